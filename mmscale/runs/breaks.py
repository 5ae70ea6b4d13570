"""Which changes at a resume make a run's losses incomparable with those before. No torch.

The trainer restarts its statistics of held-out values at such a change, and the report breaks its curves.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from mmscale.config.changes import WITHOUT_MASKING
from mmscale.config.derived import SOURCE
from mmscale.runs.held_out import ACCURACY, HeldOut

LEARNING_RATE = "lr"  # column of the metrics
_ANY = "*"  # all sets


@dataclass(frozen=True)
class Break:
    """What is not comparable with the steps before.

    Attributes:
        what: for people; empty: everything is comparable.
        training: losses of training batches.
        held_out: losses of all held-out data, and accuracies.
        own: of these only those of held-out documents of the data that is trained on.
        sets: of these only those of sets of `data.validation`, by name; "*": of all of them.
        parts: of these only those of sets of which other batches are read, by name; "*": of all. Not accuracies,
            for which all questions are asked.
        tasks: accuracies.
        rate: the learning rate, which begins another schedule; losses are comparable.
    """

    what: tuple[str, ...] = ()
    training: bool = False
    held_out: bool = False
    own: bool = False
    sets: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
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
            tuple(dict.fromkeys((*self.parts, *other.parts))),
            self.tasks or other.tasks,
            self.rate or other.rate,
        )

    @property
    def of_training(self) -> Break:
        """What of it is not about held-out data; empty if there is nothing."""
        one = replace(self, held_out=False, own=False, sets=(), parts=(), tasks=False)
        return one if one.training or one.rate else Break()

    @property
    def of_held_out(self) -> Break:
        """What of it is about held-out data; empty if there is nothing."""
        one = replace(self, training=False, rate=False)
        return one if one.held_out or one.own or one.sets or one.parts or one.tasks else Break()

    def breaks(self, key: str) -> bool:
        """Whether values of a key of metrics.jsonl are not comparable with those before."""
        if key == LEARNING_RATE:
            return self.rate
        measured = HeldOut.of(key)
        if measured is None:
            return self.training
        accuracy = measured.figure.startswith(ACCURACY)
        if self.held_out or (self.tasks and accuracy):
            return True
        if not accuracy and (measured.name in self.parts or _ANY in self.parts):
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
    ("train.eval_batches", Break(("held-out batches",), parts=(_ANY,))),
    ("model.seq_length", Break(("sequence length",), training=True, held_out=True)),
)
_SET = re.compile(r"data\.validation\.([^\s:]+)")
# Ends of lines for a data set that was moved, and for a setting that has no effect.
_SAME = ("the same documents", WITHOUT_MASKING)


def break_of(lines: Iterable[str], *, parts: Collection[str] | None = None) -> Break:
    """Which values are not comparable after some changes.

    Args:
        lines: one for each change, as printed at a resume.
        parts: names of the sets of which other batches are read than before, as in `HeldOut`; None: unknown.
    """
    found = Break()
    for line in lines:
        if not line.endswith(_SAME):
            one = next((_named(one, line) for prefix, one in _RULES if line.startswith(prefix)), Break())
            if one.parts and parts is not None:
                one = replace(one, parts=tuple(parts)) if parts else Break()
            found |= one
    return found


def _named(one: Break, line: str) -> Break:
    """With the name of the validation set that a line is about."""
    named = _SET.match(line)
    return one if named is None else replace(one, sets=(named[1],))
