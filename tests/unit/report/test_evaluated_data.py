"""A report says whose held-out values are of other documents, and which data a run was given."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from launch.goodput import goodput
from mmscale.data.prepared.prepare import prepare
from mmscale.report import facts, page
from tests.unit.data.samples import config, text, write_jsonl

SAID = "values are of other documents in each run, and cannot be compared"


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two data sets, a copy of the first one, and a set that holds nothing out."""
    folder = tmp_path_factory.mktemp("sets")
    made = {}
    for name, share in (("one", 0.3), ("other", 0.3), ("whole", 0.0)):
        records = [{"id": f"{name}{n}", "content": [text(f"{name} {n}")]} for n in range(20)]
        settings = config(documents=[str(write_jsonl(folder / f"{name}.jsonl", records))], held_out=share)
        made[name] = folder / name
        prepare(settings, made[name], progress=False)
    return made | {"copy": Path(shutil.copytree(made["one"], folder / "copy")), "gone": folder / "gone"}


def run(folder: Path, data: str, *, evaluated: bool = True) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(f"data: {data}\ntrain: {{steps: 5}}\n")
    values = {"eval/loss/text": 2.5, "eval/validation/web/loss/text": 2.5} if evaluated else {}
    lines = [{"step": 1, "attempt": 1, "loss": 2.0, "loss/text": 2.0}, {"step": 1, "attempt": 1, **values}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


DATA: dict[str, tuple[str, str, list[str]]] = {
    "same": ("path: {one}", "path: {one}", []),
    "a copy": ("path: {one}", "path: {copy}", []),
    "other": ("path: {one}", "path: {other}", ["Held-out"]),
    "missing": ("path: {one}", "path: {gone}", ["Held-out"]),
    "blend": ("path: {one}", "blend: [{{path: {one}}}, {{path: {other}}}]", ["Held-out"]),
    "a source that holds nothing out": ("path: {one}", "blend: [{{path: {copy}}}, {{path: {whole}}}]", []),
    "validation": (
        "path: {one}, validation: {{web: {one}}}",
        "path: {one}, validation: {{web: {other}}}",
        ["Validation web"],
    ),
}


@pytest.mark.parametrize("what", DATA)
@pytest.mark.parametrize("evaluated", [True, False])
def test_other_documents_are_named(what: str, evaluated: bool, sets: dict[str, Path], tmp_path: Path) -> None:
    first, second, wanted = DATA[what]
    given = [f"{{{one.format(**sets)}}}" for one in (first, second)]
    runs = [run(tmp_path / name, data, evaluated=evaluated) for name, data in zip(("a", "b"), given, strict=True)]
    page.write_page(page.read_runs(runs, goodput=goodput), tmp_path / "report.html")
    text_of = (tmp_path / "report.html").read_text()
    assert [one for one in ("Held-out", "Validation web") if f"{one} {SAID}" in text_of] == (
        wanted if evaluated else []
    )
    page.write_page(page.read_runs(runs[:1], goodput=goodput), tmp_path / "one.html")
    assert SAID not in (tmp_path / "one.html").read_text()


def test_an_added_validation_set_is_one_change(tmp_path: Path) -> None:
    """Not also a change of the empty section that it is in."""
    for attempt, data in enumerate(("{path: a, validation: {}}", "{path: a, validation: {web: b}}"), start=1):
        (tmp_path / f"config.{attempt}.yaml").write_text(f"data: {data}\n")
    assert facts.changes(tmp_path) == [(2, "data.validation.web", None, "b")]
