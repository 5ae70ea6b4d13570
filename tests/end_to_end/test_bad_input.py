"""What goes wrong for users, one test per message: exit status, one cause, one remedy, nothing half-written.

Not repeated here: a full disk, killed workers and unwritable folders while preparing
(tests/unit/data/prepared/test_prepare_accidents.py), every kind of bad document
(tests/unit/data/documents/test_documents.py), every wrong setting (tests/unit/config), damaged checkpoints
(tests/unit/checkpoint).
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.end_to_end.running import ROOT, assert_says, listing, mmscale, start


def rejects(config: Path, runs: Path, *overrides: str, status: int, cause: str, remedy: str) -> None:
    """`mmscale train --nproc 2` refuses before any rank starts, and the folder of the runs stays as it was."""
    before = listing(runs)
    ended = mmscale("train", config, f"run.dir={runs}", *overrides, "--nproc", "2")
    assert_says(ended, status=status, cause=cause, remedy=remedy)
    assert listing(runs) == before
    assert [entry.name for entry in runs.iterdir()] == sorted({name.split("/")[0] for name in before})


def copied(digits: Path, tmp_path: Path) -> Path:
    return shutil.copytree(digits, tmp_path / "data")


# --- configuration --------------------------------------------------------------------------------------------------


def test_unknown_setting(config: Path, tmp_path: Path) -> None:
    rejects(config, tmp_path, "train.step=5", status=2, cause="train.step is not a setting", remedy=r"train\.steps")


def test_layout_that_the_model_does_not_allow(config: Path, tmp_path: Path) -> None:
    cause = "num_attention_heads = 2 is not divisible by parallel.tp = 3"
    rejects(config, tmp_path, "parallel.tp=3", status=2, cause=cause, remedy="change one")


def test_layout_that_does_not_fit_the_ranks(config: Path, tmp_path: Path) -> None:
    rejects(config, tmp_path, "parallel.pp=2", status=2, cause="parallel.ep = 2 does not divide", remedy="mmscale plan")


def test_no_data_named(config: Path, tmp_path: Path) -> None:
    rejects(config, tmp_path, "data.path=null", status=2, cause="neither data.path nor data.blend", remedy="data.path")


# --- data -----------------------------------------------------------------------------------------------------------


def test_missing_data(config: Path, tmp_path: Path) -> None:
    rejects(config, tmp_path, "data.path=/nowhere", status=3, cause="no folder /nowhere", remedy="mmscale data prepare")


def test_data_that_was_not_prepared_to_the_end(config: Path, tmp_path: Path, digits: Path) -> None:
    data = copied(digits, tmp_path)
    (data / "manifest.json").unlink()
    runs = tmp_path / "runs"
    runs.mkdir()
    rejects(config, runs, f"data.path={data}", status=3, cause="is not a prepared data set", remedy="to its end")


def test_data_of_another_vocabulary(config: Path, tmp_path: Path) -> None:
    cause = (
        r"another vocabulary \(text 0..383, image 384..511\) than the configuration's \(text 0..383, image 384..519\)"
    )
    rejects(config, tmp_path, "vocab.modalities.1.size=136", status=3, cause=cause, remedy="vocab.modalities")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_truncated_data(config: Path, tmp_path: Path, digits: Path, suffix: str) -> None:
    data = copied(digits, tmp_path)
    file = next(path for path in sorted(data.rglob(f"*{suffix}")) if "train" in str(path))
    size = file.stat().st_size
    os.truncate(file, size - 10)
    runs = tmp_path / "runs"
    runs.mkdir()
    cause = f"{file.name} has {size - 10} bytes instead of {size}"
    rejects(config, runs, f"data.path={data}", status=3, cause=cause, remedy="mmscale data prepare")


def test_damage_that_only_reading_finds_is_said_once_by_two_ranks(config: Path, tmp_path: Path, digits: Path) -> None:
    """An index with the right size and wrong content: found by every rank, shown by the first, logged by the other."""
    data = copied(digits, tmp_path)
    for file in sorted(data.rglob("*.idx")):
        file.write_bytes(b"\0" * file.stat().st_size)
    runs = tmp_path / "runs"
    ended = mmscale("train", config, f"run.dir={runs}", f"data.path={data}", nproc=2)
    assert_says(ended, status=3, cause=r"\.idx or \.bin cannot be read", remedy="mmscale data prepare")
    assert ended.others.count("error:") == 1  # in rank 1's log, which the launcher keeps off the terminal
    assert not list(runs.rglob("step_*"))


# --- documents ------------------------------------------------------------------------------------------------------


def _documents(folder: Path, bad: str) -> Path:
    """Three good documents with images, and a bad one."""
    rng = np.random.default_rng(0)
    lines = []
    for number in range(3):
        Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(folder / f"{number}.png")
        content = [{"type": "text", "text": f"picture {number}"}, {"type": "image", "path": f"{number}.png"}]
        lines.append(json.dumps({"id": f"d{number}", "content": content}))
    (folder / "torn.png").write_bytes((folder / "0.png").read_bytes()[:40])
    (folder.parent / "outside.png").write_bytes((folder / "0.png").read_bytes())
    file = folder / "documents.jsonl"
    file.write_text("\n".join([*lines, bad]) + "\n")
    return file


def _image(path: str) -> str:
    return json.dumps({"id": "bad", "content": [{"type": "text", "text": "x"}, {"type": "image", "path": path}]})


@pytest.mark.parametrize(
    ("bad", "cause"),
    [
        ('{"id": "bad", "content": [', "not JSON|JSON"),
        (_image("torn.png"), r"torn\.png"),
        (_image("../outside.png"), r"outside\.png"),
    ],
    ids=["broken JSON", "unreadable image", "path that leaves the folder"],
)
def test_bad_document(tmp_path: Path, bad: str, cause: str) -> None:
    """Strict: an error, and what is there is no data set. Otherwise: counted, listed with its reason, left out."""
    folder = tmp_path / "documents"
    folder.mkdir()
    file, out = _documents(folder, bad), tmp_path / "set"
    before = listing(folder)
    settings = ("data.prepare.image.channels=1", "data.prepare.image.size=8", "data.prepare.image.patch=4")
    sizes = ("vocab.modalities.0.size=300", "vocab.modalities.1.size=8", "data.prepare.held_out=0")
    command = ("data", "prepare", "--documents", str(file), "--out", str(out), *settings, *sizes, "--workers", "1")
    assert_says(mmscale(*command, "--strict"), status=3, cause=cause, remedy="--strict")
    assert not (out / "manifest.json").exists()
    ended = mmscale(*command, "--json")
    assert ended.status == 0, ended
    (rejected,) = (json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines())
    assert rejected["reason"]
    assert json.loads((out / "manifest.json").read_text())["rejected"] == 1
    assert listing(folder) == before


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of one process, with two checkpoints."""
    runs = tmp_path_factory.mktemp("trained")
    settings = ("train.steps=2", "train.eval_every=0", "optim.warmup=1", "parallel.ep=1", "checkpoint.every=1")
    ended = mmscale("train", config, f"run.dir={runs}", *settings)
    assert ended.status == 0, ended
    return runs


