"""The run's settings inside an export's config.json, which `save_pretrained` and trainers of transformers carry along.

So a fine-tuned export still is what `convert from-hf`, `eval` and `sample` need. Exports of older versions have a
mmscale.json beside it instead, which is read too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from checkpoints_tools.hf.versions_moma import NEWEST, OLDEST
from mmscale.config import Config
from mmscale.errors import CheckpointError

CONFIG = "config.json"
REPORT = "conversion_report.json"
KEY = "mmscale"
_BEFORE = "mmscale.json"
TOKENIZERS = ("text_tokenizer", "image_tokenizer")


def settings(config: Config, tokenizers: dict[str, Any]) -> dict[str, Any]:
    """What goes into config.json under `mmscale`.

    Args:
        config: the run's configuration.
        tokenizers: fingerprints of the data set's, `text_tokenizer` and `image_tokenizer`, perhaps among other facts.
    """
    found = {name: str(tokenizers[name]) for name in TOKENIZERS}
    tested = {"oldest": OLDEST, "newest": NEWEST}
    return {
        KEY: {"format": 1, "config": config.model_dump(mode="json"), "tokenizers": found, "tested_transformers": tested}
    }


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a folder's config.json.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        content, why = None, str(error)
    else:
        why = "it holds no JSON object"
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{folder} is damaged: {CONFIG} cannot be read: {why}",
            remedy="copy the folder again, or export it again: `mmscale convert to-hf`",
        )
    return content


def refuse_quantised(folder: Path, content: dict[str, Any]) -> None:
    """Refuse a folder of quantised weights.

    Args:
        folder: for the message.
        content: of its config.json.

    Raises:
        CheckpointError: its weights are quantised.
    """
    if content.get("quantization_config"):
        raise CheckpointError(
            f"the weights of {folder} are quantised ({CONFIG} has quantization_config)",
            remedy="name the model before it was quantised",
        )


def is_ours(folder: Path, content: dict[str, Any]) -> bool:
    """Whether a folder with this config.json came from `mmscale convert to-hf`, perhaps by way of a fine-tuning."""
    return KEY in content or (folder / _BEFORE).is_file()


def config_of_export(folder: Path, content: dict[str, Any]) -> Config:
    """The configuration of the run that was exported.

    Args:
        folder: the export.
        content: of its config.json.

    Raises:
        CheckpointError: it is of another version, or damaged.
    """
    where = folder / (CONFIG if KEY in content else _BEFORE)
    try:
        held = content[KEY] if KEY in content else json.loads(where.read_text(encoding="utf-8"))
        return Config.model_validate(held["config"])
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(
            f"{where} holds no configuration of this version: {str(error).splitlines()[0]}",
            remedy="use the version of mmscale that wrote it",
        ) from None


def tokenizers_of_export(folder: Path, content: dict[str, Any]) -> dict[str, str]:
    """Fingerprints of the tokenizers that the model was trained with; empty if they are not known."""
    try:
        if KEY in content:
            held = content[KEY]["tokenizers"]
        else:
            held = json.loads((folder / REPORT).read_text(encoding="utf-8"))["data"]
        return {name: str(held[name]) for name in TOKENIZERS}
    except (OSError, ValueError, LookupError, TypeError):
        return {}
