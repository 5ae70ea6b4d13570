"""Runs with `checkpoint.mirror`: what a run, a kill, a stage and a store that is away leave there, and how they go on.

tests/unit/checkpoint/test_mirror.py has the uploads and downloads themselves, test_s3_mirror.py an S3 server.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from mmscale.checkpoint import integrity
from mmscale.checkpoint.layout import Store
from mmscale.checkpoint.mirror.downloads import generations
from mmscale.checkpoint.mirror.remote import Remote
from mmscale.resilience.inject import VARIABLE
from mmscale.runs.events import read_events
from mmscale.runs.metrics import read_metrics
from tests.end_to_end.lives import Life
from tests.end_to_end.running import mmscale

STEPS = 12
SETTINGS = (
    f"train.steps={STEPS}",
    "checkpoint.every=4",
    "train.eval_every=0",
    "auxiliary.steps=4",
)
# Layouts and ways of saving that write a checkpoint, and the layout that goes on from the mirror.
WRITTEN = {
    "async": (2, ("parallel.ep=2",), ("parallel.ep=1", "parallel.tp=2")),
    "blocking": (
        2,
        ("parallel.ep=1", "parallel.pp=2", "checkpoint.asynchronous=false"),
        ("parallel.pp=1", "parallel.ep=2"),
    ),
    "grouped": (2, ("parallel.ep=2", "checkpoint.writers=1"), ("parallel.ep=1",)),
}


def events(run: Path, name: str) -> list[int | None]:
    return [event.get("step") for event in read_events(run) if event["event"] == name]


def mirrored(folder: Path) -> list[int]:
    return [one.step for one in generations(Remote(f"file://{folder}"))]


@pytest.mark.parametrize(
    "way",
    [pytest.param(way, marks=pytest.mark.long if way == "async" else pytest.mark.exhaustive) for way in WRITTEN],
)
def test_a_run_goes_on_elsewhere_from_its_mirror(config: Path, tmp_path: Path, way: str) -> None:
    """A run that was killed after step 10 continues elsewhere, with another layout and nothing of the first folder.

    Saves overlap steps of milliseconds, so which of them were committed by then depends on the machine's load. Early
    saves wait for those before them: when that of step 4 began, that of step 2 had been committed.
    """
    nproc, writing, other = WRITTEN[way]
    mirror = f"checkpoint.mirror=file://{tmp_path}/mirror"
    whole, first, second = tmp_path / "whole", tmp_path / "first", tmp_path / "second"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "*:10:step:kill")
        settings = (*SETTINGS, *writing, "checkpoint.early=4", mirror)
        killed = mmscale("train", config, f"run.dir={first}", *settings, nproc=nproc)
        assert killed.status not in (0, 2), killed
    store = Store.of_run(first / "tiny")
    newest = store.steps()[-1]
    assert newest in (2, 4, 8)
    if mirrored(tmp_path / "mirror" / "tiny")[-1:] != [newest]:  # the kill was faster than the upload
        ended = mmscale("ckpt", "mirror", first / "tiny", "--json")
        assert ended.status == 0, ended
    assert mirrored(tmp_path / "mirror" / "tiny")[-1] == newest
    store.root.rename(tmp_path / "gone")
    ended = mmscale("ckpt", "fetch", f"file://{tmp_path}/mirror/tiny", second / "tiny", "--json")
    assert ended.status == 0, ended
    assert [one["step"] for one in json.loads(ended.out)["fetched"]] == [newest]
    # `train RUN/config.yaml`: a new cluster has another folder for the mirror's next generations, or the same.
    ended = mmscale("train", second / "tiny" / "config.yaml", *other, nproc=nproc)
    assert ended.status == 0, ended
    assert mirrored(tmp_path / "mirror" / "tiny")[-1] == STEPS, "the second run's attempt is the newer one"
    ended = mmscale("train", config, f"run.dir={whole}", *SETTINGS, *other, nproc=nproc)
    assert ended.status == 0, ended
    one, again = ({row["step"]: row["loss"] for row in read_metrics(run / "tiny")} for run in (whole, second))
    assert set(again) == set(range(newest + 1, STEPS + 1))
    assert again == pytest.approx({step: one[step] for step in again}, rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("kept", ["memory", "memory and mirror", "mirror"])
def test_a_run_goes_on_inside_a_later_phase(kept: str, config: Path, places: dict[str, str], tmp_path: Path) -> None:
    """Rank 1 is killed four steps after schedule and blend changed: the next attempt has the rates and data of then."""
    sets = ((places["DIGITS"], "{0: 1, 6: 0.5}"), (places["OTHER"], "{0: 0, 6: 0.5}"))
    blend = ", ".join(f"{{path: {path}, weight: {weight}}}" for path, weight in sets)
    phases = "{start: 6, lr: 2e-3, warmup: 3, schedule: cosine}, {start: 11, schedule: constant}"
    settings = (*SETTINGS, "parallel.ep=2", "checkpoint.asynchronous=false", "checkpoint.every=8", "data.path=null")
    settings = (*settings, f"data.blend=[{blend}]", f"optim.phases=[{phases}]", "optim.warmup=2")
    command = ("train", str(config), *settings)
    command += ("resilience.memory_every=1",) * ("memory" in kept)
    command += (f"checkpoint.mirror=file://{tmp_path}/mirror",) * ("mirror" in kept)
    whole, run = tmp_path / "whole" / "tiny", tmp_path / "first" / "tiny"
    ended = mmscale("train", config, f"run.dir={whole.parent}", *settings, nproc=2)
    assert ended.status == 0, ended
    life = Life([*command, f"run.dir={run.parent}"], faults="*:9:step:slow=2, 1:10:step:kill")
    assert life.end()[1] == -signal.SIGKILL, life.said
    if "mirror" in kept and mirrored(tmp_path / "mirror" / "tiny")[-1:] != [8]:  # the kill was faster than the upload
        assert mmscale("ckpt", "mirror", run).status == 0
    if kept == "mirror":
        run.rename(tmp_path / "gone")
        assert mmscale("ckpt", "fetch", f"file://{tmp_path}/mirror/tiny", run).status == 0
    ended = mmscale(*command, f"run.dir={run.parent}", nproc=2)
    assert ended.status == 0, ended
    (resumed,) = events(run, "resume")
    assert resumed == 8 if kept == "mirror" else resumed in (8, 9), resumed
    assert len(events(run, "memory_restored")) == ("memory" in kept)
    one, again = ({row["step"]: row for row in read_metrics(folder)} for folder in (whole, run))
    assert set(range(resumed + 1, STEPS + 1)) <= set(again)
    for step in range(resumed + 1, STEPS + 1):
        for key in ("lr", "loss", "grad_norm", "sequences", "tokens"):
            assert again[step].get(key) == one[step].get(key), (step, key)
    assert [one[step]["lr"] for step in (7, 9, 12)] == pytest.approx([2e-3 / 3, 2e-3, one[12]["lr"]])
    if "mirror" in kept:
        assert mirrored(tmp_path / "mirror" / "tiny")[-1] == STEPS


@pytest.mark.long
def test_the_end_waits_for_the_mirror_and_the_stage_has_its_own(config: Path, tmp_path: Path) -> None:
    """At 400 kB/s the last upload outlives training; the routers' checkpoints are fetched with the main ones."""
    settings = (f"run.dir={tmp_path}/runs", *SETTINGS, f"checkpoint.mirror=file://{tmp_path}/mirror")
    ended = mmscale("train", config, *settings, "checkpoint.mirror_bandwidth=400k", nproc=2)
    assert ended.status == 0, ended
    run = tmp_path / "runs" / "tiny"
    assert mirrored(tmp_path / "mirror" / "tiny")[-1] == STEPS
    assert [event["event"] for event in read_events(run)][-1] == "finish"
    (shown,) = json.loads(mmscale("status", run, "--json").out)
    assert (shown["state"], shown["mirror"]) == ("finished", {"step": STEPS, "problem": ""})
    ended = mmscale("train", config, *settings, "--stage", "auxiliary", nproc=2)
    assert ended.status == 0, ended
    assert mmscale("ckpt", "mirror", run, "--json").status == 0
    new = tmp_path / "new" / "tiny"
    ended = mmscale("ckpt", "fetch", f"file://{tmp_path}/mirror/tiny", new, "--json")
    assert ended.status == 0, ended
    assert [(one["stage"], one["step"]) for one in json.loads(ended.out)["fetched"]] == [
        ("main", STEPS),
        ("auxiliary", 4),
    ]
    one, other = (
        json.loads(mmscale("eval", place, "--batches", "1", "--routing", "causal", "--json").out)
        for place in (run, new)
    )
    assert one["loss"] == other["loss"]
    for folder in (run, run / "auxiliary"):
        newest = Store.of_run(folder).choose()
        assert integrity.verify(Store.of_run(folder).path(newest), step=newest) == []


