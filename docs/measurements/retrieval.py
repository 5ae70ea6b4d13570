"""Held-out loss with 0, 1, 2 and random neighbours on made-up facts: the table of docs/retrieval.md.

    python docs/measurements/retrieval.py FOLDER STEPS SEEDS

It writes 9,000 documents about 3,000 persons, prepares them, finds their neighbours, trains a small model with and
without neighbours for each seed, and evaluates each run four times. The table goes to the terminal and to
FOLDER/retrieval.json, the figure to FOLDER/retrieval.png. Started again, it goes on with the runs and evaluations that
are not there yet.
"""

import json
import logging
import random
import statistics
import sys
from pathlib import Path

from commands import mmscale

log = logging.getLogger(__name__)
PERSONS, DOCUMENTS, FACTS = 3000, 3, 3
EVALUATED = ("0", "1", "2", "random")  # neighbours
SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
PHRASES = {
    "town": ("lives in {}", "has a house in {}", "comes home to {}"),
    "craft": ("works as a {}", "earns money as a {}", "learned to be a {}"),
    "dish": ("likes to eat {}", "cooks {} every week", "never refuses {}"),
    "animal": ("keeps a {}", "walks with a {}", "looks after a {}"),
    "friend": ("knows {}", "often meets {}", "writes letters to {}"),
}
CONFIG = {
    "vocab": {"modalities": [{"name": "text", "size": 512}, {"name": "image", "size": 16}], "pad_multiple": 16},
    "model": {
        "kind": "dense",
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "num_attention_heads": 2,
        "seq_length": 160,
    },
    "train": {"micro_batch_size": 8, "global_batch_size": 8, "eval_every": 0},
    "optim": {"lr": 5e-3, "min_lr": 0, "warmup": 30, "schedule": "linear"},
    "precision": {"dtype": "fp32"},
    "checkpoint": {"every": 1000, "keep": 1},
}


def word(rng: random.Random, syllables: int) -> str:
    """A made-up word."""
    return "".join(rng.choice(SYLLABLES) for _ in range(syllables))


def write_documents(file: Path) -> None:
    """Three documents about each person, with three of five facts each."""
    rng = random.Random(0)
    with file.open("w") as stream:
        for person in range(PERSONS):
            name = f"{word(rng, 3).title()} {word(rng, 3).title()}"
            facts = {kind: word(rng, 4) for kind in PHRASES}
            for number in range(DOCUMENTS):
                kinds = rng.sample(sorted(PHRASES), FACTS)
                said = [rng.choice(PHRASES[kind]).format(facts[kind]) for kind in kinds]
                text = f"{name} {', '.join(said[:-1])} and {said[-1]}."
                record = {"id": f"{person}-{number}", "content": [{"type": "text", "text": text}]}
                stream.write(json.dumps(record) + "\n")


def prepared(folder: Path) -> Path:
    """The configuration, beside its data set with neighbours."""
    folder.mkdir(parents=True, exist_ok=True)
    documents, data, config = folder / "facts.jsonl", folder / "data", folder / "config.yaml"
    if not (data / "neighbours").exists():
        write_documents(documents)
        config.write_text(json.dumps(CONFIG | {"data": {"path": str(data)}, "run": {"dir": str(folder / "runs")}}))
        mmscale("data", "prepare", config, "--documents", documents, "--out", data, "data.prepare.held_out=0.05")
        log.info("%s", mmscale("data", "retrieve", data))
    return config


def measure(folder: Path, steps: int, seeds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Losses by training, evaluation and seed."""
    config, file = prepared(folder), folder / "retrieval.json"
    found: dict = json.loads(file.read_text()) if file.exists() else {}
    for seed in range(seeds):
        for most in (2, 0):
            run, name = f"trained with up to {most}", f"neighbours-{most}-seed-{seed}"
            rows = found.setdefault(run, {})
            if all(str(seed) in rows.get(wanted, {}) for wanted in EVALUATED):
                continue
            settings = (f"run.name={name}", f"run.seed={seed}", f"data.retrieval.neighbours={most}")
            mmscale("train", config, *settings, f"train.steps={steps}")
            for wanted in EVALUATED:
                loss = mmscale("eval", folder / "runs" / name, "--neighbours", wanted)["loss"]
                rows.setdefault(wanted, {})[str(seed)] = loss
                log.info("%s %s %.4f", name, wanted, loss)
                file.write_text(json.dumps(found, indent=1) + "\n")
    return found


def draw(found: dict[str, dict[str, dict[str, float]]], file: Path) -> None:
    """Draw what neighbours change in the held-out loss of models that were trained with them, a line for each seed."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    losses = found["trained with up to 2"]
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for seed in losses["0"]:
        changes = [losses[wanted][seed] - losses["0"][seed] for wanted in EVALUATED]
        axes.plot(changes, "o-", label=f"seed {seed}")
    axes.axhline(0, color="0.6", linewidth=1)
    axes.set_xticks(range(len(EVALUATED)), ["none", "1 nearest", "2 nearest", "2 random"])
    axes.set_xlabel("neighbours before a held-out document")
    axes.set_ylabel("change of its loss [nats per token]")
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    place = Path(sys.argv[1])
    result = measure(place, steps=int(sys.argv[2]), seeds=int(sys.argv[3]))
    draw(result, place / "retrieval.png")
    for run, rows in result.items():
        for wanted, by_seed in rows.items():
            losses = list(by_seed.values())
            spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
            log.info("%s | evaluated with %s | %.3f ± %.3f", run, wanted, statistics.mean(losses), spread)
