"""CPU time of a MoMa feed-forward layer over that of its matrix products alone: a table of docs/performance.md.

    python docs/measurements/layer.py HIDDEN [ROUNDS]

4 text and 4 image experts, 4 sequences of 1,024 tokens, forward and backward, fp32, one thread. The products are those
of all experts on as many rows, without SwiGLU, routing, gathering and weighted sums. `experts` adds SwiGLU. The three
are timed in turns, and ratios are taken within a round. The last line is a digest of outputs and gradients, the same in
two checkouts whose layers compute the same bits.
"""

import hashlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import Tensor

from mmscale.config import Config
from mmscale.model.expert_compute import BATCHED, feed_forward
from mmscale.model.moma import MoMaMLP
from mmscale.runtime import device, groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.assembly import build
from mmscale.train.proof.synthetic import SyntheticMixture
from mmscale.train.steps.batch import to_device

SHARE = {"text": 0.5, "image": 0.5}
LENGTH, SEQUENCES, EXPERTS, WARM_UP = 1024, 4, 4, 2


def prepared(hidden: int) -> tuple[Callable[[], list[Tensor]], Callable[[], object], Callable[[], object]]:
    """The layer, its products and its experts; each call is a forward and a backward pass."""
    ffn = hidden * 11 // 4
    config = Config.model_validate(
        {
            "vocab": {"modalities": [{"name": name, "size": 512} for name in SHARE]},
            "model": {
                "kind": "moma",
                "num_layers": 1,
                "hidden_size": hidden,
                "ffn_hidden_size": ffn,
                "num_attention_heads": 4,
                "seq_length": LENGTH,
                "experts": {"counts": dict.fromkeys(SHARE, EXPERTS), "share": SHARE},
            },
            "train": {"micro_batch_size": SEQUENCES, "global_batch_size": SEQUENCES},
            "precision": {"dtype": "fp32"},
        }
    )
    chunks = build(config, groups.initialize_layout()).chunks
    mlp = next(module for module in chunks[0].modules() if isinstance(module, MoMaMLP))
    mixture = SyntheticMixture(config, share=SHARE)
    params = to_device(mixture.micro_batch(0), mixture.vocabulary).params
    torch.manual_seed(0)
    tokens, gradient = (torch.randn(LENGTH, SEQUENCES, hidden) for _ in range(2))
    weights = [tokens.requires_grad_(), *mlp.parameters()]
    rows = LENGTH * SEQUENCES // (2 * EXPERTS)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(EXPERTS, *shape, requires_grad=True)

    taken, w1, w2, inner = drawn(rows, hidden), drawn(hidden, 2, ffn), drawn(ffn, hidden), drawn(rows, ffn)
    flat = w1.detach().view(EXPERTS, hidden, 2 * ffn).requires_grad_()
    outer, wide = torch.randn(EXPERTS, rows, hidden), torch.randn(EXPERTS, rows, 2 * ffn)

    def layer() -> list[Tensor]:
        output, _ = mlp(tokens, params)
        return [output, *torch.autograd.grad(output, weights, gradient)]

    def products() -> None:
        for _ in SHARE:
            torch.autograd.grad(torch.bmm(taken, flat), (taken, flat), wide)
            torch.autograd.grad(torch.bmm(inner, w2), (inner, w2), outer)

    def experts() -> None:
        for _ in SHARE:
            torch.autograd.grad(feed_forward(taken, w1, w2, compute=BATCHED), (taken, w1, w2), outer)

    return layer, products, experts


def seconds(work: Callable[[], object]) -> float:
    """CPU time of one call."""
    began = time.process_time()
    work()
    return time.process_time() - began


def spread(values: Sequence[float]) -> str:
    """Minimum, median and maximum."""
    return f"{min(values):.3f} / {statistics.median(values):.3f} / {max(values):.3f}"


def main(hidden: int, rounds: int) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    device.keep_host_memory()
    groups.start(RankEnv())
    layer, products, experts = prepared(hidden)
    times = [(seconds(products), seconds(experts), seconds(layer)) for _ in range(rounds + WARM_UP)][WARM_UP:]
    digest = hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in layer())).hexdigest()[:12]
    groups.finalize()
    sys.stdout.write(
        f"products, ms          {spread([1e3 * one[0] for one in times])}\n"
        f"experts over products {spread([one[1] / one[0] for one in times])}\n"
        f"layer over products   {spread([one[2] / one[0] for one in times])}\n"
        f"fastest layer over fastest products {min(t[2] for t in times) / min(t[0] for t in times):.3f}\n"
        f"{digest}\n"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 15)
