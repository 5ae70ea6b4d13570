"""CPU time and peak memory of a training step with many ids: the table "Logits" of docs/performance.md.

    python docs/measurements/logits.py IDS fp32|bf16

Run it in a checkout of each version to compare, twice in turns. It prints minimum, median and maximum of seven steps
after two, peak memory of the process, and the last gradient norm, which shows whether the bits are the same.
"""

import json
import os
import resource
import statistics
import sys
import time

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from mmscale.config import Config
from mmscale.runtime import groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.assembly import build
from mmscale.train.proof.synthetic import SyntheticMixture
from mmscale.train.steps.batch import to_device

SHARE = {"text": 0.5, "image": 0.5}
SKIPPED, STEPS = 2, 7


def measure(ids: int, dtype: str) -> dict[str, float]:
    """The figures of one process."""
    torch.set_num_threads(1)
    config = Config.model_validate(
        {
            "vocab": {"modalities": [{"name": name, "size": ids // 2} for name in SHARE]},
            "model": {
                "kind": "moma",
                "num_layers": 4,
                "hidden_size": 256,
                "ffn_hidden_size": 512,
                "num_attention_heads": 4,
                "num_query_groups": 2,
                "seq_length": 512,
                "experts": {"counts": {"text": 4, "image": 4}, "share": SHARE},
            },
            "train": {"micro_batch_size": 4, "global_batch_size": 4},
            "precision": {"dtype": dtype},
        }
    )
    groups.start(RankEnv())
    stepper = build(config, groups.initialize_layout()).stepper
    mixture = SyntheticMixture(config, share=SHARE)
    batch = [to_device(mixture.micro_batch(0), mixture.vocabulary)]
    times = []
    for _ in range(SKIPPED + STEPS):
        began = time.process_time()
        norm = stepper.train(batch, lr=1e-3).grad_norm
        times.append(time.process_time() - began)
    groups.finalize()
    own = times[SKIPPED:]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"min": min(own), "median": statistics.median(own), "max": max(own), "MiB": memory, "norm": norm}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(int(sys.argv[1]), sys.argv[2])) + "\n")
