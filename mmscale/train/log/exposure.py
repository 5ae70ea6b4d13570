"""How much data a run sees: passes over each source, tokens, tokens per parameter. One line, before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmscale.config import Config
from mmscale.data.prepared.content_facts import kept_facts
from mmscale.data.prepared.manifest import TRAIN, read_manifest
from mmscale.data.prepared.selection import read_selection
from mmscale.data.stream.mixture import Mixture
from mmscale.data.stream.source import Source
from mmscale.train.log.progress_lines import count
from mmscale.wording import numbered

_PARTS = 16  # of the steps of an attempt, between which passes are read off a straight line


def exposure(
    config: Config, data: Mixture, *, sequences: int, parameters: Mapping[str, Any], begins_at: int = 0
) -> str:
    """`600 steps = 5.4 passes over data/icons; 2.1M tokens, 12 per parameter (31 per active one)`.

    Tokens that are read in addition to those of the data sets, neighbours and holes, are named and not counted.

    Args:
        config: of the stage.
        data: its stream from its position on, so that steps before a change of the data count as they were.
        sequences: that will have been consumed after its last step.
        parameters: `total` and `active`, as in `mmscale.plan.plan`.
        begins_at: sequences that were consumed before its first step.
    """
    steps = config.train.steps
    done = _passes(data, sequences)
    # Of a later stage whose own data have changed only what follows the change is known.
    before = _passes(data, max(begins_at, data.start)) if begins_at else [0.0] * len(done)
    read = [
        (source.folder, after - already, _tokens(source))
        for source, after, already in zip(data.sources, done, before, strict=True)
        if after > already
    ]
    shown = ", ".join(f"{_rounded(passes)} passes over {folder}" for folder, passes, _ in read)
    tokens = sum(passes * size for _, passes, size in read)
    total, active = (float(parameters.get(name, 0)) for name in ("total", "active"))
    ratio = f", {_rounded(tokens / total)} per parameter" if total else ""
    if active and active != total:
        ratio += f" ({_rounded(tokens / active)} per active one)"
    added = {"neighbours": config.data.retrieval.neighbours, "holes": config.objective.cm3_rate}
    without = " and ".join(name for name, given in added.items() if given)
    counted = f"{count(tokens)} tokens{f' without {without}' if without else ''}"
    return f"{numbered(steps, 'step')} = {shown}; {counted}{ratio}"


def planned_sources(config: Config, data: Mixture, *, step: int, sequences: int) -> list[dict[str, Any]]:
    """The sources of an attempt, and how often each of them will have been read at some steps.

    Args:
        config: of the stage.
        data: its stream from its position on.
        step: of the attempt's beginning.
        sequences: that were consumed before it.

    Returns:
        Of each source `path`, `tokens` of a pass by modality, `max_epochs`, `repeated` (the share of training documents
        that equal an earlier one; None: unknown), and `passes`: pairs of a step and the
        passes over the source from the beginning of the run up to it, the last one for `train.steps`.
    """
    last = max(step, config.train.steps)
    steps = sorted({step + round((last - step) * part / _PARTS) for part in range(_PARTS + 1)})
    passes = [_passes(data, sequences + (one - step) * config.train.global_batch_size) for one in steps]
    return [
        {
            "path": str(source.folder),
            "tokens": _tokens_by_modality(source),
            "max_epochs": data.max_epochs[number],
            "repeated": _repeated(source),
            "passes": [[one, round(found[number], 6)] for one, found in zip(steps, passes, strict=True)],
        }
        for number, source in enumerate(data.sources)
    ]


def _passes(data: Mixture, sequences: int) -> list[float]:
    """Passes over each source in the first sequences of a run, those before a change of settings included."""
    since = data.passes(max(0, sequences - data.start))
    return [
        begin.epoch - begin.unread / len(source) + passes
        for source, begin, passes in zip(data.sources, data.begins, since, strict=True)
    ]


def _tokens_by_modality(source: Source) -> dict[str, int]:
    chosen = read_selection(source.folder) if source.selection else None
    if chosen is not None:
        return {name: round(count) for name, count in chosen.tokens.items()}
    manifest = read_manifest(source.folder)
    return {name: manifest.splits[TRAIN].tokens(name) for name in manifest.modalities}


def _repeated(source: Source) -> float | None:
    """Share of the training documents that equal an earlier one; None: not compared, or documents are weighted."""
    if source.selection:
        return None
    facts = kept_facts(source.folder, read_manifest(source.folder))
    if facts is None or not facts.repeated.documents[1]:
        return None
    return round(facts.repeated.documents[0] / facts.repeated.documents[1], 4)


def _tokens(source: Source) -> float:
    """Tokens of one pass. Document weights omit some documents and repeat others."""
    chosen = read_selection(source.folder) if source.selection else None
    return float(source.tokens) if chosen is None else sum(chosen.tokens.values())


def _rounded(number: float) -> str:
    """A number with two digits if it is small, otherwise a whole number."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"
