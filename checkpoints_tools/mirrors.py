"""Commands for mirrors: uploads checkpoints that a run's mirror lacks, and makes a run folder from a mirror."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmscale.bounded import BAD_CONTENT
from mmscale.checkpoint import run_folder
from mmscale.checkpoint.layout import Store
from mmscale.checkpoint.mirror import downloads
from mmscale.checkpoint.mirror.mirror_settings import MirrorSettings
from mmscale.checkpoint.mirror.reasons import without_secrets
from mmscale.checkpoint.mirror.uploads import Uploaded
from mmscale.checkpoint.named import open_store
from mmscale.config.load import load
from mmscale.errors import CheckpointError, UsageError
from mmscale.runs.attempts import settings_name
from mmscale.train.stages.table import STAGES


def mirror(run: Path) -> dict[str, Any]:
    """Upload the checkpoints of a run and of its stages that `checkpoint.mirror` lacks, and delete old ones there.

    Args:
        run: the run's folder; its config.yaml names the mirror.

    Returns:
        `uploaded`: step, name, bytes and seconds of each; `refused`: name and damage of each damaged one.

    Raises:
        UsageError: the run has no mirror.
        CheckpointError: the store cannot be read or written.
    """
    open_store(run)
    config = load(run / "config.yaml", recorded=True)
    uploaded: list[dict[str, Any]] = []
    refused: dict[str, str] = {}
    if config.checkpoint.mirror is None:
        raise UsageError(f"{run} has no mirror", remedy="set checkpoint.mirror: URL in its config.yaml")
    for stage in STAGES.values():
        settings = MirrorSettings.of_stage(stage.settings(config), run=run, folder=stage.folder(run))
        if settings is None or not Store(settings.root).steps():
            continue

        def show(done: Uploaded, stage: str = stage.name) -> None:
            uploaded.append({"stage": stage, **vars(done)})

        try:
            uploader = settings.uploader()
            uploader.bring_up_to_date(show)
        except (UsageError, CheckpointError):
            raise
        except Exception as error:  # stores raise all kinds of errors
            raise CheckpointError(
                f"{settings.url}: {without_secrets(f'{type(error).__name__}: {error}')}",
                remedy="check network, credentials and endpoint; what was uploaded stays, so start it again",
            ) from None
        refused |= uploader.refused
    return {"run": str(run), "mirror": config.checkpoint.mirror, "uploaded": uploaded, "refused": refused}


def fetch(url: str, step: int | None, run: Path, *, signers: Path | None = None) -> dict[str, Any]:
    """Make a run folder from a mirror: its newest checkpoint, that of its other stages, and its configuration.

    Args:
        url: of the run in the mirror: the value of `checkpoint.mirror`, a slash and the run's name.
        step: of a checkpoint of the main run only; None: the newest complete one of each stage.
        run: the new folder. With a step, it may have checkpoints of other steps; otherwise it must have none.
        signers: file of allowed signers, one of whom must have signed; None: no signature is required.

    Returns:
        `run`; `fetched`: stage, step, path, bytes and files of each.

    Raises:
        CheckpointError: there is none, it is damaged or not signed, or `run` has checkpoints.
    """
    fetched = []
    for stage in STAGES.values():
        remote = downloads.connect("/".join(filter(None, (url.rstrip("/"), stage.subfolder))))
        if stage.subfolder and (step is not None or not downloads.generations(remote)):
            continue
        folder = stage.folder(run)
        store = Store.of_run(folder)
        # Checkpoints of an earlier call are allowed.
        if step is None and store.steps() != [downloads.choose(remote, None).step]:
            run_folder.refuse_checkpoints(folder)
        done = downloads.fetch(remote, step, store, signers=signers)
        store.point_to_newest()
        info = store.info(done.step)
        _write_settings(run, folder, info)
        fetched.append({"stage": stage.name, "path": str(done.path), **{k: getattr(done, k) for k in _SHOWN}})
    return {"run": str(run), "fetched": fetched}


_SHOWN = ("step", "name", "bytes", "files")


def _write_settings(run: Path, folder: Path, info: dict[str, Any]) -> None:
    """Write the configuration of the run, also under the number of its attempt.

    The next attempt then gets a higher number.
    """
    run_folder.write_config(run, info.get("config"), folder=folder)
    latest = folder / "config.yaml"
    try:
        own = folder / settings_name(int(info["attempt"]))
    except BAD_CONTENT:
        return
    if latest.is_file() and not own.exists():
        own.write_text(latest.read_text(encoding="utf-8"), encoding="utf-8")
