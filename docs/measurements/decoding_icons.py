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

from checkpoints_tools.huggingface.generator import Generator, open_generator
from checkpoints_tools.huggingface.prompts import Prompt
from checkpoints_tools.huggingface.shipped.likelihood_moma import document_behind, log_likelihoods
from mmscale.inference.generate import Sampling

sys.path.append(str(Path(__file__).parents[2] / "examples" / "icons"))
from recognise import Recogniser

log = logging.getLogger(__name__)
NAMES = ["heart", "star", "home", "lock", "bell", "cloud", "folder", "camera", "key", "flag"]
DRAW, READ = "draw {}, tabler icons", "this icon is {}, tabler icons"
DRAWINGS, BEST_OF = 200, (1, 2, 4)  # of each way; numbers of samples of which the best is kept
TEMPERATURE = 0.8
MASK = {"unconditional": "mask"}
PLAIN: dict[str, dict[str, Any]] = {
    "no guidance": {},
    "guidance 1.5": {"guidance": 1.5},
    "guidance 2": {"guidance": 2.0},
    "guidance 3": {"guidance": 3.0},
    "CD-K, k 1, alpha 0.1": {"cd_k": 1, "cd_alpha": 0.1},
    "CD-K, k 4, alpha 0.3": {"cd_k": 4, "cd_alpha": 0.3},
    "CD-K, k 4, alpha 1": {"cd_k": 4, "cd_alpha": 1.0},
}
MASKED = {f"{name} from <mask>": {**way, **MASK} for name, way in PLAIN.items() if way}


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
    found: dict[str, Any] = {"cpu_seconds": round(seconds, 1), "any of them": shares(right, right.astype(float))}
    for title, caption in rankings.items():
        documents = [
            document_behind(
                model.processor,
                model.encode(one.prompt),
                one.ids,
                masked=masked,
                text=caption and caption.format(NAMES[number // each]),
            )
            for number, one in enumerate(samples)
        ]
        found[title] = shares(right, np.array(log_likelihoods(model.model, documents, pad=0)))
    return found


def shares(right: np.ndarray, scores: np.ndarray) -> dict[int, float]:
    """Share of kept drawings that are read as asked, by the number of samples of which the best is kept."""
    found = {}
    for number in BEST_OF:
        best = scores.reshape(-1, number).argmax(axis=1)
        found[number] = float(right.reshape(-1, number)[np.arange(len(best)), best].mean())
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
