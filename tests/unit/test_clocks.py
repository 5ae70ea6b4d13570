# Holds the rule that no test asserts how fast something is; tests/durations.py measures what takes long.
"""Bounds on time are ceilings that a busy machine does not meet, and hypothesis has no deadline.

An upper bound that an assertion, a refusal or a wait for something states must be at least `CEILING_S` of
tests/bounded_work.py. To show that something is quick, count what it does: reads, waits, processes, records.
It is a lint: it follows names within a function, but not what another function measures.

A second rule: functions of `time` are replaced for one module (`replace_time`), not for the whole process.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.bounded_work import CEILING_S

ROOT = Path(__file__).parents[2]
CLOCKS = {"monotonic", "perf_counter", "process_time", "thread_time", "time"}
CLOCKS |= {f"{clock}_ns" for clock in CLOCKS}
# Ceilings that every test may use, and measurements of which none is asserted.
MAY_READ_PROCESSOR_TIME = ("tests/bounded_work.py", "tests/unit/checkpoint/test_fuzzed_indices.py")
Constants = dict[str, float]
PASSES_A_TIME_ON = {"min", "max", "sum", "sorted", "round", "abs", "int", "float"}
ALLOWS_NO_NUMBER = ("pytest.approx", "approx", "range")  # of seconds, above which it would hold
# Waits that end early; a first argument is seconds. `timeout` of any call, and `within_s` of the tests' own ones.
WAITS, OWN_WAITS = {"wait", "join"}, {"until", "wait_for", "left_behind"}
PATIENCE = {"within_s", "timeout_s", "patience_s"}  # parameters of helpers in tests


def is_clock(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in CLOCKS
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "time"
    )


def number(node: ast.AST, constants: Constants) -> float | None:
    """The value of an expression of numbers and constants."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return float(node.value)
    if isinstance(node, ast.Name):
        return constants.get(node.id)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
        left, right = number(node.left, constants), number(node.right, constants)
        if left is not None and right is not None:
            return left + right if isinstance(node.op, ast.Add) else left * right
    return None


def constants_of(nodes: Iterable[ast.AST]) -> Constants:
    """Names that are given a number, and parameters by their default."""
    found: Constants = {}
    for node in nodes:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Tuple)
            and isinstance(node.value, ast.Tuple)
        ):
            pairs = list(zip(node.targets[0].elts, node.value.elts, strict=False))
        elif isinstance(node, ast.Assign):
            pairs = [(node.targets[0], node.value)]
        elif isinstance(node, ast.FunctionDef):
            given = node.args.args[len(node.args.args) - len(node.args.defaults) :]
            named = [
                *zip(given, node.args.defaults, strict=True),
                *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True),
            ]
            pairs = [(ast.Name(one.arg), value) for one, value in named if value is not None]
        else:
            continue
        for target, value in pairs:
            if isinstance(target, ast.Name) and (seen := number(value, found)) is not None:
                found[target.id] = min(seen, found.get(target.id, seen))
    return found


def timed(function: ast.FunctionDef) -> set[str]:
    """Names in a function that hold what a clock said, or what was computed of it."""
    names: set[str] = set()
    for _ in range(3):
        for node in ast.walk(function):
            if (
                isinstance(node, ast.Assign | ast.AnnAssign)
                and node.value is not None
                and reads_time(node.value, names)
            ):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    pairs = [(target, node.value)]
                    if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                        pairs = list(zip(target.elts, node.value.elts, strict=False))
                    for one, value in pairs:
                        holder = one.value if isinstance(one, ast.Subscript) else one
                        if isinstance(holder, ast.Name) and reads_time(value, names):
                            names.add(holder.id)
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "append"
                and isinstance(node.func.value, ast.Name)
                and any(reads_time(one, names) for one in node.args)
            ):
                names.add(node.func.value.id)
    return names


