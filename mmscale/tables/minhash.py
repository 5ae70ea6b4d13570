"""Programs that compute the MinHash signatures of texts (`mmscale data dedup --minhash NAME`).

mmscale/data/dedup/signers.py calls them.
"""

from __future__ import annotations

from mmscale.tables.table import Choice, Table

MINHASHES: Table[Choice] = Table(
    "Programs that compute MinHash signatures",
    ("data dedup --minhash",),
    {
        "numpy": Choice(meaning="part of mmscale"),
        "rensa": Choice(meaning="the package rensa, faster, with other signatures (the extra `rensa`)"),
    },
)
