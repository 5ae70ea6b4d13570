"""Stores the run's settings in an export's config.json, which `save_pretrained` and transformers' trainers preserve.

So `convert from-hf`, `eval` and `sample` also work with a fine-tuned export. Exports of older versions have a separate
mmscale.json, which is read too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checkpoints_tools.huggingface.shipped.versions_moma import NEWEST, OLDEST
from checkpoints_tools.huggingface.training_history import TrainingHistory
from mmscale import bounded
from mmscale.config import Config
from mmscale.config.model.schema import MOST_LAYERS
from mmscale.data.prepared.manifest import by_modality
from mmscale.errors import CheckpointError

CONFIG = "config.json"
REPORT = "conversion_report.json"
KEY = "mmscale"
_BEFORE = "mmscale.json"
_SUFFIX = "_tokenizer"


def settings(config: Config, tokenizers: dict[str, Any], history: TrainingHistory | None = None) -> dict[str, Any]:
    """The content of config.json under `mmscale`.

    Args:
        config: the run's configuration.
        tokenizers: fingerprints of the data set's tokenizers, `text_tokenizer` and so on; other entries are ignored.
        history: what the model was trained with; None: its configuration says it.
    """
    found = {name: str(value) for name, value in tokenizers.items() if name.endswith(_SUFFIX)}
    tested = {"oldest": OLDEST, "newest": NEWEST}
    held = {"format": 1, "config": config.model_dump(mode="json"), "tokenizers": found, "tested_transformers": tested}
    return {KEY: held | ({} if history is None else history.as_fields())}


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a folder's config.json.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        content = bounded.read_object(folder / CONFIG)
        _check_layers(content)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} is damaged: {CONFIG} cannot be read: {error}",
            remedy="copy the folder again, or export it again: `mmscale convert to-hf`",
        ) from None
    return content


def _check_layers(content: dict[str, Any]) -> None:
    """Refuse an impossible number of layers: transformers creates lists of that length before it reads weights.

    Raises:
        ValueError: it is not an integer, or larger than `model.num_layers` may be.
    """
    layers = content.get("num_hidden_layers", 1)
    if type(layers) is not int or not 0 < layers <= MOST_LAYERS:
        raise ValueError(f"num_hidden_layers is {str(layers)[:60]}, not a whole number from 1 to {MOST_LAYERS}")


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
    """Whether a folder with this config.json came from `mmscale convert to-hf`, possibly fine-tuned since."""
    return KEY in content or (folder / _BEFORE).is_file()


def config_of_export(folder: Path, content: dict[str, Any]) -> Config:
    """The configuration of the run that was exported.

    Args:
        folder: the export.
        content: of its config.json.

    Raises:
        CheckpointError: it is not ours, of another version, or damaged.
    """
    if not is_ours(folder, content):
        raise CheckpointError(
            f"{folder} was not exported by mmscale (no {KEY} in its {CONFIG})",
            remedy="name a run, or a folder that `mmscale convert to-hf` made",
        )
    return _held(folder, content)[0]


def history_of_export(folder: Path, content: dict[str, Any]) -> TrainingHistory:
    """What the model was trained with. Arguments and errors as for `config_of_export`."""
    return _held(folder, content)[1]


def _held(folder: Path, content: dict[str, Any]) -> tuple[Config, TrainingHistory]:
    where = folder / (CONFIG if KEY in content else _BEFORE)
    try:
        held = content[KEY] if KEY in content else bounded.read_json(where)
        config = Config.model_validate(held["config"])
        return config, TrainingHistory.of_export(held, config)
    except (OSError, *bounded.BAD_CONTENT) as error:  # ValidationError is a ValueError
        raise CheckpointError(
            f"{where} holds no configuration of this version: {str(error).splitlines()[0]}",
            remedy="use the version of mmscale that wrote it",
        ) from None


def tokenizers_of_export(folder: Path, content: dict[str, Any]) -> dict[str, str]:
    """Fingerprints of the tokenizers that the model was trained with; empty if they are unknown."""
    try:
        held = content[KEY]["tokenizers"] if KEY in content else bounded.read_json(folder / REPORT)["data"]
        return by_modality({name: str(value) for name, value in held.items() if name.endswith(_SUFFIX)})
    except (OSError, *bounded.BAD_CONTENT):
        return {}
