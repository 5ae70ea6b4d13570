"""Deduplication by several tasks: the bytes of one process, whatever happens to the tasks."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmscale.data.dedup import apply, clusters, compared, shared, work
from mmscale.data.dedup.compared_files import Compared, RecordBlock
from mmscale.data.dedup.pairs import DuplicateRule
from mmscale.data.prepared.prepare import prepare
from mmscale.data.prepared.selection import FOLDER, read_selection
from mmscale.data.process_pool import run_stages
from mmscale.data.progress import Reporter
from mmscale.errors import DataError
from tests.unit.data.samples import config, image, save_picture, text, write_jsonl

SILENT = Reporter(enabled=False)
RULES = (DuplicateRule(), DuplicateRule("image"), DuplicateRule("text", exact=True))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several slices and ranges of keys."""
    monkeypatch.setattr(compared.slices, "__kwdefaults__", {"size": 11})
    monkeypatch.setattr(work, "RANGE", 200)
    monkeypatch.setattr(clusters, "_CHUNK", 16)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts and pictures with duplicates, some held out."""
    folder, rng = tmp_path_factory.mktemp("shared"), np.random.default_rng(0)
    words = [f"w{n}" for n in range(60)]
    texts = [" ".join(rng.choice(words, 30)) for _ in range(25)]
    documents = []
    for n in range(80):
        own: list[Any] = [text(texts[n % 25])]
        if n % 3 == 0:
            save_picture(folder / f"img/{n % 15}.png", n % 15)
            own.insert(0, image(f"img/{n % 15}.png"))
        documents.append({"id": f"d{n}", "content": own, "split": "validation" if n % 20 == 19 else "train"})
    settings = {"source": "documents", "documents": [str(write_jsonl(folder / "d.jsonl", documents))]}
    prepare(config(vocab={"text": 600, "image": 16}, part_documents=30, **settings), folder / "set", progress=False)
    return folder / "set"


@pytest.fixture
def sets(made: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copies of the data set, by name."""

    def copied(name: str) -> Path:
        shutil.copytree(made, tmp_path / name)
        return tmp_path / name

    return copied


def selection_bytes(folder: Path) -> dict[str, bytes]:
    """The files of weights, without the path of the data set."""
    return {file.name: file.read_bytes().replace(str(folder).encode(), b"SET") for file in (folder / FOLDER).iterdir()}


def planned(folder: Path, rule: DuplicateRule, tasks: int = 4) -> shared.SharedDedup:
    return shared.plan_tasks(folder, rule=rule, tasks=tasks)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.match)
@pytest.mark.parametrize("tasks", [1, 3, 50])
def test_tasks_write_the_bytes_of_one_process(sets: Callable[[str], Path], rule: DuplicateRule, tasks: int) -> None:
    one, several = sets("one"), sets("several")
    alone = apply.dedup(one, rule=rule, reporter=SILENT)
    plan = planned(several, rule, tasks)
    assert len(plan.work.blocks) == min(tasks, len(plan.work.pieces)) and len(plan.work.pieces) > 3
    found: Any = None
    for stage in plan.stages(workers=1):
        for task in pickle.loads(pickle.dumps(stage)):
            found = task()
    assert 0 < found["kept"] < found["documents"]
    assert {**found, "folder": "", "against": []} == {**alone, "folder": "", "against": []}
    assert selection_bytes(several) == selection_bytes(one)
    assert not plan.work.scratch.exists()


@pytest.mark.usefixtures("small")
def test_the_last_task_does_what_killed_ones_left_undone(sets: Callable[[str], Path]) -> None:
    one, several = sets("one"), sets("several")
    apply.dedup(one, rule=RULES[0], reporter=SILENT)
    plan = planned(several, RULES[0])
    reads, compares, (last,) = plan.stages(workers=1)
    reads[0]()
    reads[2]()
    compares[0]()  # not all slices are read: it leaves the work to the last
    assert not list(plan.work.scratch.glob("pairs-*"))
    reads[1]()
    reads[3]()
    compares[1]()
    done = {file: file.stat().st_mtime_ns for file in plan.work.scratch.glob("*.npy")}
    assert len(done) > 3
    (several / "train").rename(several / "gone")  # what is done is not read again
    reads[0]()
    (several / "gone").rename(several / "train")
    last()
    assert selection_bytes(several) == selection_bytes(one)
    for late in (*reads, *compares):
        late()
    assert not plan.work.scratch.exists()


def test_processes_of_this_machine(sets: Callable[[str], Path]) -> None:
    one, several = sets("one"), sets("several")
    apply.dedup(one, rule=RULES[0], reporter=SILENT)
    (found,) = run_stages(planned(several, RULES[0]).stages(workers=1), tasks=2)
    assert found["kept"] == json.loads((one / FOLDER / "selection.json").read_text())["kept"]
    assert selection_bytes(several) == selection_bytes(one)


@pytest.mark.usefixtures("small")
def test_other_documents_and_two_last_tasks_are_refused(sets: Callable[[str], Path], made: Path) -> None:
    folder = sets("one")
    plan = planned(folder, RULES[0])
    (last,) = plan.stages(workers=1)[2]
    with shared._locked(plan.work.scratch), pytest.raises(DataError, match="another process finishes the work"):
        last()
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"source": "0" * 64}))
    with pytest.raises(DataError, match="has other documents than when the tasks began"):
        last()
    assert read_selection(folder) is None


def test_another_request_has_another_folder(sets: Callable[[str], Path]) -> None:
    folder = sets("one")
    folders = {planned(folder, rule, tasks).work.scratch for rule in RULES for tasks in (1, 2)}
    assert len(folders) == 6
    assert planned(folder, RULES[0]).jobs() == []
    planned(folder, RULES[0]).keep_jobs(["17_0", "18"])
    assert planned(folder, RULES[0]).jobs() == ["17_0", "18"]


def test_records_of_several_folders_are_one_array(tmp_path: Path) -> None:
    blocks = [RecordBlock(tmp_path / str(first), first, stop) for first, stop in ((0, 3), (3, 4), (4, 9))]
    for block in blocks:
        block.create()
    records = Compared(blocks)
    for number in range(9):
        records.signatures.write(number, np.full(128, number))
        records.flush(number)
    wanted = np.array([8, 0, 3, 3, 2, 5])
    assert Compared(blocks).signatures.of(wanted)[:, 7].tolist() == wanted.tolist()
    assert records.signatures.between(5, 8)[:, 0].tolist() == [5, 6, 7]
    blocks[0].create()  # again, by a command that goes on: nothing is lost
    assert Compared(blocks).signatures.of(np.arange(9))[:, 0].tolist() == list(range(9))
