"""Which changes at a resume make a run's losses incomparable with those before. No torch.

The trainer restarts its statistics of held-out values at such a change, and the report breaks its curves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Break:
    """What is not comparable with the steps before.

    Attributes:
        what: for people; empty: everything is comparable.
        training: losses of training batches.
        held_out: losses of held-out data, and accuracies.
        tasks: accuracies.
        rate: the learning rate, which begins another schedule; losses are comparable.
    """

    what: tuple[str, ...] = ()
    training: bool = False
    held_out: bool = False
    tasks: bool = False
    rate: bool = False


# Beginnings of the lines that describe changes (mmscale.train.saves.resume); the first match applies.
_RULES = (
    ("learning rate: ", Break(rate=True)),
    # The selection of held-out documents does not depend on it.
    ("data: share of", Break(("share of data",), training=True)),
    ("data: another order", Break()),
    ("data: neighbours of", Break(("neighbours",), training=True)),
    ("data: ", Break(("data",), training=True, held_out=True)),
    ("data.path", Break(("data",), training=True, held_out=True)),  # in runs of versions that did not compare content
    ("data.blend", Break(("data",), training=True, held_out=True)),
    ("data.validation", Break(("validation set",), held_out=True)),
    ("data.document_multiple", Break(("padding of documents",), training=True, held_out=True)),
    ("data.retrieval.loss", Break(("loss on neighbours",), training=True)),
    ("data.retrieval.evaluation", Break(("neighbours of held-out documents",), held_out=True)),
    ("task ", Break(("questions",), tasks=True)),
    ("train.global_batch_size", Break(("batch",), training=True, held_out=True)),
    ("train.micro_batch_size", Break(("batch",), training=True, held_out=True)),
    ("train.eval_batches", Break(("held-out batches",), held_out=True)),
    ("model.seq_length", Break(("sequence length",), training=True, held_out=True)),
)
_SAME = "the same documents"  # end of the line for a data set that was moved


def break_of(lines: Iterable[str]) -> Break:
    """Which values are not comparable after some changes.

    Args:
        lines: one for each change, as printed at a resume.
    """
    found = [
        next((one for prefix, one in _RULES if line.startswith(prefix)), Break())
        for line in lines
        if not line.endswith(_SAME)
    ]
    return Break(
        tuple(dict.fromkeys(what for one in found for what in one.what)),
        any(one.training for one in found),
        any(one.held_out for one in found),
        any(one.tasks for one in found),
        any(one.rate for one in found),
    )
