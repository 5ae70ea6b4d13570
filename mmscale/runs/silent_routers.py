"""Finds auxiliary routers that take no token of a modality, in the rows of `mmscale eval` and of the stage's report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mmscale.wording import numbered

_WHOSE = {"experts": "experts", "depth": "Mixture-of-Depths layers"}


def silent_routers(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """A sentence for each modality whose tokens are taken under batch routing, and in some layers not by the routers.

    Args:
        rows: one for each layer and modality, with `layer`, `kind`, `modality`, `per_token` and `per_token_batch`.
    """
    known: dict[tuple[str, str], dict[int, bool]] = {}  # by kind and modality: layers, and whether they take nothing
    for row in rows:
        if row.get("per_token_batch"):
            layers = known.setdefault((str(row["kind"]), str(row["modality"])), {})
            layers[int(row["layer"])] = row["per_token"] == 0
    found = []
    for (kind, modality), layers in known.items():
        silent = [layer for layer, takes_nothing in sorted(layers.items()) if takes_nothing]
        if not silent:
            continue
        if len(silent) == len(layers):
            where = "any layer"
        else:
            where = f"{numbered(len(silent), 'layer')} of {len(layers)} ({', '.join(map(str, silent))})"
        found.append(
            f"causal routers of {_WHOSE.get(kind, kind)} take no token of {modality} in {where}: they pass by there, "
            "while batch routing takes some"
        )
    return found
