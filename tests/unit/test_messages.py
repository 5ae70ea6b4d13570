"""What users read: causes and remedies of errors as far as text can be checked, and help that is shown whole."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
from rich.text import Text

from mmscale.cli import app

ROOT = Path(__file__).parents[2]
ERRORS = {"Problem", "MmscaleError"} | {
    f"{kind}Error" for kind in ("Usage", "Config", "Data", "Checkpoint", "Training", "Save", "Launch")
}
# A text that ends with one of these was cut off.
UNFINISHED = re.compile(r"(?:[,:;=(\[{*+-]|\b(?:a|an|the|of|for|and|or|but|in|by|than|which|be|over))$")


def messages() -> Iterator[tuple[str, str]]:
    """Place and text of every literal message; a value that is filled in stands as X."""
    for folder in ("mmscale", "launch", "checkpoints_tools", "slurm"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call) or getattr(node.func, "id", "") not in ERRORS:
                    continue
                for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
                    text = text_of(argument)
                    if text is not None:
                        yield f"{file.relative_to(ROOT)}:{argument.lineno}", text


def text_of(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
    return None


def faults_of(text: str) -> list[str]:
    """What is wrong with a message."""
    found = []
    if text != text.strip() or "  " in text.replace("\n  ", "\n"):
        found.append("spaces")
    if text.count("`") % 2 or text.count('"') % 2:
        found.append("quotes")
    found += [f"{one}{two}" for one, two in ("()", "[]", "{}") if text.count(one) != text.count(two)]
    if UNFINISHED.search(text):
        found.append("unfinished")
    if text.endswith(".") and not text.endswith("..."):
        found.append("a full stop: `; ` and the remedy follow")
    return found


def test_messages_are_whole() -> None:
    texts = list(messages())
    assert len(texts) > 500
    wrong = [f"{place}: {text!r}: {', '.join(faults_of(text))}" for place, text in texts if text and faults_of(text)]
    assert wrong == []


# Values in commands that are no paths: names of settings and modules.
NO_PATHS = {"key.name if key else name", "name", "module_name"}
QUOTING = {"quote", "join", "shell_command"}


def unquoted(source: str) -> Iterator[tuple[int, str]]:
    """Values that stand in a command in backquotes, after its first word, as they are."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.JoinedStr):
            continue
        text = ""
        for part in node.values:
            if isinstance(part, ast.Constant):
                text += str(part.value)
                continue
            value = part.value if isinstance(part, ast.FormattedValue) else part
            called = value.func if isinstance(value, ast.Call) else None
            quotes = getattr(called, "attr", getattr(called, "id", "")) in QUOTING
            if text.count("`") % 2 and " " in text.rpartition("`")[2] and not quotes:
                yield node.lineno, ast.unparse(value)
            text += "X"


def test_paths_in_commands_are_quoted_for_a_shell() -> None:
    """A user pastes the command of a remedy; a path may have spaces."""
    wrong = [
        f"{file.relative_to(ROOT)}:{line}: {value}"
        for folder in ("mmscale", "launch", "checkpoints_tools", "slurm")
        for file in sorted((ROOT / folder).rglob("*.py"))
        for line, value in unquoted(file.read_text(encoding="utf-8"))
        if value not in NO_PATHS
    ]
    assert wrong == []


def test_an_unquoted_path_is_found() -> None:
    assert list(unquoted('f"{run}: see `mmscale stop {run}`"')) == [(1, "run")]
    assert list(unquoted('f"{run}: `{run}`, `mmscale stop {quote(run)}`"')) == []


@pytest.mark.parametrize(
    "text", ["X is more than", "one  two", " one", "see (this", "use `x", "give:", "split over", "it is."]
)
def test_what_is_not_whole_is_found(text: str) -> None:
    assert faults_of(text)


def helps() -> Iterator[tuple[str, str]]:
    """Every text that --help shows, by command."""
    stack = [("mmscale", typer.main.get_command(app))]
    while stack:
        name, command = stack.pop()
        stack += [(f"{name} {inner}", one) for inner, one in getattr(command, "commands", {}).items()]
        yield from ((name, text) for text in (command.help, command.epilog, command.short_help) if text)
        for parameter in command.params:
            for text in (getattr(parameter, "help", None), getattr(parameter, "show_default", None)):
                if isinstance(text, str):
                    yield f"{name} {parameter.name}", text


def test_help_is_shown_whole() -> None:
    """Help is read as rich's markup, which takes `[tokens]` for a style and shows nothing."""
    texts = list(helps())
    assert len(texts) > 150
    assert [(name, text) for name, text in texts if Text.from_markup(text).plain != text.replace("\\[", "[")] == []
