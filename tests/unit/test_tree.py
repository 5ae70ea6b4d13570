"""Names and sizes of source files: a file and a class are found by their name, and a file has one reason to change."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("mmscale", "launch", "slurm", "checkpoints_tools")
LONGEST = 400  # lines

# A command, and a benchmark, is a file named after what it runs or measures.
NAMED_AFTER_OTHERS = ("mmscale/cli", "mmscale/bench")
ALLOWED_TWINS = {
    "build.py": "model: the model's chunks; data/prepared: one data set, called by prepare.py",
    "breaks.py": "runs: finds breaks in curves; report: shows them",
    "batch.py": "launch: users' batch scripts call `python -m launch.batch`; train/steps: the batch of a step",
    "plugins.py": "config: the setting; tables: loading by import path or entry point",
    "preflight.py": "slurm: checks of a node, started by that name on nodes; train: checks of a run",
    "rules.py": "config: in the folder of each topic; all of them",
    "schema.py": "config: in the folder of each topic; the whole; data/documents: the document format",
    "settings.py": "checkpoint: the settings that a checkpoint was saved with; tables: those of an entry",
    "table.py": "tables: what a table of choices is; train/stages: the table of stages",
}


def sources() -> list[Path]:
    return [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]


def test_no_two_files_of_one_name() -> None:
    """An import, a traceback and a search lead to one file. Rename the new one after what it alone does."""
    found = defaultdict(list)
    for path in sources():
        place = path.relative_to(ROOT).as_posix()
        if path.name not in ("__init__.py", "__main__.py") and not place.startswith(NAMED_AFTER_OTHERS):
            found[path.name].append(place)
    twins = {name: places for name, places in found.items() if len(places) > 1}
    assert {name: places for name, places in twins.items() if name not in ALLOWED_TWINS} == {}
    assert set(ALLOWED_TWINS) <= set(twins), "remove from ALLOWED_TWINS what has no twin any more"


def test_no_two_files_of_tests_of_one_name() -> None:
    """pytest imports each by its base name, and stops when it meets a second one."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []


def test_no_two_classes_of_one_name() -> None:
    """Rename the one that fewer files use after what it alone is."""
    found = defaultdict(list)
    for path in sources():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(path.relative_to(ROOT).as_posix())
    assert {name: places for name, places in found.items() if len(places) > 1} == {}


def test_no_long_file() -> None:
    """Split it by reasons to change, a file of tests by topics."""
    files = [*sources(), *(ROOT / "tests").rglob("*.py")]
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in files}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST} == {}


def test_objects_are_gathered_by_one_function() -> None:
    """`mmscale.runtime.groups.gathered`, which makes a list of the right length."""
    users = [path for path in sources() if path.parts[-3:-1] != ("mmscale", "runtime")]
    found = [str(path.relative_to(ROOT)) for path in users if "all_gather_object" in path.read_text()]
    assert found == ["slurm/bandwidth.py"], "which imports torch alone"
