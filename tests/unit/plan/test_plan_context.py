"""The plan of context parallelism: what attention keeps and sends when keys and values are gathered, and in a ring."""

from __future__ import annotations

from typing import Any

import pytest

from mmscale.config import Config
from mmscale.config.derived import micro_batches_per_step
from mmscale.config.load import resolve
from mmscale.config.rules import check
from mmscale.plan.activations import Kernels, layer_activations
from mmscale.plan.communication import MessageKind, Operation, Traffic, communication
from mmscale.plan.layouts import GPUS
from mmscale.plan.parameters import count_parameters
from mmscale.plan.timing import step_time

SIZES = (2, 4, 8)
WORLD = 8


def _config(way: str, cp: int, **parallel: Any) -> Config:
    made = resolve(
        {
            "vocab": {"modalities": [{"name": "text", "size": 1000}, {"name": "image", "size": 1000}]},
            "model": {
                "kind": "dense",
                "num_layers": 2,
                "hidden_size": 1024,
                "ffn_hidden_size": 2048,
                "num_attention_heads": 16,
                "num_query_groups": 4,
                "seq_length": 65536,
            },
            "data": {"document_multiple": 16},
            "train": {"global_batch_size": 8, "micro_batch_size": 1},
            "parallel": {"cp": cp, "cp_attention": way, **parallel},
            "precision": {"dtype": "bf16"},
        }
    )
    check(made, world_size=WORLD)
    return made


def _sent(made: Config) -> list[Traffic]:
    return [entry for entry in communication(made, WORLD) if entry.kind is MessageKind.CP]


@pytest.mark.parametrize("again", [frozenset(), frozenset({"core_attn"})], ids=["kept", "recomputed"])
def test_a_ring_keeps_its_own_keys_and_values_only(again: frozenset[str]) -> None:
    """Bytes of attention for a token of a rank: the same for every cp. Gathered keys add to them, if they are kept."""
    kept: dict[str, list[float]] = {"gather": [], "ring": []}
    for way, found in kept.items():
        for cp in SIZES:
            parts = layer_activations(_config(way, cp), 0, kernels=Kernels.TE, again=again)
            found.append(parts["attention"] * cp)
    assert len(set(kept["ring"])) == 1
    key_bytes = 2 * 4 * 64 * 2 * 65536  # keys and values, four heads of 64, bf16, the whole sequence
    for cp, gathered in zip(SIZES, kept["gather"], strict=True):
        assert gathered - kept["ring"][0] == pytest.approx(0.0 if again else (cp - 0.5) * key_bytes)


@pytest.mark.parametrize("cp", SIZES)
def test_a_ring_sends_keys_and_values_three_times(cp: int) -> None:
    """Forward passes on keys and values; backward passes them on again, with their gradients."""
    gather, ring = (sum(entry.sent for entry in _sent(_config(way, cp))) for way in ("gather", "ring"))
    passes = 2 * micro_batches_per_step(_config("ring", cp), WORLD)  # layers times micro-batches
    assert ring == pytest.approx(passes * 3 * (cp - 1) * 65536 / cp * 2 * 4 * 64 * 2)
    assert ring == pytest.approx(1.5 * gather)
    assert {entry.operation for entry in _sent(_config("ring", cp))} == {Operation.SEND}


def test_attention_hides_what_a_ring_sends() -> None:
    ways = (_config(way, 4) for way in ("gather", "ring"))
    gather, ring = (step_time(made, WORLD, GPUS["h100"], parameters=count_parameters(made)).cp for made in ways)
    assert ring == 0.0 < gather