def test_a_store_that_is_away_ends_nothing(config: Path, tmp_path: Path) -> None:
    """The run trains to its end with status 0, says why the mirror lags behind, and the command uploads later."""
    (tmp_path / "mirror").write_text("in the way")
    settings = (*SETTINGS, f"checkpoint.mirror=file://{tmp_path}/mirror", "checkpoint.mirror_wait=2")
    ended = mmscale("train", config, f"run.dir={tmp_path}/runs", "parallel.ep=1", *settings)
    assert ended.status == 0, ended
    run = tmp_path / "runs" / "tiny"
    assert f"the mirror file://{tmp_path}/mirror/tiny is behind" in ended.out + ended.err
    assert events(run, "finish") == [STEPS] and not events(run, "mirror_uploaded") and events(run, "mirror_failed")
    ended = mmscale("ckpt", "mirror", run)
    assert ended.status == 4 and "NotADirectoryError" in ended.err
    (tmp_path / "mirror").unlink()
    assert mmscale("ckpt", "mirror", run).status == 0
    assert mirrored(tmp_path / "mirror" / "tiny") == Store.of_run(run).steps()[-2:]


def test_what_is_refused_before_anything_starts(config: Path, tmp_path: Path) -> None:
    """Credentials in a URL, which would be written into records, and stores for which no package is installed."""
    for url, said in (
        ("s3://key:hunter2@bucket/folder", "holds credentials"),
        ("bucket/folder", "is no URL"),
        ("file://folder", "named from the root"),
        ("gopher9://bucket/folder", "knows no store"),
    ):
        ended = mmscale("train", config, f"run.dir={tmp_path}", "parallel.ep=1", f"checkpoint.mirror={url}")
        assert ended.status == 2 and said in ended.err, ended
        assert "hunter2" not in ended.err and not (tmp_path / "tiny").exists()
