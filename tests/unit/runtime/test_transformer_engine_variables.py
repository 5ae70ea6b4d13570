"""Which kernels of attention the environment's variables ask megatron-core for."""

from __future__ import annotations

import pytest

from mmscale.errors import ConfigError
from mmscale.runtime.transformer_engine import attention_backend


@pytest.mark.parametrize(
    ("environ", "choice"),
    [
        ({}, "auto"),
        ({"NVTE_FLASH_ATTN": "0", "NVTE_FUSED_ATTN": "1"}, "fused"),
        ({"NVTE_FLASH_ATTN": "0"}, "fused"),
        ({"NVTE_FUSED_ATTN": "0"}, "flash"),
        ({"NVTE_FLASH_ATTN": "0", "NVTE_FUSED_ATTN": "0"}, "unfused"),
        ({"NVTE_FLASH_ATTN": "0", "NVTE_UNFUSED_ATTN": "0"}, "fused"),
    ],
)
def test_choices(environ: dict[str, str], choice: str) -> None:
    assert attention_backend(environ) == choice


@pytest.mark.parametrize("environ", [{"NVTE_FLASH_ATTN": "yes"}, {"NVTE_FLASH_ATTN": "0", "NVTE_UNFUSED_ATTN": "1"}])
def test_what_megatron_core_would_stop_at(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="no choice that megatron-core knows"):
        attention_backend(environ)