def reads_time(node: ast.AST, names: set[str]) -> bool:
    """Whether an expression is a time: not a call that is given one, nor a count of times."""
    if is_clock(node) or (isinstance(node, ast.Name) and node.id in names):
        return True
    if isinstance(node, ast.BinOp):
        return reads_time(node.left, names) or reads_time(node.right, names)
    if isinstance(node, ast.Subscript):
        return reads_time(node.value, names)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in PASSES_A_TIME_ON:
        return any(reads_time(one, names) for one in node.args)
    return False


def limit(node: ast.AST, function: ast.FunctionDef, constants: Constants) -> float | None:
    """How many seconds an upper bound allows: a number, or what is added to a clock where the bound is made."""
    if (seen := number(node, constants)) is not None:
        return seen
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = [limit(part, function, constants) for part in (node.left, node.right)]
        return max((part for part in parts if part is not None), default=None)
    if isinstance(node, ast.Name):
        for one in ast.walk(function):
            if isinstance(one, ast.Assign):
                pairs = [(one.targets[0], one.value)]
                if isinstance(one.targets[0], ast.Tuple) and isinstance(one.value, ast.Tuple):
                    pairs = list(zip(one.targets[0].elts, one.value.elts, strict=False))
                for target, value in pairs:
                    if isinstance(target, ast.Name) and target.id == node.id and not isinstance(value, ast.Name):
                        return limit(value, function, constants)
    return None


def deadlines(nodes: list[ast.AST]) -> list[str]:
    """Deadlines of hypothesis, which measures wall time."""
    return [
        f"{call.lineno}: a deadline of hypothesis"
        for call in nodes
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "settings"
        for keyword in call.keywords
        if keyword.arg == "deadline" and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is None)
    ]


