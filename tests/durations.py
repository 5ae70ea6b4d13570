# Tests are ranked by processor time, because wall time on a shared machine depends on other processes. Does not
# decide which tests run or how long they may take.
"""A plugin of pytest that appends processor and wall time of every phase of every test to a table.

    python -m pytest -p tests.durations --durations-to FILE ...
    python -m tests.durations FILE       # a page about the table

Columns, separated by tabs: folder, file, test, phase (collection, setup, call, teardown), user and system seconds of
this process and of the children it has waited for, wall seconds. Nobody here waits for daemons and what they start:
`MMSCALE_CPUACCT` names a file in which the kernel counts the nanoseconds of a control group (cpuacct.usage); then the
column `user` has all processes of that group, and `system` is 0.
"""

from __future__ import annotations

import csv
import os
import resource
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

COLUMNS = ("folder", "file", "test", "phase", "user", "system", "wall")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--durations-to", type=Path, required=False, help="append the cost of each test to this table")


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--durations-to")
    if file is not None:
        config.pluginmanager.register(Durations(file, os.environ.get("MMSCALE_CPUACCT")))


class Durations:
    """Writes one line per phase of a test.

    Args:
        file: the table; a new file gets a first line with the names of the columns.
        counter: a file with nanoseconds, used instead of the times of this process and its children.
    """

    def __init__(self, file: Path, counter: str | None) -> None:
        self._counter = Path(counter) if counter else None
        self._began = self._now()
        new = not file.exists() or not file.stat().st_size
        self._table = file.open("a", buffering=1)
        if new:
            self._table.write("\t".join(COLUMNS) + "\n")

    def _now(self) -> tuple[float, float, float]:
        if self._counter is not None:
            return int(self._counter.read_text()) / 1e9, 0.0, time.monotonic()
        own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
        return own.ru_utime + children.ru_utime, own.ru_stime + children.ru_stime, time.monotonic()

    def _write(self, nodeid: str, phase: str, began: tuple[float, float, float]) -> None:
        file, _, test = nodeid.partition("::")
        folder = "/".join(file.split("/")[:2])
        spent = [f"{now - then:.3f}" for now, then in zip(self._now(), began, strict=True)]
        self._table.write("\t".join([folder, file, test.replace("\t", " "), phase, *spent]) + "\n")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Write the time of imports and of generated parameters."""
        if session.items:
            self._write(f"{session.items[0].nodeid.partition('::')[0]}::", "collection", self._began)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        """Write the time of fixtures; a shared fixture counts for the first test that uses it."""
        began = self._now()
        try:
            return (yield)
        finally:
            self._write(item.nodeid, "setup", began)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        began = self._now()
        try:
            return (yield)
        finally:
            self._write(item.nodeid, "call", began)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Iterator[None]:
        began = self._now()
        try:
            return (yield)
        finally:
            self._write(item.nodeid, "teardown", began)

    def pytest_unconfigure(self) -> None:
        self._table.close()


def page(file: Path, *, files: int = 25, tests: int = 40) -> str:
    """Tables in Markdown: folders, the most expensive files, and the most expensive phases of tests."""
    with file.open() as table:
        rows = [
            row for row in csv.DictReader(table, delimiter="\t", quoting=csv.QUOTE_NONE) if row["folder"] != "folder"
        ]
    lines = ["| folder | tests | CPU s | of it system | collection | wall s |", "| --- | --: | --: | --: | --: | --: |"]
    spent: defaultdict[str, Counter[str]] = defaultdict(Counter)
    by_file: Counter[str] = Counter()
    for row in rows:
        cpu = float(row["user"]) + float(row["system"])
        folder = spent[row["folder"]]
        folder.update(tests=int(row["phase"] == "call"))
        for column, value in (("cpu", cpu), ("system", float(row["system"])), ("wall", float(row["wall"]))):
            folder[column] += value  # type: ignore[assignment]
        if row["phase"] == "collection":
            folder["collection"] += cpu  # type: ignore[assignment]
        else:
            by_file[row["file"]] += cpu  # type: ignore[assignment]
    for name, folder in sorted(spent.items(), key=lambda item: -item[1]["cpu"]):
        cells = [f"{folder[column]:.0f}" for column in ("tests", "cpu", "system", "collection", "wall")]
        lines.append(f"| {' | '.join([name, *cells])} |")
    lines += ["", "| file | CPU s |", "| --- | --: |"]
    lines += [f"| {name.removeprefix('tests/')} | {cpu:.1f} |" for name, cpu in by_file.most_common(files)]
    lines += ["", "| test | phase | CPU s | wall s |", "| --- | --- | --: | --: |"]
    rows = [row for row in rows if row["phase"] != "collection"]
    for row in sorted(rows, key=lambda row: -float(row["user"]) - float(row["system"]))[:tests]:
        name = f"{row['file'].removeprefix('tests/')}::{row['test']}".replace("|", "/")
        lines.append(
            f"| {name} | {row['phase']} | {float(row['user']) + float(row['system']):.1f} | {float(row['wall']):.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(Path(sys.argv[1])))
