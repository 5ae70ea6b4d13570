"""Makes run folders of published curves again, for `mmscale compare`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from mmscale.config import Config
from mmscale.config.load import dump, resolve
from mmscale.plan.siblings import siblings
from mmscale.runs.metrics import METRICS

AXES = (("training_step", "loss"), ("step", "eval/"))  # the steps of a curve, and how the names of its values begin


def rebuild(runs: Mapping[str, Mapping[str, Any]], base: Config, out: Path) -> list[Path]:
    """Write a folder for each run, with its configuration and its curves.

    Args:
        runs: by name: `model` (a baseline of `base`), `settings` (overrides of it), and curves with their steps.
        base: the configuration that `mmscale baselines` gets.
        out: receives the folders.

    Returns:
        The folders, in the order of `runs`.
    """
    kinds = {one.name: one.config.model_dump(mode="json") for one in siblings(base)}
    for name, run in runs.items():
        (out / name).mkdir(parents=True)
        (out / name / "config.yaml").write_text(dump(resolve(kinds[run["model"]], run["settings"])))
        lines = []
        for axis, prefix in AXES:
            keys = [key for key in run if key.startswith(prefix)]
            columns = zip(*(run[key] for key in keys), strict=True)
            lines += [
                {"step": step, "attempt": 1} | dict(zip(keys, values, strict=True))
                for step, values in zip(run[axis], columns, strict=True)
            ]
        (out / name / METRICS).write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    return [out / name for name in runs]
