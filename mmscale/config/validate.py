"""Checks a document against a section of settings, and reads two things as a person means them.

It knows pydantic's errors and the text of scalars, not the settings: load.py and launch/profile.py word the problems.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from mmscale.config.document import Document
from mmscale.config.section import Section

S = TypeVar("S", bound=Section)


def validate(section: type[S], document: Document) -> tuple[S | None, list[ErrorDetails]]:
    """The settings of a document, or what is wrong with it.

    An empty `section:` is read as all defaults, and a scalar where text is wanted is read as it was written:
    `run.name=$JOB_ID` must not fail because the id has only digits.

    Args:
        section: the class of the whole document.
        document: changed in place where it is read so.
    """
    try:
        return section.model_validate(document.data), []
    except ValidationError as error:
        errors = error.errors()
    if not _repair(document, errors):
        return None, errors
    return validate(section, document)


def dotted(document: Document, error: ErrorDetails) -> str:
    """The dotted key of an error."""
    return ".".join(str(part) for part in _path(document, error))


def _repair(document: Document, errors: Sequence[ErrorDetails]) -> bool:
    """Whether something could be read in another way."""
    changed = False
    for error in errors:
        path = _path(document, error)
        name = ".".join(str(part) for part in path)
        if error["type"] == "model_type" and error["input"] is None and path:
            _set(document.data, path, {})
            changed = True
        elif error["type"] == "string_type" and name in document.written:
            _set(document.data, path, document.written.pop(name))
            changed = True
    return changed


def _set(data: Any, path: Sequence[Any], value: Any) -> None:
    *parents, last = path
    for part in parents:
        data = data[part]
    data[last] = value


def _path(document: Document, error: ErrorDetails) -> list[str | int]:
    """The keys and indices of an error: pydantic mixes tags of union members and "[key]" into its own path."""
    here: Any = document.data
    parts: list[str | int] = []
    for part in error["loc"]:
        known = part in here if isinstance(here, dict) else isinstance(here, list) and isinstance(part, int)
        if known:
            here = here[part]
        elif error["type"] != "missing":
            continue
        parts.append(part)
    return parts
