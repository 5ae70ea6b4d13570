"""Says how often a run knows the number of a key that was named near, or that stood nowhere but far, before a question.

    python examples/long_documents/measure.py runs/long-documents data/documents-8k/documents.jsonl

Held-out documents are cut into pieces of the run's `model.seq_length`, each beginning half a length after the one
before, and a question is asked in the first piece that holds it. What stood at most half a length ago is then in the
piece, and what stood more than a length ago is not. The answer is the likeliest of the ten numbers, so guessing gets
10 %.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from write_documents import ASK, WORDS

from mmscale import bounded
from mmscale.data.documents.schema import Document, folder_resolver, parse_document
from mmscale.data.prepared.encode import DocumentEncoder, Encoded
from mmscale.data.prepared.questions import encoder_of
from mmscale.data.stream.packed import pack_rows
from mmscale.inference.model import RunModel, open_run

# Place of the asked key, its distances from where it was named and where it last stood, and the place of the answer.
Question = tuple[int, int, int, int]


def held_out(file: Path) -> list[Document]:
    """The documents to measure on."""
    found = []
    for line in file.read_text().splitlines():
        record = bounded.parse_json(line)
        if record["split"] == "validation":
            document = parse_document(record, where=str(file), fallback_id="", resolve=folder_resolver(file.parent))
            assert isinstance(document, Document), document
            found.append(document)
    return found


def questions(ids: np.ndarray, ask: int, named: Mapping[int, int]) -> list[Question]:
    """The questions of a document; `named`: a key's id by that of each word that names it together with a number."""
    keys = np.array([named.get(one, one) for one in ids.tolist()])
    asked = [int(place) + 1 for place in np.flatnonzero(ids == ask)]
    found = []
    for place in asked:
        before = np.flatnonzero(keys[:place] == keys[place])
        found.append((place, place - int(before[0]), place - int(before[-1]), place + 1))
    return found


def names(vocabulary: Mapping[str, int]) -> dict[int, int]:
    """The id of the key in each word that holds a key and a number."""
    found = {}
    for word, number in itertools.product(vocabulary, WORDS):
        if word + number in vocabulary:
            found[vocabulary[word + number]] = vocabulary[word]
    return found


def measure(
    run: RunModel, encoder: DocumentEncoder, documents: list[Document], *, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """[n, 2] distances of the questions as in `Question`, and [n] whether their answers are right.

    Args:
        run: the model.
        encoder: texts to ids.
        documents: to measure on.
        length: of a piece [tokens].
    """
    ask, *numbers = (int(encoder.text.encode_batch([word])[0][0]) for word in (ASK, *WORDS))
    named = names(encoder.text.tokenizer.get_vocab())
    distances, right = [], []
    for encoded in encoder.encode(documents):
        assert isinstance(encoded, Encoded), encoded
        ids, last = encoded.ids, 0
        asked = questions(ids, ask, named)
        for start in range(0, max(1, len(ids) - length // 2), max(1, length // 2)):
            piece = ids[start : start + length]
            mine = [one for one in asked if last <= one[0] and one[3] < start + len(piece)]
            last = mine[-1][0] + 1 if mine else last
            batch, _ = pack_rows([[piece]], vocabulary=run.vocabulary, seq_length=length)
            logits = run.logits(batch)[0, [one[0] - start for one in mine]][:, numbers]
            answers = torch.tensor(numbers)[logits.argmax(dim=-1)].tolist()
            distances.extend(one[1:3] for one in mine)
            right.extend(answer == ids[one[3]] for answer, one in zip(answers, mine, strict=True))
    return np.array(distances), np.array(right)


def main() -> None:
    """Print the two accuracies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("run", type=Path)
    parser.add_argument("documents", type=Path)
    parser.add_argument("--step", type=int, help="of the checkpoint; default: the newest")
    parser.add_argument("--length", type=int, help="tokens of a piece; default: the run's model.seq_length")
    parser.add_argument("--near", type=int, default=512, help="near: named at most so many tokens ago")
    parser.add_argument("--far", type=int, default=1024, help="far: last there more tokens ago than this")
    parser.add_argument("--data", type=Path, help="the prepared data, if it is not where the run says")
    given = parser.parse_args()
    with open_run(given.run, step=given.step) as run:
        config = run.config
        if given.data is not None:
            config = config.model_copy(update={"data": config.data.model_copy(update={"path": str(given.data)})})
        encoder = encoder_of(config)
        encoder.max_tokens = 1 << 30
        distances, right = measure(
            run, encoder, held_out(given.documents), length=given.length or config.model.seq_length
        )
    for name, chosen in (("near", distances[:, 0] <= given.near), ("far", distances[:, 1] > given.far)):
        sys.stdout.write(f"{name}: {right[chosen].mean():.1%} of {chosen.sum()} questions\n")


if __name__ == "__main__":
    main()
