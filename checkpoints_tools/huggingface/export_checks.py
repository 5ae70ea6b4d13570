"""Checks of an export that need only settings and files, made before torch is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from checkpoints_tools.huggingface.export_settings import CONFIG, REPORT, config_of_export, read_config
from mmscale.checkpoint import publish
from mmscale.checkpoint.layout import Store
from mmscale.checkpoint.settings import config_of
from mmscale.config import Config, ModelConfig
from mmscale.data.prepared.manifest import (
    Manifest,
    check_vocabulary,
    common_tokenizers,
    most_complete,
    named_sources,
    read_manifest,
)
from mmscale.data.vocab import IMAGE, Vocabulary
from mmscale.errors import CheckpointError, DataError, UsageError, shell_command
from mmscale.inference.supported_routing import LACKING, saved_model
from mmscale.tables.routings import Needs


class NoRoutersError(CheckpointError):
    """A model has routing, but no routers or thresholds for causal routing."""


def check(run: Path, step: int | None, out: Path, *, data: Path | None, routing: str) -> None:
    """Refuse an export that cannot work.

    Args:
        run: the run's folder.
        step: the checkpoint; None: the newest.
        out: the export; an earlier export is compared with the checkpoint later.
        data: the prepared data set with the tokenizers; None: the run's.
        routing: mode by which experts are assigned to tokens: causal, top1 or threshold.

    Raises:
        CheckpointError: the checkpoint is missing or cannot route causally; `out` is something else than an export.
        DataError: the data set is missing or has another vocabulary.
    """
    if not (out / REPORT).is_file():
        publish.refuse_existing(out)
    check_routers(run, step, routing=routing)
    store = Store.of_run(run)
    chosen = store.choose(step)
    tokenizer_set(config_of(store.info(chosen), where=store.path(chosen), run=run), store.path(chosen), data)


def check_routers(run: Path, step: int | None, *, routing: str) -> None:
    """Refuse a run's checkpoint without routers or thresholds for causal routing.

    Args:
        run: the run's folder.
        step: the checkpoint; None: the newest.
        routing: causal, top1 or threshold.

    Raises:
        NoRoutersError: it has none.
        CheckpointError: there is no such checkpoint.
    """
    chosen, model = saved_model(run, step)
    refuse_without_routers(
        model,
        run,
        Store.of_run(run).path(chosen),
        auxiliary=model.auxiliary_width is not None,
        thresholds=model.keeps_thresholds,
        routing=routing,
    )


def refuse_without_routers(
    model: ModelConfig, run: Path, where: Path, *, auxiliary: bool, thresholds: bool, routing: str
) -> None:
    """Refuse a model that routes, and has no routers or thresholds for causal routing.

    Args:
        model: of the checkpoint.
        run: its run.
        where: its folder, for the message.
        auxiliary: whether there are auxiliary routers.
        thresholds: whether averaged cut-offs are kept.
        routing: causal, top1 or threshold.

    Raises:
        NoRoutersError: it has none.
    """
    if not model.routes or (thresholds if routing == "threshold" else auxiliary):
        return
    if routing == "threshold":
        what, remedy = "averaged cut-offs", LACKING[Needs.THRESHOLDS][1]
    else:
        what = "auxiliary routers"
        remedy = f"train them: {shell_command('train', run / 'config.yaml', '--stage', 'auxiliary')}"
        remedy += ", or export with --routing threshold" if thresholds else ""
    raise NoRoutersError(
        f"{where} has no {what}: its experts choose among all tokens of a sequence, later ones too, so that "
        "it cannot generate",
        remedy=remedy,
    )


def check_asked(folder: Path, step: int | None, *, chat: bool, modalities: Iterable[str]) -> None:
    """Refuse what a model cannot be asked for by its vocabulary.

    Args:
        folder: of a run or an export.
        step: the run's checkpoint; None: the newest.
        chat: whether prompts are messages.
        modalities: of files of the prompts and of items to begin.

    Raises:
        UsageError: the vocabulary has no such modality, or no tokens for messages.
        CheckpointError: the checkpoint or the export is damaged.
    """
    if (folder / CONFIG).is_file():
        config = config_of_export(folder, read_config(folder))
    else:
        store = Store.of_run(folder)
        chosen = store.choose(step)
        config = config_of(store.info(chosen), where=store.path(chosen), run=folder)
    for name in modalities:
        if name not in config.vocab.names:
            raise no_modality(name)
    if chat and not config.vocab.reserved:
        raise no_messages()


def no_modality(name: str) -> UsageError:
    """The error for items of a modality that a model was not trained with."""
    options = "--image and --draw" if name == IMAGE else "its files and --begin"
    return UsageError(
        f"this model was trained without {'images' if name == IMAGE else name}", remedy=f"leave {options} away"
    )


def no_messages() -> UsageError:
    """The error for messages to a model whose vocabulary has no tokens for them."""
    return UsageError(
        "--chat: the vocabulary of this model has no tokens for messages",
        remedy="train with vocab.reserved=true, and on conversations: `mmscale train CONFIG --stage sft`",
    )


def tokenizer_set(config: Config, where: Path, data: Path | None) -> tuple[Path, Manifest]:
    """The prepared data set whose tokenizers an export holds.

    Of a blend it is the first data set with the most modalities, because the first one may be text only.

    Args:
        config: of the checkpoint.
        where: the checkpoint, for the message.
        data: the data set; None: the run's.

    Raises:
        DataError: there is no such data set, it has another vocabulary, or a blend's tokenizers are not the same.
    """
    if data is None and not config.data.sources:  # a run made by `convert from-hf`
        raise DataError(
            f"the run of {where} has no data set, and with it no tokenizers",
            remedy="name one: `mmscale convert to-hf RUN OUT --data DIR`, or data.path in the run's config.yaml",
        )
    folders = [data] if data is not None else [Path(source.path) for source in named_sources(config)]
    blend = {folder: read_manifest(folder) for folder in folders}
    common_tokenizers({folder: manifest.tokenizers for folder, manifest in blend.items()})
    folder = most_complete(blend)
    assert folder is not None
    check_vocabulary(folder, blend[folder], Vocabulary.from_config(config.vocab))
    return folder, blend[folder]
