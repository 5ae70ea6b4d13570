"""The results of the auxiliary stage after its last step: `RUN/auxiliary/report.json`, for its readers. No torch.

The stage writes the file; the report page, `compare` and the model card read it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmscale import bounded
from mmscale.checkpoint.layout import Store
from mmscale.config.derived import SOURCE
from mmscale.runs.held_out import AUXILIARY, HeldOut
from mmscale.runs.silent_routers import silent_routers
from mmscale.train.stages.origin import folder_of, main_origin

REPORT = "report.json"


@dataclass(frozen=True)
class StageReport:
    """Held-out losses of a main checkpoint with the routers that the stage trained for it.

    Attributes:
        main_step: step of the main checkpoint.
        step: last step of the stage.
        losses: [nats] by routing mode and data set; includes those of batch routing.
        other_data: the data sets that they were measured on, if the main run has others (`--yes`); empty: its own.
        silent: sentences about routers that take no token of a modality.
    """

    main_step: int
    step: int
    losses: Mapping[HeldOut, float]
    other_data: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        """Why the losses are not shown with those of the main run; "": they are."""
        where = ", ".join(self.other_data)
        return where and f"losses under causal routing were measured on other data ({where}) and are not shown here"

    def causal(self) -> dict[HeldOut, float]:
        """Losses under the stage's routers, i.e. all except those of batch routing, marked as the stage's.

        Empty if they were measured on other data, because readers show them beside the losses of the main run.
        """
        if self.other_data:
            return {}
        return {
            replace(where, stage=AUXILIARY): value for where, value in self.losses.items() if where.routing != "batch"
        }


def report_in(folder: Path) -> StageReport | None:
    """The report in the stage's folder; None: there is no readable one."""
    return _read(folder / REPORT)[0]


def report_of(run: Path) -> StageReport | None:
    """The report on a main run's checkpoint.

    Args:
        run: the main run's folder.

    Returns:
        None: the stage has not ended, or it was trained for another checkpoint that had the same step.
    """
    found, digest = _read(folder_of(run) / REPORT)
    store = Store.of_run(run)
    if found is None or digest is None or not store.path(found.main_step).is_dir():
        return found  # the report has no digest (older version), or the checkpoint was deleted
    return found if main_origin(store, found.main_step)["main_digest"] == digest else None


def _read(file: Path) -> tuple[StageReport | None, str | None]:
    try:
        content = bounded.read_object(file)
        losses = dict(_losses(content))
        digest = content.get("main_digest")
        step = int(content["main_step"])
        other = tuple(str(one) for one in content.get("other_data") or ())
        silent = tuple(silent_routers(content.get("routers") or ()))
        report = StageReport(step, int(content.get("step", 0)), losses, other, silent)
        return report, None if digest is None else str(digest)
    except (OSError, *bounded.BAD_CONTENT):
        return None, None


def by_kind(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Losses grouped by the kind of data set: `source` for each source of a blend, `validation` for each further set.

    Args:
        found: losses by the names of `HeldOut`.
    """
    sources = {name.removeprefix(SOURCE): own for name, own in found.items() if name.startswith(SOURCE)}
    others = {name: own for name, own in found.items() if not name.startswith(SOURCE)}
    return ({"source": sources} if sources else {}) | {"validation": others}


def _losses(content: Mapping[str, Any]) -> Iterator[tuple[HeldOut, float]]:
    """The inverse of `by_kind`, with `held_out` for the whole training data: losses by routing mode and name."""
    sources = {f"{SOURCE}{name}": own for name, own in content.get("source", {}).items()}
    for name, routings in {"": content.get("held_out", {}), **sources, **content.get("validation", {})}.items():
        for routing, figures in routings.items():
            for figure, value in figures.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    yield HeldOut(figure, routing, name), float(value)
