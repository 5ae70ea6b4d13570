"""What evaluated documents share with training documents, of all pairs of data sets of a run, as lines for people.

`data prepare` keeps keys of the content of a set beside the data (content_facts.py). The start of a run compares the
keys of every set that it trains on with those of every set that it evaluates; `data inspect RUN`, reports and model
cards repeat its lines. `data prepare --like` compares two sets in both directions, which `data inspect` repeats.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from mmscale import bounded
from mmscale.config import Config
from mmscale.data.documents.schema import TRAIN, VALIDATION
from mmscale.data.prepared.content_facts import SetKeys, content_keys, kept_facts, kept_keys, shared_from
from mmscale.data.prepared.identity import identity_of
from mmscale.data.prepared.manifest import HELD_OUT, Manifest, read_blend, read_manifest
from mmscale.data.prepared.shared_content import Shared, common_content
from mmscale.data.prepared.split_keys import comparable
from mmscale.data.prepared.validation import read_validation
from mmscale.errors import DataError, shell_command
from mmscale.runtime.atomic_files import write_atomic

log = logging.getLogger(__name__)

_FILE = ".cache/companion.json"  # inside the data set


def leaks_of(
    trained: Mapping[Path, Manifest], evaluated: Mapping[Path, Manifest], *, whole: Collection[Path] = ()
) -> list[str]:
    """One line for each kind of content that is trained on and evaluated, and for each set that cannot be compared.

    Args:
        trained: manifests of the data sets that are trained on, by folder.
        evaluated: of those whose held-out documents are evaluated.
        whole: those of `evaluated` of which all documents are evaluated, because they hold out none.
    """
    lines: list[str] = []
    keys: dict[Path, SetKeys | None] = {}
    for here, manifest in trained.items():
        for other, found in evaluated.items():
            split = TRAIN if other in whole else VALIDATION
            if not (_has(manifest, TRAIN) and _has(found, split)):
                continue
            if here == other:
                facts = kept_facts(here, manifest)
                lines += [] if facts is None else facts.leaks(of=str(here))
                if facts is None and comparable(manifest):
                    keys[here] = None
                continue
            for folder, own in ((here, manifest), (other, found)):
                if folder not in keys:
                    keys[folder] = kept_keys(folder, own)
            train, evaluation = keys[here], keys[other]
            if train is not None and evaluation is not None:
                shared = common_content(evaluation[split], train[TRAIN])
                lines += shared.lines(of=str(other), here=str(here), held_out=split == VALIDATION)
    manifests = {**trained, **evaluated}
    return lines + [_not_compared(folder, manifests[folder]) for folder, own in keys.items() if own is None]


def leaks_of_settings(
    trained: Config,
    evaluated: Config,
    *,
    read: Collection[str] = (),
    before: Iterable[tuple[str, str]] = (),
    missing: bool = True,
) -> list[str]:
    """As `leaks_of`, for the data sets that two configurations name.

    Args:
        trained: names the data that a model was trained on.
        evaluated: names the data that it is evaluated on, which must be readable.
        read: identities of the training documents when they were read; empty: unknown.
        before: paths and identities of further data sets that the model was trained on before: before its run or stage,
            or by earlier attempts.
        missing: whether to say of training data that it cannot be compared because it is missing or was replaced.
    """
    blend = read_blend(evaluated)
    sets = read_validation(evaluated, blend)
    own = {**blend, **{one.folder: one.manifest for one in sets}}
    trained_sets: list[tuple[str, Collection[str]]] = [(one.path, read) for one in trained.data.sources if one.trained]
    known, lines = still_as_read([*trained_sets, *((path, (identity,)) for path, identity in before)], own)
    whole = {one.folder for one in sets if one.split != HELD_OUT}
    return leaks_of(known, own, whole=whole) + (lines if missing else [])


def still_as_read(
    read: Iterable[tuple[str, Collection[str]]], own: Mapping[Path, Manifest]
) -> tuple[dict[Path, Manifest], list[str]]:
    """Those data sets that a model was trained on which can be compared with others, and a line for each other one.

    Args:
        read: their paths, each with the identities that its training documents may have; empty: unknown.
        own: manifests of the data sets that they are compared with, by folder.

    Returns:
        Manifests by folder; a folder of `own` under another path keeps its key in `own`, as does one that was moved.
    """
    names = {folder.resolve(): folder for folder in own}
    known: dict[Path, Manifest] = {}
    lines: list[str] = []
    for path, identities in read:
        if len(identities) == 1 and set(identities) <= {identity_of(*one) for one in known.items()}:
            continue  # the same documents, in another folder
        folder = names.get(Path(path).resolve(), Path(path))
        manifest, problem = _as_read(folder, own, identities)
        moved = _moved(own, identities) if manifest is None else None
        if manifest is not None:
            known[folder] = manifest
        elif moved is not None:
            known[moved] = own[moved]
        else:
            lines.append(f"held-out documents are not compared with the training documents of {path}, {problem}")
    return known, lines


def _moved(own: Mapping[Path, Manifest], identities: Collection[str]) -> Path | None:
    """The folder of `own` that has these training documents now; None: none has, or which documents is unknown."""
    if len(identities) != 1:
        return None
    splits = ((folder, manifest) for folder, manifest in own.items() if _has(manifest, TRAIN))
    return next((folder for folder, manifest in splits if identity_of(folder, manifest) in identities), None)


def _as_read(folder: Path, own: Mapping[Path, Manifest], identities: Collection[str]) -> tuple[Manifest | None, str]:
    """The manifest of one of these data sets, or why it cannot be compared. Arguments as for `still_as_read`."""
    try:
        manifest = own[folder] if folder in own else read_manifest(folder)
        same = not identities or identity_of(folder, manifest) in identities
    except (OSError, DataError):
        return None, "which cannot be read"
    if not same:
        return None, "which were replaced after the run read them"
    for other in own.values():
        common = manifest.tokenizers.keys() & other.tokenizers.keys()
        if manifest.vocabulary != other.vocabulary or any(
            manifest.tokenizers[n] != other.tokenizers[n] for n in common
        ):
            return None, "which have other tokenizers"
    return manifest, ""


def _has(manifest: Manifest, split: str) -> bool:
    return split in manifest.splits and manifest.splits[split].documents > 0


def _not_compared(folder: Path, manifest: Manifest) -> str:
    if not comparable(manifest):
        return f"{folder} is not compared with other data sets: it is a Megatron corpus. `mmscale data dedup` compares"
    return (
        f"held-out documents are not compared with training documents where {folder} is concerned, whose .cache is "
        f"missing or of an older version: {shell_command('data', 'inspect', folder)} makes it"
    )


@dataclass(frozen=True)
class Companion:
    """What a data set and the one that it was prepared like have in common.

    Attributes:
        path: of the other one.
        trains: what it holds out and this one trains on.
        holds_out: what this one holds out and it trains on.
    """

    path: Path
    trains: Shared
    holds_out: Shared

    def lines(self, folder: Path) -> list[str]:
        """Lines for people; `folder` is this data set."""
        return [
            *self.trains.lines(of=str(self.path), here=str(folder)),
            *self.holds_out.lines(of=str(folder), here=str(self.path)),
        ]

    def marked_by(self, folder: Path) -> list[str]:
        """Commands that list the held-out documents in question and mark them."""
        pairs = [(self.trains, self.path, folder), (self.holds_out, folder, self.path)]
        return [
            shell_command("data", "inspect", owner, "--held-out", "--trained-on", place).strip("`")
            for found, owner, place in pairs
            if found.lines()
        ]


def compare_companion(folder: Path, manifest: Manifest, like: Path, other: Manifest) -> Companion | None:
    """Compare a data set with the one that it was prepared like, in both directions, and keep the result.

    A folder that cannot be written to is not an error.

    Args:
        folder: the data set.
        manifest: of it.
        like: the other one.
        other: its manifest.

    Returns:
        None: one of them is of a Megatron corpus.
    """
    own, others = content_keys(folder, manifest), content_keys(like, other)
    if own is None or others is None:
        return None
    trains, holds_out = (common_content(a[VALIDATION], b[TRAIN]) for a, b in ((others, own), (own, others)))
    content = {"of": _of(folder, manifest), "path": str(like), "trains": asdict(trains), "holds_out": asdict(holds_out)}
    try:
        (folder / _FILE).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / _FILE, json.dumps(content))
    except OSError as error:
        log.warning("data: %s cannot be written: data inspect does not repeat its remarks: %s", folder / _FILE, error)
    return Companion(like, trains, holds_out)


def kept_companion(folder: Path, manifest: Manifest) -> Companion | None:
    """What `compare_companion` found; None: nothing is kept, or it is of other documents or of an older version."""
    try:
        content = bounded.read_object(folder / _FILE)
        if content["of"] != _of(folder, manifest):
            return None
        return Companion(Path(str(content["path"])), shared_from(content["trains"]), shared_from(content["holds_out"]))
    except (OSError, *bounded.BAD_CONTENT):
        return None


def _of(folder: Path, manifest: Manifest) -> list[str]:
    return [identity_of(folder, manifest, split=split) for split in (TRAIN, VALIDATION)]
