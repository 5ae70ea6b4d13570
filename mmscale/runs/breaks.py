"""Which changes at a resume make a run's losses incomparable with those before. No torch.

The trainer restarts its statistics of held-out values at such a change, and the report breaks its curves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from mmscale.config.derived import SOURCE
from mmscale.runs.held_out import ACCURACY, HeldOut

LEARNING_RATE = "lr"  # column of the metrics
_ANY = "*"  # all sets of `data.validation`


@dataclass(frozen=True)
class Break:
    """What is not comparable with the steps before.

    Attributes:
        what: for people; empty: everything is comparable.
        training: losses of training batches.
        held_out: losses of all held-out data, and accuracies.
        own: of these only those of held-out documents of the data that is trained on.
        sets: of these only those of sets of `data.validation`, by name; "*": of all of them.
        tasks: accuracies.
        rate: the learning rate, which begins another schedule; losses are comparable.
    """

    what: tuple[str, ...] = ()
    training: bool = False
    held_out: bool = False
    own: bool = False
    sets: tuple[str, ...] = ()
    tasks: bool = False
    rate: bool = False

    def __or__(self, other: Break) -> Break:
        """Both."""
        return Break(
            tuple(dict.fromkeys((*self.what, *other.what))),
            self.training or other.training,
            self.held_out or other.held_out,
            self.own or other.own,
            tuple(dict.fromkeys((*self.sets, *other.sets))),
            self.tasks or other.tasks,
            self.rate or other.rate,
        )

    def breaks(self, key: str) -> bool:
        """Whether values of a key of metrics.jsonl are not comparable with those before."""
        if key == LEARNING_RATE:
            return self.rate
        measured = HeldOut.of(key)
        if measured is None:
            return self.training
        if self.held_out or (self.tasks and measured.figure.startswith(ACCURACY)):
            return True
        if not measured.name or measured.name.startswith(SOURCE):
            return self.own
        return measured.name in self.sets or _ANY in self.sets


# Beginnings of the lines that describe changes (mmscale.train.saves.resume); the first match applies.
_RULES = (
    ("learning rate: ", Break(rate=True)),
    # The selection of held-out documents does not depend on it.
    ("data: share of", Break(("share of data",), training=True)),
    ("data: another order", Break()),
    ("data: neighbours of", Break(("neighbours",), training=True)),
    ("data: ", Break(("data",), training=True, own=True)),
    ("data.path", Break(("data",), training=True, own=True)),  # in runs of versions that did not compare content
    ("data.blend", Break(("data",), training=True, own=True)),
    ("data.validation", Break(("validation set",), sets=(_ANY,))),
    ("data.document_multiple", Break(("padding of documents",), training=True, held_out=True)),
    ("data.retrieval.loss", Break(("loss on neighbours",), training=True)),
    ("data.retrieval.evaluation", Break(("neighbours of held-out documents",), held_out=True)),
    # Held-out documents are read as they are.
    ("objective.", Break(("objective",), training=True)),
    # Logged losses are unweighted, but gradient norms are not, and another objective is minimized.
    ("train.loss", Break(("objective",), training=True)),
    ("train.modality_weights", Break(("objective",), training=True)),
    ("train.z_loss", Break(("objective",), training=True)),
    ("task ", Break(("questions",), tasks=True)),
    ("train.global_batch_size", Break(("batch",), training=True, held_out=True)),
    ("train.micro_batch_size", Break(("batch",), training=True, held_out=True)),
    ("train.eval_batches", Break(("held-out batches",), held_out=True)),
    ("model.seq_length", Break(("sequence length",), training=True, held_out=True)),
)
_SET = re.compile(r"data\.validation\.([^\s:]+)")
_SAME = "the same documents"  # end of the line for a data set that was moved


def break_of(lines: Iterable[str]) -> Break:
    """Which values are not comparable after some changes.

    Args:
        lines: one for each change, as printed at a resume.
    """
    found = Break()
    for line in lines:
        if not line.endswith(_SAME):
            found |= next((_named(one, line) for prefix, one in _RULES if line.startswith(prefix)), Break())
    return found


def _named(one: Break, line: str) -> Break:
    """With the name of the validation set that a line is about."""
    named = _SET.match(line)
    return one if named is None else replace(one, sets=(named[1],))
