"""CPU time of a step of each model of docs/eta.md's icons, in turns in one process: its table of wall clock.

    mmscale baselines examples/icons/equal_loss.yaml --out FOLDER
    python docs/measurements/eta_steps.py FOLDER OUT.json [ROUNDS]

Whole steps (forward, backward, update) with the shapes of the runs, on synthetic sequences with as many image tokens
and as much padding as the icons have, one thread. Auxiliary routers are not trained. A ratio is that of the dense
model's time to the model's in the same round, i.e. of their tokens per second.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from mmscale.bench.step import OwnContender
from mmscale.config import Config
from mmscale.config.load import load
from mmscale.runtime import device, groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.proof.synthetic import SyntheticMixture

SHARE, PADDING = {"text": 0.19, "image": 0.81}, 0.05
MODELS = ("dense", "1t1i", "4t4i", "4t4i_untied", "mod_4t4i", "moe8x", "mot", "mot_4t1i", "tc_4t4i", "tc_8x")
WARM_UP = 2


def contender(config: Config) -> OwnContender:
    """A model in its training step, with sequences as the icons' are."""
    found = OwnContender(config)
    found.mixture = SyntheticMixture(config, share=SHARE, padding=PADDING)
    return found


def seconds(model: OwnContender, step: int) -> float:
    """CPU time of one step."""
    model.prepare(step)
    began = time.process_time()
    model.forward_backward()
    model.update()
    return time.process_time() - began


def spread(values: Sequence[float]) -> dict[str, float]:
    """Minimum, median and maximum."""
    found = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {name: round(value, 4) for name, value in found.items()}


def main(folder: Path, out: Path, rounds: int) -> None:
    """Measure, print the rows and write the file."""
    torch.set_num_threads(1)
    device.keep_host_memory()
    groups.initialize(RankEnv(), seed=1)
    models = {name: contender(load(next(folder.glob(f"*_{name}.yaml")))) for name in MODELS}
    times = [{name: seconds(model, step) for name, model in models.items()} for step in range(rounds + WARM_UP)]
    groups.finalize()
    counted = times[WARM_UP:]
    found = {
        name: {
            "seconds": spread([one[name] for one in counted]),
            "throughput_over_dense": spread([one["dense"] / one[name] for one in counted]),
        }
        for name in MODELS
    }
    result = {"machine": device.device_name(), "torch": torch.__version__, "rounds": rounds, "models": found}
    out.write_text(json.dumps(result, indent=1) + "\n")
    for name, one in found.items():
        cells = [" / ".join(f"{value:.2f}" for value in figures.values()) for figures in one.values()]
        sys.stdout.write(f"| {name} | {' | '.join(cells)} |\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 15)
