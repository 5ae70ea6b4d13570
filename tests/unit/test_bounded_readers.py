"""Every reader of files from outside: hostile, wrong and randomly changed ones are read or refused in words."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoints_tools.huggingface.export_settings import (
    CONFIG,
    config_of_export,
    is_ours,
    read_config,
    tokenizers_of_export,
)
from checkpoints_tools.huggingface.files import INDEX as WEIGHTS_INDEX
from checkpoints_tools.huggingface.files import ModelFiles
from launch import budget, record
from launch.goodput import goodput
from launch.policy import Budget
from launch.status import status
from mmscale.checkpoint import integrity
from mmscale.checkpoint.layout import Store
from mmscale.data.prepared.manifest import Manifest, Part, Split, Task, read_manifest
from mmscale.data.prepared.tasks import read_task
from mmscale.errors import CheckpointError, MmscaleError
from mmscale.report import history
from mmscale.report.facts import environment, results
from mmscale.report.layers import layers_of
from mmscale.report.timeline import timeline_of
from mmscale.resilience import generations, snapshot_files, watchdog
from mmscale.runs.attempts import next_attempt
from mmscale.runs.events import EVENTS, read_events
from mmscale.runs.metrics import LAYERS, METRICS, read_metrics
from mmscale.runs.run_progress import PROGRESS, RunProgress
from tests.bounded_work import bounded_work
from tests.unit.test_bounded import DEEP

# --- every reader -----------------------------------------------------------------------------------------------------

_DIGEST = integrity.FileRecord(3, integrity.text_digest("abc"))
_MANIFEST = integrity.CheckpointManifest(2, 1, "c", "0.2", {"world_size": 2}, {"a.distcp": _DIGEST})
_PART = Part(prefix="train/00000", documents=0, tokens={"text": 0}, bin_bytes=0, idx_bytes=0)
_DATA = Manifest(
    format=1,
    modalities=("text",),
    ranges=((0, 300),),
    vocabulary="v",
    text_tokenizer="t",
    image_tokenizer="none",
    tokens_per_image=0,
    splits={"train": Split(parts=(_PART,))},
)
_GENERATION = {"name": "n", "attempt": 1, "identity": {}, "groups": [[0, 1]], "folders": ["/dev/shm/x"]}
_EVENTS = [
    {"time": 1.0, "attempt": 1, "event": "launch", "since": 0.5, "launch": "001"},
    {"time": 2.0, "attempt": 1, "event": "start", "step": 0},
    {"time": 3.0, "attempt": 1, "event": "save_committed", "step": 2},
    {"time": 5.0, "attempt": 1, "event": "ranks_ended", "status": 1, "cause": "rank 0", "over": False},
    {"time": 6.0, "attempt": 2, "event": "resume", "step": 2},
    {"time": 8.0, "attempt": 2, "event": "finish", "step": 4},
]
_FIGURES = {"loss": 2.0, "loss/text": 2.0, "step_time_s": 0.1, "save_stall_s": 0.0, "eval_s": 0.0, "time": 3.0}
_METRICS = [
    {"step": 1, "attempt": 1, **_FIGURES, "tokens_per_second": 5.0},
    {"step": 2, "attempt": 1, **_FIGURES, "slowest_rank": 1, "rank_time_median_s": 0.1, "rank_time_max_s": 0.2},
    {"step": 3, "attempt": 2, "rollback": 1, **_FIGURES},
    {"step": 3, "attempt": 2, "rollback": 1, "eval/loss/text": 1.5},
]
_LAYER = {"experts": {"up": {"text": {"load": [0.5, 0.5], "coselection": [[0, 1]]}}}, "norm": 1.0}
_RECORD = {"folder": "f", "run": "r", "cwd": "c", "cluster": "x", "profile": {}, "nodes": 1, "tasks_per_node": 1}
_JOB = {"job": "12", "cluster": "c", "name": "n", "submitted": "s", "log": "l"}
_MARKER = {"members": [0, 1], "lengths": [3, 3], "digests": ["a", "b"], "rank": 0, "step": 1, "serial": 2}


def _manifest(folder: Path) -> Any:
    """With a digest of its own that fits: whoever changes a manifest can compute it."""
    file = folder / integrity.MANIFEST
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
        manifest = json.loads(file.read_text())["manifest"]
        whole = {"manifest": manifest, "digest": integrity.text_digest(json.dumps(manifest, indent=1, sort_keys=True))}
        file.write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n")
    try:
        return integrity.verify(folder, step=2)
    except integrity.NoManifestError:
        return None


def _run(folder: Path) -> Any:
    """All that a report and `status` compute of a run's logs."""
    events, told = read_events(folder), history.read(folder)
    goodput(events, read_metrics(folder), now=10.0)
    timeline = timeline_of(events, told, begin=0.0, goodput=goodput)
    timeline.as_json()
    results(told, timeline=timeline, events=events)
    layers_of(folder)
    environment(folder)
    next_attempt(folder)
    return status([folder])


