"""Generation against a loop that computes every sequence anew, one row at a time, with rules written out in words."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, Qwen3Config, Qwen3ForCausalLM

from checkpoints_tools.huggingface.item_rules import strength
from checkpoints_tools.huggingface.model_config import model_config
from checkpoints_tools.huggingface.shipped.grammar_moma import ImageGrammar
from mmscale.data.vocab import BOI, BOS, END_OF_FILL, END_OF_TURN, EOI, EOS, HOLES, PAD, ROLES
from mmscale.errors import DataError
from mmscale.inference.generate import Continuation, ItemRules, Sampling, generate
from tests.unit.checkpoints_tools.huggingface.test_modeling_moma import MODELS as EXPORTED
from tests.unit.checkpoints_tools.huggingface.test_modeling_moma import exported
from tests.unit.model.reference import IMAGE_IDS, TEXT_IDS, depth, tiny

FIRST, END, TOKENS, CONTEXT = TEXT_IDS, TEXT_IDS + IMAGE_IDS, 4, 26
UNUSED = tiny("moma").vocab.padded_size - END
IMAGE = [BOI, 20, 25, 21, 30, EOI]
# Of four lengths, with and without an image, one that begins an image.
PROMPTS = [[BOS, 7, 9], [BOS, *IMAGE, 9, 10, 11], [BOS], [BOS, 8, 12, 5, BOI]]
HOLE = 14  # stands for `<mask:0>`
_IDS = dict.fromkeys((*HOLES, END_OF_FILL, *ROLES, END_OF_TURN), HOLE)
# What the rules need of a processor.
PROCESSOR = SimpleNamespace(tokenizer=SimpleNamespace(bos_token_id=BOS, get_vocab=lambda: _IDS))


def rules() -> ItemRules:
    grammar = ImageGrammar(FIRST, END, tokens=TOKENS, boi=BOI, eoi=EOI)
    return ItemRules("image", FIRST, END, TOKENS, BOI, EOI, grammar, partial(strength, PROCESSOR, grammar))


def dense() -> Any:
    """A native model of transformers."""
    content = model_config(tiny("dense"), auxiliary_size=0, thresholds=False, routing="causal", tokens_per_image=TOKENS)
    torch.manual_seed(3)
    kept = {key: value for key, value in content.items() if key not in ("architectures", "model_type")}
    return Qwen3ForCausalLM(Qwen3Config(**kept | {"initializer_range": 0.5})).eval()


def model(name: str) -> Any:
    if name == "dense":
        return dense()
    return exported(
        {
            "moma": tiny("moma", num_query_groups=2),
            "dense and depth": tiny("dense", num_layers=3, depth=depth()),
            "moma and depth": tiny("moma", num_layers=3, depth=depth()),
        }[name]
    )


MODELS = ["dense", "moma", "dense and depth", "moma and depth"]
GREEDY = Sampling(temperature=0.0)


def allowed(ids: list[int], left: int) -> set[int]:
    """Which ids of this file's models may follow, with room for `left` more tokens of this row."""
    return allowed_of(ids, left, image=(FIRST, END), tokens=TOKENS)


def allowed_of(ids: list[int], left: int, *, image: tuple[int, int], tokens: int) -> set[int]:
    """The same for any image range, right behind text, and any length of an image."""
    begun = len(ids) - 1 - ids[::-1].index(BOI) if BOI in ids else -1
    if begun >= 0 and EOI not in ids[begun:]:
        return set(range(*image)) if len(ids) - 1 - begun < tokens else {EOI}
    text = set(range(image[0])) - {PAD, BOS, EOI}
    return text if left >= tokens + 2 else text - {BOI}


@torch.no_grad()
def slow(
    model: Any,
    prompt: list[int],
    *,
    limit: int,
    guidance: float = 1.0,
    before: tuple[int, ...] = (BOS,),
    contrast: tuple[int, float] | None = None,
) -> Continuation:
    """Greedy, without a cache, without padding. `contrast`: k and alpha of CD-K."""
    ids = list(prompt)
    while len(ids) < len(prompt) + limit:
        scores = model(torch.tensor([ids])).logits[0, -1]
        may = allowed(ids, len(prompt) + limit - len(ids))
        drawing = may == set(range(FIRST, END))
        if drawing and (guidance != 1.0 or contrast is not None):
            begun = len(ids) - 1 - ids[::-1].index(BOI)
            without: Tensor = model(torch.tensor([[*before, *ids[begun:]]])).logits[0, -1].log_softmax(dim=-1)
        if drawing and contrast is not None:
            p = scores[FIRST:END].softmax(dim=-1).tolist()
            floor = contrast[1] * sorted(p)[-contrast[0]]
            kept = {FIRST + place for place, value in enumerate(p) if value >= floor}
            best = max(sorted(kept), key=lambda number: float(scores.log_softmax(dim=-1)[number] - without[number]))
            ids.append(best)
            continue
        if drawing and guidance != 1.0:
            scores = without + guidance * (scores.log_softmax(dim=-1) - without)
        best = max(sorted(may), key=lambda number: float(scores[number]))
        if best == EOS:
            return Continuation(tuple(ids[len(prompt) :]), True)
        ids.append(best)
    return Continuation(tuple(ids[len(prompt) :]), False)


