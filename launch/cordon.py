# Nodes found bad: a shared text file, one node a line with the reason behind a #, which the next launch excludes.
# A person takes a line out when a node is mended; nothing here does.
"""The cordon file."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

_NODE = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")


def read(file: Path) -> list[str]:
    """Nodes in the file, each once; a line that is no node is left out."""
    if not file.is_file():
        return []
    words = [line.split("#")[0].split() for line in file.read_text(errors="replace").splitlines()]
    return list(dict.fromkeys(found[0] for found in words if len(found) == 1 and _NODE.match(found[0])))


def add(file: Path, nodes: Sequence[str], *, reason: str) -> list[str]:
    """Write down nodes that are not there yet; returns them."""
    new = [node for node in nodes if _NODE.match(node) and node not in read(file)]
    if new:
        file.parent.mkdir(parents=True, exist_ok=True)
        said = " ".join(reason.replace("#", " ").split())
        text = "".join(f"{node}  # {said}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n" for node in new)
        with file.open("ab") as opened:
            os.write(opened.fileno(), text.encode())  # one write: several jobs may find bad nodes at once
    return new
