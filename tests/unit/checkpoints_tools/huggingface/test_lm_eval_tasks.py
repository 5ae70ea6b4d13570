# checkpoints_tools/huggingface/lm_eval_tasks.py without the harness: what is asked, and how ids become words.
"""Requests against a loop over documents, and the tokenizer whose words are ids."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from checkpoints_tools.huggingface.lm_eval_metrics import process_results, token_loss, token_perplexity
from checkpoints_tools.huggingface.lm_eval_tasks import _write_tokenizer, spans, words
from mmscale.data.stream.packed import pack_rows
from mmscale.data.stream.unpacked import unpacked
from mmscale.data.vocab import BOI, EOI, Vocabulary
from tests.unit.data.corpora import THREE, VOCABULARY, corpus

SPEECH = 140  # an id


def labels_of(documents: list[np.ndarray], known: Vocabulary) -> dict[str, set[tuple[int, ...]]]:
    """For each pair the beginnings of documents that end with a label that counts."""
    found: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for ids in documents:
        modality = known.modality_of(ids)
        own = [known.names[m] if token >= len(known.specials) else "" for token, m in zip(ids, modality, strict=True)]
        for at in range(1, len(ids)):
            for other in {*own[:at]} - {"", own[at]}:
                if own[at]:
                    found[f"{own[at]}_given_{other}"].add(tuple(ids[: at + 1].tolist()))
    return found


@pytest.mark.parametrize("known", [VOCABULARY, THREE], ids=["text-image", "three"])
def test_every_label_is_asked_once_with_everything_before_it(known: Vocabulary) -> None:
    documents, rng = corpus(12, seed=3, longest_text=9), np.random.default_rng(0)
    for number in range(0, 12, 3):  # text and speech after images
        more = [BOI, *rng.integers(100, 132, 3), EOI, *rng.integers(55, 100, 4)]
        more += [SPEECH] * 2 * (known is THREE)
        documents[number] = np.array([*documents[number][:-1], *more, 2])
    batch, _ = pack_rows([documents[:6], documents[6:]], vocabulary=known, seq_length=512)
    found: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for document in unpacked(batch, known):
        for pair, start, end in spans(document, known):
            whole = [*document.tokens[: start + 1], *document.labels[start:end]]
            found[pair] += [tuple(whole[: start + 1 + more]) for more in range(1, end - start + 1)]
    wanted = labels_of(documents, known)
    assert wanted.keys() == found.keys() and len(wanted) == (2 if known is VOCABULARY else 4)
    for pair, asked in found.items():
        assert len(asked) == len(set(asked)) and set(asked) == wanted[pair], pair


def test_labels_that_are_not_trained_on_are_not_asked() -> None:
    """Of documents whose loss bits have only the image."""
    documents = corpus(4, seed=1)
    batch, _ = pack_rows([documents], vocabulary=VOCABULARY, seq_length=512)
    batch.loss_mask[VOCABULARY.modality_of(batch.labels) == 0] = 0
    pairs = {pair for document in unpacked(batch, VOCABULARY) for pair, *_ in spans(document, VOCABULARY)}
    assert pairs == {"image_given_text"}


def test_words_are_ids(tmp_path: Path) -> None:
    """Of a context and its continuation too, as the harness joins them; nothing is added."""
    from transformers import AutoTokenizer

    _write_tokenizer(tmp_path / "ids", 512)
    read = AutoTokenizer.from_pretrained(tmp_path / "ids")
    ids = np.array([1, 12, 2, 121, 11, 0, 4, 511])
    assert read.encode(words(ids)) == ids.tolist() and len(read) == 512
    assert read.encode(f"{words(ids[:3])} {words(ids[3:])}") == ids.tolist()


def test_means_over_tokens_not_over_requests() -> None:
    items = [process_results({"tokens": n}, [(log_p, False)]) for n, log_p in ((1, -3.0), (3, -1.0))]
    assert token_loss([one["token_loss"] for one in items]) == 1.0
    assert token_perplexity([one["token_perplexity"] for one in items]) == pytest.approx(np.e)
