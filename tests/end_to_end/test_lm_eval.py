"""lm-evaluation-harness on tasks that `mmscale convert to-lm-eval` wrote: the values of `mmscale eval`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import checkpoints_tools.huggingface.evaluate_export  # noqa: F401  what forked commands would import one by one
from tests.end_to_end.running import assert_says, mmscale, ok
from tests.end_to_end.test_conditional_losses import PAIRS, conditional


def harness(model: Path, tasks: Path, out: Path) -> dict[str, dict[str, Any]]:
    """Results of `lm_eval` by task, without mmscale on its path."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(out / "home")}
    settings = f"pretrained={model},tokenizer={tasks / 'tokenizer'},trust_remote_code=True,dtype=float32"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", settings, "--device", "cpu"]
    command += ["--include_path", str(tasks), "--tasks", "mmscale", "--batch_size", "8", "--output_path", str(out)]
    ended = subprocess.run(command, env=kept | offline, cwd=out, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    (results,) = out.rglob("results_*.json")
    found: dict[str, dict[str, Any]] = json.loads(results.read_text())["results"]
    return found


@pytest.mark.long
@pytest.mark.parametrize("name", ["tiny", "dense"])
def test_the_harness_computes_the_conditional_losses_of_eval(exported: Path, name: str, tmp_path: Path) -> None:
    """Of an export with experts, Mixture-of-Depths and custom code, and of one that transformers knows."""
    pytest.importorskip("lm_eval", reason="pip install -c constraints.txt -e '.[evals]'")
    export, tasks = exported / f"{name}-hf", tmp_path / "tasks"
    few = ("--batches", "10")
    written = json.loads(ok("convert", "to-lm-eval", export, tasks, *few, "--json"))
    assert written["tasks"].keys() == {f"mmscale_{pair}" for pair in PAIRS}
    moved = tasks.rename(tmp_path / "moved")
    found = harness(export, moved, tmp_path)
    wanted = json.loads(ok("eval", export, *few, "--json"))
    for pair in PAIRS:
        of_task = found[f"mmscale_{pair}"]
        assert of_task["token_loss,none"] == pytest.approx(wanted[f"conditional_loss/{pair}"], rel=1e-5)
        assert of_task["token_perplexity,none"] == pytest.approx(wanted[f"conditional_perplexity/{pair}"], rel=1e-5)
    assert conditional(wanted) != pytest.approx(conditional(json.loads(ok("eval", export, "--json"))), rel=1e-5)


def test_what_is_written_and_refused(exported: Path, digits: Path, tmp_path: Path) -> None:
    export, tasks = exported / "tiny-hf", tmp_path / "tasks"
    shown = ok("convert", "to-lm-eval", export, tasks, "--batches", "1")
    assert "mmscale_text_given_image" in shown and f"--include_path {tasks} --tasks mmscale" in shown
    again = ("convert", "to-lm-eval", export, tasks)
    assert_says(mmscale(*again), status=4, cause="exists already", remedy="name a folder that does not exist")
    to = ("convert", "to-lm-eval", export, tmp_path / "none")
    assert_says(mmscale(*to, "--data", tmp_path), status=3, cause="is not a prepared data set", remedy="data prepare")
    settings = json.loads((export / "config.json").read_text())
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text(json.dumps({key: one for key, one in settings.items() if key != "mmscale"}))
    foreign = mmscale("convert", "to-lm-eval", bare, tmp_path / "none", "--data", digits)
    assert_says(foreign, status=4, cause="was not exported by mmscale", remedy="convert to-hf")
    assert {path.name for path in tmp_path.iterdir()} == {"tasks", "bare"}
