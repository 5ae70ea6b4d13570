"""Says how many spoken digits a simple classifier recognises: held-out ones, through the codec, and generated ones.

    python examples/speech/recognise.py data/speech-documents data/speech samples

The classifier is a logistic regression on log-mel frames, fitted to the recordings of the training split. Folder
`samples` is that of `mmscale sample RUN --prompt "say zero" ... --prompt "say nine" --begin audio --out samples`: the
row of a file is the digit asked for.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mmscale import bounded
from mmscale.data.modalities.audio import AudioCodec, AudioModality


def features(codec: AudioCodec, items: np.ndarray) -> np.ndarray:
    """Recordings float [n, S] to numbers [n, D]."""
    return codec.features(items).reshape(len(items), -1).astype(np.float64)


def main() -> None:
    """Print one line per kind of recording."""
    documents, data, samples = map(Path, sys.argv[1:4])
    codec = AudioModality.load(data / "audio_tokenizer")
    read: dict[str, tuple[list[np.ndarray], list[int]]] = {"train": ([], []), "validation": ([], [])}
    for line in (documents / "documents.jsonl").read_text().splitlines():
        document = bounded.parse_json(line)
        if document["id"].endswith("-say"):
            items, labels = read[document["split"]]
            items.append(AudioModality.read(documents / f"audio/{document['group']}.wav", codec))
            labels.append(int(document["group"][0]))
    known, held_out = (np.stack(items) for items, _ in read.values())
    labels, wanted = (np.array(own) for _, own in read.values())
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200, C=0.01))
    classifier.fit(features(codec, known), labels)

    def show(what: str, items: np.ndarray, right: np.ndarray) -> None:
        share = (classifier.predict(features(codec, items)) == right).mean()
        sys.stdout.write(f"{what}: {share:.1%} of {len(items)} are read as asked\n")

    show("held-out recordings", held_out, wanted)
    through = np.stack([AudioModality.read(one, codec) for one in codec.decode(codec.encode(held_out))])
    show("the same through the codec", through, wanted)
    files = sorted(samples.glob("[0-9][0-9]_*.wav"))
    made = np.stack([AudioModality.read(file, codec) for file in files])
    show("generated", made, np.array([int(file.name[:2]) for file in files]))


if __name__ == "__main__":
    main()
