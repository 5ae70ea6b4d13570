"""Forks in which the gates of the other tests run are like the fresh interpreter of `gate.run_isolated`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoints_tools.huggingface import gate
from tests.end_to_end import isolated

REPORT = """
import json, os, sys
from transformers.dynamic_module_utils import HF_MODULES_CACHE
from transformers.utils.hub import is_offline_mode
print(json.dumps({
    "arguments": sys.argv[1:], "file": __file__, "name": __name__, "cwd": os.getcwd(), "environment": dict(os.environ),
    "flags": [sys.flags.isolated, sys.flags.optimize], "path": sys.path, "cache": HF_MODULES_CACHE,
    "offline": is_offline_mode(),
    "ours": [name for name in sys.modules if name.split(".")[0] in ("mmscale", "checkpoints_tools", "megatron")],
}))
sys.stderr.write("said")
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    return own | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OWN": "x"}


@pytest.fixture
def forked() -> Callable[..., Any]:
    isolated.start()
    return isolated.run


def test_a_fork_sees_what_a_fresh_interpreter_sees(
    forked: Callable[..., Any], environment: dict[str, str], tmp_path: Path
) -> None:
    program = tmp_path / "report.py"
    program.write_text(REPORT)
    found = []
    for run in (gate.run_isolated, forked):
        ended = run([str(program), "a", "b c"], cwd=tmp_path, environment=environment)
        assert (ended.returncode, ended.stderr) == (0, "said"), ended
        found.append(json.loads(ended.stdout))
    assert found[0] == found[1]
    assert found[0]["ours"] == [] and found[0]["offline"] and str(tmp_path) in found[0]["cache"]


@pytest.mark.parametrize(
    ("program", "status", "said"),
    [
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('no')", 1, "no"),
        ("raise ValueError('no')", 1, "ValueError: no"),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
    ],
)
def test_its_end_is_told(
    forked: Callable[..., Any], program: str, status: int, said: str, environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "program.py").write_text(program)
    ended = forked([str(tmp_path / "program.py")], cwd=tmp_path, environment=environment)
    assert ended.returncode == status and said in ended.stderr, ended


def test_no_program_changes_the_next_one(
    forked: Callable[..., Any], environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "program.py").write_text(
        "import sys, os, torch; print(hasattr(torch, 'mark'), os.environ['OWN']); torch.mark = os.environ['OWN'] = '1'"
    )
    for own in ("x", "y"):
        ended = forked([str(tmp_path / "program.py")], cwd=tmp_path, environment=environment | {"OWN": own})
        assert ended.stdout == f"False {own}\n", ended
    assert not hasattr(sys.modules["torch"], "mark")
