"""Documents in which a prompt follows its drawing, and how likely they make it."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints_tools.huggingface.fast_tokenizer import write_text_tokenizer
from checkpoints_tools.huggingface.shipped import likelihood_moma
from checkpoints_tools.huggingface.shipped.decoding_moma import special_grammar
from checkpoints_tools.huggingface.shipped.likelihood_moma import document_behind, likelihoods, log_likelihoods
from checkpoints_tools.huggingface.shipped.processing_moma import MomaProcessor
from mmscale.data.holes import hole_tokens, rotation
from mmscale.data.modalities.image_tokens import LevelsTokenizer
from mmscale.data.modalities.text_tokens import TextTokenizer
from mmscale.data.vocab import BOI, BOS, EOI, EOS, PAD, Vocabulary
from tests.unit.inference.test_generate import END, FIRST, TOKENS, model

TEXT, SIZE = 320, 2
IMAGE = [BOI, *range(TEXT, TEXT + SIZE * SIZE), EOI]


def made(folder: Any, *, reserved: bool, image: bool = True) -> Any:
    vocabulary = Vocabulary(("text", "image"), ((0, TEXT), (TEXT, TEXT + 16)), reserved=reserved)
    text = TextTokenizer.train(["a red bus"] * 3, size=TEXT, specials=vocabulary.specials)
    write_text_tokenizer(folder, text, vocabulary, rows=TEXT + 16, context=128)
    if image:
        LevelsTokenizer(SIZE, 1, 9).save(folder / "image_tokenizer")
    ranges = [[name, *pair] for name, pair in zip(vocabulary.names, vocabulary.ranges, strict=True)]
    (folder / "processor_config.json").write_text(json.dumps({"modalities": ranges}))
    return MomaProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def processors(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Any]:
    return {one: made(tmp_path_factory.mktemp(f"processor{one}"), reserved=one) for one in (True, False)}


def test_without_holes_the_prompt_follows(processors: dict[bool, Any]) -> None:
    processor = processors[False]
    red, bus = (processor.encode([text], begin=False) for text in ("a red ", "bus"))
    want = ([BOS, *IMAGE, *red], list(range(7, 7 + len(red))))
    assert document_behind(processor, [BOS, *red, BOI], [*IMAGE[1:], 9, 10], masked=False) == want
    assert document_behind(processor, [BOS, *red], [9, *IMAGE, 9], masked=False) == want  # the model began it
    assert document_behind(processor, [BOS, *red, BOI], [*IMAGE[1:], *IMAGE], masked=False) == want  # the first
    document, places = document_behind(processor, [BOS, *red, BOI], IMAGE[1:], masked=True, text="bus") or ([], [])
    assert document == [BOS, *IMAGE, *bus] and [document[place] for place in places] == bus
    for cut in (IMAGE[1:-1], IMAGE[1:-2], []):
        assert document_behind(processor, [BOS, *red, BOI], cut, masked=False) is None
    mixed = [BOS, *red, *IMAGE, *bus, BOI]
    document, places = document_behind(processor, mixed, IMAGE[1:], masked=False) or ([], [])
    assert document == [BOS, *IMAGE, *red, *IMAGE, *bus] and [document[place] for place in places] == [*red, *bus]
    with pytest.raises(ValueError, match="no text"):
        document_behind(processor, [BOS, BOI], IMAGE[1:], masked=False)
    with pytest.raises(ValueError, match="no tokens for holes"):
        document_behind(processor, [BOS, *red, BOI], IMAGE[1:], masked=True)


@settings(max_examples=60)
@given(st.lists(st.one_of(st.just("image"), st.lists(st.integers(40, 300), min_size=1, max_size=4)), max_size=6))
def test_with_holes_it_is_a_rotated_document_of_training(processors: dict[bool, Any], pieces: list[Any]) -> None:
    processor = processors[True]
    ids, spans = [BOS], []
    for piece in pieces:
        if piece != "image" and spans and spans[-1][1] == len(ids):
            spans[-1] = (spans[-1][0], len(ids) + len(piece))
        elif piece != "image":
            spans.append((len(ids), len(ids) + len(piece)))
        ids += IMAGE if piece == "image" else piece
    if not spans:
        with pytest.raises(ValueError, match="no text"):
            document_behind(processor, [*ids, BOI], IMAGE[1:], masked=True)
        return
    vocabulary = Vocabulary(("text", "image"), ((0, TEXT), (TEXT, TEXT + 16)), reserved=True)
    plain = np.array([*ids, *IMAGE, EOS])
    want = np.append(plain, hole_tokens(vocabulary))[rotation(len(plain), spans)].tolist()
    document, places = document_behind(processor, [*ids, BOI], IMAGE[1:], masked=True) or ([], [])
    assert document == want
    holes = set(hole_tokens(vocabulary)[:-1].tolist())
    behind = len(document) - len(places) - len(spans)
    assert places == [place for place in range(behind, len(document)) if document[place] not in holes]


def test_likelihoods_are_sums_over_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several lengths, in several passes: as one by one without padding."""
    monkeypatch.setattr(likelihood_moma, "_TOKENS", 20)
    own = model("moma and depth")
    documents = [([BOS, 7, 9, 11, 12], [2, 4]), None, ([BOS, 8, BOI, FIRST, END - 1, 30, 31, EOI, 9, 7], [8, 9])]
    documents += [([BOS, 5], [1]), ([BOS, 7, 9, 11, 13], [2, 3, 4])]
    want = []
    for document in documents:
        if document is None:
            want.append(float("-inf"))
            continue
        scores = own(torch.tensor([document[0]])).logits[0].log_softmax(dim=-1)
        want.append(sum(float(scores[place - 1, document[0][place]].detach()) for place in document[1]))
    assert log_likelihoods(own, documents, pad=PAD) == pytest.approx(want, rel=1e-5)
    assert log_likelihoods(own, [None], pad=PAD) == [float("-inf")] and TOKENS == 4


