"""A stop request before training begins: the exit status, wherever the interpreter is at that moment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mmscale.train.training_lock import STOPS

PROGRAM = """
import os, sys, time
from pathlib import Path

from mmscale.errors import LaunchError
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.stages.table import STAGES
from mmscale.train.training_lock import claimed

try:
    with claimed(Path("run"), STAGES["main"], RankEnv()):
        {ask}
except LaunchError as error:
    print(error.cause)
    sys.exit(1)
"""
ASK = "os.kill(os.getpid(), {number}); time.sleep(60)"


@pytest.mark.parametrize("place", ["a statement", "exec of a string, as dataclasses do it"])
@pytest.mark.parametrize("number", STOPS, ids=lambda number: number.name)
def test_status_is_that_of_an_error(tmp_path: Path, number: int, place: str) -> None:
    ask = ASK.format(number=int(number))
    ask = ask if place == "a statement" else f"exec({ask!r})"
    (tmp_path / "asked.py").write_text(PROGRAM.format(ask=ask))
    command = ["env", "--default-signal", sys.executable, "-m", "asked"]  # a background job of a shell ignores SIGINT
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (1, "")
    assert ended.stdout == f"stopped by {number.name} before training began: nothing was saved\n"
