"""README and docs: links lead somewhere, README stays short, the picture of imports is that of the import contracts."""

from __future__ import annotations

import functools
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmscale.config import Config, keys

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def _anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", text)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in _anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_blocks_are_closed(page: Path) -> None:
    """An open one turns the rest of the page inside out: text is shown as code, and code as text."""
    assert len(re.findall(r"^ *```", page.read_text(), flags=re.MULTILINE)) % 2 == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_configurations_can_be_copied(page: Path) -> None:
    """A block that begins with a section of the configuration is YAML, and all of its keys are settings."""
    for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL):
        found = re.match(r"(\w+): *(#.*)?\n", block)
        if found and found[1] in Config.model_fields:
            for key in _keys(yaml.safe_load(block)):
                assert _is_setting(key), (key, block)


def _keys(settings: Any, place: str = "") -> list[str]:
    """Dotted keys of the leaves."""
    if not isinstance(settings, dict):
        return [place]
    return [key for name, value in settings.items() for key in _keys(value, f"{place}.{name}" if place else name)]


def _is_setting(key: str) -> bool:
    """Whether a key is a setting, or lies in a mapping of the user's own names."""
    parts = key.split(".")
    beginnings = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    found = next((one for one in map(keys.find, beginnings) if one is not None), None)
    return found is not None and (found.section is None or found.name == key)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_item_of_a_list_begins_a_line(page: Path) -> None:
    """Lines that were filled anew hide an item behind the end of the one before it."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"[.;:)] [*-] (?:\*\*|`|[A-Z]).*", text) == []


@functools.cache
def _tests() -> dict[str, set[str]]:
    """Names of tests and of their classes, by the name of their file without `.py`."""
    files = {file.stem: file.read_text() for file in ROOT.glob("tests/**/test_*.py")}
    return {
        name: set(re.findall(r"^ *(?:def|class) ([Tt]est_?\w+)", text, re.MULTILINE)) for name, text in files.items()
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tests_that_a_page_names_exist(page: Path) -> None:
    """`tests/FOLDER/test_FILE.py`, `test_FILE::test_NAME`, and `…` for the rest of a name or the file named before."""
    text, tests = page.read_text(), _tests()
    names = {name for found in tests.values() for name in found}
    for path in re.findall(r"\btests/[\w/.-]*\w", text):
        assert (ROOT / path).exists() or (ROOT / f"{path}.py").exists() or list(ROOT.glob(f"{path}*")), path
    file = ""
    for named, name, cut in re.findall(r"(?:\b(test_\w+)(?:\.py)?|…)::(\w+)(…?)", text):
        file = named or file
        assert any(one == name or (cut and one.startswith(name)) for one in tests.get(file, ())), f"{file}::{name}"
    for name, cut in re.findall(r"(?<!:)\b(test_\w+)(…?)", text):
        known = {*tests, *names}
        assert name in known or (cut and any(one.startswith(name) for one in known)), name


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 180


def test_the_picture_of_imports_is_that_of_the_contracts() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    staircases = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    page = (ROOT / "docs" / "architecture.md").read_text()
    pictures = re.findall(r"```\n([^`]*? <- [^`]*?)```", page)
    for layers, picture in zip(staircases, pictures, strict=True):
        wanted = [set(re.findall(r"\(([\w.]+)\)", layer.replace("mmscale.", ""))) for layer in reversed(layers)]
        assert [set(re.findall(r"\w+", layer)) for layer in picture.split("<-")] == wanted
        for package in set().union(*wanted):
            assert re.search(rf"(^|\s){package}(/|\.py)(\s|$)", page, flags=re.MULTILINE), package


def test_make_security_runs_what_the_page_names() -> None:
    page = (ROOT / "docs" / "security.md").read_text()
    named = set(re.findall(r"`(?:tests/[\w/]+/)?(test_\w+)[`:]", page))
    listed = re.search(r"^SECURITY := ((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert listed is not None
    files = [ROOT / name for name in listed[1].replace("\\\n", " ").split()]
    assert [str(file) for file in files if not file.is_file()] == []
    assert {file.stem for file in files} == named


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/extending/*.md")), ids=lambda page: page.name)
def test_code_of_a_how_to_page_is_that_of_the_example(page: Path) -> None:
    """Which is what tests run."""
    blocks = re.findall(r"```python\n# (\S+)\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert blocks or page.name == "index.md"
    for file, code in blocks:
        assert code == (ROOT / file).read_text(), file


def test_every_choice_is_on_the_reference_page() -> None:
    from docs.reference import generate
    from mmscale.tables import settings
    from mmscale.tables.plugins import PLUGINS
    from mmscale.tables.routings import ROUTINGS
    from mmscale.tables.table import Table

    page = generate.choices()
    for table in (*(one for one in vars(settings).values() if isinstance(one, Table)), ROUTINGS):
        assert all(f"| `{name}` | {choice.meaning} |" in page for name, choice in table.items()), table.title
    assert all(f"| {name} |" in page for name in PLUGINS)
    assert all((ROOT / "docs" / kind.page).is_file() for kind in PLUGINS.values())
