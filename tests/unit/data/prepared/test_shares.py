# mmscale/data/prepared/shares.py: several processes make what one makes; on SLURM: tests/slurm/test_prepare_array.py.
"""Tests of preparing a data set in shares."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import pickle
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mmscale.cli import main
from mmscale.data.prepared.encode import Encoded
from mmscale.data.prepared.folder import PLAN
from mmscale.data.prepared.manifest import read_manifest
from mmscale.data.prepared.parts import PartWriter
from mmscale.data.prepared.prepare import finish, plan_shares, prepare
from mmscale.data.prepared.shares import Share, preparation_status, rest_of
from mmscale.data.vocab import Vocabulary
from mmscale.errors import ConfigError, DataError
from tests.unit.data.samples import config, corpus, files_of, text, write_jsonl


def made(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in files_of(folder).items() if name != PLAN}


def test_shares_make_what_one_process_makes(tmp_path: Path) -> None:
    settings = config(documents=[str(corpus(tmp_path / "in", 40))], part_documents=6)
    prepare(settings, tmp_path / "one", progress=False)
    out = tmp_path / "several"
    shares = plan_shares(settings, out, number=4, progress=False)
    assert [len(one.jobs) for one in shares] == [2, 2, 2, 1]
    for number, share in enumerate(pickle.loads(pickle.dumps(shares))):
        if number != 2:  # one is lost: whoever finishes makes it good
            share()
        with pytest.raises(DataError):
            read_manifest(out)
    told = preparation_status(out)
    assert told is not None and (told["state"], told["done"], told["parts"]) == ("submitting", 5, 7)
    prepare(settings, out, progress=False)
    assert made(out) == made(tmp_path / "one")
    assert (preparation_status(out) or {})["state"] == "prepared" and preparation_status(tmp_path / "one") is None
    assert plan_shares(settings, out, number=4, progress=False) == []
    read_manifest(out)


def test_one_share_makes_what_the_others_leave_and_no_more(tmp_path: Path) -> None:
    """On GPUs the job that finishes has none: it refuses a set of which parts are missing."""
    settings = config(documents=[str(corpus(tmp_path / "in", 40))], part_documents=6)
    prepare(settings, tmp_path / "one", progress=False)
    out = tmp_path / "several"
    shares = plan_shares(settings, out, number=4, progress=False)
    rest = pickle.loads(pickle.dumps(rest_of(shares)))
    for share in shares[:2]:
        share()
    kept = {file: file.stat().st_mtime_ns for file in (out / "done").iterdir()}
    with pytest.raises(DataError, match=r"3 of 7 parts of .* are missing, and this job has no GPU") as refused:
        finish(settings, out, strict=None, workers=1, whole=True)
    assert "again: finished parts are kept" in refused.value.remedy
    rest()
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert (preparation_status(out) or {})["done"] == 7
    finish(settings, out, strict=None, workers=1, whole=True)
    assert made(out) == made(tmp_path / "one")


def test_nobody_else_prepares_meanwhile(tmp_path: Path) -> None:
    settings = config(documents=[str(corpus(tmp_path / "in", 10))], part_documents=3)
    shares = plan_shares(settings, tmp_path / "out", number=2, progress=False)
    with (tmp_path / "out/.lock").open("r") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        shares[0]()
        with pytest.raises(DataError, match="another process is preparing"):
            prepare(settings, tmp_path / "out", progress=False)
    prepare(settings, tmp_path / "out", progress=False)


@pytest.mark.parametrize("late", ["other documents", "finished", "removed"])
def test_a_late_share_leaves_the_folder_alone(tmp_path: Path, late: str, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (
        config(documents=[str(write_jsonl(tmp_path / f"{word}.jsonl", records))], part_documents=6)
        for word in ("first", "other")
        for records in [[{"id": str(n), "content": [text(f"{word} {n:03d}")]} for n in range(24)]]
    )
    out = tmp_path / "out"
    shares = plan_shares(first, out, number=2, progress=False)
    if late == "removed":
        shutil.rmtree(out)
    else:
        prepare(second if late == "other documents" else first, out, overwrite=True, progress=False)
        victim = sorted(out.glob("train/*.bin"))[0]
        victim.unlink()  # a share that makes parts would make it
    before = files_of(out)
    for share in shares:
        share()
    assert files_of(out) == before and out.exists() == (late != "removed")
    why = {"finished": "is finished", "removed": "is gone"}.get(late, "is made from something else by now")
    assert capsys.readouterr().err.count(f"{out} {why}; this task makes no parts of it") == len(shares)


def test_two_processes_that_make_one_part_do_not_mix_their_bytes(tmp_path: Path) -> None:
    document: Any = SimpleNamespace(where="x", id="x")
    vocabulary = Vocabulary(("text", "image"), ((0, 300), (300, 316)))
    rows = np.random.default_rng(0).integers(10, 299, (20, 5000))
    encoded = [Encoded(ids, np.array([5000, 0]), 3, document, 1) for ids in rows]
    one, other, alone = (PartWriter(tmp_path / name, "train/00000", vocabulary) for name in ("both", "both", "alone"))
    for number, piece in enumerate(encoded):
        one.add(piece)
        alone.add(piece)
        if number == 14:  # larger than a buffer: some of it is in the file by now
            other.add(encoded[0])
    alone.finish()
    one.finish()
    assert files_of(tmp_path / "both").keys() > files_of(tmp_path / "alone").keys()  # the other one writes on
    other.abort()
    assert files_of(tmp_path / "both") == files_of(tmp_path / "alone")


def test_a_part_that_was_killed_while_it_was_written_is_made_again(tmp_path: Path) -> None:
    settings = config(documents=[str(corpus(tmp_path / "in", 40))], part_documents=20)
    prepare(settings, tmp_path / "one", progress=False)
    out = tmp_path / "several"
    share, other = plan_shares(settings, out, number=2, progress=False)
    process = multiprocessing.get_context("fork").Process(target=_killed_in_a_part, args=(share,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (left,) = out.glob("*/*.tmp")
    other()
    share()
    assert left.exists() and len(list(out.glob("done/*.json"))) == 2  # it may be of a process that lives
    prepare(settings, out, progress=False)
    assert made(out) == made(tmp_path / "one")


def _killed_in_a_part(share: Share) -> None:
    add = PartWriter.add

    def killed(self: PartWriter, encoded: Encoded) -> None:
        add(self, encoded)
        os.kill(os.getpid(), signal.SIGKILL)

    PartWriter.add = killed  # type: ignore[method-assign]
    share()


def test_a_corpus_without_parts(tmp_path: Path) -> None:
    linked: Any = config(source="megatron", documents=["a.idx"])
    with pytest.raises(ConfigError, match="no parts to share"):
        plan_shares(linked, tmp_path / "out", number=2, progress=False)


def test_the_command_prepares_in_processes_of_this_machine(tmp_path: Path) -> None:
    documents = str(corpus(tmp_path / "in", 40))
    settings = ("data.prepare.part_documents=6", "data.prepare.image={kind: levels, size: 4, channels: 1}")
    sizes = "vocab.modalities=[{name: text, size: 300}, {name: image, size: 16}]"
    for name, more in (("one", ()), ("three", ("--tasks", "3"))):
        command = ["data", "prepare", "--documents", documents, "--out", str(tmp_path / name), *settings, sizes, *more]
        assert main(command) == 0
    assert made(tmp_path / "three") == made(tmp_path / "one")
    assert main([*command, "--overwrite"]) == 0 and made(tmp_path / "three") == made(tmp_path / "one")
    assert main([*command[:-2], "--cluster", "test"]) == 2
