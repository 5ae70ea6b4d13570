"""Shards: what is in memory while they are written, and what a gate's findings amount to."""

from __future__ import annotations

import copy
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from checkpoints_tools.huggingface import gate
from checkpoints_tools.huggingface.files import ModelFiles, write_weights
from checkpoints_tools.huggingface.weights import Move, moves
from mmscale.checkpoint.tensors import TensorEntry, open_tensors
from mmscale.config import Config
from mmscale.runtime import groups
from mmscale.runtime.rank_env import RankEnv
from tests.support import run_ranks
from tests.unit.model.reference import tiny

MB = 1 << 20


class Made:
    """Tensors that are made when they are asked for."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def entry(self, name: str) -> TensorEntry:
        return TensorEntry(name, self.shapes[name], torch.float32)

    def read(self, name: str) -> Tensor:
        generator = torch.Generator().manual_seed(len(name))
        return torch.randn(self.shapes[name], generator=generator)


def dense_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    model = config.model
    hidden, rows = model.hidden_size, config.vocab.padded_size
    kinds = {
        "word_embeddings.weight": (rows, hidden),
        "output_layer.weight": (rows, hidden),
        "linear_qkv.weight": ((model.num_attention_heads + 2 * model.query_groups) * model.head_dim, hidden),
        "linear_proj.weight": (hidden, model.num_attention_heads * model.head_dim),
        "linear_fc1.weight": (2 * model.ffn_hidden_size, hidden),
        "linear_fc2.weight": (hidden, model.ffn_hidden_size),
        "q_layernorm.weight": (model.head_dim,),
        "k_layernorm.weight": (model.head_dim,),
    }
    listed = moves(config, auxiliary=False, thresholds=False)
    return {m.source: next((s for k, s in kinds.items() if m.source.endswith(k)), (hidden,)) for m in listed}


def test_shards_hold_every_tensor_once(tmp_path: Path) -> None:
    config = tiny("dense", num_layers=3, num_query_groups=2)
    source, listed = Made(dense_shapes(config)), moves(config, auxiliary=False, thresholds=False)
    written = write_weights(tmp_path, source, listed, shard_bytes=4000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(written.shards) > 3 and set(index["weight_map"].values()) == set(written.shards)
    assert index["metadata"]["total_size"] == written.bytes == sum(source.entry(m.source).nbytes for m in listed)
    for name in written.shards:
        with safe_open(tmp_path / name, framework="pt") as opened:
            held = [opened.get_tensor(key).nbytes for key in opened.keys()]  # noqa: SIM118
        assert sum(held) <= 4000 or len(held) == 1
    files = ModelFiles(tmp_path)
    assert len(files.names()) == written.tensors
    for move in listed:
        assert torch.equal(move.join([files.read(name) for name in move.targets]), source.read(move.source))


class Large:
    """Weights for a checkpoint: 12 tensors of 24 MB."""

    step = 1

    def sharded(self, *, loading: bool) -> dict[str, Any]:
        from megatron.core.dist_checkpointing import ShardedTensor

        weights = {f"w{n}": torch.full((6 * MB,), float(n)) for n in range(12)}
        return {
            **{name: ShardedTensor.from_rank_offsets(name, tensor) for name, tensor in weights.items()},
            "progress": {"step": 1},
        }

    def restore(self, loaded: dict[str, Any]) -> None:
        raise NotImplementedError


def peak_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def test_memory_of_streaming(tmp_path: Path) -> None:
    """Less than twice the largest tensor and one shard, whatever the model's size: 288 MB here."""
    from mmscale.checkpoint.manager import CheckpointManager

    run, out = tmp_path / "run", tmp_path / "out"
    out.mkdir()

    def save(ranks: RankEnv) -> None:
        groups.start(ranks)
        groups.initialize_layout()
        CheckpointManager(run, every=1, keep=9, attempt=1, info={}, on_event=lambda *_, **__: None).save(Large())

    def stream(ranks: RankEnv) -> None:
        source = open_tensors(run)
        # split like linear_qkv: every part is a copy
        listed = [
            Move(f"w{n}", (f"a{n}", f"b{n}"), lambda t: list(t.view(-1, 2).t()), lambda t: t[0]) for n in range(12)
        ]
        source.read("w0")  # libraries and the reader's own buffers are loaded
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
        before = peak_mb()
        written = write_weights(out, source, listed, shard_bytes=48 * MB)
        grown = peak_mb() - before
        assert written.bytes == 288 * MB and len(written.shards) == 6
        assert grown < 2 * 24 + 48, f"{grown:.0f} MB"

    run_ranks(save, world_size=1)
    run_ranks(stream, world_size=1)


