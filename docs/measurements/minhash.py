"""CPU time of MinHash signatures by each program, alone and in a whole deduplication, for docs/selection.md.

It has no arguments, and prints the lowest, the median and the highest of five rounds.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from mmscale.config.load import resolve
from mmscale.data.dedup import apply, signers, words
from mmscale.data.dedup.pairs import DuplicateRule
from mmscale.data.prepared.prepare import prepare
from mmscale.data.progress import Reporter
from mmscale.tables.minhash import MINHASHES

ROUNDS = 5
LENGTHS = (20, 200, 2000)
DOCUMENTS = 4000  # of 300 words each


def alone(name: str, length: int, rng: np.random.Generator) -> list[float]:
    """Microseconds for the signature of a text with that many shingles, one number for each round."""
    sign = signers.signer(name)
    texts = [np.unique(rng.integers(0, 1 << 63, length, dtype=np.uint64)) for _ in range(max(10, 20_000 // length))]
    found = []
    for _ in range(ROUNDS):
        began = time.process_time()
        for text in texts:
            sign(text)
        found.append((time.process_time() - began) / len(texts) * 1e6)
    return found


def prepared(folder: Path, rng: np.random.Generator) -> Path:
    """A data set of random English-like words without duplicates."""
    syllables = [a + b for a in "bcdfghklmnprstvw" for b in "aeiou"]
    vocabulary = ["".join(rng.choice(syllables, int(rng.integers(1, 4)))) for _ in range(5000)]
    with (folder / "texts.jsonl").open("w", encoding="utf-8") as file:
        for number in range(DOCUMENTS):
            text = " ".join(rng.choice(vocabulary, 300))
            file.write(json.dumps({"id": str(number), "content": [{"type": "text", "text": text}]}) + "\n")
    model = {"kind": "dense", "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4}
    settings = {
        "model": model | {"seq_length": 1024},
        "vocab": {"modalities": [{"name": "text", "size": 4096}]},
        "data": {"prepare": {"source": "documents", "documents": [str(folder / "texts.jsonl")], "held_out": 0.0}},
    }
    prepare(resolve(settings), folder / "set", progress=False)
    return folder / "set"


def main() -> None:
    """Print the table."""
    rng = np.random.default_rng(0)
    names = [signers.exact_name(name) for name in MINHASHES]
    for length in LENGTHS:
        for name in names:
            spent = sorted(alone(name, length, rng))
            sys.stdout.write(
                f"{length} shingles, {name}: {spent[0]:.1f} {spent[ROUNDS // 2]:.1f} {spent[-1]:.1f} us a text\n"
            )
    with tempfile.TemporaryDirectory() as place:
        folder = prepared(Path(place), rng)
        found: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(ROUNDS):
            for name in names:  # in turns
                words._cache.clear()
                began = time.process_time()
                apply.dedup(folder, rule=DuplicateRule(minhash=name), reporter=Reporter(enabled=False), workers=1)
                found[name].append((time.process_time() - began) / DOCUMENTS * 1e6)
    for name, spent in found.items():
        spent.sort()
        sys.stdout.write(f"whole, {name}: {spent[0]:.0f} {spent[ROUNDS // 2]:.0f} {spent[-1]:.0f} us a document\n")


if __name__ == "__main__":
    main()