def _model(folder: Path) -> Any:
    content = read_config(folder)
    return is_ours(folder, content) and config_of_export(folder, content), tokenizers_of_export(folder, content)


@dataclass(frozen=True)
class Reader:
    file: str
    content: Any
    read: Callable[[Path], Any]
    lines: bool = False


READERS = {
    "manifest of a checkpoint": Reader(integrity.MANIFEST, json.loads(_MANIFEST.text()), _manifest),
    "info of a checkpoint": Reader(
        "checkpoints/step_00000002/mmscale.json",
        {"format": 2},
        lambda folder: (store := Store.of_run(folder)).info(2) and store.promises_manifest(2),
    ),
    "manifest of data": Reader("manifest.json", json.loads(_DATA.model_dump_json()), read_manifest),
    "task": Reader(
        "tasks.jsonl",
        [{"ids": [1, 2, 3], "answer": [1, 2], "choices": [[2], [5]]}],
        lambda folder: read_task(
            folder, _DATA.model_copy(update={"tasks": (Task(name="t", file="tasks.jsonl"),)}), "t"
        ),
        lines=True,
    ),
    "generations": Reader(
        generations.INDEX, {"format": generations.FORMAT, "generations": [_GENERATION]}, generations.read_index
    ),
    "hang reports": Reader(
        f"{watchdog.FOLDER}/rank_0.json",
        asdict(watchdog.HangReport(0, "h", 1, 2, 3.0, True, ["a"])),
        lambda folder: (found := watchdog.reports(folder)) and watchdog.culprits(found, world_size=2),
    ),
    "launch": Reader(record.RECORD, _RECORD, record.read_record),
    "job": Reader(record.JOB, _JOB, lambda folder: (record.keys_of(folder), record.job_log(folder, "12"))),
    "budget": Reader("budget.json", asdict(Budget()), budget.load),
    "progress": Reader(
        PROGRESS, {"offset": 0, "last": {}, "attempts": {"1": [[1, 0.1, 0.0, 0.0, True]]}}, RunProgress.load
    ),
    "config of a model": Reader(CONFIG, {"num_hidden_layers": 2, "mmscale": {"config": {}, "tokenizers": {}}}, _model),
    "index of weights": Reader(WEIGHTS_INDEX, {"weight_map": {"a": "model.safetensors"}}, ModelFiles),
    "events": Reader(EVENTS, _EVENTS, _run, lines=True),
    "metrics": Reader(METRICS, _METRICS, _run, lines=True),
    "layers": Reader(LAYERS, [{"step": 1, "attempt": 1, "layers": {"0": _LAYER}}] * 2, _run, lines=True),
    "environment": Reader("environment.json", {"git": {"diff": "x"}, "packages": ["a"]}, _run),
}
# What readers raise in words of their own, besides errors of ours.
IN_WORDS = (MmscaleError, integrity.DamagedError, snapshot_files.UnusableError)


def place(reader: Reader, folder: Path, text: str | bytes) -> None:
    file = folder / reader.file
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    (folder / "config.yaml").write_text("train: {steps: 4}\n")
    for logged, lines in ((EVENTS, _EVENTS), (METRICS, _METRICS)):
        if file.name != logged and reader.read is _run:
            (folder / logged).write_text("".join(json.dumps(line) + "\n" for line in lines))


