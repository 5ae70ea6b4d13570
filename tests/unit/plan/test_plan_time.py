"""The time model: figures of devices, what hides what, which way each setting moves a step; Step Law."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from mmscale.config import Config
from mmscale.config.load import load, resolve
from mmscale.errors import UsageError
from mmscale.plan import MessageKind, Operation, Traffic, communication, count_parameters, flops_per_token, sent_by_kind
from mmscale.plan.step_law import suggest
from mmscale.plan.timing import StepTime, mfu, step_time
from mmscale.tables.gpus import GPUS, gpu_named

H100 = GPUS["h100"]
CONFIGS = Path(__file__).parents[3] / "configs"


def config(*overrides: str, **model: Any) -> Config:
    """A 1.3B-like model that every layout below divides."""
    shape = {
        "kind": "moma",
        "num_layers": 24,
        "hidden_size": 2048,
        "ffn_hidden_size": 5632,
        "num_attention_heads": 16,
        "seq_length": 4096,
        "experts": {"counts": {"text": 4, "image": 4}, "share": {"text": 0.5, "image": 0.5}},
    }
    values = {"model": shape | model, "train": {"micro_batch_size": 1, "global_batch_size": 512}}
    return resolve(values, overrides)


def time_of(*overrides: str, gpu: str = "h100", world: int = 64, **model: Any) -> StepTime:
    settings = config(*overrides, **model)
    return step_time(settings, world, GPUS[gpu], parameters=count_parameters(settings))


def test_parts_sum_to_the_step() -> None:
    found = time_of("parallel.tp=2", "parallel.pp=2", "parallel.ep=4", "parallel.recompute=full")
    parts = found.as_dict()
    total = parts.pop("total")
    assert sum(parts.values()) == pytest.approx(total, rel=1e-3)
    assert found.total == pytest.approx(found.compute + found.communication + found.bubble)
    assert all(parts[name] > 0 for name in ("products", "attention", "elementwise", "recompute", "tp", "ep", "bubble"))


def test_no_device_is_faster_than_its_data_sheet() -> None:
    """Products at 100 % of the peak would take this long; the model must stay below, but in the same order."""
    settings = config()
    found = time_of()
    tokens = settings.train.global_batch_size * settings.model.seq_length / 64
    flops = flops_per_token(settings)
    floor = flops.training * tokens / H100.bf16
    assert 1.3 * floor < found.total < 5 * floor
    reached = mfu(settings, 64, H100, seconds=found.total, flops=flops.training)
    assert reached == pytest.approx(floor / found.total)


@pytest.mark.parametrize(
    ("slow", "fast"),
    [
        ({"gpu": "a100"}, {"gpu": "h100"}),
        ({"gpu": "h100"}, {"gpu": "h200"}),
        ({"overrides": ["parallel.recompute=full"]}, {"overrides": ["parallel.recompute=selective"]}),
        ({"overrides": ["parallel.recompute=selective"]}, {"overrides": []}),
        ({"overrides": ["parallel.tp=8"]}, {"overrides": ["parallel.tp=2"]}),
        ({"overrides": ["parallel.tp=16"]}, {"overrides": ["parallel.tp=8"]}),
        ({"overrides": ["parallel.pp=4"]}, {"overrides": ["parallel.pp=4", "parallel.vpp=3"]}),
        ({"overrides": ["parallel.overlap_grad_reduce=false"]}, {"overrides": []}),
        ({"overrides": ["precision.dtype=fp32"]}, {"overrides": []}),
        ({"overrides": ["model.backend=torch"]}, {"overrides": []}),
        ({"overrides": []}, {"overrides": ["model.depth.every=2"]}),
    ],
)
def test_which_is_faster(slow: dict[str, Any], fast: dict[str, Any]) -> None:
    times = [time_of(*case.get("overrides", ()), gpu=case.get("gpu", "h100")).total for case in (slow, fast)]
    assert times[0] > times[1]


def test_full_recompute_repeats_the_layers_and_not_the_output_layer() -> None:
    """What 24 more layers add to a forward pass is what 24 layers cost in it."""
    few, many = (
        (found.products + found.attention) / 3 + found.elementwise * 2 / 5
        for found in (time_of(), time_of(num_layers=48))
    )
    full = time_of("parallel.recompute=full")
    assert full.recompute == pytest.approx(many - few, rel=1e-6)
    assert full.recompute < 0.97 * few


def test_the_bubble_is_the_textbook_one_where_stages_are_alike() -> None:
    found = time_of("parallel.pp=4")
    micro_batches = 512 // 16
    busy = found.total - found.bubble - found.dp - found.optimizer
    assert found.bubble / busy == pytest.approx(3 / micro_batches, rel=1e-6)


def test_fp8_is_faster_by_less_than_its_peak_says() -> None:
    """Products take half the time; casting to FP8 takes some of it back. The A100 has no FP8."""
    plain, fp8 = time_of(), time_of("precision.fp8=delayed")
    assert fp8.products < 0.7 * plain.products
    assert fp8.elementwise > plain.elementwise
    assert plain.products - fp8.products > fp8.elementwise - plain.elementwise
    # slots are rounded up, and nothing else differs
    assert time_of("precision.fp8=delayed", gpu="a100").products == pytest.approx(
        time_of(gpu="a100").products, rel=0.02
    )


def test_experts_across_machines_cost_more() -> None:
    inside, across = time_of("parallel.ep=4"), time_of("parallel.tp=4", "parallel.ep=4")
    assert across.ep > 2 * inside.ep


def test_large_micro_batches_hide_the_cost_of_starting_kernels() -> None:
    small: dict[str, Any] = {"hidden_size": 256, "ffn_hidden_size": 704, "num_attention_heads": 4, "seq_length": 256}
    one, many = time_of(**small), time_of("train.micro_batch_size=8", **small)
    assert one.products > 4 * many.products


def test_sent_by_ring_algorithms() -> None:
    kinds = {Operation.ALL_GATHER: 75.0, Operation.REDUCE_SCATTER: 75.0, Operation.ALL_REDUCE: 150.0}
    for operation, sent in kinds.items():
        assert Traffic(MessageKind.SP, operation, ranks=4, calls=1, payload=100.0).sent == sent
    assert Traffic(MessageKind.EP, Operation.ALL_TO_ALL, ranks=4, calls=1, payload=100.0).sent == 75.0
    assert Traffic(MessageKind.PP, Operation.SEND, ranks=4, calls=1, payload=100.0).sent == 100.0


def test_one_rank_sends_nothing() -> None:
    assert set(sent_by_kind(communication(config("train.global_batch_size=1"), 1)).values()) == {0.0}


def test_tied_embeddings_are_summed_over_first_and_last_stage() -> None:
    tied, untied = (
        sent_by_kind(communication(config("parallel.pp=4", f"model.tie_embeddings={tie}"), 64, stage=3))["pp"]
        for tie in ("true", "false")
    )
    table = config().vocab.padded_size * 2048
    assert tied - untied == table * 4


def test_an_unknown_gpu() -> None:
    with pytest.raises(UsageError, match="--gpu v100: no figures of it; use one of h100, h200, b200, gb200, a100"):
        gpu_named("v100")
    assert gpu_named("H200") is GPUS["h200"]


class TestStepLaw:
    def test_what_the_literature_notes_computed(self) -> None:
        """papers on MoMa's classes: 435M dense 7.8e-3, 1.4B dense 2.9e-3, 1.4B 4t4i 8.4e-4; 4.1M tokens a step."""
        for name, lr in (("435m_dense", 7.8e-3), ("1b4_dense", 2.9e-3), ("1b4_4t4i", 8.4e-4)):
            settings = load(CONFIGS / f"moma_{name}.yaml")
            found = suggest(settings, count_parameters(settings))
            assert found.lr == pytest.approx(lr, rel=0.02)
            assert found.batch_tokens == pytest.approx(4.1e6, rel=0.02)
            assert found.batch_sequences == round(found.batch_tokens / 4096)

    def test_caveats_follow_the_configuration(self) -> None:
        dense = config("train.steps=10", kind="dense", experts={}, qk_norm=False)
        mixed = config("train.steps=1000000", "model.depth.every=2")
        found = [suggest(settings, count_parameters(settings)) for settings in (dense, mixed)]
        assert [len(suggestion.caveats) for suggestion in found] == [1, 5]
        assert "longest run of the fit" in found[1].caveats[1]
        assert all(math.isfinite(suggestion.lr) for suggestion in found)
