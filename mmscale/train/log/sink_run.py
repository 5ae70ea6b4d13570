"""The information about a run that its sinks receive: folder, name and settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmscale.config import Config
from mmscale.config.document import leaves


@dataclass(frozen=True)
class SinkRun:
    """The run whose metrics a sink receives.

    Attributes:
        folder: of the run, or of a stage of it.
        files: the same folder by a path that stays valid when the folder is renamed; only this process can use it.
        name: of the run.
        settings: the attempt's whole configuration by dotted key, without arguments of plug-ins, which may be secret.
    """

    folder: Path
    files: Path
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The same for every attempt of a run; different for runs of the same name in different folders."""
        place = hashlib.sha256(str(self.folder.resolve()).encode()).hexdigest()[:8]
        return f"{self.name}-{place}"


def shown_settings(config: Config) -> dict[str, Any]:
    """The settings that sinks show: single values by dotted key; lists as text, null left out.

    Args:
        config: of the run.
    """
    content = config.model_dump(mode="json")
    content["log"]["sinks"] = list(content["log"]["sinks"])
    content["train"]["hooks"] = list(content["train"]["hooks"])
    for section, key in (("optim", "schedule_args"), ("optim", "optimizer_args"), ("train", "loss_args")):
        content[section][key] = list(content[section][key])
    found = {}
    for key, value in leaves(content):
        if value is not None:
            found[key] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return found