def upper_bounds(test: ast.expr, *, holds: bool = True) -> list[tuple[ast.expr, ast.expr]]:
    """What a condition that holds, or does not, says is smaller, and than what."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return upper_bounds(test.operand, holds=not holds)
    if isinstance(test, ast.BoolOp):
        return [bound for value in test.values for bound in upper_bounds(value, holds=holds)]
    if isinstance(test, ast.Call):
        return [bound for value in test.args for bound in upper_bounds(value, holds=holds)]
    found = []
    if isinstance(test, ast.Compare):
        sides = [test.left, *test.comparators]
        for left, operator, right in zip(sides, test.ops, sides[1:], strict=False):
            if isinstance(operator, ast.Lt | ast.LtE if holds else ast.Gt | ast.GtE):
                found.append((left, right))
            elif isinstance(operator, ast.Gt | ast.GtE if holds else ast.Lt | ast.LtE):
                found.append((right, left))
            elif holds and isinstance(operator, ast.Eq | ast.In) and isinstance(right, ast.Call):
                found += [(left, right)] if ast.unparse(right.func) in ALLOWS_NO_NUMBER else []
    return found


def refuses(statement: ast.If) -> bool:
    """Whether it fails the test."""
    first = statement.body[0]
    return isinstance(first, ast.Raise) or (isinstance(first, ast.Expr) and "pytest.fail(" in ast.unparse(first))


def conditions(function: ast.FunctionDef) -> list[tuple[int, ast.expr, bool]]:
    """Line, condition, and whether it must hold."""
    found: list[tuple[int, ast.expr, bool]] = []
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            found.append((node.lineno, node.test, True))
        elif isinstance(node, ast.If) and refuses(node):
            found.append((node.lineno, node.test, False))
    return found


def waits(nodes: list[ast.AST], constants: Constants) -> list[tuple[ast.AST, int, float]]:
    """Waits for something: node, line and seconds."""
    found: list[tuple[ast.AST, int, ast.expr]] = []
    for node in nodes:
        if isinstance(node, ast.Call):
            method = node.func.attr if isinstance(node.func, ast.Attribute) else None
            name = node.func.id if isinstance(node.func, ast.Name) else method
            given = [keyword.value for keyword in node.keywords if keyword.arg == "timeout"]
            given += [one.value for one in node.keywords if one.arg in PATIENCE and name in OWN_WAITS]
            given += node.args[:1] if method in WAITS else []
            found += [(node, node.lineno, one) for one in given]
        elif isinstance(node, ast.FunctionDef) and node.name in OWN_WAITS:
            named = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            found += [(node, node.lineno, value) for one, value in named if value and one.arg in PATIENCE]
    seconds = [(node, line, number(one, constants)) for node, line, one in found]
    return [(node, line, one) for node, line, one in seconds if one]  # 0: it looks once


def spared(nodes: list[ast.AST]) -> set[ast.AST]:
    """Waits that look again and again, or are expected to end without what they wait for."""
    kept: list[ast.AST] = []
    for node in nodes:
        if isinstance(node, ast.While):
            kept.append(node.test)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            kept.append(node.operand)
        elif isinstance(node, ast.With) and any("pytest.raises(" in ast.unparse(one) for one in node.items):
            kept += node.body
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "threading.Event().wait":
            kept.append(node)  # a sleep
    return {inner for one in kept for inner in ast.walk(one)}


def faults(source: str, shared: Constants) -> list[str]:
    """Statements of a file that a busy machine can break, as `line: why`."""
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    found, constants = deadlines(nodes), shared | constants_of(nodes)
    short = [(node, line, seconds) for node, line, seconds in waits(nodes, constants) if seconds < CEILING_S]
    fine = spared(nodes) if short else set()
    found += [f"{line}: waits {given} s, less than {CEILING_S:.0f}" for node, line, given in short if node not in fine]
    found += [
        f"{node.lineno}: write `time.{node.names[0].name}`, which this lint follows"
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module == "time"
    ]
    lines = source.splitlines()
    for function in (node for node in nodes if isinstance(node, ast.FunctionDef)):
        if not any("time." in line for line in lines[function.lineno - 1 : function.end_lineno]):
            continue
        names = timed(function)
        for line, test, holds in conditions(function):
            for small, large in upper_bounds(test, holds=holds):
                allowed = limit(large, function, constants) if reads_time(small, names) else CEILING_S
                if allowed is None or allowed < CEILING_S:
                    found.append(f"{line}: allows {allowed} s, less than {CEILING_S:.0f}")
    return sorted(set(found))


def replaced_for_all(source: str) -> list[int]:
    """Lines that replace a function of `time` for every module and thread, subprocess among them."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("setattr", "patch", "patch.object")):
            named = [one.value if isinstance(one, ast.Constant) else ast.unparse(one) for one in node.args[:2]]
            parts = ".".join(map(str, named)).split(".")
            if any(one == "time" and other in CLOCKS | {"sleep"} for one, other in itertools.pairwise(parts)):
                found.append(node.lineno)
    return found


def files() -> list[Path]:
    return [path for path in sorted((ROOT / "tests").rglob("*.py")) if path != Path(__file__)]


def test_no_assertion_is_about_speed() -> None:
    sources = {path: path.read_text() for path in files()}
    shared: Constants = {}
    for source in sources.values():
        for node in ast.parse(source).body:
            for name, value in constants_of([node]).items() if isinstance(node, ast.Assign) else ():
                shared[name] = min(value, shared.get(name, value))
    found = {str(path.relative_to(ROOT)): faults(source, shared) for path, source in sources.items()}
    assert {file: lines for file, lines in found.items() if lines} == {}


def test_processor_time_is_read_in_one_place() -> None:
    """`bounded_work` is the only ceiling of processor time."""
    names = ("process_time", "thread_time")
    found = [
        str(path.relative_to(ROOT)) for path in files() if any(f"time.{name}" in path.read_text() for name in names)
    ]
    assert sorted(found) == sorted(MAY_READ_PROCESSOR_TIME)


