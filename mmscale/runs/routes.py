"""Whether figures of a run have a routing mode to name. Reads the configurations in the run's folder."""

from __future__ import annotations

import functools
from pathlib import Path

from mmscale.config import Config
from mmscale.config.load import load
from mmscale.errors import ConfigError
from mmscale.runs.attempts import LATEST_SETTINGS, attempts_with_settings, settings_name


def routes(run: Path) -> bool:
    """Whether layers of the run's model choose among tokens (`model.routes`), in any attempt.

    True if no configuration can be read: the figures of such a run may depend on routing.

    Args:
        run: its folder.
    """
    files = [run / settings_name(attempt) for attempt in reversed(attempts_with_settings(run))]
    different: dict[bytes, Path] = {}
    for file in files:
        try:
            different.setdefault(file.read_bytes(), file)
        except OSError:
            continue
    known = False
    for file in different.values() or [run / LATEST_SETTINGS]:
        try:
            if recorded_config(file).model.routes:
                return True
            known = True
        except ConfigError:
            continue
    return not known


def recorded_config(file: Path) -> Config:
    """A configuration that a run wrote; a file that has not changed is read once.

    Raises:
        ConfigError: as `mmscale.config.load.load`.
    """
    try:
        found = file.stat()
    except OSError:
        return load(file, recorded=True)
    return _load(file, found.st_mtime_ns, found.st_size)


@functools.lru_cache(maxsize=64)
def _load(file: Path, _modified: int, _size: int) -> Config:
    return load(file, recorded=True)
