"""Names of mirrored checkpoints, their order, and which of them are kept. Does no I/O."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from mmscale.checkpoint import integrity
from mmscale.checkpoint.integrity import CheckpointManifest
from mmscale.checkpoint.save_settings import Retention

_NAME = re.compile(r"^step_(\d{8,})-attempt_(\d+)-([0-9a-f]{16})$")


@dataclass(frozen=True, order=True)
class MirroredStep:
    """One checkpoint in a mirror. The order is by age: first by attempt, then by step.

    The name contains a digest of the content, so a checkpoint that is written again gets another folder, and no file in
    a mirror is ever overwritten with other bytes.

    Attributes:
        attempt: of the run that wrote it.
        step: optimizer steps done.
        digest: the first 16 digits of the digest of its manifest.
    """

    attempt: int
    step: int
    digest: str

    @classmethod
    def of(cls, manifest: CheckpointManifest) -> MirroredStep:
        """The generation of a checkpoint."""
        return cls(manifest.attempt, manifest.step, integrity.text_digest(manifest.text())[:16])

    @classmethod
    def parse(cls, name: str) -> MirroredStep | None:
        """The generation of a folder, from its name; None: it is another kind of folder."""
        found = _NAME.match(name)
        return cls(int(found[2]), int(found[1]), found[3]) if found else None

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"step_{self.step:08d}-attempt_{self.attempt}-{self.digest}"


def outdated(
    complete: Iterable[MirroredStep], *, local: Iterable[MirroredStep], retention: Retention, best: int | None
) -> list[MirroredStep]:
    """Complete generations that a mirror need not keep any more.

    Args:
        complete: those in the mirror.
        local: checkpoints of the run.
        retention: number of newest ones to keep, and those that are kept permanently.
        best: step of the best checkpoint of the run, which is kept; None: unknown.
    """
    there = sorted(complete)
    here = set(local)
    again = {(one.attempt, one.step) for one in here if one in there}
    # After a roll-back the same attempt writes a step again; its earlier content does not belong to the run any more.
    replaced = [one for one in there if one not in here and (one.attempt, one.step) in again]
    valid = [one for one in there if one not in replaced]
    newest = valid[-retention.keep :]
    last = {one.step: one for one in valid}  # the latest attempt's checkpoint of each step
    permanent = {one for step, one in last.items() if retention.keeps(step) or step == best}
    kept = permanent.union(newest)
    return [one for one in there if one not in kept]
