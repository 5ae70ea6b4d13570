"""What held-out documents share with training documents, as `data prepare` found it, as lines for people.

`data prepare` compares (content_facts.py, remarks.py) and keeps the result beside the data. The start of a run,
`data inspect`, reports and model cards repeat these lines. Nothing is compared again here.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from mmscale import bounded
from mmscale.data.documents.schema import TRAIN, VALIDATION
from mmscale.data.prepared.content_facts import kept_facts
from mmscale.data.prepared.identity import identity_of
from mmscale.data.prepared.manifest import Manifest
from mmscale.data.prepared.shared_content import Shared
from mmscale.runtime.atomic_files import write_atomic

log = logging.getLogger(__name__)

_FILE = ".cache/companion.json"  # inside the data set


def leaks_of(trained: Mapping[Path, Manifest], evaluated: Mapping[Path, Manifest]) -> list[str]:
    """One line for each kind of content that is trained on and held out.

    Args:
        trained: manifests of the data sets that are trained on, by folder.
        evaluated: of those whose held-out documents are evaluated.
    """
    lines = []
    for folder, manifest in trained.items():
        facts = kept_facts(folder, manifest) if folder in evaluated else None
        lines += facts.shared.lines(of=str(folder)) if facts is not None else []
        lines += leaks_of_companion(folder, manifest, evaluated=evaluated)
    return lines


def leaks_of_companion(
    folder: Path, manifest: Manifest, *, evaluated: Mapping[Path, Manifest] | None = None
) -> list[str]:
    """Lines about held-out documents of the set that this one was prepared like (`data prepare --like`).

    Args:
        folder: the data set.
        manifest: of it.
        evaluated: data sets whose held-out documents are evaluated; None: the other set need not be one of them.
    """
    try:
        content = bounded.read_object(folder / _FILE)
        if content["of"] != identity_of(folder, manifest, split=TRAIN):
            return []
        others = (evaluated or {}).items()
        if evaluated is not None and content["held_out"] not in {
            identity_of(other, found, split=VALIDATION) for other, found in others
        }:
            return []
        shared = Shared(**{name: (int(pair[0]), int(pair[1])) for name, pair in content["shared"].items()})
        return shared.lines(of=str(content["path"]), here=str(folder))
    except (OSError, *bounded.BAD_CONTENT):
        return []


def keep_companion(folder: Path, manifest: Manifest, like: Path, other: Manifest, found: Shared) -> None:
    """Keep what a comparison with another data set found; a folder that cannot be written to is not an error.

    Args:
        folder: the data set that trains.
        manifest: of it.
        like: the data set that holds out.
        other: its manifest.
        found: what both have.
    """
    content = {
        "of": identity_of(folder, manifest, split=TRAIN),
        "held_out": identity_of(like, other, split=VALIDATION),
        "path": str(like),
        "shared": asdict(found),
    }
    try:
        (folder / _FILE).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / _FILE, json.dumps(content))
    except OSError as error:
        log.warning("data: %s cannot be written: runs do not repeat its remarks: %s", folder / _FILE, error)
