"""The command that continues a run which `mmscale train` started: for messages. `mmscale resume` continues launches."""

from __future__ import annotations

from pathlib import Path

from mmscale.config.document import read_file
from mmscale.errors import ConfigError, shell_command
from mmscale.runs.attempts import LATEST_SETTINGS
from mmscale.runs.events import BEGINS, read_events
from mmscale.train.stages.table import of_folder

_SAME = "start the same `mmscale train` again"


def start_again(run: Path) -> str:
    """How to continue a run that `mmscale train` started, in words.

    Args:
        run: its folder, or that of its stage. The command is named if the folder's configuration leads back to the
            folder from here; otherwise only what to start.
    """
    stage = of_folder(run)
    if stage.subfolder:
        return f"{_SAME}, with --stage {stage.name}: it continues from the newest checkpoint"
    file = run / LATEST_SETTINGS
    if not _leads_to(run, file):
        return f"{_SAME}, in the folder where it was started: it continues from the newest checkpoint"
    ranks = _ranks(run)
    several = ("--nproc", ranks) if ranks > 1 else ()
    return f"{_SAME}, or {shell_command('train', file, *several)}: it continues from the newest checkpoint"


def _leads_to(run: Path, file: Path) -> bool:
    """Whether `mmscale train` with a run's configuration, started here, finds the run's folder."""
    try:
        named = read_file(file).data["run"]
        return (Path(named["dir"]) / named["name"]).resolve() == run.resolve()
    except (ConfigError, KeyError, TypeError):
        return False


def _ranks(run: Path) -> int:
    """Number of ranks of the newest attempt."""
    sizes = [event.get("world_size") for event in read_events(run) if event.get("event") in BEGINS]
    return sizes[-1] if sizes and isinstance(sizes[-1], int) else 1
