"""Ways to draw icons with a trained model: the table of icons in docs/decoding.md.

    python docs/measurements/decoding_icons.py RUN DATA DOCUMENTS OUT.json [DRAWINGS]

RUN is a run of examples/icons whose model is causal (dense, token choice, or with auxiliary routers) or its export,
DATA its prepared data set, DOCUMENTS the folder that examples/icons/prepare.sh wrote. Start it where the run was
trained, if its `data.path` is relative. It draws DRAWINGS (default 200) icons in each way, the same number of each of
ten names, and counts those that a classifier reads as asked (examples/icons/recognise.py). Ways that need holes are
left out for models trained without `objective.cm3_rate`. It writes OUT.json after each way.
"""

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from decoding_ways import MASKED, PLAIN, scores, shares

from checkpoints_tools.huggingface.generator import Generator, open_generator
from checkpoints_tools.huggingface.prompts import Prompt
from mmscale.inference.generate import Sampling

sys.path.append(str(Path(__file__).parents[2] / "examples" / "icons"))
from recognise import Recogniser

log = logging.getLogger(__name__)
NAMES = ["heart", "star", "home", "lock", "bell", "cloud", "folder", "camera", "key", "flag"]
DRAW, READ = "draw {}, tabler icons", "this icon is {}, tabler icons"
DRAWINGS, BEST_OF = 200, (1, 2, 4)  # of each way; numbers of samples of which the best is kept
TEMPERATURE = 0.8


def drawn(model: Generator, recogniser: Recogniser, way: dict[str, Any], *, each: int) -> dict[str, Any]:
    """Share of drawings read as asked, by what ranks samples and of how many the best is kept."""
    prompts = [Prompt(DRAW.format(name), draw=True) for name in NAMES]
    settings = Sampling(max_tokens=66, temperature=TEMPERATURE, batch=each * len(NAMES), **way)
    began = time.process_time()
    samples = model.sample(prompts, count=each, sampling=settings)
    seconds = time.process_time() - began
    right = recogniser.read([one.pieces[0] for one in samples]) == np.repeat(np.arange(len(NAMES)), each)
    masked = bool(model.config.objective.cm3_rate)
    rankings = {"the prompt": None, "the caption": READ}
    found: dict[str, Any] = {
        "cpu_seconds": round(seconds, 1),
        "any of them": shares(right, right.astype(float), best_of=BEST_OF),
    }
    for title, caption in rankings.items():
        captions = caption and [caption.format(NAMES[number // each]) for number in range(len(samples))]
        ranks = scores(model, samples, masked=masked, captions=captions)
        found[title] = shares(right, ranks, best_of=BEST_OF)
    return found


def main(run: Path, data: Path, documents: Path, out: Path, drawings: int) -> None:
    """Draw in every way."""
    model, recogniser = open_generator(run), Recogniser(documents, NAMES)
    masked = bool(model.config.objective.cm3_rate)
    result: dict[str, Any] = {
        "run": run.name,
        "step": model.step,
        "routing": model.routing,
        "drawings": drawings,
        "temperature": TEMPERATURE,
        "read": {"left out of the fit": recogniser.left_out(), "through the tokenizer": recogniser.through(data)},
    }
    log.info("%s", json.dumps(result))
    for title, way in {**PLAIN, **(MASKED if masked else {})}.items():
        result[title] = drawn(model, recogniser, way, each=drawings // len(NAMES))
        log.info("%s | %s", title, json.dumps(result[title]))
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(*map(Path, sys.argv[1:5]), drawings=int(sys.argv[5]) if len(sys.argv) > 5 else DRAWINGS)
