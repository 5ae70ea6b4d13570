"""Validates a document against a section of settings, and corrects two misreadings of YAML.

It handles pydantic's errors and the text of scalars. load.py and launch/profile.py write the messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from mmscale.config.document import ConfigDocument
from mmscale.config.section import Section

S = TypeVar("S", bound=Section)


def validate(section: type[S], document: ConfigDocument) -> tuple[S | None, list[ErrorDetails]]:
    """The settings of a document, or the errors in it.

    An empty `section:` means all defaults. A scalar in place of text is read as written: `run.name=$JOB_ID` must not
    fail if the id has only digits.

    Args:
        section: the class of the whole document.
        document: changed in place by these two corrections.
    """
    try:
        return section.model_validate(document.data), []
    except ValidationError as error:
        errors = error.errors()
    if not _repair(document, errors):
        return None, errors
    return validate(section, document)


def dotted(document: ConfigDocument, error: ErrorDetails) -> str:
    """The dotted key of an error."""
    return ".".join(str(part) for part in _path(document, error))


def _repair(document: ConfigDocument, errors: Sequence[ErrorDetails]) -> bool:
    """Whether a misreading was corrected."""
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


def _path(document: ConfigDocument, error: ErrorDetails) -> list[str | int]:
    """The keys and indices of an error, without the union tags and "[key]" that pydantic adds to its path."""
    here: Any = document.data
    parts: list[str | int] = []
    for part in error["loc"]:
        if isinstance(here, dict):
            known = part in here
        else:  # a list that is too short: its last number is missing
            known = isinstance(here, list) and isinstance(part, int) and part < len(here)
        if known:
            here = here[part]
        elif error["type"] != "missing":
            continue
        parts.append(part)
    return parts
