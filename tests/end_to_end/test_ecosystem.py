"""Exports in other libraries (checks_ecosystem.py), and the way back of what they made.

peft and torchao are installed into a folder of their own, which stands first on the path of a fresh process: what
transformers does where they are installed is not what the rest of the suite should see. Only `make test-all` does it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.running import ROOT, assert_says, mmscale
from tests.end_to_end.test_evaluate_export import evaluated, ok

LIBRARIES = ("peft==0.21.2", "torchao==0.18.0")
CHECKS = Path(__file__).with_name("checks_ecosystem.py")


@pytest.fixture(scope="module")
def tuned(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders that the checks left, after all of them have passed."""
    libraries, out = tmp_path_factory.mktemp("libraries"), tmp_path_factory.mktemp("tuned")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(libraries), *LIBRARIES]
    ended = subprocess.run(pip, capture_output=True, text=True)
    if ended.returncode != 0:
        assert "CI" not in os.environ, ended.stderr
        pytest.skip(f"{' and '.join(LIBRARIES)} cannot be installed: {ended.stderr.strip().splitlines()[-1]}")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(libraries), str(ROOT)]),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(out / "home"),
        "EXPORTS": str(exported),
        "TUNED": str(out),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(CHECKS)]
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-6000:]
    return out


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["tiny", "dense"])
@pytest.mark.parametrize("way", ["trainer", "lora"])
def test_the_way_back(way: str, name: str, tuned: Path, exported: Path, tmp_path: Path) -> None:
    """A fine-tuned export is evaluated, becomes a run with the same numbers, and is exported again behind the gate."""
    hf = tuned / f"{way}-{name}"
    after = evaluated(hf, "--batches", "2")["loss"]
    assert after != evaluated(exported / f"{name}-hf", "--batches", "2")["loss"]
    said = json.loads(ok("convert", "from-hf", hf, tmp_path / "run", "--json"))
    assert said["verified"].startswith("shapes and values")
    run = evaluated(tmp_path / "run", "--routing", "causal", "--batches", "2")["loss"]
    assert run == pytest.approx(after, rel=2e-6)
    ok("convert", "to-hf", tmp_path / "run", tmp_path / "again")


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["tiny", "dense"])
def test_a_quantised_folder_does_not_come_back(name: str, tuned: Path, tmp_path: Path) -> None:
    for command in (("convert", "from-hf", tuned / f"int8-{name}", tmp_path / "run"), ("eval", tuned / f"int8-{name}")):
        assert_says(mmscale(*command), status=4, cause="are quantised", remedy="before it was quantised")
    assert not (tmp_path / "run").exists()