def test_going_on_with_another_model(trained: Path, config: Path) -> None:
    """The run's config.yaml, too, stays that of the run."""
    cause = "step_00000002 holds another model: model.ffn_hidden_size was 64, is 128"
    rejects(config, trained, "model.ffn_hidden_size=128", status=4, cause=cause, remedy="run.name")


def test_starting_anew_among_old_checkpoints(trained: Path, config: Path) -> None:
    cause = "holds checkpoints up to step 2"
    rejects(config, trained, "checkpoint.resume=false", status=2, cause=cause, remedy="run.name")


@pytest.mark.parametrize(
    ("text", "status", "cause"),
    [("{}/nothing", 4, "there is no folder"), ("{}/tiny@9", 4, "no checkpoint of step 9"), ("{}/tiny@x", 2, "'x'")],
)
def test_no_checkpoint_for_eval(trained: Path, text: str, status: int, cause: str) -> None:
    assert_says(mmscale("eval", text.format(trained)), status=status, cause=cause, remedy=".")


def test_a_run_that_never_saved_has_nothing_to_evaluate(trained: Path, tmp_path: Path) -> None:
    shutil.copyfile(trained / "tiny" / "config.yaml", tmp_path / "config.yaml")
    assert_says(mmscale("eval", tmp_path), status=4, cause="holds no committed checkpoint", remedy="mmscale train")


# --- ranks ----------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_rank_that_dies_at_start(config: Path, tmp_path: Path) -> None:
    """Its name, how it ended and where its log is; the other rank does not wait for it for ever."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if os.environ.get('RANK') == '1':\n"
        "    print('no such device', file=sys.stderr, flush=True)\n"
        "    os._exit(11)\n"
    )
    runs = tmp_path / "runs"
    command = start(
        "train",
        config,
        f"run.dir={runs}",
        "--nproc",
        "2",
        environ={"PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])},
    )
    ended = command.end()
    assert_says(ended, status=1, cause="rank 1 of 2 ended with exit status 11", remedy=r"rank_1\.log")
    assert "no such device" in ended.err
    assert command.left_behind() == []
    assert {file.name for file in runs.rglob("*") if file.is_file()} == {"rank_1.log", "lease.json"}
