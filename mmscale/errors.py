"""What a user can act on: every error carries a cause, a remedy and the exit status of the command.

Bugs are not here: those stay `assert` and plain Python exceptions.
"""


class MmscaleError(Exception):
    """An error with one line of cause and one line of remedy.

    Args:
        cause: what is wrong, where, and by which rule.
        remedy: what the user can do about it.
    """

    exit_status = 1

    def __init__(self, cause: str, *, remedy: str = "") -> None:
        super().__init__(cause)  # the cause alone: pickle calls the class with these, and workers send errors home
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


class SaveError(MmscaleError):
    """Checkpoints cannot be written: the last save of a run failed, or several in a row did."""

    exit_status = 74  # EX_IOERR of sysexits.h


class LaunchError(MmscaleError):
    """A rank died or could not start."""

    exit_status = 1
