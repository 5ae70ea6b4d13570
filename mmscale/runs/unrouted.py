"""The share of tokens that no expert takes: read from a logged step's metrics, with a note if it is high.

mmscale.model.moma measures it. Progress lines and reports use this module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# Experts that choose at random leave out about a third of the tokens (MoMa's capacity, 4 experts: 31.6 %).
HIGH = 0.45
_KEY = re.compile(r"experts/(.+)/unrouted_fraction")


def unrouted(values: Mapping[str, float]) -> dict[str, float]:
    """Share of each group's tokens that no expert took, mean over layers, by the name of the group.

    Args:
        values: metrics of a step by the keys of metrics.jsonl.
    """
    return {found[1]: value for key, value in values.items() if (found := _KEY.fullmatch(key))}


def note(shares: Mapping[str, float]) -> str | None:
    """One sentence if a share is above HIGH; otherwise None.

    Args:
        shares: from `unrouted`.
    """
    high = [f"{share:.0%} of the tokens of {name}" for name, share in shares.items() if share > HIGH]
    if not high:
        return None
    return (
        f"experts take no part in {' and '.join(high)} (mean over layers): see docs/routing.md, "
        "model.experts.choice and model.experts.capacity"
    )
