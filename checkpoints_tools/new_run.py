"""What the checkpoint of step 0 of a new run says, whatever its weights come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmscale.checkpoint.integrity import CheckpointManifest
from mmscale.checkpoint.shape import shape_of
from mmscale.config import Config
from mmscale.config.load import digest
from mmscale.runtime.environment import code_version


class NewRun:
    """A run that has not begun: the part of a `TensorSource` that does not depend on its tensors.

    Args:
        path: where the weights come from, for messages.
        config: of the new run.
        tokenizers: fingerprints of the tokenizers that the weights belong to; empty if they are unknown.
    """

    step = 0

    def __init__(self, path: Path, config: Config, tokenizers: dict[str, str]) -> None:
        self.path = path
        self._config, self._tokenizers = config, tokenizers

    def info(self) -> dict[str, Any]:
        """The content of mmscale.json."""
        return {
            "shape": shape_of(self._config),
            "config": self._config.model_dump(mode="json"),
            "config_digest": digest(self._config),
            "attempt": 1,
            **({"tokenizers": self._tokenizers} if self._tokenizers else {}),
        }

    def manifest(self) -> CheckpointManifest:
        """No files are hashed; an origin is added when it is written."""
        return CheckpointManifest(
            step=0, attempt=1, config_digest=digest(self._config), code_version=code_version(), topology={}, files={}
        )

    def common(self) -> dict[str, Any]:
        """Counters of a run that has not begun."""
        return {"progress": {"step": 0, "sequences": 0, "tokens": 0, "modality_tokens": {}}}