def test_time_is_replaced_for_one_module() -> None:
    found = {str(path.relative_to(ROOT)): replaced_for_all(path.read_text()) for path in files()}
    assert {file: lines for file, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        ('monkeypatch.setattr(time, "sleep", f)', True),
        ('monkeypatch.setattr(scheduler.time, "monotonic", f)', True),
        ('monkeypatch.setattr("launch.job_table.time.monotonic", f)', True),
        ('mock.patch("launch.logs.time.sleep")', True),
        ('mock.patch.object(time, "time_ns", f)', True),
        ('monkeypatch.setattr(module, "time", clock)', False),
        ('monkeypatch.setattr(clock, "sleep", f)', False),
    ],
)
def test_a_replacement_for_all_is_seen(line: str, seen: bool) -> None:
    assert bool(replaced_for_all(line)) is seen


@pytest.mark.parametrize(
    "line",
    [
        "began = time.monotonic(); work(); assert time.monotonic() - began < 5",
        "began = time.perf_counter(); work(); took = time.perf_counter() - began; assert took <= 0.1",
        "deadline = time.monotonic() + 20\n    while wait(): assert time.monotonic() < deadline",
        "deadline, at = time.monotonic() + PATIENCE_S, 0\n    while wait(): assert time.monotonic() < deadline",
        "times = []; at = time.process_time(); times.append(time.process_time() - at); assert min(times) < 0.05",
        "began = time.monotonic(); assert 4 <= time.monotonic() - began < 10",
        "first = time.time(); one = time.time() - first; other = time.time() - first; assert one < other",
        "began = time.monotonic(); assert 20 > time.monotonic() - began",
        "settings(max_examples=9, deadline=2000)(work)",
        "from time import monotonic; began = monotonic(); assert monotonic() - began < 5",
        "began = time.monotonic(); work()\n    if time.monotonic() - began > 5: raise AssertionError",
        "deadline = time.monotonic() + 20\n    while wait():\n        if time.monotonic() > deadline: pytest.fail('x')",
        "began = time.monotonic(); took = round(time.monotonic() - began, 3); assert took < 5",
        "took = {}; took['a'] = time.monotonic(); assert took['a'] < 5",
        "began = time.monotonic(); assert time.monotonic() - began == pytest.approx(1, abs=0.5)",
        "began = time.monotonic(); assert int(time.monotonic() - began) in range(5)",
        "began = time.monotonic(); assert not time.monotonic() - began > 5",
        "process.wait(timeout=5)",
        "assert event.wait(PATIENCE_S)",
        "thread.join(timeout=5.0)",
        "subprocess.run(command, timeout=10)",
        "run.until(there, within_s=5)",
        "def left_behind(*, within_s: float = 5.0) -> None: ...",
    ],
)
def test_a_bound_that_load_breaks_is_seen(line: str) -> None:
    assert len(faults(f"def test() -> None:\n    {line}\n", {"PATIENCE_S": 20.0})) == 1


@pytest.mark.parametrize(
    "line",
    [
        "began = time.monotonic(); work(); assert time.monotonic() - began < 60",
        "began = time.monotonic(); work(); assert time.monotonic() - began >= 0.2",
        "deadline = time.monotonic() + PATIENCE_S\n    while wait(): assert time.monotonic() < deadline",
        "settings(max_examples=9, deadline=None)(work)",
        "began = time.monotonic(); looks = [time.monotonic()]; assert len(looks) <= 3",
        "process.wait(timeout=PATIENCE_S)",
        "while not event.wait(0.02): work()",
        "assert not event.wait(0.5)",
        "threading.Event().wait(0.1)",
        "', '.join(words); Path('a').joinpath('b')",
        "with pytest.raises(subprocess.TimeoutExpired): process.wait(timeout=1)",
    ],
)
def test_a_ceiling_is_none(line: str) -> None:
    assert faults(f"def test() -> None:\n    {line}\n", {"PATIENCE_S": 60.0}) == []
