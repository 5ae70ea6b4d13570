"""Which kernels of attention the environment's variables ask megatron-core for."""

from __future__ import annotations

import pytest

from mmscale.errors import ConfigError
from mmscale.runtime.transformer_engine import attention_backend


def _set(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]) -> None:
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)


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
def test_choices(environ: dict[str, str], choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, environ)
    assert attention_backend() == choice


@pytest.mark.parametrize("environ", [{"NVTE_FLASH_ATTN": "yes"}, {"NVTE_FLASH_ATTN": "0", "NVTE_UNFUSED_ATTN": "1"}])
def test_what_megatron_core_would_stop_at(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, environ)
    with pytest.raises(ConfigError, match="no choice that megatron-core knows"):
        attention_backend()
