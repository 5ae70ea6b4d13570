"""Lists, verifies and prunes the checkpoints of a run by names, sizes, digests and types of tensors.

torch is used only for the index of a verified checkpoint, so login nodes can use the rest; show.py and diff.py read
values of tensors.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from mmscale.checkpoint import integrity, signing
from mmscale.checkpoint.integrity import CheckpointManifest, DamagedError, DeletedError, NoManifestError
from mmscale.checkpoint.kinds import wrong_types
from mmscale.checkpoint.layout import ARRAYS, is_archive
from mmscale.checkpoint.named import open_store
from mmscale.checkpoint.save_settings import Retention
from mmscale.config.load import load
from mmscale.errors import CheckpointError, ConfigError

FEWEST = 2  # number of intact checkpoints that `prune` always keeps


def listing(run: Path) -> dict[str, Any]:
    """Every committed checkpoint with its size and origin, and those renamed to .bad; nothing is hashed.

    A checkpoint that the run deletes meanwhile (`checkpoint.keep`) is left out.

    Raises:
        CheckpointError: there is no such run.
    """
    store = open_store(run)
    rows = []
    for step in store.steps():
        with contextlib.suppress(DeletedError), integrity.tolerating_deletion(store.path(step)):
            row = _row(store.path(step), step)
            rows += [row] if store.path(step).is_dir() else []
    return {"run": str(run), "checkpoints": rows, "bad": store.quarantined(), "best": store.best()}


def _row(folder: Path, step: int) -> dict[str, Any]:
    files = [file.lstat().st_size for file in folder.rglob("*") if file.is_file()]
    row: dict[str, Any] = {"step": step, "path": str(folder), "files": len(files), "bytes": sum(files)}
    manifest = _manifest(folder)
    if manifest is not None:
        row |= {name: getattr(manifest, name) for name in ("attempt", "topology", "code_version", "config_digest")}
    return row | {"manifest": manifest is not None}


def _manifest(folder: Path) -> CheckpointManifest | None:
    try:
        return integrity.read_manifest(folder)
    except DamagedError:
        return None


def verify(run: Path, *, step: int | None = None) -> dict[str, Any]:
    """Read and hash every file of an archive, of one checkpoint or of all committed ones; nothing is renamed.

    Args:
        run: the run's folder, or an archive.
        step: one checkpoint; None: all.

    Returns:
        `whole`: whether all are intact; `checkpoints`: step, whole, problems, files and bytes of each; for an archive
        also `archive`: true.

    Raises:
        CheckpointError: there is no such run or checkpoint.
    """
    if is_archive(run):
        manifest = _manifest(run)
        row = _with_types(run, _verified(run, manifest.step if manifest else None))
        return {"run": str(run), "archive": True, "whole": row["whole"], "checkpoints": [row]}
    store = open_store(run)
    chosen = store.choose(step)
    steps = [chosen] if step is not None else store.steps()
    rows = []
    for one in steps:
        try:
            rows.append(_with_types(store.path(one), _verified(store.path(one), one)))
        except DeletedError:
            if step is not None or (one == steps[-1] and not rows):
                raise
    return {"run": str(run), "whole": all(row["whole"] for row in rows), "checkpoints": rows}


def sign(run: Path, key: Path, *, step: int | None = None) -> dict[str, Any]:
    """Sign intact checkpoints: all of a run, one of them, or an archive.

    Args:
        run: the run's folder, or an archive.
        key: of ssh.
        step: one checkpoint; None: all.

    Returns:
        `signed`: step and signature of each.

    Raises:
        CheckpointError: there is none, or one is damaged; nothing is signed then.
        UsageError: the key cannot be used.
    """
    found = verify(run, step=step)
    damaged = [row for row in found["checkpoints"] if not row["whole"]]
    if damaged:
        raise CheckpointError(
            f"step {damaged[0]['step']} of {run} is damaged: {integrity.describe(damaged[0]['problems'])}",
            remedy="sign whole ones only: RUN@STEP",
        )
    folders = _folders(run, found)
    return {
        "run": str(run),
        "signed": [{"step": step, "path": str(signing.sign(folder, key))} for step, folder in folders.items()],
    }


def with_signers(run: Path, found: dict[str, Any], signers: Path) -> dict[str, Any]:
    """The result of `verify`, with the `signer` of each checkpoint. Those without an allowed signer become not `whole`.

    Args:
        run: as passed to `verify`.
        found: the result of `verify`.
        signers: file of allowed signers.

    Raises:
        UsageError: there is no such file.
    """
    folders = _folders(run, found)
    rows = []
    for row in found["checkpoints"]:
        name, problem = signing.signer(folders[row["step"]], signers)
        problems = [*row["problems"], *([problem] if problem else [])]
        rows.append(row | {"signer": name, "whole": not problems, "problems": problems})
    return found | {"whole": all(row["whole"] for row in rows), "checkpoints": rows}


def _folders(run: Path, found: dict[str, Any]) -> dict[int | None, Path]:
    store = None if found.get("archive") else open_store(run)
    return {row["step"]: run if store is None else store.path(row["step"]) for row in found["checkpoints"]}


def _verified(folder: Path, step: int | None) -> dict[str, Any]:
    """One row of `verify`.

    Raises:
        DeletedError: it was deleted in the meantime.
    """
    try:
        with integrity.tolerating_deletion(folder):
            integrity.refuse_world_writable(folder)
            problems = integrity.verify(folder, step=step)
    except DeletedError:
        raise
    except NoManifestError as error:
        problems = [str(error)]
    except CheckpointError as error:
        problems = [error.cause]
    if problems and not folder.exists():
        raise integrity.deleted(folder)
    manifest = _manifest(folder)
    sizes = [record.size for record in manifest.files.values()] if manifest else []
    return {"step": step, "whole": not problems, "problems": problems, "files": len(sizes), "bytes": sum(sizes)}


def _with_types(folder: Path, row: dict[str, Any]) -> dict[str, Any]:
    """The row of a folder with intact files, extended by tensors whose types do not match their names."""
    if not row["whole"]:
        return row
    try:
        with integrity.tolerating_deletion(folder):
            problems = wrong_types(_types(folder))
    except DeletedError:
        raise
    except CheckpointError as error:
        problems = [error.cause]
    return row | {"whole": not problems, "problems": problems}


def _types(folder: Path) -> dict[str, str]:
    """Types of tensors by name."""
    if (folder / ARRAYS).is_dir():
        from mmscale.checkpoint.archive import ArchiveTensors

        archive = ArchiveTensors(folder)
        return {name: archive.entry(name).type_name for name in archive.names()}
    from mmscale.checkpoint.sharded import stored

    return {name: entry.type_name for name, entry in stored(folder).items()}


def restore_bad(run: Path, *, step: int | None = None) -> dict[str, Any]:
    """Verify checkpoints that were renamed to .bad again, and rename the intact ones back.

    Args:
        run: the run's folder.
        step: one of them; None: all.

    Returns:
        `restored`: steps; `damaged`: name and problems of each that was not renamed.

    Raises:
        CheckpointError: there is no such run or folder, or a checkpoint of that step exists.
    """
    store = open_store(run)
    prefix = "" if step is None else f"{store.path(step).name}."
    names = [name for name in store.quarantined() if name.startswith(prefix)]
    if not names:
        raise CheckpointError(
            f"{store.root}: no folder {'' if step is None else f'of step {step} '}was renamed to .bad",
            remedy="`mmscale ckpt list` names those that were",
        )
    restored, damaged = [], {}
    for name in names:
        row = _verified(store.root / name, int(name.partition(".")[0].removeprefix("step_")))
        if row["whole"]:
            restored.append(store.restore_bad(name))
        else:
            damaged[name] = row["problems"]
    return {"run": str(run), "restored": restored, "damaged": damaged}


def prune(run: Path, *, keep: int) -> dict[str, Any]:
    """Delete all but the newest intact checkpoints, which are all hashed before any is deleted.

    Also kept: those that the run's configuration keeps permanently, the best one, and damaged ones among the newest.

    Args:
        run: the run's folder.
        keep: number of intact checkpoints to keep, at least two.

    Raises:
        CheckpointError: there is no such run, or fewer than two checkpoints are intact.
    """
    store = open_store(run)
    whole: list[int] = []
    looked_at: set[int] = set()
    # The run may save and delete checkpoints meanwhile, so the steps are listed again for each.
    while len(whole) < max(keep, FEWEST) and (left := [step for step in store.steps() if step not in looked_at]):
        looked_at.add(left[-1])
        with contextlib.suppress(DeletedError):
            if _verified(store.path(left[-1]), left[-1])["whole"]:
                whole.append(left[-1])
    if len(whole) < FEWEST and len(store.steps()) > keep:
        raise CheckpointError(
            f"{len(whole)} of {len(store.steps())} checkpoints in {store.root} are whole; nothing was deleted",
            remedy="`mmscale ckpt verify` says what is wrong with the others",
        )
    best = store.best()
    steps = store.steps()
    oldest = min(looked_at.intersection(steps), default=0)
    newest = sum(step >= oldest for step in steps)
    gone = store.prune(newest, permanent=_retention(run).keeps, verified=whole, spared=() if best is None else (best,))
    store.point_to_newest()
    return {"run": str(run), "deleted": gone, "kept": store.steps(), "verified": sorted(whole)}


def _retention(run: Path) -> Retention:
    try:
        settings = load(run / "config.yaml", recorded=True).checkpoint
    except ConfigError:  # there is no configuration of this version, so none are kept permanently
        return Retention(FEWEST)
    return Retention(settings.keep, settings.keep_every, settings.early)