FOUND: dict[str, Any] = {
    "loading": {"missing_keys": [], "unexpected_keys": []},
    "weights": {"not_in_files": [], "not_in_model": []},
    "prompts": [
        {
            "tokens": 9,
            "max_abs": 1e-6,
            "cached_max_abs": 2e-6,
            "padded_max_abs": 3e-6,
            "argmax_same": 9,
            "largest_gap_of_another_argmax": 0.0,
            "finite": True,
            "margin": 0.5,
        }
    ]
    * 4,
    "generated": [
        {"cached": [7, 8], "uncached": [7, 8], "batched": [7, 8], "trainer": [7, 8], "margin": 0.5, "gap": 0.1}
    ]
    * 3,
    "other_ids": [],
    "other_plain_ids": [],
    "other_items": {"image": 0},
}


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_others_may_read_what_the_umask_lets_them(umask: int, tmp_path: Path) -> None:
    """The safetensors library writes files of mode 0600 whatever the umask says."""
    config = tiny("dense", num_query_groups=2)
    before = os.umask(umask)
    try:
        write_weights(
            tmp_path, Made(dense_shapes(config)), moves(config, auxiliary=False, thresholds=False), shard_bytes=10**9
        )
    finally:
        os.umask(before)
    (file,) = tmp_path.glob("*.safetensors")
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask


def test_verdict_of_a_good_export() -> None:
    verdict = gate.judge(FOUND)
    assert verdict["passed"] and verdict["max_abs"] == 3e-6 and (verdict["tokens"], verdict["compared"]) == (36, 4)
    assert verdict["generated"] == 6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"loading": {"missing_keys": ["lm_head.weight"]}}, "missing keys: lm_head.weight"),
        ({"loading": {"mismatched_keys": ["x"]}}, "mismatched keys: x"),
        ({"weights": {"not_in_model": ["extra"]}}, "not in model: extra"),
        ({"max_abs": 2e-4}, "logits differ by 0.0002"),
        ({"cached_max_abs": 2e-4}, "logits differ by 0.0002"),
        ({"padded_max_abs": float("nan")}, "logits differ by nan"),
        ({"finite": False}, "not finite"),
        ({"largest_gap_of_another_argmax": 5e-5, "argmax_same": 8}, "another most likely token"),
        ({"other_ids": ["<s>"]}, "the processor encodes '<s>' differently"),
        ({"other_plain_ids": ["<s>"]}, "the tokenizer encodes '<s>' differently"),
        ({"other_items": {"image": 1}}, "1 images are made or read differently"),
    ],
)
def test_verdict_of_a_bad_one(change: dict[str, Any], said: str) -> None:
    found = copy.deepcopy(FOUND)
    for key, value in change.items():
        if key in found:
            found[key] = value
        else:
            found["prompts"] = [found["prompts"][0] | {key: value}, *found["prompts"][1:]]
    verdict = gate.judge(found)
    assert not verdict["passed"] and any(said in problem for problem in verdict["problems"]), verdict


def test_close_calls_prove_nothing_but_may_not_be_many() -> None:
    far = FOUND["prompts"][0] | {"max_abs": 1.0, "margin": 1e-7}
    some = FOUND | {"prompts": [far, *FOUND["prompts"]]}
    assert gate.judge(some)["passed"] and gate.judge(some)["close_calls"] == 1
    many = FOUND | {"prompts": [far] * 5 + FOUND["prompts"]}
    assert "may be close calls" in gate.judge(many)["problems"][0]


@pytest.mark.parametrize("way", gate.WAYS)
def test_what_generate_gives_must_be_what_the_trainer_gives(way: str) -> None:
    (good, *_) = FOUND["generated"]
    other = good | {way: [7, 9]}
    (problem,) = gate.judge(FOUND | {"generated": [good, other, good]})["problems"]
    assert problem == f"generate() gives other tokens than the trainer's model ({way})"
    for close in ({"gap": 1e-5}, {"margin": 1e-7}):
        verdict = gate.judge(FOUND | {"generated": [good, other | close, good]})
        assert verdict["passed"] and verdict["generated"] == 4
        (problem,) = gate.judge(FOUND | {"generated": [other | close] * 3})["problems"]
        assert "never gives the tokens" in problem
