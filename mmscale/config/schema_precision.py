"""Settings of number formats (`precision`).

Only shapes of single values; rules between settings are in rules.py and rules_*.py.
"""

from __future__ import annotations

from typing import Literal

from mmscale.config.section import Section, setting


class PrecisionConfig(Section):
    """Number formats."""

    dtype: Literal["fp32", "bf16"] = setting(
        "Parameters and activations; with bf16 the optimizer keeps fp32 copies.", "bf16"
    )
    fp8: Literal["off"] = setting("FP8 layers; only 'off' so far.", "off")
