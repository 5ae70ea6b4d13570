"""The cost of expert choice and Mixture-of-Depths in training time, at equal FLOPs per token.

Whole optimizer steps (forward, backward, update) on synthetic micro-batches, one process. dense, moe8x, 4t4i and 4t4i
with Mixture-of-Depths alternate step by step, so that a busy machine slows all of them. The paper's results (MoMa,
arXiv 2407.21770, Table 2) are shown next to ours. A peer, transformers' Mixtral with the FLOPs of 4t4i, alternates with
them. Communication is not measured.

    mmscale bench step --repeats 5 --profile
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from mmscale.bench import operators, peer_mixtral
from mmscale.config import Config
from mmscale.data.vocab import Vocabulary
from mmscale.errors import UsageError
from mmscale.model.build import build_chunks, transformer_config
from mmscale.plan import count_parameters, flops_per_token
from mmscale.runtime import device, groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.optim.optimizer import make_optimizer, set_learning_rate, wrap
from mmscale.train.proof.synthetic import SyntheticMixture
from mmscale.train.steps.batch import Batch, to_device
from mmscale.train.steps.step import Stepper

_EXPERTS = {"counts": {"text": 4, "image": 4}, "share": {"text": 0.5, "image": 0.5}}
_MODELS: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense"},
    "moe8x": {"kind": "moe", "experts": {"counts": {"mixed": 8}}},
    "4t4i": {"kind": "moma", "experts": _EXPERTS},
    "4t4i_mod": {"kind": "moma", "experts": _EXPERTS, "depth": {"every": 2, "capacity": 0.25}},
}
PEER = "mixtral_peer"
VARIANTS = (*_MODELS, PEER)
# Tokens per second relative to dense, 435M class, 256 A100 (MoMa, Table 2).
PAPER = {"moe8x": 28_990 / 31_970, "4t4i": 26_424 / 31_970, "4t4i_mod": 22_114 / 31_970}
_PARTS = ("step", "forward_backward", "optimizer")


class Contender(Protocol):
    """Something that trains; a step is `forward_backward` and then `update`."""

    def prepare(self, step: int) -> None:
        """Make the micro-batches of a step. Not timed; `mmscale bench data` measures loading."""

    def forward_backward(self) -> None:
        """Gradients of all micro-batches, summed."""

    def update(self) -> None:
        """Clip gradients and take the optimizer's step."""


class OwnContender:
    """A model of mmscale in the training step of mmscale."""

    def __init__(self, config: Config) -> None:
        collection = groups.collection()
        transformer = transformer_config(config)
        chunks = wrap(config, transformer, build_chunks(config, collection, transformer=transformer), collection)
        self.config = config
        self.optimizer = make_optimizer(config, chunks, collection)
        self.stepper = Stepper(config, chunks, self.optimizer, collection)
        self.mixture = SyntheticMixture(config, share={"text": 0.5, "image": 0.5}, padding=0.0)
        self.vocabulary = Vocabulary.from_config(config.vocab)
        self.batches: list[Batch] = []

    def prepare(self, step: int) -> None:
        """Make the micro-batches of a step."""
        # New tensors, so that the masks that a micro-batch caches for its layers are made within the timed part.
        number = self.config.train.global_batch_size // self.config.train.micro_batch_size
        self.batches = [
            to_device(self.mixture.micro_batch(step * number + index), self.vocabulary) for index in range(number)
        ]

    def forward_backward(self) -> None:
        """Gradients of all micro-batches."""
        self.stepper.accumulate(self.batches)

    def update(self) -> None:
        """Take the optimizer's step."""
        set_learning_rate(self.optimizer, self.config, self.config.optim.lr)
        self.optimizer.step()


@dataclass(frozen=True)
class Times:
    """Seconds of a step's parts: wall clock and CPU time of the process."""

    wall: dict[str, float]
    cpu: dict[str, float]