def test_likelihoods_of_what_generate_returns(processors: dict[bool, Any]) -> None:
    """Padded prompts; a model that finds red most likely after one of the pictures."""
    processor = processors[False]
    red = processor.encode(["a red"], begin=False)

    class Judge:
        device, config = torch.device("cpu"), SimpleNamespace()

        def __call__(self, *, input_ids: torch.Tensor, logits_to_keep: int, **_: Any) -> Any:
            logits = torch.zeros(*input_ids.shape, TEXT + 16)
            logits[:, :, red] = (input_ids == TEXT + 3).sum(dim=1)[:, None, None].float()
            return SimpleNamespace(logits=logits[:, -logits_to_keep:])

    prompts = torch.tensor([[PAD, BOS, *red, BOI]] * 3)
    other = [BOI, *[TEXT] * (SIZE * SIZE), EOI]
    sequences = torch.cat((prompts, torch.tensor([IMAGE[1:], other[1:], [*IMAGE[1:-1], EOS]])), dim=1)
    first, second, third = likelihoods(processor, Judge(), prompts, sequences)
    assert first > second > third == float("-inf")


def test_which_special_tokens_may_follow(processors: dict[bool, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every special token of a vocabulary: those that only training places are never generated."""

    def left_out(processor: Any, last: str) -> set[str]:
        known = processor.tokenizer.get_vocab()
        (scores,) = special_grammar(processor)(torch.tensor([[known[last]]]), torch.zeros(1, TEXT + 16))
        return set(processor.tokenizer.convert_ids_to_tokens(scores.isneginf().nonzero().flatten().tolist()))

    holes = {*(f"<mask:{number}>" for number in range(16)), "<eom>"}
    roles = {"<system>", "<user>", "<assistant>", "<tool>"}
    assert left_out(processors[False], "a") == {"<pad>", "<s>"}
    assert left_out(processors[True], "a") == {"<pad>", "<s>"} | holes | roles
    assert left_out(processors[True], "<s>") == left_out(processors[True], "<eot>") == {"<pad>", "<s>"} | holes
    text = made(tmp_path_factory.mktemp("text"), reserved=False, image=False)
    assert left_out(text, "a") == {"<pad>", "<s>", "<boi>", "<eoi>"}
    text.tokenizer.pad_token = "</s>"
    assert left_out(text, "a") == {"<pad>", "<s>", "<boi>", "<eoi>"}
    (scores,) = processors[True].grammar()(torch.tensor([[BOS, 40]]), torch.zeros(1, TEXT + 16))
    specials = Vocabulary(("text", "image"), ((0, TEXT), (TEXT, TEXT + 16)), reserved=True).specials
    names = processors[True].tokenizer.convert_ids_to_tokens((scores == 0).nonzero().flatten().tolist())
    assert set(names) & set(specials) == {"</s>", "<boi>", "<eot>"}
