"""Checks the options of `mmscale sample` that belong together. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmscale.cli.named_files import existing
from mmscale.errors import UsageError, shell_command

UNCONDITIONAL = {"none": "nothing", "mask": "the hole <mask:0>, for models trained with objective.cm3_rate"}
CD_ALPHA = 0.1  # as in contrastive decoding, arXiv 2210.15097


def guidance_of(given: str) -> float | None:
    """A non-negative number; None: auto."""
    if given == "auto":
        return None
    try:
        value = float(given)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UsageError(f"--guidance {given!r} is no number from 0 on, nor auto", remedy="for example: --guidance 2")
    return value


def texts_of(prompt: list[str] | None, infill: list[str] | None) -> list[str]:
    """The prompts, or the documents with holes."""
    if bool(prompt) == bool(infill):
        given = "both given" if prompt else "neither given"
        raise UsageError(f"--prompt and --infill are {given}", remedy="give one of them; both may be repeated")
    return [*(prompt or ()), *(infill or ())]


@dataclass(frozen=True)
class HoleOptions:
    """Holes are filled; `mask` is one in the picture of each document: x, y, width and height in tokens."""

    mask: tuple[int, int, int, int] | None


def holes_of(
    infill: list[str] | None, mask: str | None, *, pictures: int, others: dict[str, Any]
) -> HoleOptions | None:
    """None: prompts are continued. `others`: options that cannot be combined with holes, and their values."""
    if not infill:
        if mask is not None:
            raise UsageError("--mask is given without --infill", remedy='for example: --infill "a cat" --mask 2,2,4,4')
        return None
    given = [name for name, value in others.items() if value]
    if given:
        raise UsageError(f"{', '.join(given)}: not with --infill", remedy="leave it away")
    if mask is None:
        return HoleOptions(None)
    if pictures != 1:
        raise UsageError(f"--mask is given with {pictures} pictures", remedy="give one: --image FILE")
    parts = mask.split(",")
    if len(parts) != 4 or not all(part.strip().isdecimal() for part in parts):
        raise UsageError(f"--mask {mask!r} is not X,Y,WIDTH,HEIGHT", remedy="for example: --mask 2,2,4,4")
    x, y, width, height = map(int, parts)
    return HoleOptions((x, y, width, height))


def refuse_with_batch_routing(path: Path, options: dict[str, Any]) -> None:
    """Refuse options that need a next token: names and values.

    Raises:
        UsageError: one is given.
    """
    given = [name for name, value in options.items() if value]
    if given:
        raise UsageError(
            f"{', '.join(given)}: not with batch routing, which draws items for texts only",
            remedy="train auxiliary routers: "
            f"{shell_command('train', path / 'config.yaml', '--stage', 'auxiliary')}, and use --routing causal",
        )


def item_of(given: str) -> tuple[str, Path]:
    """Name of a modality and file of MODALITY=FILE."""
    name, equals, file = given.partition("=")
    if not name or not equals or not file:
        raise UsageError(f"--item {given!r} is not MODALITY=FILE", remedy="for example: --item audio=seven.wav")
    return name, existing(Path(file))


@dataclass(frozen=True)
class PromptOptions:
    """What strengthens the effect of the prompt.

    Attributes:
        guidance: None: auto.
        cd_k, cd_alpha: contrastive decoding; k 0: none.
        unconditional: what stands for the prompt in the branch without it.
    """

    guidance: float | None
    cd_k: int
    cd_alpha: float
    unconditional: str


def prompt_options(guidance: str, cd_k: int | None, cd_alpha: float | None, unconditional: str) -> PromptOptions:
    """The options, checked against each other.

    Raises:
        UsageError: one is out of range, or two contradict each other.
    """
    scale = guidance_of(guidance)
    if unconditional not in UNCONDITIONAL:
        raise UsageError(
            f"--unconditional {unconditional!r} is unknown", remedy=f"choose one of {', '.join(UNCONDITIONAL)}"
        )
    if cd_k is None and cd_alpha is not None:
        raise UsageError("--cd-alpha is given without --cd-k", remedy="for example: --cd-k 1 --cd-alpha 0.1")
    if cd_k is not None and cd_k < 1:
        raise UsageError(f"--cd-k {cd_k} is not at least 1", remedy="for example: --cd-k 1")
    if cd_alpha is not None and not 0.0 < cd_alpha <= 1.0:
        raise UsageError(f"--cd-alpha {cd_alpha:g} is not above 0 and at most 1", remedy="for example: --cd-alpha 0.1")
    if cd_k is not None and scale != 1.0:
        raise UsageError("--guidance and --cd-k are both given", remedy="give one of them")
    if unconditional != "none" and cd_k is None and scale == 1.0:
        raise UsageError(
            "--unconditional is given without --guidance or --cd-k",
            remedy="for example: --guidance 2 --unconditional mask",
        )
    return PromptOptions(scale, cd_k or 0, CD_ALPHA if cd_alpha is None else cd_alpha, unconditional)


def best_of_options(best_of: int, captions: list[str] | None, *, temperature: float) -> tuple[str, ...]:
    """The captions by which samples are ranked; none: the prompts.

    Raises:
        UsageError: the number is below 1, samples would be equal, or captions are given without it.
    """
    if best_of < 1:
        raise UsageError(f"--best-of {best_of} is not at least 1", remedy="for example: --best-of 4; 1: no ranking")
    if best_of > 1 and temperature == 0.0:
        raise UsageError("--best-of: all samples are equal with --temperature 0", remedy="leave one of them away")
    if captions and best_of == 1:
        raise UsageError("--caption is given, and --best-of is not", remedy="for example: --best-of 4")
    if any(not caption.strip() for caption in captions or ()):
        raise UsageError("--caption is empty", remedy='for example: --caption "this is a seven"')
    return tuple(captions or ())
