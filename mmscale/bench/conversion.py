"""Measures the conversion of a checkpoint to a Hugging Face model, and the generation speed of that model.

Conversion alternates with a plain copy of the same bytes, and its peak memory is measured; generation alternates with a
dense Qwen3 of transformers with the same number of active parameters. Weights are random; the gate is not timed.

    mmscale bench convert --hidden 512 --layers 4 --repeats 5
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from checkpoints_tools.huggingface.files import write_weights
from checkpoints_tools.huggingface.model_config import model_config
from checkpoints_tools.huggingface.weights import moves
from mmscale.checkpoint.manager import CheckpointManager
from mmscale.checkpoint.shape import shape_of
from mmscale.checkpoint.sharded import metadata
from mmscale.checkpoint.tensors import open_tensors
from mmscale.config import Config
from mmscale.errors import UsageError
from mmscale.model.build import build_chunks
from mmscale.runtime import device, groups
from mmscale.runtime.atomic_files import fsync
from mmscale.runtime.rank_env import RankEnv

_STEP = 1


class _Weights:
    """The weights of a new model as a state that can be saved."""

    step = _STEP

    def __init__(self, model: Any) -> None:
        self.model = model

    def sharded(self, *, loading: bool) -> dict[str, Any]:
        return {"model": self.model.sharded_state_dict(metadata=metadata()), "progress": {"step": _STEP}}

    def restore(self, loaded: dict[str, Any]) -> None:
        raise NotImplementedError("the benchmark reads tensors by name")


def run(
    *,
    hidden: int = 512,
    layers: int = 4,
    experts: int = 4,
    repeats: int = 5,
    shard_mb: int = 256,
    batch: int = 4,
    prompt: int = 64,
    new_tokens: int = 64,
    folder: str | None = None,
) -> dict[str, Any]:
    """Measure conversion and generation.

    Args:
        hidden: width of the model.
        layers: its layers.
        experts: experts of each of the two modalities.
        repeats: rounds.
        shard_mb: largest file of weights [MB].
        batch: sequences that are generated together.
        prompt: tokens of a prompt.
        new_tokens: tokens that are generated.
        folder: to write into; default: the system's temporary folder.

    Returns:
        `model`: parameters and bytes; `convert`, `copy` [MB/s], `ratio`: min, median, max; `memory` [MB]; `generate`:
        tokens/s of both, and ratios.
    """
    if hidden % 64 or min(layers, experts, repeats, shard_mb, batch, prompt, new_tokens) < 1:
        raise UsageError(
            "bench convert: --hidden must be a multiple of 64, everything else at least 1", remedy="change the options"
        )
    config = _config(hidden, layers, experts)
    with tempfile.TemporaryDirectory(prefix="mmscale-bench-", dir=folder) as scratch:
        converted = _conversion(config, Path(scratch), repeats=repeats, shard_bytes=shard_mb * 10**6)
    return {
        "device": device.device_name(),
        "torch": torch.__version__,
        **converted,
        "generate": _generation(config, repeats=repeats, batch=batch, prompt=prompt, new_tokens=new_tokens),
    }


def _config(hidden: int, layers: int, experts: int) -> Config:
    return Config.model_validate(
        {
            "vocab": {"modalities": [{"name": "text", "size": 8192}, {"name": "image", "size": 8192}]},
            "model": {
                "kind": "moma",
                "num_layers": layers,
                "hidden_size": hidden,
                "ffn_hidden_size": hidden * 8 // 3,
                "num_attention_heads": hidden // 64,
                "seq_length": 2048,
                "experts": {
                    "counts": {"text": experts, "image": experts},
                    "share": {"text": 0.5, "image": 0.5},
                },
                "auxiliary": {"mode": "joint"},
            },
            "precision": {"dtype": "fp32"},
        }
    )


def _conversion(config: Config, scratch: Path, *, repeats: int, shard_bytes: int) -> dict[str, Any]:
    run = scratch / "run"
    _save(config, run)
    source = open_tensors(run)
    listed = moves(config, auxiliary=True, thresholds=False)
    sizes = [source.entry(name).nbytes for name in source.names()]
    total = sum(sizes)

    def convert() -> None:
        (scratch / "out").mkdir()
        # opened again, so that the checkpoint's files are hashed while they are read, as in a real export
        write_weights(scratch / "out", open_tensors(run), listed, shard_bytes=shard_bytes)

    def copy() -> None:
        shutil.copytree(source.path, scratch / "out")
        for file in (scratch / "out").rglob("*"):
            fsync(file)

    seconds: dict[str, list[float]] = {"convert": [], "copy": []}
    memory = _peak_mb(convert, scratch / "out", run)
    for number in range(repeats):
        turns: list[tuple[str, Callable[[], None]]] = [("convert", convert), ("copy", copy)]
        for name, action in turns if number % 2 == 0 else reversed(turns):
            start = time.perf_counter()
            action()
            seconds[name].append(time.perf_counter() - start)
            shutil.rmtree(scratch / "out")
    ratios = [copied / converted for copied, converted in zip(seconds["copy"], seconds["convert"], strict=True)]
    return {
        "model": {"parameters": total // 4, "bytes": total, "tensors": len(sizes)},
        "convert_mb_per_s": _spread([total / 1e6 / value for value in seconds["convert"]]),
        "copy_mb_per_s": _spread([total / 1e6 / value for value in seconds["copy"]]),
        "convert_over_copy": _spread(ratios),
        "memory_mb": {"peak": memory, "largest_tensor": max(sizes) / 1e6, "shard": min(shard_bytes, total) / 1e6},
    }


def _save(config: Config, run: Path) -> None:
    """A committed checkpoint of new weights."""
    collection = groups.initialize(RankEnv(), seed=config.run.seed)
    try:
        (model,) = build_chunks(config, collection)
        info = {"shape": shape_of(config)}
        manager = CheckpointManager(run, every=1, keep=1, attempt=1, info=info, on_event=lambda *_, **__: None)
        manager.save(_Weights(model))
    finally:
        groups.finalize()


def _peak_mb(convert: Callable[[], None], out: Path, run: Path) -> float | None:
    """Peak resident memory of a conversion above that of its process before [MB]; None on other systems than Linux."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            source = open_tensors(run)
            # Load everything that only a first call loads.
            source.read(min(source.names(), key=lambda name: source.entry(name).nbytes))
            Path("/proc/self/clear_refs").write_text("5")
            before = _resident_mb()
            convert()
            os.write(writing, str(_resident_mb() - before).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        said = stream.read()
    os.waitpid(child, 0)
    shutil.rmtree(out, ignore_errors=True)
    return float(said) if said else None


def _resident_mb() -> float:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def _generation(config: Config, *, repeats: int, batch: int, prompt: int, new_tokens: int) -> dict[str, Any]:
    """Greedy generation with a cache: one expert per token, so a dense model of the same widths has the same size."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from checkpoints_tools.huggingface.shipped.configuration_moma import MomaConfig
    from checkpoints_tools.huggingface.shipped.modeling_moma import MomaForCausalLM

    content = model_config(
        config, auxiliary_size=config.model.hidden_size // 2, thresholds=False, routing="top1", tokens_per_image=0
    )
    shared = {key: content[key] for key in content if key in Qwen3Config().to_dict() and key != "architectures"}
    torch.manual_seed(0)
    models: dict[str, Any] = {
        "moma": MomaForCausalLM(MomaConfig(**content)).eval(),
        "dense": Qwen3ForCausalLM(Qwen3Config(**shared | {"model_type": "qwen3"})).eval(),
    }
    ids = torch.randint(5, config.vocab.size, (batch, prompt))
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    speeds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(repeats + 1):
        for name in models if number % 2 else reversed(models):
            start = time.perf_counter()
            models[name].generate(ids, attention_mask=torch.ones_like(ids), **settings)
            if number:  # the first round warms up
                speeds[name].append(batch * new_tokens / (time.perf_counter() - start))
    ratios = [own / theirs for own, theirs in zip(speeds["moma"], speeds["dense"], strict=True)]
    return {
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        "batch": batch,
        "new_tokens": new_tokens,
        "moma_tokens_per_s": _spread(speeds["moma"]),
        "dense_tokens_per_s": _spread(speeds["dense"]),
        "moma_over_dense": _spread(ratios),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def render(result: dict[str, Any]) -> str:
    """The result as a table."""
    table = Table(box=None, pad_edge=False)
    for column in ("measured", "min", "median", "max"):
        table.add_column(column, justify="left" if column == "measured" else "right")
    rows = [
        ("conversion, MB/s", result["convert_mb_per_s"]),
        ("plain copy, MB/s", result["copy_mb_per_s"]),
        ("conversion over copy", result["convert_over_copy"]),
        ("MoMa, new tokens/s", result["generate"]["moma_tokens_per_s"]),
        ("dense Qwen3 of its active size, new tokens/s", result["generate"]["dense_tokens_per_s"]),
        ("MoMa over dense", result["generate"]["moma_over_dense"]),
    ]
    for name, spread in rows:
        table.add_row(name, *(f"{spread[key]:.3g}" for key in ("min", "median", "max")))
    memory, model = result["memory_mb"], result["model"]
    console = Console(highlight=False, width=120)
    with console.capture() as capture:
        console.print(table)
        peak = "not measured" if memory["peak"] is None else f"{memory['peak']:.0f} MB"
        console.print(
            f"{model['parameters'] / 1e6:.1f} M parameters in {model['tensors']} tensors; peak memory "
            f"{peak} (largest tensor {memory['largest_tensor']:.0f} MB, shard {memory['shard']:.0f} MB)",
            soft_wrap=True,
        )
    return capture.get().rstrip()
