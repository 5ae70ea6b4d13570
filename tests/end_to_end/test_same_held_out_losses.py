"""The held-out losses that training prints and those of `mmscale eval`: the same numbers, or both say what was read."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import checkpoints_tools.huggingface.evaluate_export  # noqa: F401  what forked commands would import one by one
from mmscale.data.prepared.manifest import MANIFEST
from mmscale.runs.metrics import read_metrics
from tests.end_to_end.running import mmscale, ok

FEW, ALL = 2, 10_000  # train.eval_batches; the sets have more than two batches, and fewer than 10,000
SAME = 2e-6  # fp32; an export computes documents alone, a run packs them
RUN = ("train.steps=4", "checkpoint.every=2", "checkpoint.asynchronous=false", "parallel.ep=1", "optim.warmup=1")
JOINT = ("model.auxiliary.mode=joint", "model.experts.threshold_decay=0.9")


@dataclass(frozen=True)
class Trained:
    """A run and what training printed.

    Attributes:
        run: its folder.
        err: stderr of the main stage.
        which: a file of questions that were asked along the run.
    """

    run: Path
    err: str
    which: Path


def questions(file: Path) -> Path:
    words = [" zero", " one", " two", " three"]
    lines = [{"content": [{"type": "text", "text": "this is"}], "choices": words, "answer": n % 4} for n in range(12)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture(
    scope="module", params=[FEW, pytest.param(ALL, marks=pytest.mark.long)], ids=["few batches", "all batches"]
)
def trained(
    request: pytest.FixtureRequest, config: Path, digits: Path, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    """A joint run with cut-offs, so that every causal routing is there; evaluated at steps 2 and 4."""
    folder = tmp_path_factory.mktemp("held-out")
    which = questions(folder / "which.jsonl")
    small = small_set(digits, folder / "small")
    evaluated = (f"train.eval_batches={request.param}", "train.eval_every=2", f"train.tasks=[which={which}]")
    given = (f"run.dir={folder}", *RUN, *JOINT, *evaluated, f"data.validation={{small: {small}}}")
    ended = mmscale("train", config, *given)
    assert ended.status == 0, ended
    return Trained(folder / "tiny", ended.err, which)


def small_set(digits: Path, folder: Path) -> Path:
    """The digits with their questions left out: another set that is evaluated."""
    shutil.copytree(digits, folder)
    file = folder / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tasks": [], "source": "digits again"}))
    return folder


def evaluation(run: Path, step: int, prefix: str = "eval/") -> dict[str, float]:
    """The figures of a step's evaluation in metrics.jsonl, without their prefix."""
    (row,) = (row for row in read_metrics(run) if row["step"] == step)
    return {key.removeprefix(prefix): value for key, value in row.items() if key.startswith(prefix)}


def asked(*arguments: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ok("eval", *arguments, "--json"))
    return found


def of_routing(figures: dict[str, float], routing: str) -> dict[str, float]:
    """Figures of a routing mode, under the keys of `mmscale eval`."""
    own: dict[str, float] = {}
    for key, value in figures.items():
        words = key.split("/")
        modes = [word for word in words if word in ("causal", "threshold")]
        if modes == ([] if routing == "batch" else [routing]):
            own["/".join(word for word in words if word != routing or routing == "batch")] = value
    return own


def extent_in(text: str) -> set[str]:
    """Which part of a set each line of an evaluation names; "" for a line that names none."""
    lines = re.findall(r"^.*(?:held-out|validation small) \(\w+ routing\)  loss .*$", text, re.MULTILINE)
    assert lines, text
    return {found[0] if (found := re.findall(r"\((first \d+ of \d+ batches)\)$", line)) else "" for line in lines}


@pytest.mark.parametrize("step", [pytest.param(2, marks=pytest.mark.long), 4])
@pytest.mark.parametrize(
    "routing", ["causal", *(pytest.param(n, marks=pytest.mark.long) for n in ("batch", "threshold"))]
)
def test_main(trained: Trained, routing: str, step: int) -> None:
    """By default `eval` reads all: the same numbers if training did so too; else both name the batches."""
    run = (f"{trained.run}@{step}", "--routing", routing, "--task", trained.which)
    wanted = of_routing(evaluation(trained.run, step), routing)
    assert {"loss", "loss/text", "validation/small/loss", "accuracy/which", "z_loss"} <= wanted.keys()
    found = asked(*run)
    told = extent_in(trained.err)
    if told == {""}:
        assert {key: found[key] for key in wanted} == pytest.approx(wanted, rel=SAME)
        assert found["batches"] == found["batches_available"] == found["batches_in_training"]
        return
    assert told == {f"first {FEW} of {found['batches_available']} batches"}
    assert f"--batches {FEW}" in trained.err
    assert found["loss"] != pytest.approx(wanted["loss"], rel=1e-5)
    shown = ok("eval", *run)
    part = f"held-out: {found['batches']} batches read here, the first {FEW} in training"
    assert part in " ".join(shown.split()) and f"--batches {FEW} gives its numbers" in " ".join(shown.split())
    again = asked(*run, "--batches", str(FEW))
    assert {key: again[key] for key in wanted} == pytest.approx(wanted, rel=SAME)
    assert (again["batches"], again["batches_in_training"]) == (FEW, FEW)