def generated(model: Any, prompts: list[list[int]], sampling: Sampling = GREEDY, **settings: Any) -> list[Continuation]:
    return generate(
        model, prompts, sampling=sampling, items=[rules()], context=CONTEXT, never=range(END, END + UNUSED), **settings
    )


@pytest.mark.parametrize("name", MODELS)
def test_greedy_in_a_batch_with_a_cache_is_the_slow_loop(name: str) -> None:
    """Left padding, caches, limits of rows and the grammar at once; without a cache, and one by one, the same."""
    own = model(name)
    want = [slow(own, prompt, limit=CONTEXT - len(prompt)) for prompt in PROMPTS]
    assert any(EOI in one.ids for one in want), "no image is drawn: choose other weights"
    assert generated(own, PROMPTS) == want
    assert generated(own, PROMPTS, use_cache=False) == want
    assert [generated(own, [prompt])[0] for prompt in PROMPTS] == want
    assert generated(own, PROMPTS, Sampling(temperature=0.0, batch=3)) == want


@pytest.mark.parametrize("name", ["dense", "moma and depth"])
def test_guidance_is_the_slow_loop(name: str) -> None:
    """Rows begin images at different times, some of them several."""
    own = model(name)
    plain = [slow(own, prompt, limit=CONTEXT - len(prompt)) for prompt in PROMPTS]
    want = [slow(own, prompt, limit=CONTEXT - len(prompt), guidance=4.0) for prompt in PROMPTS]
    assert want != plain
    for use_cache in (True, False):
        assert generated(own, PROMPTS, Sampling(temperature=0.0, guidance=4.0), use_cache=use_cache) == want
    assert generated(own, PROMPTS, Sampling(temperature=0.0, guidance=1.0)) == plain


@pytest.mark.parametrize("name", ["dense", "moma and depth"])
def test_other_branches_are_the_slow_loop(name: str) -> None:
    """Guidance from `<mask:0>`, and contrastive decoding from nothing and from `<mask:0>`, with and without a cache."""
    own = model(name)
    ways: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"guidance": 4.0, "unconditional": "mask"}, {"guidance": 4.0, "before": (BOS, HOLE)}),
        ({"cd_k": 3, "cd_alpha": 0.5}, {"contrast": (3, 0.5)}),
        ({"cd_k": 2, "cd_alpha": 1.0, "unconditional": "mask"}, {"contrast": (2, 1.0), "before": (BOS, HOLE)}),
    ]
    found = [[slow(own, prompt, limit=CONTEXT - len(prompt)) for prompt in PROMPTS]]
    for given, meant in ways:
        want = [slow(own, prompt, limit=CONTEXT - len(prompt), **meant) for prompt in PROMPTS]
        for use_cache in (True, False):
            assert generated(own, PROMPTS, Sampling(temperature=0.0, **given), use_cache=use_cache) == want
        assert want not in found
        found.append(want)


@pytest.mark.exhaustive
@pytest.mark.parametrize("routing", ["causal", "top1", "threshold"])
@pytest.mark.parametrize("name", ["moe", "softmax", "competitive", "ungated", "untied depth, post norm", "untied moma"])
def test_other_branches_of_every_kind_of_model(name: str, routing: str) -> None:
    """Every routing mode: with a cache, in a batch, as in the slow loop."""
    own = exported(EXPORTED[name], routing=routing, seed=1)
    given = Sampling(temperature=0.0, cd_k=3, cd_alpha=0.5, unconditional="mask")
    want = [slow(own, one, limit=CONTEXT - len(one), contrast=(3, 0.5), before=(BOS, HOLE)) for one in PROMPTS]
    assert generated(own, PROMPTS, given) == generated(own, PROMPTS, given, use_cache=False) == want


