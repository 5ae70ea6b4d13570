"""examples/icons: names, styles and splits of icons, and what the questions ask; pictures need no renderer here."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mmscale.data.documents.readers import list_files, scan_files
from mmscale.data.documents.schema import Document

ROOT = Path(__file__).parents[2]
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010100000000376ef9240000000a49444154789c6360000000020001"
    "48afa4710000000049454e44ae426082"
)


@pytest.fixture(scope="module")
def render() -> Any:
    spec = importlib.util.spec_from_file_location("render_icons", ROOT / "examples/icons/render.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def package(folder: Path, names: list[str], *, suffixes: tuple[str, ...] = ()) -> Path:
    folder.mkdir(parents=True)
    icons: dict[str, Any] = {name: {"body": "<path d='M0 0h24v24z'/>"} for name in names}
    icons["gone"] = {"body": "", "hidden": True}
    (folder / "icons.json").write_text(json.dumps({"prefix": folder.name, "icons": icons, "width": 24, "height": 24}))
    info = {"name": folder.name.title(), "total": len(names), "author": {"name": "A"}, "license": {"title": "MIT"}}
    (folder / "info.json").write_text(json.dumps(info))
    (folder / "package.json").write_text(json.dumps({"version": "1.0.0"}))
    if suffixes:
        (folder / "metadata.json").write_text(json.dumps({"suffixes": dict.fromkeys(suffixes, "A style")}))
    return folder


def test_names_lose_their_style_and_their_size(render: Any, tmp_path: Path) -> None:
    names = [
        "arrow-left",
        "arrow-left-16-filled",
        "arrow-left-24-filled",
        "bell-outline-sharp",
        "dice-3",
        "fill",
        "tv-24px",
    ]
    folder = package(tmp_path / "set", names, suffixes=("", "16-filled", "24-filled", "outline-sharp"))
    found = {icon.key: (icon.name, icon.style) for icon in render.icons(folder)}
    assert found == {
        "arrow-left": ("arrow left", ""),
        "arrow-left-16-filled": ("arrow left", "filled"),  # of two sizes the first
        "bell-outline-sharp": ("bell", "outline sharp"),
        "dice-3": ("dice", ""),
        "fill": ("fill", ""),
        "tv-24px": ("tv", ""),
    }


def test_documents_can_be_read_and_names_are_held_out_across_sets(
    render: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render, "render", lambda icon, edge: PNG)
    names = [f"icon{number}x" for number in range(200)]
    for name in ("one", "two"):
        render.write_set(package(tmp_path / name, [f"{own}-fill" for own in names]), tmp_path / "out", 32)
    files = sorted((tmp_path / "out/documents").glob("*.parquet"))
    read = [
        one
        for piece in scan_files(list_files([str(file) for file in files]), slice_records=100, threads=1)
        for one in piece.read()
    ]
    assert len(read) == 800
    assert all(isinstance(one, Document) for one in read)
    splits: dict[str, set[str]] = {}
    for row in (row for file in files for row in pq.read_table(file).to_pylist()):
        splits.setdefault(row["group"], set()).add(row["split"])
    assert all(len(own) == 1 for own in splits.values())
    held = [name for name, own in splits.items() if own == {"validation"}]
    assert 2 <= len(held) <= 25
    monkeypatch.setattr(render, "CHOICES", 2)
    assert render.write_questions(tmp_path / "out") == len(held)
    for line in map(json.loads, (tmp_path / "out/which.jsonl").read_text().splitlines()):
        assert line["choices"][line["answer"]] == f" {line['id']},"
        assert (tmp_path / "out" / line["content"][0]["path"]).is_file()
    render.write_credits([tmp_path / "one"], tmp_path / "out")
    assert "| One | `@iconify-json/one` 1.0.0 | 200 | A | MIT |" in (tmp_path / "out/credits.md").read_text()
