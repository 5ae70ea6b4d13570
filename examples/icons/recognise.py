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


class Recogniser:
    """Reads which of some names a picture shows.

    Args:
        documents: folder of the documents.
        names: to choose among; each needs five training icons.

    Raises:
        ValueError: a name has fewer.
    """

    def __init__(self, documents: Path, names: list[str]) -> None:
        self.pictures, self.labels = icons(documents, names)
        counts = np.bincount(self.labels, minlength=len(names))
        missing = [name for name, count in zip(names, counts, strict=True) if count < 5]
        if missing:
            raise ValueError(f"fewer than 5 training icons: {', '.join(missing)}")
        self._classifier = LogisticRegression(max_iter=500, C=0.1)
        self._classifier.fit(features(self.pictures), self.labels)

    def read(self, pictures: list[PIL.Image.Image]) -> np.ndarray:
        """The number of the name that each picture shows, int [n]."""
        size = self.pictures.shape[1:3]
        pixels = np.stack([np.asarray(one.convert("RGB").resize(size)) for one in pictures])
        found: np.ndarray = self._classifier.predict(features(pixels))
        return found

    def left_out(self) -> float:
        """Share of icons that a classifier reads as their name that was not fitted to them (five folds)."""
        classifier = LogisticRegression(max_iter=500, C=0.1)
        return float(cross_val_score(classifier, features(self.pictures), self.labels, cv=5).mean())

    def through(self, data: Path) -> float:
        """Share of the fitted icons that are read as their name after the tokenizer of a data set."""
        codec = open_codecs(data)[IMAGE]
        decoded = np.asarray(codec.decode(codec.encode(self.pictures)))
        return float((self._classifier.predict(features(decoded)) == self.labels).mean())


def main() -> None:
    """Print one line per kind of picture."""
    documents, data, samples, names = *map(Path, sys.argv[1:4]), sys.argv[4:]
    try:
        recogniser = Recogniser(documents, names)
    except ValueError as error:
        sys.exit(str(error))
    count = len(recogniser.labels)
    sys.stdout.write(f"icons left out of the fit: {recogniser.left_out():.1%} of {count} are read as their name\n")
    sys.stdout.write(f"the fitted ones through the tokenizer: {recogniser.through(data):.1%}\n")
    files = sorted(samples.glob("[0-9][0-9]_*.png"))
    asked = np.array([int(file.name[:2]) for file in files])
    right = (recogniser.read([PIL.Image.open(file) for file in files]) == asked).mean()
    sys.stdout.write(f"generated: {right:.1%} of {len(files)} are read as asked (chance {1 / len(names):.1%})\n")


if __name__ == "__main__":
    main()