def variant_config(
    name: str, *, hidden: int, seq: int, layers: int, micro_batch: int, tokens_per_step: int, dtype: str
) -> Config:
    """The configuration of a variant; Mixture-of-Depths gets the number of layers whose FLOPs come nearest to dense.

    Args:
        name: one of the models, not the peer.
        hidden: width; heads are 64 wide, the SwiGLU width is 8/3 of it, rounded up to a multiple of 64.
        seq: tokens of a sequence.
        layers: layers of the models that are not Mixture-of-Depths.
        micro_batch: sequences of a micro-batch.
        tokens_per_step: tokens of an optimizer step.
        dtype: fp32 or bf16.
    """
    # With 10 ids per unit of width the output layer has the same share of the FLOPs (15 %) as in the paper's 435M
    # class.
    image = hidden * 2
    base = {
        "vocab": {"modalities": [{"name": "text", "size": 8 * hidden}, {"name": "image", "size": image}]},
        "train": {"micro_batch_size": micro_batch, "global_batch_size": tokens_per_step // seq},
        "precision": {"dtype": dtype},
    }
    shape = {
        "hidden_size": hidden,
        "ffn_hidden_size": -(-8 * hidden // (3 * 64)) * 64,
        "num_attention_heads": max(1, hidden // 64),
        "seq_length": seq,
    }

    def with_layers(count: int) -> Config:
        return Config.model_validate({**base, "model": {**shape, "num_layers": count, **_MODELS[name]}})

    config = with_layers(layers)
    if config.model.depth is None:
        return config
    target = flops_per_token(
        variant_config(
            "dense",
            hidden=hidden,
            seq=seq,
            layers=layers,
            micro_batch=micro_batch,
            tokens_per_step=tokens_per_step,
            dtype=dtype,
        )
    ).forward
    return min(
        (with_layers(count) for count in range(layers, 3 * layers + 1)),
        key=lambda config: abs(flops_per_token(config).forward - target),
    )


def run(
    *,
    hidden: int = 512,
    seq: int = 1024,
    layers: int = 4,
    micro_batch: int = 8,
    tokens_per_step: int = 16_384,
    repeats: int = 5,
    variants: Sequence[str] | str = VARIANTS,
    dtype: str = "fp32",
    profile: bool = False,
) -> dict[str, Any]:
    """Time training steps of the variants, alternating.

    Args:
        hidden: width of the models.
        seq: tokens of a sequence.
        layers: layers of the dense model and of all without Mixture-of-Depths.
        micro_batch: sequences of a micro-batch.
        tokens_per_step: tokens of an optimizer step; its micro-batches accumulate gradients, so that updating eight
            times the parameters is spread over many tokens, as in real training (the paper: 24,576 a GPU).
        repeats: timed rounds, after one round to warm up.
        variants: names of VARIANTS; dense is always included, for the ratios.
        dtype: fp32 or bf16.
        profile: also profile one forward and backward of each variant by operator.

    Returns:
        `machine`, `threads`, `shape`; per variant `flops_per_token`, `parameters`, `seconds`, `throughput_over_dense`
        (by part and clock: min, median, max; ratios are taken within a round); and `profile` if requested.
    """
    names = (variants,) if isinstance(variants, str) else tuple(variants)
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise UsageError(f"bench step: no variant is called {unknown[0]}", remedy=f"there are {', '.join(VARIANTS)}")
    if tokens_per_step % (micro_batch * seq):
        raise UsageError(
            f"bench step: tokens-per-step = {tokens_per_step} is not a multiple of micro-batch * seq = "
            f"{micro_batch * seq}",
            remedy="change one of them",
        )
    names = tuple(name for name in VARIANTS if name in names or name == "dense")
    shape: dict[str, Any] = {
        "hidden": hidden,
        "seq": seq,
        "layers": layers,
        "micro_batch": micro_batch,
        "tokens_per_step": tokens_per_step,
        "dtype": dtype,
    }
    configs = {name: variant_config("4t4i" if name == PEER else name, **shape) for name in names}
    # Otherwise a variant's time would depend on memory freed by the previous one.
    device.keep_host_memory()
    own_groups = not torch.distributed.is_initialized()
    if own_groups:
        groups.initialize(RankEnv(), seed=configs["dense"].run.seed)
    try:
        contenders: dict[str, Contender] = {
            name: peer_mixtral.Peer(config) if name == PEER else OwnContender(config)
            for name, config in configs.items()
        }
        rounds = _rounds(contenders, repeats)
        profiles = {name: _profile(contender) for name, contender in contenders.items()} if profile else {}
    finally:
        if own_groups:
            groups.finalize()
    result: dict[str, Any] = {
        "machine": device.device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "shape": shape,
        "repeats": repeats,
        "variants": {
            name: {
                "layers": config.model.num_layers,
                "parameters": count_parameters(config).total,
                "flops_per_token": flops_per_token(config).training,
                "seconds": _spread([times[name] for times in rounds]),
                "throughput_over_dense": _ratios(rounds, name),
                "paper": PAPER.get(name),
            }
            for name, config in configs.items()
        },
    }
    if profiles:
        result["profile"] = profiles
    return result


def _rounds(contenders: dict[str, Contender], repeats: int) -> list[dict[str, Times]]:
    """Alternating steps: dense, moe8x, ..., dense, moe8x, ...; the first round warms up and is not returned."""
    return [{name: _time(c, step) for name, c in contenders.items()} for step in range(repeats + 1)][1:]


def _time(contender: Contender, step: int) -> Times:
    contender.prepare(step)

    def part(work: Callable[[], None]) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        device.synchronize()
        return time.perf_counter() - wall, time.process_time() - cpu

    device.synchronize()
    both, update = part(contender.forward_backward), part(contender.update)
    parts = {"forward_backward": both, "optimizer": update, "step": (both[0] + update[0], both[1] + update[1])}
    return Times(wall={k: v[0] for k, v in parts.items()}, cpu={k: v[1] for k, v in parts.items()})


def _profile(contender: Contender) -> dict[str, Any]:
    contender.prepare(0)
    return operators.profile(contender.forward_backward)


def _summary(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def _spread(times: Sequence[Times]) -> dict[str, dict[str, dict[str, float]]]:
    return {
        part: {
            "wall": _summary([one.wall[part] for one in times]),
            "cpu": _summary([one.cpu[part] for one in times]),
        }
        for part in _PARTS
    }


def _ratios(rounds: Sequence[dict[str, Times]], name: str) -> dict[str, dict[str, dict[str, float]]]:
    """Throughput relative to the dense step of the same round."""
    return {
        part: {
            "wall": _summary([times["dense"].wall[part] / times[name].wall[part] for times in rounds]),
            "cpu": _summary([times["dense"].cpu[part] / times[name].cpu[part] for times in rounds]),
        }
        for part in ("step", "forward_backward")
    }


def render(result: dict[str, Any]) -> str:
    """The result of `run` as tables for people."""
    shape = result["shape"]

    def triple(values: dict[str, float], digits: int) -> str:
        return " / ".join(f"{values[key]:.{digits}f}" for key in ("min", "median", "max"))

    lines = [
        f"{result['machine']}, {result['threads']} thread(s), torch {result['torch']}, {shape['dtype']}; hidden "
        f"{shape['hidden']}, seq {shape['seq']}, micro-batch {shape['micro_batch']}, {shape['tokens_per_step']:,} "
        f"tokens a step, {result['repeats']} rounds; min / median / max",
        "",
        "| variant | layers | parameters | MFLOPs per token | step, s | step, CPU s | forward + backward, CPU s | "
        "optimizer, CPU s | tokens/s over dense | by CPU time | by CPU time, without optimizer | paper |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in result["variants"].items():
        seconds, ratio = found["seconds"], found["throughput_over_dense"]
        cells = [
            name,
            str(found["layers"]),
            f"{found['parameters'] / 1e6:.1f} M",
            f"{found['flops_per_token'] / 1e6:.1f}",
            triple(seconds["step"]["wall"], 2),
            triple(seconds["step"]["cpu"], 2),
            triple(seconds["forward_backward"]["cpu"], 2),
            triple(seconds["optimizer"]["cpu"], 2),
            triple(ratio["step"]["wall"], 3),
            triple(ratio["step"]["cpu"], 3),
            triple(ratio["forward_backward"]["cpu"], 3),
            "" if found["paper"] is None else f"{found['paper']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if "profile" in result:
        lines += ["", operators.render(result["profile"])]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(render(run(profile=True)) + "\n")
