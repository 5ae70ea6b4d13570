"""The command that continues a run which `mmscale train` started: for messages. `mmscale resume` continues launches."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mmscale.config.document import read_file
from mmscale.errors import ConfigError, shell_command
from mmscale.runs.attempts import LATEST_SETTINGS
from mmscale.runs.events import BEGINS, read_events
from mmscale.train.stages.table import of_folder
from mmscale.wording import numbered

# They start ranks on several nodes, so `--nproc` would not start the same.
_LAUNCHERS = {"torchrun": "torchrun", "slurm": "SLURM", "mpi": "mpirun"}
_SAME = "start the same `mmscale train` again"


def start_again(run: Path) -> str:
    """How to continue a run that `mmscale train` started, in words.

    Args:
        run: its folder, or that of its stage. The command is named if it started its ranks itself and if the folder's
            configuration leads back to the folder from here; otherwise only what to start.
    """
    stage, ranks = of_folder(run), _ranks(run)
    by = f" with {numbered(ranks.number, 'rank')} of {_LAUNCHERS[ranks.by]}" if ranks.by in _LAUNCHERS else ""
    if stage.subfolder:
        return f"{_SAME}{by}, with --stage {stage.name}: it continues from the newest checkpoint"
    file = run / LATEST_SETTINGS
    if by or not _leads_to(run, file):
        return f"{_SAME}{by}, in the folder where it was started: it continues from the newest checkpoint"
    several = ("--nproc", ranks.number) if ranks.number > 1 else ()
    return f"{_SAME}, or {shell_command('train', file, *several)}: it continues from the newest checkpoint"


def _leads_to(run: Path, file: Path) -> bool:
    """Whether `mmscale train` with a run's configuration, started here, finds the run's folder."""
    try:
        named = read_file(file).data["run"]
        return (Path(named["dir"]) / named["name"]).resolve() == run.resolve()
    except (ConfigError, KeyError, TypeError):
        return False


class _Ranks(NamedTuple):
    number: int
    by: str  # a launcher, as `RankEnv.source`; "": unknown


def _ranks(run: Path) -> _Ranks:
    """Those of the newest attempt whose steps began."""
    for event in reversed(read_events(run)):
        if event.get("event") in BEGINS:
            size = event.get("world_size")
            return _Ranks(size if isinstance(size, int) else 1, str(event.get("ranks_by", "")))
    return _Ranks(1, "")
