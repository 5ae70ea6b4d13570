"""The memory that processes may still use: the machine's free memory and the limits of control groups.

Reads /proc and /sys only; no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")  # version 1 or 2


def available() -> int:
    """Bytes that can be allocated before the machine or a control group (SLURM, containers) kills a process.

    Reclaimable page cache does not count as used. Limits that cannot be read are ignored.
    """
    return max(0, min([_of_machine(_PROC), *_of_groups(_PROC, _CGROUPS)]))


def _of_machine(proc: Path) -> int:
    for line in _text(proc / "meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 62


def _of_groups(proc: Path, cgroups: Path) -> Iterator[int]:
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = cgroups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = cgroups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = root / path.lstrip("/")
        while folder.is_relative_to(root):  # limits of all parent groups apply too
            yield from _left(folder, *names)
            folder = folder.parent


def _left(folder: Path, limit: str, usage: str, inactive: str) -> Iterator[int]:
    most, taken = _text(folder / limit).strip(), _text(folder / usage).strip()
    if most.isdigit() and taken.isdigit():
        pairs = (line.split() for line in _text(folder / "memory.stat").splitlines())
        dropped = next((int(pair[1]) for pair in pairs if pair[0] == inactive), 0)
        yield int(most) - int(taken) + dropped


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""