def test_a_stop_in_the_middle_of_an_image_leaves_nothing_behind() -> None:
    """The same processors serve another batch, which is in the middle of an image, and beams that change places."""
    own, sampling = model("moma and depth"), Sampling(temperature=0.0, guidance=4.0)
    want = {}
    for prompt in ([BOS, 9, BOI], [BOS, 9, BOI, 20, 21], [BOS, 7, BOI, 20]):
        want[tuple(prompt)] = slow(own, prompt, limit=TOKENS + 1, guidance=4.0).ids
    (guided,) = rules().strength(own, sampling, True).first
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": PAD, "eos_token_id": EOS}
    for prompt, wanted in want.items():
        for steps in (1, 3):
            out = own.generate(
                torch.tensor([prompt]),
                max_new_tokens=steps,
                logits_processor=LogitsProcessorList([guided, rules().grammar]),
                **options,
            )
            assert out[0, len(prompt) :].tolist() == list(wanted)[:steps]
    beams = []
    for use_cache in (True, False):
        (guided,) = rules().strength(own, sampling, use_cache).first
        out = own.generate(
            torch.tensor([[BOS, 9, BOI]]),
            num_beams=3,
            max_new_tokens=TOKENS,
            logits_processor=LogitsProcessorList([guided, rules().grammar]),
            **options,
        )
        beams.append(out.tolist())
    assert beams[0] == beams[1]


def test_guidance_of_one_step_changes_nothing_without_prompt() -> None:
    """Where the prompt is the unconditional one, both branches agree, whatever the scale."""
    own = model("moma and depth")
    prompt = [[BOS, BOI]]
    limit = Sampling(temperature=0.0, max_tokens=TOKENS + 1)
    strong = Sampling(temperature=0.0, max_tokens=TOKENS + 1, guidance=9.0)
    assert generated(own, prompt, strong) == generated(own, prompt, limit)


@pytest.mark.parametrize("limit", [1, 5, 7])
def test_every_row_ends_at_its_limit(limit: int) -> None:
    own = model("moma")
    want = [slow(own, prompt, limit=limit) for prompt in PROMPTS[:3]]
    assert generated(own, PROMPTS[:3], Sampling(temperature=0.0, max_tokens=limit)) == want


@pytest.mark.parametrize("chosen", [{"temperature": 1.5}, {"top_k": 3}, {"top_p": 0.5}, {"guidance": 3.0}, {"cd_k": 2}])
def test_sampled_sequences_keep_the_rules(chosen: dict[str, Any]) -> None:
    own = model("moma and depth")
    prompts = [prompt for prompt in PROMPTS for _ in range(4)]
    found = generated(own, prompts, Sampling(**{"temperature": 1.0, "seed": 7} | chosen))
    again = generated(own, prompts, Sampling(**{"temperature": 1.0, "seed": 7} | chosen))
    other = generated(own, prompts, Sampling(**{"temperature": 1.0, "seed": 8} | chosen))
    assert found == again != other
    for prompt, one in zip(prompts, found, strict=True):
        ids = list(prompt)
        for number in one.ids:
            assert number in allowed(ids, CONTEXT - len(ids)), (ids, number)
            ids.append(number)
        assert one.ended or len(ids) == CONTEXT
    assert sum(EOI in one.ids for one in found) > 3


def test_top_k_and_top_p_choose_among_what_the_grammar_leaves() -> None:
    """One of the most likely allowed tokens, by hand, for the first token after `<boi>`."""
    own = model("moma")
    prompt = PROMPTS[3]
    with torch.no_grad():
        scores = own(torch.tensor([prompt])).logits[0, -1, FIRST:END]
    ranked = (scores.argsort(descending=True) + FIRST).tolist()
    rows = [prompt] * 200
    first = {one.ids[0] for one in generated(own, rows, Sampling(temperature=1.0, top_k=2, max_tokens=5, batch=200))}
    assert first == set(ranked[:2])
    odds = scores.softmax(dim=-1).sort(descending=True).values
    kept = int((odds.cumsum(0) - odds < 0.6).sum())
    first = {one.ids[0] for one in generated(own, rows, Sampling(temperature=1.0, top_p=0.6, max_tokens=5, batch=200))}
    assert first <= set(ranked[:kept]) and len(first) > 1


def test_a_model_without_images_draws_none() -> None:
    own = dense()
    found = generate(
        own, [[BOS], [BOS, 7]], sampling=Sampling(temperature=2.0), items=[], context=20, never=range(FIRST, END + 1)
    )
    assert all(EOS < number < FIRST and number not in (BOI, EOI) for one in found for number in one.ids)


@pytest.mark.parametrize(
    ("prompt", "sampling", "cause"),
    [
        ([BOS] + [7] * 25, GREEDY, "a prompt has 26 tokens, the model's context is 26"),
        ([BOS] + [7] * 20 + [BOI], GREEDY, "begins an image of 4 \\+ 1, the context has room for 4"),
        ([BOS, BOI], Sampling(max_tokens=4), "begins an image of 4 \\+ 1, the limit of new tokens is for 4"),
    ],
)
def test_refused(prompt: list[int], sampling: Sampling, cause: str) -> None:
    with pytest.raises(DataError, match=cause):
        generated(dense(), [prompt], sampling)
