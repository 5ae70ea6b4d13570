"""Checks files that a command line names, before a command loads torch and a model. It does not read them."""

from __future__ import annotations

from pathlib import Path

from mmscale.errors import DataError


def existing(file: Path, *, what: str = "file", whose: str = "") -> Path:
    """The file, if it exists.

    Args:
        file: named by the user.
        what: it is, for the remedy.
        whose: beginning of the message.

    Raises:
        DataError: there is no such file.
    """
    if not file.exists():
        raise DataError(f"{whose}{file} cannot be read: there is no such file", remedy=f"name another {what}")
    return file
