"""What commands on checkpoints refuse by their arguments, manifests and metadata, before torch is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from checkpoints_tools.alike import check_models
from checkpoints_tools.fused_settings import ONE_CONFIGURATION, check_dense, fused_settings, fused_tokenizers
from checkpoints_tools.upcycled_settings import upcycled_settings
from mmscale.checkpoint import publish, run_folder
from mmscale.checkpoint.layout import is_archive
from mmscale.checkpoint.named import find, find_archive
from mmscale.checkpoint.settings import config_of
from mmscale.config import Config
from mmscale.errors import CheckpointError, UsageError

ONE_MODEL = "average checkpoints of one model and one vocabulary"
HF_CONFIG = "config.json"
Named = tuple[Path, int | None]  # a run's folder (or an archive, or an export) and a step


def check_average(checkpoints: Sequence[Named], out: Path, *, ema: float | None) -> list[float]:
    """Refuse a mean that cannot be computed.

    Args:
        checkpoints: run folders (or archives) and steps.
        out: the folder of the new run.
        ema: decay of an exponential moving average; None: all have the same weight.

    Returns:
        The weight of each checkpoint.

    Raises:
        UsageError: fewer than two checkpoints, or a decay outside of 0..1.
        CheckpointError: one is missing or damaged, they are of different models, or `out` has checkpoints.
    """
    if len(checkpoints) < 2:
        raise UsageError("a mean needs two checkpoints or more", remedy="name them: RUN@100 RUN@200 ... OUT")
    run_folder.refuse_checkpoints(out)
    counts = coefficients(len(checkpoints), ema=ema)
    first, *others = [find(path, step) for path, step in checkpoints]
    for other in others:
        check_models(first, other, remedy=ONE_MODEL)
    return counts


def coefficients(number: int, *, ema: float | None = None) -> list[float]:
    """What each of `number` checkpoints counts; their sum is 1.

    Raises:
        UsageError: the decay is outside of 0..1.
    """
    if ema is None:
        return [1.0 / number] * number
    if not 0.0 < ema < 1.0:
        raise UsageError(f"--ema {ema:g} is no decay", remedy="use a number between 0 and 1, e.g. 0.9")
    return [ema ** (number - 1), *((1.0 - ema) * ema ** (number - 1 - index) for index in range(1, number))]


def check_fuse(text: Named, image: Named, out: Path, *, average: bool, steps: int | None) -> None:
    """Refuse two models that cannot be fused. Of exports only the folders are checked.

    Args:
        text: the model of the first modality: a run and step, an archive, or a Hugging Face folder (step None).
        image: the model of all other modalities.
        out: the folder of the new run.
        average: the mean of all weights instead of a Mixture-of-Transformers.
        steps: `train.steps` of the new run; None: the text model's.

    Raises:
        UsageError: both names are the same.
        CheckpointError: one is missing or damaged, or not of a dense model without Mixture-of-Depths; shapes,
            vocabularies or tokenizers differ; `out` has checkpoints.
        ConfigError: the new model breaks a rule between settings.
    """
    run_folder.refuse_checkpoints(out)
    if text == image:
        raise UsageError(f"both models are {text[0]}", remedy="name a text model and an image model")
    found = [find(*named) for named in (text, image) if not (named[0] / HF_CONFIG).is_file()]
    if len(found) < 2:
        return
    one, other = found
    check_models(one, other, remedy=ONE_CONFIGURATION)
    fused_tokenizers(one, other)
    old = config_of(one.info(), where=one.path)
    check_dense(old, one)
    fused_settings(old, config_of(other.info(), where=other.path), untie=not average, steps=steps)


def check_upcycle(
    run: Path,
    step: int | None,
    out: Path,
    *,
    experts: Mapping[str, int],
    untie: Sequence[str] = (),
    top_k: int | None = None,
    ungated: Sequence[str] = (),
    split: int | None = None,
    steps: int | None = None,
) -> Config:
    """Refuse to upcycle what cannot become such a model.

    Args:
        run: the run's folder, or an archive.
        step: the checkpoint; None: the newest.
        out: the folder of the new run.
        experts: as in `upcycle.upcycle`.
        untie: likewise.
        top_k: likewise.
        ungated: likewise.
        split: likewise.
        steps: likewise.

    Returns:
        The configuration of the new run.

    Raises:
        UsageError: the groups are not those of the model's modalities.
        CheckpointError: the source is missing, damaged, or has several experts already; `out` has checkpoints.
        ConfigError: the new model breaks a rule between settings.
    """
    run_folder.refuse_checkpoints(out)
    source = find(run, step)
    old = config_of(source.info(), where=source.path)
    if split is not None and not experts:
        experts = dict.fromkeys(old.vocab.names, split)
    return upcycled_settings(
        old, experts, untie, done=source.step, steps=steps, top_k=top_k, ungated=ungated, split=split
    )


def check_copy(run: Path, step: int | None, out: Path) -> None:
    """Refuse to copy a checkpoint that is missing, or into a run that has some.

    Args:
        run: the run's folder, or an archive.
        step: the checkpoint; None: the newest.
        out: the folder of the new run.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or `out` has checkpoints.
    """
    run_folder.refuse_checkpoints(out)
    find(run, step)


def check_archive(run: Path, step: int | None, out: Path) -> None:
    """Refuse to archive a checkpoint that is missing, or where something exists.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or `out` exists.
    """
    publish.refuse_existing(out)
    find(run, step)


def check_restore(path: Path, run: Path) -> None:
    """Refuse to restore what is no archive, or into a run that has checkpoints.

    Raises:
        CheckpointError: the archive is missing or damaged, or the run has checkpoints.
    """
    run_folder.refuse_checkpoints(run)
    if not is_archive(path):
        what = "is no archive" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {what}", remedy="`mmscale ckpt archive RUN[@STEP] OUT` makes one")
    find_archive(path)