def test_questions_that_only_training_asks_are_named(trained: Trained) -> None:
    shown = " ".join(ok("eval", trained.run, "--batches", "1").split())
    assert f"training asks which={trained.which} too: --task which={trained.which}" in shown
    for named in (trained.which, f"mine={trained.which}"):  # the same file, also under another name
        assert asked(trained.run, "--batches", "1", "--task", named)["not_asked"] == []


@pytest.mark.long
@pytest.mark.parametrize("routing", ["batch", "causal"])
def test_auxiliary(trained: Trained, config: Path, routing: str, tmp_path: Path) -> None:
    """The losses at the end of the stage are those of `eval` on the main run."""
    run = Path(shutil.copytree(trained.run, tmp_path / "tiny"))
    settings = ("auxiliary.steps=2", "auxiliary.calibration_batches=1", "auxiliary.optim.warmup=0")
    batches = FEW if extent_in(trained.err) != {""} else ALL
    given = (f"run.dir={tmp_path}", *RUN, *JOINT, f"train.eval_batches={batches}")
    ended = mmscale("train", config, *given, "--stage", "auxiliary", *settings)
    assert ended.status == 0, ended
    report = json.loads((run / "auxiliary/report.json").read_text())["held_out"][routing]
    found = asked(run, "--routing", routing)
    told = extent_in(ended.err)
    if batches == ALL:
        assert told == {""}
        assert {key: found[key] for key in report} == pytest.approx(report, rel=SAME)
        return
    assert told == {f"first {FEW} of {found['batches_available']} batches"} and f"--batches {FEW}" in ended.err
    again = asked(run, "--routing", routing, "--batches", str(FEW))
    assert {key: again[key] for key in report} == pytest.approx(report, rel=SAME)


@pytest.mark.long
def test_sft(trained: Trained, config: Path, digits: Path, tmp_path: Path) -> None:
    """The stage has a folder of its own, which `eval` takes."""
    run = Path(shutil.copytree(trained.run, tmp_path / "tiny"))
    settings = (f"sft.path={digits}", "sft.steps=2", "sft.eval_every=1", f"sft.tasks=[which={trained.which}]")
    batches = FEW if extent_in(trained.err) != {""} else ALL
    given = (f"run.dir={tmp_path}", *RUN, *JOINT, f"train.eval_batches={batches}")
    ended = mmscale("train", config, *given, "--stage", "sft", "sft.optim.warmup=0", *settings)
    assert ended.status == 0, ended
    wanted = of_routing(evaluation(run / "sft", 2), "batch")
    assert {"loss", "loss/image", "accuracy/which"} <= wanted.keys()
    found = asked(run / "sft", "--task", trained.which)
    told = extent_in(ended.err)
    if batches == ALL:
        assert told == {""}
        assert {key: found[key] for key in wanted} == pytest.approx(wanted, rel=SAME)
        return
    assert told == {f"first {FEW} of {found['batches_available']} batches"} and f"--batches {FEW}" in ended.err
    again = asked(run / "sft", "--task", trained.which, "--batches", str(FEW))
    assert {key: again[key] for key in wanted} == pytest.approx(wanted, rel=SAME)


@pytest.mark.long
def test_an_export(trained: Trained, tmp_path: Path) -> None:
    """By default it reads all documents, with the routing of its config.json."""
    ok("convert", "to-hf", trained.run, tmp_path / "hf", timeout_s=400)
    wanted = of_routing(evaluation(trained.run, 4), "causal")
    run = (tmp_path / "hf", "--task", f"which={trained.which}")
    found = asked(*run)
    if extent_in(trained.err) == {""}:
        assert found["routing"] == "causal"
        assert {key: found[key] for key in wanted} == pytest.approx(wanted, rel=SAME)
        return
    assert f"--batches {FEW} gives its numbers" in " ".join(ok("eval", *run).split())
    again = asked(*run, "--batches", str(FEW))
    assert {key: again[key] for key in wanted} == pytest.approx(wanted, rel=SAME)


def test_a_set_of_which_training_reads_a_part_is_named_beside_one_that_it_reads_whole(
    config: Path, digits: Path, tmp_path: Path
) -> None:
    """The first set has fewer batches than `train.eval_batches`, a validation set has more."""
    large, batches = Path(shutil.copytree(digits, tmp_path / "large")), 40
    manifest = json.loads((large / MANIFEST).read_text())
    manifest["splits"] = {"train": {"parts": []}, "validation": manifest["splits"]["train"]}
    (large / MANIFEST).write_text(json.dumps(manifest | {"tasks": [], "source": "all held out"}))
    given = (f"run.dir={tmp_path}", *RUN, "train.steps=2", "train.eval_every=0", f"train.eval_batches={batches}")
    ended = mmscale("train", config, *given, f"data.validation={{large: {large}}}")
    assert ended.status == 0, ended
    found = asked(tmp_path / "tiny")
    assert found["batches"] == found["batches_in_training"] < batches
    shown = " ".join(ok("eval", tmp_path / "tiny").split())
    assert f"--batches {batches} gives its numbers" in shown and "validation large" in shown
    wanted, again = evaluation(tmp_path / "tiny", 2), asked(tmp_path / "tiny", "--batches", str(batches))
    assert {key: again[key] for key in wanted} == pytest.approx(wanted, rel=SAME)
