"""Documents with holes of exports: the ids of training, what may fill a hole, and which masks there are."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints_tools.huggingface.fast_tokenizer import write_text_tokenizer
from checkpoints_tools.huggingface.infill import refuse_untrained
from checkpoints_tools.huggingface.shipped.infilling_moma import Holes, mask_runs
from checkpoints_tools.huggingface.shipped.processing_moma import MomaProcessor
from mmscale.config import Config
from mmscale.data.holes import hole_tokens, rotation
from mmscale.data.modalities.image_tokens import LevelsTokenizer
from mmscale.data.modalities.text_tokens import TextTokenizer
from mmscale.data.vocab import Vocabulary
from mmscale.errors import UsageError

TEXT, SIZE, LEVELS = 320, 4, 9
VOCABULARY = Vocabulary(("text", "image"), ((0, TEXT), (TEXT, TEXT + 16)), reserved=True)


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("processor")
    text = TextTokenizer.train(["a red bus"] * 3, size=TEXT, specials=VOCABULARY.specials)
    write_text_tokenizer(folder, text, VOCABULARY, rows=TEXT + 16, context=128)
    LevelsTokenizer(SIZE, 1, LEVELS).save(folder / "image_tokenizer")
    ranges = [[name, *pair] for name, pair in zip(VOCABULARY.names, VOCABULARY.ranges, strict=True)]
    (folder / "processor_config.json").write_text(json.dumps({"modalities": ranges}))
    return MomaProcessor.from_pretrained(folder)


PICTURE = (np.arange(16, dtype=np.uint8) * 15).reshape(SIZE, SIZE, 1)
MASKED = {"type": "image", "image": PICTURE, "mask": (1, 2, 2, 2)}


def test_prompts_are_the_rotated_documents_of_training(processor: Any) -> None:
    holes = Holes(processor, ["a ", processor.HOLE, " bus", MASKED])
    texts = [processor.encode([text], begin=False) for text in ("a ", "red", " bus")]
    image = processor.encode([PICTURE], begin=False)
    ids = np.array([1, *texts[0], *texts[1], *texts[2], *image, 2])
    at, first = 1 + len(texts[0]), 1 + sum(map(len, texts)) + 1
    spans = [(at, at + len(texts[1])), (first + 9, first + 11), (first + 13, first + 15)]
    rotated = np.append(ids, hole_tokens(VOCABULARY))[rotation(len(ids), spans)].tolist()
    fillings = [ids[start:stop].tolist() for start, stop in spans]
    assert holes.sizes == [None, 2, 2]
    for number in range(3):
        prompt = holes.prompt(fillings[:number])
        assert rotated[: len(prompt)] == prompt
    assert holes.filled(fillings) == ids.tolist()
    text, picture = processor.pieces(holes.filled(fillings))
    assert text == "a red bus" and np.asarray(picture).shape == (SIZE, SIZE)


def test_what_may_fill_a_hole(processor: Any) -> None:
    holes = Holes(processor, ["a ", processor.HOLE, MASKED])
    text, picture = holes.grammar(0), holes.grammar(1)

    def allowed(grammar: Any, ids: list[int]) -> list[int]:
        (scores,) = grammar(torch.tensor([ids]), torch.zeros(1, TEXT + 16))
        return (scores == 0).nonzero().flatten().tolist()

    prompt = holes.prompt([])
    assert allowed(text, [*prompt, 40]) == [holes.end, *range(len(VOCABULARY.specials), TEXT)]
    prompt = holes.prompt([[40]])
    codes = list(range(TEXT, TEXT + LEVELS))
    assert allowed(picture, prompt) == allowed(picture, [*prompt, TEXT]) == codes
    assert allowed(picture, [*prompt, TEXT, TEXT]) == [holes.end]


def test_a_model_fills_hole_after_hole(processor: Any) -> None:
    """With a stand-in that generates a fixed filling: what `infill` puts together."""
    asked = []

    def generate(ids: torch.Tensor, **options: Any) -> torch.Tensor:
        asked.append((ids[0].tolist(), options))
        red = processor.encode(["red"], begin=False)
        own = red if ids[0, -1] == holes.holes[0] else [TEXT] * 2
        return torch.cat([ids, torch.tensor([[*own, holes.end, 0, 0]])], dim=1)

    content = ["a ", processor.HOLE, " bus", MASKED]
    holes = Holes(processor, content)
    model = SimpleNamespace(generate=generate, device=torch.device("cpu"))
    text, picture = processor.infill(model, content, do_sample=False, max_new_tokens=7)
    assert text == "a red bus"
    pixels = np.asarray(picture)
    inside = np.zeros((SIZE, SIZE), bool)
    inside[2:4, 1:3] = True
    plain = processor.pieces(processor.encode([PICTURE]))[0]
    assert (pixels[~inside] == np.asarray(plain)[~inside]).all() and (pixels[inside] == 0).all()
    assert [options["max_new_tokens"] > 7 for _, options in asked] == [False, True, True]
    assert all(options["eos_token_id"] == holes.end for _, options in asked)


@pytest.mark.parametrize(
    ("mask", "runs"),
    [((0, 0, 4, 4), [(0, 16)]), ((0, 1, 4, 2), [(4, 12)]), ((1, 2, 2, 2), [(9, 11), (13, 15)])],
)
def test_rows_of_a_mask(mask: tuple[int, ...], runs: list[tuple[int, int]]) -> None:
    assert mask_runs(mask, 16) == runs


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "image", "image": PICTURE, "mask": (3, 0, 2, 1)}], "not inside the image of 4 x 4"),
        ([{"type": "image", "image": PICTURE, "mask": (0, 0, 0, 1)}], "not inside"),
        ([{"type": "audio", "path": "a.wav", "mask": (0, 0, 1, 1)}], "only images have masks"),
        (["a bus"], "no hole"),
        ([{"type": "hole"}] * 17, "more than 16 holes"),
    ],
)
def test_refused(processor: Any, content: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Holes(processor, content)


@pytest.mark.parametrize(
    ("reserved", "rate", "message"), [(False, 0.0, "no tokens for holes"), (True, 0.0, "not trained to fill holes")]
)
def test_models_that_were_not_trained_for_it(reserved: bool, rate: float, message: str) -> None:
    shape = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 1, "kind": "dense"}
    config = Config.model_validate({"vocab": {"reserved": reserved}, "model": shape, "objective": {"cm3_rate": rate}})
    with pytest.raises(UsageError, match=message):
        refuse_untrained(config)
