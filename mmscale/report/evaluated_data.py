"""Whether the held-out values of several runs are of the same documents; a report shows them in one row and one chart.

Reads settings, and manifests of the data sets that are still at their paths.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmscale.data.prepared.identity import identity_of
from mmscale.data.prepared.manifest import HELD_OUT, has_documents, read_manifest
from mmscale.errors import DataError
from mmscale.report.history import History
from mmscale.runs.held_out import HeldOut, words_of

_VALIDATION = "data.validation."


def evaluated_data_notes(
    histories: Mapping[str, History], configurations: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """A line for each held-out set, by its name in reports, whose documents are not the same in all runs.

    Args:
        histories: by name of the run.
        configurations: settings by dotted key, by name of the run; empty: not readable.
    """
    found: dict[str, dict[str, list[str]]] = {}  # folders by set and run
    for run, history in histories.items():
        measured = {one.name for key in history.columns if (one := HeldOut.of(key))}
        for name, folders in _sets(configurations.get(run, {})).items():
            if name in measured:
                found.setdefault(name, {})[run] = folders
    return [
        f"{_titled(words_of(name)) or 'Held-out'} values are of other documents in each run, and cannot be "
        f"compared: {'; '.join(f'{run} evaluates {_listed(folders)}' for run, folders in runs.items())}."
        for name, runs in found.items()
        if len({_identity(folders) for folders in runs.values()}) > 1
    ]


def _sets(settings: Mapping[str, Any]) -> dict[str, list[str]]:
    """Folders by name of the set, as in `HeldOut`; "": the data that is trained on."""
    blend = settings.get("data.blend")
    sources = [one.get("path") for one in blend if isinstance(one, dict)] if isinstance(blend, list) else []
    sources = sources or [settings.get("data.path")]
    found = {"": [str(one) for one in sources if one]}
    for key, folder in settings.items():
        if key.startswith(_VALIDATION):
            found[key.removeprefix(_VALIDATION)] = [str(folder)]
    return {name: folders for name, folders in found.items() if folders}


def _titled(words: str) -> str:
    return words[:1].upper() + words[1:]


def _listed(folders: list[str]) -> str:
    return " and ".join(folders)


def _identity(folders: list[str]) -> tuple[str, ...]:
    """Of their held-out documents; of folders that cannot be read their paths."""
    found = set()
    for text in folders:
        folder = Path(text)
        try:
            manifest = read_manifest(folder)
        except DataError:
            found.add(str(folder.resolve()))
            continue
        if has_documents({folder: manifest}, HELD_OUT):
            found.add(identity_of(folder, manifest, split=HELD_OUT))
    return tuple(sorted(found))
