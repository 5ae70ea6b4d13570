"""Puts the example plug-ins into an environment as an installed package, outside the tree."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

from mmscale.config.keys import all_keys
from mmscale.tables.plugins import GROUP, PLUGINS

EXAMPLE = Path(__file__).parents[1] / "examples" / "plugins"
PACKAGE = "moma_plugins"


def entry_points() -> dict[str, str]:
    """Names of the example's entry points, each with its import path."""
    found: dict[str, str] = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]["entry-points"][GROUP]
    return found


# The values of settings that name the example, by kind: import path and entry point.
NAMED: dict[str, tuple[str, str]] = {
    kind: (path, name)
    for name, path in entry_points().items()
    for kind in PLUGINS
    if path.partition(":")[0].endswith(f".{kind}")
}


# Kinds that settings of the configuration name.
KINDS = [kind for kind, one in PLUGINS.items() if one.settings[0] in all_keys()]

# Those of them that training uses; the others prepare data.
TRAINED = [kind for kind in KINDS if not PLUGINS[kind].settings[0].startswith("data.prepare.")]


def setting(kind: str, name: str, args: str = "{}") -> list[str]:
    """Overrides that name a plug-in."""
    key = PLUGINS[kind].settings[0]
    if kind in ("sink", "hook"):
        return [f"{key}={{'{name}': {args}}}"]
    # The configuration of a preparation must name documents.
    others = ["data.prepare.documents=[some.jsonl]"] if key.startswith("data.prepare.") else []
    return [f"{key}={name}", f"{key}_args={args}", *others]


def install(folder: Path) -> Path:
    """Copy the package with the metadata that pip would write; add `folder` to sys.path or PYTHONPATH afterwards."""
    shutil.copytree(EXAMPLE / PACKAGE, folder / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    info = folder / f"{PACKAGE}-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 0.1\n")
    lines = [f"{name} = {path}" for name, path in entry_points().items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines]) + "\n")
    return folder
