"""Reads small JSON files that were made for the documents a data set had at that time."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict

from mmscale import bounded
from mmscale.errors import DataError


class MadeFor(BaseModel):
    """A file with a format and the identity of the training documents that it was made for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int
    of: str


File = TypeVar("File", bound=MadeFor)


def read_made_for(
    model: type[File], file: Path, *, version: int, most: int, of: str | None, remedy: str
) -> File | None:
    """The content of a file; None: there is no file.

    Args:
        model: of the content.
        file: in a subfolder of the data set.
        version: the format that is read.
        most: bytes.
        of: identity of the training documents; None: not compared.
        remedy: of the errors.

    Raises:
        DataError: it is damaged, of another version, or was made for other documents.
    """
    try:
        found = model.model_validate(bounded.read_json(file, most=most))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"data: {file} is damaged: {str(error).splitlines()[0]}", remedy=remedy) from error
    if found.format != version:
        raise DataError(f"data: {file} has format {found.format}, this version reads {version}", remedy=remedy)
    if of is not None and found.of != of:
        raise DataError(f"data: {file} was made for other documents than {file.parent.parent} has now", remedy=remedy)
    return found
