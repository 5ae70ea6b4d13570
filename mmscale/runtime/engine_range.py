"""Versions of Transformer-Engine that mmscale works with. Imports nothing, for `mmscale doctor`.

megatron-core 0.16.1 asks for versions below 2.12 in the metadata of its extra `dev`; its code and that of later
releases checks for old versions only. Newer ones were tried with Transformer-Engine's Python (docs/versions.md).
"""

from __future__ import annotations

FIRST, BELOW = "2.9", "2.21"
WANTED = f">={FIRST},<{BELOW}"
# The newest patch of each release: tests/engine_versions.py.
TRIED = (
    "2.9.0",
    "2.10.0",
    "2.11.0",
    "2.12.0",
    "2.13.0",
    "2.14.1",
    "2.15.0",
    "2.16.0",
    "2.17.0",
    "2.18.0",
    "2.19.0",
    "2.20.2",
)
