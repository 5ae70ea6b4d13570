"""Held-out losses with and without loss-based weights, on data with planted duplicates or noise.

Trains small dense models on handwritten digits in one process, on the same sequences for every kind of weights:

    python examples/digits/write_documents.py --out data/digits-documents
    mmscale data prepare configs/quickstart.yaml --out SET
    python docs/measurements/loss_weights.py SET 400 loss_weights.jsonl

It appends a line for each model and skips those that the file has, so that it can be stopped and started again.

`clean`: the training documents. `duplicates`: a fifth of all documents are copies of eight of them. `noise`: one of 20
documents has random tokens of the same modalities instead of its own. Held-out documents are those of the set.
"""

from __future__ import annotations

import json
import statistics
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mmscale.config import Config
from mmscale.data.prepared.manifest import read_manifest
from mmscale.data.stream.packed import fill_rows, pack_rows
from mmscale.data.stream.passes import open_passes
from mmscale.data.stream.source import Source
from mmscale.data.vocab import Vocabulary
from mmscale.runtime import device, groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.assembly import build
from mmscale.train.optim.schedule import learning_rate
from mmscale.train.steps.batch import to_device
from mmscale.train.steps.evaluation import evaluate

COPIED, DUPLICATES, NOISE = 8, 0.2, 0.05
ROWS, LENGTH = 16, 64  # sequences of a step, tokens of a sequence
SEEDS = (1, 2, 3)
WEIGHTS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "linupper": {"kind": "linupper", "temperature": 0.4, "warmup": 50, "decay": 0.98},
    "quadratic": {"kind": "quadratic", "temperature": 0.4, "warmup": 50, "decay": 0.98},
}
Documents = list[np.ndarray]


def planted(documents: Documents, vocabulary: Vocabulary, kind: str, rng: np.random.Generator) -> Documents:
    """The documents of one kind of data."""
    if kind == "duplicates":
        chosen = [documents[number] for number in rng.choice(len(documents), COPIED, replace=False)]
        count = round(len(documents) * DUPLICATES / (1 - DUPLICATES))
        return documents + [chosen[number % COPIED] for number in range(count)]
    if kind == "noise":
        noisy = set(rng.choice(len(documents), round(NOISE * len(documents)), replace=False).tolist())
        return [noise(ids, vocabulary, rng) if n in noisy else ids for n, ids in enumerate(documents)]
    return documents


def noise(ids: np.ndarray, vocabulary: Vocabulary, rng: np.random.Generator) -> np.ndarray:
    """Random tokens of the modalities of a document; special tokens stay."""
    found, specials = ids.copy(), len(vocabulary.specials)
    for modality, (first, end) in enumerate(vocabulary.ranges):
        own = (vocabulary.modality_of(ids) == modality) & (ids >= specials)
        found[own] = rng.integers(max(first, specials), end, int(own.sum()))
    return found


def sequences(documents: Documents, rng: np.random.Generator) -> Any:
    """Rows of document numbers without end, each epoch in another order."""
    while True:
        order = rng.permutation(len(documents))
        for row in fill_rows([documents[number] for number in order], seq_length=LENGTH):
            yield [documents[order[number]] for number in row]


def config_of(data: Path, steps: int, weights: dict[str, Any] | None) -> Config:
    """A dense model of 4 layers and width 64."""
    manifest = read_manifest(data)
    sizes = [{"name": n, "size": e - b} for n, (b, e) in zip(manifest.modalities, manifest.ranges, strict=True)]
    shape = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4}
    return Config.model_validate(
        {
            "vocab": {"modalities": sizes, "pad_multiple": 64},
            "model": {"kind": "dense", "seq_length": LENGTH, **shape},
            "data": {"path": str(data)},
            "train": {"steps": steps, "micro_batch_size": 8, "global_batch_size": ROWS, "loss_weights": weights},
            "optim": {"lr": 3e-3, "warmup": 20, "schedule": "cosine"},
            "precision": {"dtype": "fp32"},
        }
    )


def trained(folder: Path, steps: int, *, data: str, weights: str, seed: int) -> dict[str, float]:
    """Held-out losses of one model, and the effective share of documents in the last step."""
    config = config_of(folder, steps, WEIGHTS[weights])
    vocabulary = Vocabulary.from_config(config.vocab)
    source = Source(folder, split="train", vocabulary=vocabulary)
    every = np.arange(len(source))
    documents = np.split(source.read(every), np.cumsum(source.rows(every).lengths)[:-1])
    documents = planted(documents, vocabulary, data, np.random.default_rng(seed))
    rows = sequences(documents, np.random.default_rng(100 + seed))
    groups.initialize_layout(seed=seed)
    device.set_seeds(seed)
    parts = build(config, groups.collection())
    size = config.train.micro_batch_size
    for step in range(steps):
        taken = list(islice(rows, ROWS))
        packed = [
            pack_rows(taken[at : at + size], vocabulary=vocabulary, seq_length=LENGTH)[0] for at in range(0, ROWS, size)
        ]
        lr = learning_rate(config.optim, step=step + 1, steps=steps, tokens=step * ROWS * LENGTH)
        parts.stepper.train([to_device(batch, vocabulary) for batch in packed], lr=lr)
    held_out = open_passes(config, vocabulary=vocabulary)[""]
    found = evaluate(config, stepper=parts.stepper, mixture=held_out, groups=parts.groups, batches=None)
    shares = {key: value for key, value in parts.stepper.figures().items() if "effective_share" in key}
    groups.destroy_layout()
    return {key: round(value, 4) for key, value in (found | shares).items()}


def main(data: Path, steps: int, out: Path) -> None:
    """Append the figures of all models that are not there yet, and print means over seeds."""
    groups.start(RankEnv())
    wanted: list[dict[str, Any]] = [
        {"data": kind, "weights": weights, "seed": seed}
        for seed in SEEDS
        for kind in ("duplicates", "noise", "clean")
        for weights in WEIGHTS
    ]
    found = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    for model in wanted:
        if not any(model.items() <= one.items() for one in found):
            found.append(model | trained(data, steps, **model))
            with out.open("a") as stream:
                stream.write(json.dumps(found[-1]) + "\n")
    groups.finalize()
    for kind in ("clean", "duplicates", "noise"):
        for weights in WEIGHTS:
            losses = [one["loss"] for one in found if (one["data"], one["weights"]) == (kind, weights)]
            spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
            sys.stdout.write(f"{kind:12} {weights:10} {statistics.mean(losses):.4f} ± {spread:.4f}  {losses}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