def text_of(reader: Reader, content: Any) -> str:
    if reader.lines and isinstance(content, list):
        return "".join(json.dumps(line) + "\n" for line in content)
    return json.dumps(content)


def read_in_words(reader: Reader, folder: Path) -> Any:
    """What it read, or the error that said why not; anything but words fails, and so does work without a bound."""
    with bounded_work():
        try:
            found: Any = reader.read(folder)
        except IN_WORDS as error:
            found = error
    assert not isinstance(found, Exception) or len(str(found)) < 2000
    return found


@pytest.mark.parametrize("name", READERS)
def test_readers_read_what_is_right(tmp_path: Path, name: str) -> None:
    reader = READERS[name]
    place(reader, tmp_path, text_of(reader, reader.content))
    read_in_words(reader, tmp_path)


TEXTS: dict[str, str | bytes] = {
    **DEEP,
    "empty": b"",
    "NUL": bytes(1000),
    "not UTF-8": b"\xff\xfe{",
    "half": b'{"a": ',
    "null": b"null",
    "a list": b"[]",
    "a number": b"1e999",
    "digits": b'{"format": ' + b"9" * 5000 + b"}",
    "a surrogate": b'{"event": "\\ud800", "time": 1}',
}


@pytest.mark.parametrize("name", READERS)
def test_no_reader_stumbles(tmp_path: Path, name: str) -> None:
    for text in TEXTS.values():
        place(READERS[name], tmp_path, text)
        read_in_words(READERS[name], tmp_path)


_WRONG: tuple[Any, ...] = (None, True, -1, 0, 1.5, 2**53 + 1, 10**30, 1e308, math.inf, math.nan, "", "x", "nan", "../x")
_VALUES = st.sampled_from([*_WRONG, "\ud800", [], {}, [None], [[]], {"a": None}, [1, "x"], [10**12] * 3])


@st.composite
def changed(draw: st.DrawFn, content: Any) -> Any:
    """A value with one of its parts replaced or left out."""
    if not isinstance(content, dict | list) or not content or draw(st.integers(0, 9)) == 0:
        return draw(_VALUES)
    keys = list(content) if isinstance(content, dict) else list(range(len(content)))
    key = draw(st.sampled_from(keys))
    copy = dict(content) if isinstance(content, dict) else list(content)
    if draw(st.integers(0, 4)) == 0:
        del copy[key]
    else:
        copy[key] = draw(changed(content[key]))
    return copy


def fuzz(name: str, data: st.DataObject, folder: Path) -> None:
    reader = READERS[name]
    content = data.draw(changed(reader.content))
    for _ in range(data.draw(st.integers(0, 2))):
        content = data.draw(changed(content))
    place(reader, folder, text_of(reader, content))
    read_in_words(reader, folder)


_FOLDER = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(deadline=None, max_examples=200, suppress_health_check=_FOLDER)
@given(name=st.sampled_from(sorted(READERS)), data=st.data())
def test_changed_files_are_read_or_refused_in_words(tmp_path: Path, name: str, data: st.DataObject) -> None:
    fuzz(name, data, tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", READERS)
@settings(deadline=None, max_examples=5000, suppress_health_check=_FOLDER)
@given(data=st.data())
def test_many_changed_files(tmp_path: Path, name: str, data: st.DataObject) -> None:
    fuzz(name, data, tmp_path)


@pytest.mark.parametrize("layers", [200_000_000, 10**15, 0, -1, "2", None, 1.5, True])
def test_a_model_with_too_many_layers(tmp_path: Path, layers: Any) -> None:
    (tmp_path / CONFIG).write_text(json.dumps({"num_hidden_layers": layers}))
    with pytest.raises(CheckpointError, match=r"num_hidden_layers is .* not a whole number from 1 to"):
        read_config(tmp_path)


@pytest.mark.parametrize("prefix", ["../train/00000", "/etc/passwd", "a/../../b", "", "a\\b"])
def test_parts_of_a_data_set_stay_inside_it(tmp_path: Path, prefix: str) -> None:
    content = json.loads(_DATA.model_dump_json())
    content["splits"]["train"]["parts"][0]["prefix"] = prefix
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(MmscaleError, match="is damaged"):
        read_manifest(tmp_path)
