"""Folders that `mmscale init` copies: configurations, programs, a cluster profile, and a README of the commands."""

from __future__ import annotations

import shutil
from pathlib import Path

from mmscale.errors import UsageError

FOLDER = Path(__file__).parent
PRESETS = {
    "quickstart": "handwritten digits, five minutes on two cores",
    "own-data": "your own pictures and words, one process",
    "slurm": "the quickstart on a SLURM cluster, with a profile to edit",
}
_ALSO = {"slurm": "quickstart"}  # a preset with the files of another one that it does not replace


def copy(preset: str, folder: Path) -> list[Path]:
    """Write the files of a preset.

    Args:
        preset: one of PRESETS.
        folder: where to; it is made if it is missing.

    Returns:
        The new files.

    Raises:
        UsageError: unknown preset, or one of the files exists. Nothing has been written then.
    """
    if preset not in PRESETS:
        raise UsageError(f"there is no preset {preset!r}", remedy=f"choose one of: {', '.join(PRESETS)}")
    files = {**_files(_ALSO[preset]), **_files(preset)} if preset in _ALSO else _files(preset)
    existing = [str(folder / name) for name in files if (folder / name).exists()]
    if existing:
        exist = "exists" if len(existing) == 1 else "exist"
        raise UsageError(f"{', '.join(existing)} {exist} already", remedy="name another folder, or move it away")
    for name, source in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / name)
    return [folder / name for name in files]


def _files(preset: str) -> dict[Path, Path]:
    """Files of a preset's own folder by their names relative to it; what Python compiled is left out."""
    source = FOLDER / preset
    files = [file for file in sorted(source.rglob("*")) if file.is_file() and file.suffix != ".pyc"]
    return {file.relative_to(source): file for file in files}
