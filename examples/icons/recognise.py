"""Says how many icons a simple classifier recognises: left-out ones, through the tokenizer, and generated ones.

    python examples/icons/recognise.py data/icons-documents data/icons samples heart star home

The classifier chooses among the names given. It is a logistic regression on the pixels of the training icons with these
names, of all sets and styles. Folder `samples` is that of `mmscale sample RUN --prompt "draw heart, tabler icons,
outline" ... --out samples`, one prompt for each name in their order: the row of a file is the name asked for.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score

from mmscale.data.modalities.table import open_codecs
from mmscale.data.vocab import IMAGE


def icons(documents: Path, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of the training icons with these base names, uint8 [n, edge, edge, 3], and the names' numbers [n]."""
    pictures, labels = [], []
    for file in sorted((documents / "documents").glob("*.parquet")):
        for row in pq.read_table(file, filters=[("group", "in", names)]).to_pylist():
            if row["id"].endswith(" read") and row["split"] == "train":
                with PIL.Image.open(io.BytesIO(row["content"][0]["bytes"])) as opened:
                    pictures.append(np.asarray(opened.convert("RGB")))
                labels.append(names.index(row["group"]))
    return np.stack(pictures), np.array(labels)


def features(pictures: np.ndarray) -> np.ndarray:
    """Pictures to numbers, float [n, D]: how dark each pixel is."""
    return 1.0 - pictures.astype(float).mean(axis=-1).reshape(len(pictures), -1) / 255.0


def main() -> None:
    """Print one line per kind of picture."""
    documents, data, samples, names = *map(Path, sys.argv[1:4]), sys.argv[4:]
    pictures, labels = icons(documents, names)
    counts = np.bincount(labels, minlength=len(names))
    missing = [name for name, count in zip(names, counts, strict=True) if count < 5]
    if missing:
        sys.exit(f"fewer than 5 training icons: {', '.join(missing)}")
    classifier = LogisticRegression(max_iter=500, C=0.1)
    right = cross_val_score(classifier, features(pictures), labels, cv=5).mean()
    sys.stdout.write(f"icons left out of the fit: {right:.1%} of {len(labels)} are read as their name\n")
    classifier.fit(features(pictures), labels)
    codec = open_codecs(data)[IMAGE]
    through = np.asarray(codec.decode(codec.encode(pictures)))
    right = (classifier.predict(features(through)) == labels).mean()
    sys.stdout.write(f"the fitted ones through the tokenizer: {right:.1%}\n")
    files = sorted(samples.glob("[0-9][0-9]_*.png"))
    drawn = np.stack([np.asarray(PIL.Image.open(file).convert("RGB").resize(pictures.shape[1:3])) for file in files])
    asked = np.array([int(file.name[:2]) for file in files])
    right = (classifier.predict(features(drawn)) == asked).mean()
    sys.stdout.write(f"generated: {right:.1%} of {len(files)} are read as asked (chance {1 / len(names):.1%})\n")


if __name__ == "__main__":
    main()
