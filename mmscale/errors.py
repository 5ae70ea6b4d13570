"""Errors that a user can act on. Each has a cause, a remedy and the exit status of the command.

Bugs are not reported with these classes: they stay `assert` and plain Python exceptions.
"""

import shlex
from pathlib import Path


def shell_command(*words: object, program: str = "mmscale") -> str:
    """A command for a message, in backquotes, with paths quoted for a shell."""
    return f"`{program} {shlex.join(map(str, words))}`"


def missing(path: Path | str, *, what: str) -> str:
    """That a file or folder does not exist, as a cause; of a relative path with the place where it was looked for.

    Args:
        path: the name that was given, or a pattern.
        what: the kind of file.
    """
    place = "" if Path(path).is_absolute() else f" in {Path.cwd()}"
    return f"there is no {what} {path}{place}"


def no_folder(folder: Path) -> str:
    """`missing` for a folder."""
    return missing(folder, what="folder")


class MmscaleError(Exception):
    """An error with one line of cause and one line of remedy.

    Args:
        cause: what is wrong, where, and by which rule.
        remedy: what the user can do about it.
    """

    exit_status = 1

    def __init__(self, cause: str, *, remedy: str = "") -> None:
        super().__init__(cause)  # pickle calls the class with these, and workers send errors to their parent
        self.cause = cause
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.cause}; {self.remedy}" if self.remedy else self.cause


class UsageError(MmscaleError):
    """The command line asks for something impossible."""

    exit_status = 2


class ConfigError(MmscaleError):
    """The configuration is wrong."""

    exit_status = 2


class DataError(MmscaleError):
    """The data is missing, damaged or made for another vocabulary."""

    exit_status = 3


class CheckpointError(MmscaleError):
    """There is no usable checkpoint."""

    exit_status = 4


class TrainingError(MmscaleError):
    """Training gave up."""

    exit_status = 5


class HookError(TrainingError):
    """A hook of another package failed, perhaps on this rank alone: no collective may follow."""


class DamagedDataError(DataError):
    """Prepared data is not what was prepared, as all ranks have agreed at the same step."""


class SaveError(MmscaleError):
    """Checkpoints cannot be written: the last save of a run failed, or several in a row did."""

    exit_status = 74  # EX_IOERR of sysexits.h


class LaunchError(MmscaleError):
    """A rank died or could not start."""

    exit_status = 1
