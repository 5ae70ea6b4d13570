"""The handwritten digits as documents, as the program of examples/digits writes them: data for tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[1] / "examples"


def program(name: str) -> Any:
    """A program of examples/ as a module, e.g. digits/write_documents; modules beside it can be imported by it."""
    file = EXAMPLES / f"{name}.py"
    known = f"examples_{name.replace('/', '_')}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, file)
        assert spec is not None and spec.loader is not None
        module = sys.modules[known] = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(file.parent))
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(file.parent))
    return sys.modules[known]


def write(folder: Path, *, copies: int = 0) -> Path:
    """Write the documents; the folder."""
    assert program("digits/write_documents").main(["--out", str(folder), "--copies", str(copies)]) == 0
    return folder


def named(folder: Path) -> dict[str, Any]:
    """The settings of data.prepare that name the files of such a folder."""
    return {"documents": [str(folder / "documents.jsonl")], "tasks": {"digit": str(folder / "digit.jsonl")}}
