"""The cordon file.

Nodes found bad: a shared text file, one node per line with reason and time after a #. Later launches exclude them for a
while. A person may remove a line earlier, when the node is repaired; the code never removes lines.
"""

from __future__ import annotations

import datetime
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_NODE = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
_TIME = "%Y-%m-%d %H:%M:%S"
_ENTRY = re.compile(r"^\s*(\S+)\s*(?:#\s*(.*?)\s*)?$")


@dataclass(frozen=True)
class Entry:
    """A line of the file.

    Attributes:
        node: its name.
        reason: why it was added.
        time: when it was added [seconds since 1970]; None for a line that a person wrote without time, which never
            expires.
    """

    node: str
    reason: str = ""
    time: float | None = None


def entries(file: Path, *, max_age_s: float = float("inf")) -> list[Entry]:
    """Lines that still count, each node once; lines that name no node are ignored.

    Args:
        file: the cordon file.
        max_age_s: how long a line counts [seconds].
    """
    if not file.is_file():
        return []
    found: dict[str, Entry] = {}
    for line in file.read_text(errors="replace").splitlines():
        parts = _ENTRY.match(line)
        if parts is None or not _NODE.match(parts[1]):
            continue
        reason, comma, stamp = (parts[2] or "").rpartition(", ")
        written = _seconds(stamp) if comma else None
        entry = Entry(parts[1], reason if written is not None else parts[2] or "", written)
        if written is None or time.time() - written <= max_age_s:
            found.setdefault(entry.node, entry)
    return list(found.values())


def read(file: Path, *, max_age_s: float = float("inf")) -> list[str]:
    """Nodes of the lines that still count."""
    return [entry.node for entry in entries(file, max_age_s=max_age_s)]


def cause(text: str) -> str:
    """The problem without the details that differ between nodes, for comparing the causes of two nodes."""
    return re.sub(r"[0-9.]+", "N", " ".join(text.replace("#", " ").split()))


def add(file: Path, nodes: Sequence[str], *, reason: str, max_age_s: float = float("inf")) -> list[str]:
    """Add nodes that are missing or whose lines have expired; returns them."""
    there = read(file, max_age_s=max_age_s)
    new = [node for node in nodes if _NODE.match(node) and node not in there]
    if new:
        file.parent.mkdir(parents=True, exist_ok=True)
        said = " ".join(reason.replace("#", " ").split())
        text = "".join(f"{node}  # {said}, {time.strftime(_TIME)}\n" for node in new)
        with file.open("ab") as opened:
            os.write(opened.fileno(), text.encode())  # one write: several jobs may find bad nodes at the same time
    return new


def _seconds(text: str) -> float | None:
    try:
        return datetime.datetime.strptime(text, _TIME).timestamp()
    except ValueError:
        return None
