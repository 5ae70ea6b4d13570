"""Settings with which a run's data was prepared, where they are not those of its configuration. No torch.

`mmscale.data.prepared.prepared_with` finds them at the start of an attempt, which writes them into its event.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmscale.runs.events import BEGINS

FIELD = "prepared_with"  # of the event


def as_field(found: tuple[str, Sequence[tuple[str, str, str]]] | None) -> dict[str, Any]:
    """The field of the event of an attempt's start; empty if the configuration describes the data.

    Args:
        found: the data set, and for each setting its key, the set's value, and the configuration's.
    """
    return {} if found is None else {FIELD: {"path": found[0], "settings": {key: has for key, has, _ in found[1]}}}


def preparation_in(events: Iterable[Mapping[str, Any]]) -> tuple[str, dict[str, str]]:
    """The data set and its own values by key, of a run's newest attempt; empty if there is nothing to say.

    Args:
        events: of events.jsonl, in order.
    """
    given: Any = None
    for event in events:
        if event.get("event") in BEGINS:
            given = event.get(FIELD)
    try:
        return str(given["path"]), {str(key): str(value) for key, value in given["settings"].items()}
    except (AttributeError, KeyError, TypeError):
        return "", {}
