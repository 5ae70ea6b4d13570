"""Fine-tuning on conversations through the commands: prepare, train, resume, evaluate, answer, export."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from checkpoints_tools.sources import open_source
from mmscale.checkpoint.layout import Store
from mmscale.data.prepared.manifest import read_manifest
from mmscale.data.vocab import EOS
from mmscale.runs.events import read_events
from mmscale.runs.metrics import read_metrics
from tests.end_to_end.running import assert_says, mmscale, ok

EXAMPLE = Path(__file__).parents[2] / "examples/digits_chat/write_conversations.py"
STEPS = 6
EXACT = ("loss", "grad_norm", "loss/text", "loss/image", "tokens")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny: dict[str, Any], digits_documents: Path) -> Path:
    """`chat`, conversations and tasks; `set`, prepared digits; `chat-set`; `tiny.yaml`; `runs/tiny`, a main run."""
    root = tmp_path_factory.mktemp("sft")
    arguments = [str(digits_documents), str(root / "chat"), "--conversations", "60"]
    assert runpy.run_path(str(EXAMPLE))["main"](arguments) == 0
    file = root / "tiny.yaml"
    settings = {
        **tiny,
        "run": {"name": "tiny", "dir": str(root / "runs")},
        "vocab": {**tiny["vocab"], "reserved": True},
        "data": {**tiny["data"], "path": str(root / "set")},
        "parallel": {},
        "sft": {"path": str(root / "chat-set"), "steps": STEPS, "eval_every": 3, "optim": {"lr": 1e-3}},
    }
    file.write_text(yaml.safe_dump(settings))
    ok("data", "prepare", file, "--out", root / "set")
    chat = ("--documents", root / "chat/conversations.jsonl", "--like", root / "set", "--out", root / "chat-set")
    ok("data", "prepare", *chat, "data.prepare.held_out=0.2")
    ok("train", file, "train.steps=8", "train.eval_every=0", "checkpoint.every=4", "checkpoint.asynchronous=false")
    return root


def stage(folder: Path, runs: Path, *overrides: str, nproc: int = 1) -> dict[int, dict[str, Any]]:
    """The stage in a copy of the main run; what each of its steps gave."""
    if not (runs / "tiny").exists():
        shutil.copytree(folder / "runs" / "tiny", runs / "tiny")
    ok("train", folder / "tiny.yaml", f"run.dir={runs}", "--stage", "sft", *overrides, nproc=nproc)
    return {line["step"]: line for line in read_metrics(runs / "tiny" / "sft")}


@pytest.fixture(scope="module")
def tuned(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, dict[str, Any]]]:
    """The folder of the stage, and its metrics."""
    runs = tmp_path_factory.mktemp("tuned")
    tasks = f"sft.tasks=[{folder / 'chat/digit.jsonl'}]"
    return runs / "tiny" / "sft", stage(folder, runs, "sft.checkpoint_every=3", tasks)


Tuned = tuple[Path, dict[int, dict[str, Any]]]


def test_labels_are_those_of_answers(folder: Path, tuned: Tuned) -> None:
    """Figures of the stage: text and image losses of answers, held-out losses, accuracy, and where it began."""
    run, numbers = tuned
    assert all(line["loss/text"] > 0 for line in numbers.values())
    assert any("loss/image" in line for line in numbers.values()), "drawings are trained on, too"
    assert {"eval/loss", "eval/loss/text", "eval/accuracy/digit"} <= numbers[STEPS].keys()
    (began,) = [event for event in read_events(run) if event["event"] == "start"]
    assert began["sft"]["main_step"] == 8 and began["sources"][0]["path"].endswith("chat-set")
    assert [one["path"] for one in began["sft"]["main_data"]] == [str(folder / "set")]
    # Conversations are about pictures that the main run was trained on, whatever the split of the conversation.
    assert any(f"in training documents of {folder / 'set'} too" in line for line in began["leaks"])
    assert Store.of_run(run).info(STEPS)["config"]["run"]["name"] == "sft"
    evaluated = json.loads(ok("eval", run, "--batches", "1", "--json"))
    assert evaluated["leaks"] == began["leaks"]


@pytest.mark.parametrize(
    ("overrides", "nproc"),
    [
        (("parallel.tp=2",), 2),
        pytest.param(("parallel.ep=2",), 2, marks=pytest.mark.long),
        pytest.param(("parallel.pp=2",), 2, marks=pytest.mark.exhaustive),
    ],
    ids=["tp2", "ep2", "pp2"],
)
def test_layouts_train_alike(
    folder: Path, tuned: Tuned, overrides: tuple[str, ...], nproc: int, tmp_path: Path
) -> None:
    found = stage(folder, tmp_path, *overrides, nproc=nproc)
    for step, line in tuned[1].items():
        for key in ("loss", "grad_norm", "eval/loss"):
            if key in line:
                assert found[step][key] == pytest.approx(line[key], rel=2e-5), (step, key)


def test_resumed_bit_by_bit_even_if_the_main_run_goes_on(folder: Path, tuned: Tuned, tmp_path: Path) -> None:
    stage(folder, tmp_path, "sft.steps=3", "sft.checkpoint_every=3", "sft.optim.schedule=constant")
    ok("train", folder / "tiny.yaml", f"run.dir={tmp_path}", "train.steps=10", "train.eval_every=0")
    shutil.rmtree(tmp_path / "tiny" / "checkpoints")  # the stage has all it needs
    resumed = stage(folder, tmp_path, "sft.optim.schedule=constant")
    whole = stage(folder, tmp_path / "whole", "sft.optim.schedule=constant")
    for step, line in whole.items():
        assert {key: resumed[step].get(key) for key in EXACT} == {key: line.get(key) for key in EXACT}


@pytest.mark.long
def test_phases_of_a_stage_with_conversations_and_documents_with_holes(folder: Path, tmp_path: Path) -> None:
    """Answers only, and CM3 in the other source; stopped in either phase it resumes bit by bit, also without holes."""
    both = ("sft.path=null", f"sft.blend=[{{path: {folder / 'chat-set'}}}, {{path: {folder / 'set'}}}]")
    phases = ("sft.optim.schedule=constant", "sft.optim.phases=[{start: 3, lr: 2e-4}]")
    main = ("train.steps=6", "train.eval_every=0", "checkpoint.every=0", "checkpoint.asynchronous=false")
    ok("train", folder / "tiny.yaml", f"run.dir={tmp_path / 'whole'}", *main, "objective.cm3_rate=0.8")
    for name in ("parts", "tp2", "plain"):
        shutil.copytree(tmp_path / "whole" / "tiny", tmp_path / name / "tiny")
    masked = (*both, *phases, "objective.cm3_rate=0.8")
    whole = stage(folder, tmp_path / "whole", *masked)
    assert [whole[step]["lr"] for step in range(1, 7)] == [1e-3] * 3 + [2e-4] * 3
    without = tuple(one for one in masked if not one.startswith("sft.optim.phases"))
    for steps, settings in ((2, without), (5, masked), (STEPS, masked)):  # the phase comes with the first resume
        parts = stage(folder, tmp_path / "parts", *settings, f"sft.steps={steps}", "sft.checkpoint_every=2")
    spread = stage(folder, tmp_path / "tp2", *masked, "parallel.tp=2", nproc=2)
    for step, line in whole.items():
        assert {key: parts[step].get(key) for key in EXACT} == {key: line.get(key) for key in EXACT}
        assert spread[step]["loss"] == pytest.approx(line["loss"], rel=2e-5), step
    assert stage(folder, tmp_path / "plain", *both, *phases)[1]["loss"] != whole[1]["loss"]


@pytest.mark.long
def test_muon_fine_tunes_alike_in_layouts_and_after_a_stop(folder: Path, tuned: Tuned, tmp_path: Path) -> None:
    muon = ("sft.optim.optimizer=muon", "sft.optim.schedule=constant")
    whole = stage(folder, tmp_path / "whole", *muon)
    assert whole[STEPS]["loss"] != tuned[1][STEPS]["loss"]
    stage(folder, tmp_path / "resumed", *muon, "sft.steps=3", "sft.checkpoint_every=3")
    resumed = stage(folder, tmp_path / "resumed", *muon)
    spread = stage(folder, tmp_path / "tp2", *muon, "parallel.tp=2", nproc=2)
    for step, line in whole.items():
        assert {key: resumed[step].get(key) for key in EXACT} == {key: line.get(key) for key in EXACT}
        assert spread[step]["loss"] == pytest.approx(line["loss"], rel=2e-5), step


@pytest.mark.long
def test_token_choice_is_fine_tuned_and_its_biases_move_on(folder: Path, tmp_path: Path) -> None:
    """In one process and over two expert-parallel ranks; the biases of the main run are where they begin."""
    choice = ("model.experts.token_choice={bias_rate: 0.01}", "model.depth=null")
    short = ("train.steps=6", "train.eval_every=0", "checkpoint.every=0", "checkpoint.asynchronous=false")
    ok("train", folder / "tiny.yaml", f"run.dir={tmp_path}", *choice, *short)
    shutil.copytree(tmp_path / "tiny", tmp_path / "ep2" / "tiny")
    whole = stage(folder, tmp_path, *choice)
    spread = stage(folder, tmp_path / "ep2", *choice, "parallel.ep=2", nproc=2)
    for step, line in whole.items():
        assert spread[step]["loss"] == pytest.approx(line["loss"], rel=2e-5), step
    before, after = open_source(tmp_path / "tiny", 6), open_source(tmp_path / "tiny" / "sft", STEPS)
    names = [name for name in before.names(weights=True) if ".router_bias." in name]
    assert names and any(not torch.equal(before.read(name), after.read(name)) for name in names)
    assert max(float((after.read(name) - before.read(name)).abs().max()) for name in names) <= STEPS * 0.01 + 1e-6


def test_it_starts_from_the_checkpoint_that_is_named(folder: Path, tuned: Tuned, tmp_path: Path) -> None:
    found = stage(folder, tmp_path, "sft.main_step=4", "sft.steps=2", "sft.eval_every=0")
    assert found[1]["loss"] != tuned[1][1]["loss"]
    (began,) = [event for event in read_events(tmp_path / "tiny" / "sft") if event["event"] == "start"]
    assert began["sft"]["main_step"] == 4
    ended = mmscale("train", folder / "tiny.yaml", f"run.dir={tmp_path}", "--stage", "sft", "sft.main_step=8")
    assert_says(
        ended, status=4, cause="began from step 4 of the main run, sft.main_step is 8", remedy="sft.main_step=4"
    )


def moved(tuned: Tuned, tmp_path: Path) -> Path:
    """The stage in a copy of its run."""
    run = tmp_path / "tiny" / "sft"
    shutil.copytree(tuned[0].parent, run.parent)
    config = run / "config.yaml"
    content = yaml.safe_load(config.read_text())
    content["run"]["dir"] = str(run.parent)
    config.write_text(yaml.safe_dump(content))
    return run


def test_the_folder_is_that_of_a_run(folder: Path, tuned: Tuned, tmp_path: Path) -> None:
    """Evaluated and shown."""
    run = moved(tuned, tmp_path)
    found = json.loads(ok("eval", run, "--task", folder / "chat/even.jsonl", "--json"))
    assert found["loss"] == pytest.approx(tuned[1][STEPS]["eval/loss"], rel=1e-4)
    assert found["tasks"]["even"]["asked"] > 100
    (shown,) = json.loads(ok("status", run, "--json"))
    assert shown["step"] == shown["steps"] == STEPS and shown["state"] == "finished", shown
    ok("report", run, "--out", tmp_path / "report.html")


@pytest.mark.long
def test_it_is_given_routers_and_exported(folder: Path, tuned: Tuned, tmp_path: Path) -> None:
    """It is trained further, too. Asked by its template, run and export answer the same."""
    run = moved(tuned, tmp_path)
    ok("train", run / "config.yaml", f"train.steps={STEPS + 1}", "optim.schedule=constant", "optim.lr=1e-5")
    began, resumed = [event for event in read_events(run) if event["event"] in ("start", "resume")]
    learned = began["sft"]["main_data"]
    assert resumed["leaks"] == began["leaks"] and resumed["made_from"]["main_data"] == learned
    routers = ("auxiliary.steps=2", "auxiliary.calibration_batches=0")
    ok("train", run / "config.yaml", "--stage", "auxiliary", *routers)
    ok("convert", "to-hf", run, tmp_path / "hf", timeout_s=600)
    exported = json.loads((tmp_path / "hf/config.json").read_text())["mmscale"]
    assert exported["read_before"] == [[one["path"], one["identity"]] for one in learned]
    picture = folder / "chat/held_out_0000.png"
    asked = ("--chat", "--image", picture, "--prompt", "Which digit is this?", "--count", "1", "--temperature", "0")
    answers = [
        json.loads(ok("sample", model, *asked, "--out", tmp_path / "samples", "--json"))["samples"][0]["text"]
        for model in (run, tmp_path / "hf")
    ]
    assert answers[0] == answers[1]
    end = read_manifest(folder / "set").vocab.reserved_id("<eot>")
    settings = json.loads((tmp_path / "hf/generation_config.json").read_text())
    assert settings["eos_token_id"] == [EOS, end]
    assert "<assistant>" in (tmp_path / "hf/chat_template.jinja").read_text()


def test_refused(folder: Path, config: Path, digits: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "runs" / "tiny", tmp_path / "tiny")
    run = ("train", folder / "tiny.yaml", f"run.dir={tmp_path}", "--stage", "sft")
    ended = mmscale(*run, "sft.path=null")
    assert_says(ended, status=2, cause="neither sft.path nor sft.blend is set", remedy="sft.path=DIR")
    ended = mmscale(*run, "model.rope_base=5000")
    assert_says(ended, status=2, cause="would change what the model", remedy="--yes")
    ended = mmscale(*run, f"sft.path={digits}")
    assert_says(ended, status=3, cause="another vocabulary", remedy="prepare it")
    ended = mmscale(*run, f"run.dir={tmp_path / 'nothing'}")
    assert_says(ended, status=4, cause="no committed checkpoint", remedy="train first")
    assert not (tmp_path / "tiny" / "sft").exists() and not (tmp_path / "nothing").exists()
    plain = mmscale("sample", folder / "runs/tiny", "--chat", "--prompt", "a", "--routing", "batch")
    assert_says(plain, status=2, cause="--chat", remedy="auxiliary")
