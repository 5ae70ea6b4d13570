"""Runs a command of mmscale and reads its result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

_ONE_THREAD = {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0"}


def mmscale(*arguments: object, one_thread: bool = False) -> dict[str, Any]:
    """The JSON that a command prints; empty if it prints none.

    Args:
        arguments: of the command, without --json.
        one_thread: of the command and of what it starts.

    Raises:
        RuntimeError: it failed; its error went to the terminal.
    """
    command = [sys.executable, "-m", "mmscale", *map(str, arguments), "--json"]
    environment = os.environ | (_ONE_THREAD if one_thread else {})
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stdout[-500:]}")
    return json.loads(done.stdout[done.stdout.index("{") :]) if "{" in done.stdout else {}
