"""Failed ranks, in the order in which srun or the agents noticed them.

Which ranks of an attempt failed, and with which exit status each, from the output of srun and of torchrun's agents.
policy.py decides what follows.

srun ends with the highest status of all ranks. After the first failure it ends the others, so that status is often that
of a rank that was ended (143, 137), and not that of the one that failed.
"""

from __future__ import annotations

import calendar
import contextlib
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_SRUN = re.compile(r"error: (\S+): tasks? ([\d,-]+): (.+)$", re.MULTILINE)
_EXIT_CODE = re.compile(r"Exited with exit code (\d+)")
# torch/distributed/elastic/multiprocessing/api.py, one line for the first failed rank of a node in every round.
_AGENT = re.compile(
    r"^E(\d{4} \d\d:\d\d:\d\d)\.(\d+) .*\] failed \(exitcode: (-?\d+)\) local_rank: (\d+) ", re.MULTILINE
)
_SIGNALS = {signal.strsignal(number): number for number in signal.valid_signals()}
# An agent may notice a rank that was killed later than another agent notices a rank that lost the connection to it.
_NOTICED_S = 3.0
_SUDDEN = tuple(128 + number for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL))
_HALF_A_YEAR_S = 182 * 86_400.0
_CLOCKS_S = 1.0  # between clocks of nodes; a restart in place takes longer


@dataclass(frozen=True)
class Failure:
    """Ranks of one node that failed in the same way.

    Attributes:
        ranks: their numbers as srun prints them, e.g. `3` or `0-1,7`.
        node: where.
        status: exit status, 128 + N for signal N; None if SLURM names neither.
        said: SLURM's words.
    """

    ranks: str
    node: str
    status: int | None
    said: str = ""

    def __str__(self) -> str:
        return f"rank{'' if self.ranks.isdigit() else 's'} {self.ranks} on {self.node}: {self._how()}"

    def _how(self) -> str:
        if self.status is None:
            return self.said
        if self.status - 128 in signal.valid_signals():
            return f"killed by {signal.Signals(self.status - 128).name}"
        return f"exit status {self.status}"


def of_srun(said: str) -> list[Failure]:
    """Failed ranks by srun's output."""
    return [Failure(ranks, node, _status(how), how) for node, ranks, how in _SRUN.findall(said)]


def of_agents(logs: Path, nodes: Sequence[str], *, tasks: int, since: float) -> list[Failure]:
    """Failed ranks by the logs of torchrun's agents, the first one of each node.

    Args:
        logs: folder of `agent_NODE.log`.
        nodes: their names, in SLURM's order.
        tasks: ranks on each node.
        since: when this round of ranks was started [seconds since 1970]; failures of earlier rounds do not count.
    """
    found = []
    for number, node in enumerate(nodes):
        try:
            text = (logs / f"agent_{number}.log").read_text(errors="replace")
        except OSError:
            continue
        for moment, fraction, code, local in _AGENT.findall(text):
            at = _time(moment, after=since - _CLOCKS_S)
            if at is not None:
                at += float(f"0.{fraction}")
                status = int(code) if int(code) >= 0 else 128 - int(code)
                found.append((at, Failure(str(number * tasks + int(local)), node, status)))
                break
    first = min((at for at, _ in found), default=0.0)

    def order(one: tuple[float, Failure]) -> tuple[bool, bool, float]:
        at, failure = one
        return at - first > _NOTICED_S, failure.status not in _SUDDEN, at

    return [failure for _, failure in sorted(found, key=order)]


def _time(moment: str, *, after: float) -> float | None:
    """A month, day and time (UTC) without a year; None if it was before `after`, by less than half a year."""
    year = time.gmtime(after).tm_year
    for one in (year, year + 1):
        with contextlib.suppress(ValueError):  # 29 February of another year
            at = calendar.timegm(time.strptime(f"{one}{moment}", "%Y%m%d %H:%M:%S"))
            if after <= at < after + _HALF_A_YEAR_S:
                return at
    return None


def _status(how: str) -> int | None:
    if code := _EXIT_CODE.match(how):
        return int(code[1])
    number = _SIGNALS.get(how.removesuffix(" (core dumped)"))
    return None if number is None else 128 + number
