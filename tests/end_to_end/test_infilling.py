"""Causal masking through the commands: train, resume, other layouts, fill holes with the run and its export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import yaml

from mmscale.runs.metrics import read_metrics
from tests.end_to_end.running import assert_says, mmscale, ok

STEPS = 6
EXACT = ("loss", "grad_norm", "loss/text", "loss/image", "tokens", "eval/loss")


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory, tiny: dict[str, Any]) -> Path:
    """A configuration with causal masking; its data, `set`, is beside it."""
    root = tmp_path_factory.mktemp("masked")
    file = root / "masked.yaml"
    settings = {
        **tiny,
        "run": {"name": "masked", "dir": str(root / "runs")},
        "vocab": {**tiny["vocab"], "reserved": True},
        "model": {**tiny["model"], "kind": "dense", "experts": {}, "depth": None},
        "data": {**tiny["data"], "path": str(root / "set")},
        "train": {**tiny["train"], "steps": STEPS, "eval_every": 3},
        "optim": {**tiny["optim"], "warmup": 0},
        "objective": {"cm3_rate": 0.8, "image_spans": "partial"},
        "parallel": {},
        "checkpoint": {"every": 3, "keep": 9, "asynchronous": False},
    }
    file.write_text(yaml.safe_dump(settings))
    ok("data", "prepare", file, "--out", root / "set")
    return file


def trained(file: Path, runs: Path, *overrides: str, nproc: int = 1) -> dict[int, dict[str, Any]]:
    """What each step of a run gave."""
    ok("train", file, f"run.dir={runs}", "optim.schedule=constant", *overrides, nproc=nproc)
    return {line["step"]: line for line in read_metrics(runs / "masked")}


@pytest.fixture(scope="module")
def whole(masked: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """Figures of a run in one process."""
    return trained(masked, tmp_path_factory.mktemp("whole"))


def test_resumed_bit_by_bit(masked: Path, whole: dict[int, dict[str, Any]], tmp_path: Path) -> None:
    trained(masked, tmp_path, "train.steps=3")
    resumed = trained(masked, tmp_path)
    for step, line in whole.items():
        assert {key: resumed[step].get(key) for key in EXACT} == {key: line.get(key) for key in EXACT}


@pytest.mark.long
def test_with_neighbours_a_run_resumes_bit_by_bit(masked: Path, tmp_path: Path) -> None:
    """RA-CM3: retrieved documents first, then the rotated document. Held-out losses are of documents as they are."""
    folder = Path(shutil.copytree(masked.parent / "set", tmp_path / "set"))
    ok("data", "retrieve", folder)
    settings = (f"data.path={folder}", "data.retrieval.neighbours=2", "data.retrieval.evaluation=1")
    whole = trained(masked, tmp_path / "whole", *settings)
    trained(masked, tmp_path / "parts", *settings, "train.steps=3")
    parts = trained(masked, tmp_path / "parts", *settings)
    for step, line in whole.items():
        assert {key: parts[step].get(key) for key in EXACT} == {key: line.get(key) for key in EXACT}
    alone = trained(masked, tmp_path / "alone", f"data.path={folder}")
    assert alone[1]["loss"] != whole[1]["loss"]


@pytest.mark.long
def test_held_out_losses_are_those_of_plain_documents(
    masked: Path, whole: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    """Before anything was learned runs with and without causal masking measure the same."""
    still = ("optim.lr=1e-12", "optim.min_lr=0", "train.steps=1", "train.eval_every=1")
    one = trained(masked, tmp_path / "one", *still)
    other = trained(masked, tmp_path / "other", *still, "objective.cm3_rate=0")
    assert one[1]["eval/loss"] == pytest.approx(other[1]["eval/loss"], rel=1e-6)
    assert one[1]["loss"] == whole[1]["loss"] != other[1]["loss"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("overrides", ["parallel.tp=2", "parallel.pp=2", "train.micro_batch_size=2"])
def test_layouts_train_alike(masked: Path, whole: dict[int, dict[str, Any]], overrides: str, tmp_path: Path) -> None:
    found = trained(masked, tmp_path, overrides, nproc=2)
    for step, line in whole.items():
        for key in ("loss", "grad_norm", "eval/loss"):
            if key in line:
                assert found[step][key] == pytest.approx(line[key], rel=2e-5), (step, key)


def test_refused(masked: Path, tmp_path: Path) -> None:
    run = ("train", masked, f"run.dir={tmp_path}")
    ended = mmscale(*run, "vocab.reserved=false")
    assert_says(ended, status=2, cause="needs tokens for holes", remedy="vocab.reserved=true")
    assert not (tmp_path / "masked").exists()
    trained(masked, tmp_path, "train.steps=1", "train.eval_every=0")
    ended = mmscale(*run, "train.steps=2", "objective.cm3_rate=0.1")
    assert_says(ended, status=2, cause=r"objective.cm3_rate: 0.8 -> 0.1", remedy="--yes")


@pytest.fixture(scope="module")
def models(masked: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A run, its export, and a drawn digit."""
    folder = tmp_path_factory.mktemp("models")
    trained(masked, folder, "train.steps=30", "train.eval_every=0", "checkpoint.every=0")
    ok("convert", "to-hf", folder / "masked", folder / "hf", timeout_s=600)
    picture = folder / "picture.png"
    pixels = np.add.outer(np.arange(8), np.arange(8)) * 18
    PIL.Image.fromarray(pixels.astype(np.uint8)).save(picture)
    return folder / "masked", folder / "hf", picture


def infilled(model: Path, *arguments: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ok("sample", model, *arguments, "--json"))
    return found


def test_run_and_export_fill_holes_alike(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    run, export, picture = models
    ways: list[tuple[str | Path, ...]] = [
        ("--infill", "<hole> seven and <hole>", "--count", "3", "--max-tokens", "5"),
        ("--infill", "a <hole>", "--image", picture, "--mask", "0,1,1,1", "--count", "1", "--max-tokens", "4"),
    ]
    for way in ways:
        one, other = (infilled(model, *way, "--out", tmp_path / model.name) for model in (run, export))
        kept = [
            [(sample["text"], sample["tokens"], sample["ended"]) for sample in found["samples"]]
            for found in (one, other)
        ]
        assert kept[0] == kept[1] and len(kept[0]) == len(one["samples"])
        for mine, theirs in zip(one["images"], other["images"], strict=True):
            assert Path(mine).read_bytes() == Path(theirs).read_bytes()
    continued = infilled(run, "--prompt", "a", "--count", "1", "--max-tokens", "3", "--out", tmp_path / "continued")
    assert [sample["prompt"] for sample in continued["samples"]] == ["a"]
    (filled,) = one["images"]
    plain = infilled(run, "--infill", "a <hole>", "--image", picture, "--count", "1", "--out", tmp_path / "plain")
    before, after = (np.asarray(PIL.Image.open(file)) for file in (plain["images"][0], filled))
    assert (before[:4] == after[:4]).all() and (before[:, 4:] == after[:, 4:]).all()


@pytest.mark.long
def test_holes_are_filled_after_an_attempt_without_them(
    models: tuple[Path, Path, Path], masked: Path, tmp_path: Path
) -> None:
    """The weights have learned it, whatever the newest settings say: the run, its export, and the export's own code."""
    from transformers import AutoModelForCausalLM

    from checkpoints_tools.huggingface.shipped.decoding_moma import masking_rate

    run, _, picture = models
    shutil.copytree(run, tmp_path / "masked")
    plain = ("objective.cm3_rate=0", "objective.image_spans=none", "train.steps=31", "train.eval_every=0", "--yes")
    trained(masked, tmp_path, *plain)
    own, export = tmp_path / "masked", tmp_path / "hf"
    ok("convert", "to-hf", own, export, timeout_s=600)
    assert (
        json.loads((export / "config.json").read_text())["mmscale"]["config"]["objective"]["cm3_rate"] == 0
    )  # the settings stay what they were
    ways: list[tuple[str | Path, ...]] = [
        ("--infill", "<hole> seven", "--image", picture, "--mask", "0,1,1,1"),
        ("--prompt", "a two", "--draw", "--guidance", "2", "--unconditional", "mask"),
    ]
    for way in ways:
        one, other = (
            infilled(model, *way, "--count", "1", "--max-tokens", "8", "--out", tmp_path / "out" / model.name)
            for model in (own, export)
        )
        assert [sample["tokens"] for sample in one["samples"]] == [sample["tokens"] for sample in other["samples"]]
    model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True)
    assert masking_rate(model) == pytest.approx(0.8)


def test_the_processor_of_an_export_fills_holes_alike(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Token by token what the command gives, with what an export's user loads."""
    import torch
    from transformers import AutoModelForCausalLM, AutoProcessor

    run, export, picture = models
    model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(export, trust_remote_code=True)
    content = ["a ", processor.HOLE, " seven", {"type": "image", "image": picture, "mask": (0, 0, 2, 1)}]
    pieces = processor.infill(model, content, do_sample=False, max_new_tokens=6)
    way = ("--infill", "a <hole> seven<image>", "--image", picture, "--mask", "0,0,2,1", "--max-tokens", "6")
    (sample,) = infilled(run, *way, "--temperature", "0", "--count", "1", "--out", tmp_path)["samples"]
    texts, pictures = ([piece for piece in pieces if isinstance(piece, str) is kind] for kind in (True, False))
    assert "".join(texts) == sample["text"]
    assert (np.asarray(pictures[0]) == np.asarray(PIL.Image.open(sample["pieces"][-1]["image"]))).all()


DRAWN: dict[str, tuple[str, ...]] = {
    "guided": ("--guidance", "2", "--unconditional", "mask"),
    "contrasted": ("--cd-k", "3", "--cd-alpha", "0.3", "--unconditional", "mask", "--top-k", "20"),
    "contrasted with nothing": ("--cd-k", "2", "--temperature", "0"),
    "compared": ("--guidance", "auto", "--unconditional", "mask"),
    "best": ("--best-of", "3", "--guidance", "2"),
    "best by a caption": ("--best-of", "2", "--cd-k", "3", "--caption", "this is a two", "--caption", "it is a"),
}


@pytest.mark.long
@pytest.mark.parametrize("name", DRAWN)
def test_run_and_export_draw_alike(name: str, models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Prompts of two lengths, equal seeds."""
    way = ("--prompt", "draw a two", "--prompt", "a", "--draw", "--count", "2", "--max-tokens", "8", *DRAWN[name])
    one, other = (infilled(model, *way, "--out", tmp_path / model.name) for model in models[:2])
    for mine, theirs in zip(one["samples"], other["samples"], strict=True):
        for key in ("text", "tokens", "ended"):
            assert mine[key] == theirs[key]
        assert ("prompt_log_likelihood" in mine) == name.startswith("best")
        if name.startswith("best"):
            assert mine["prompt_log_likelihood"] == pytest.approx(theirs["prompt_log_likelihood"], rel=1e-4)
            assert mine["prompt_log_likelihood"] < 0
    assert len(one["images"]) == len(other["images"]) >= 4
    for mine, theirs in zip(one["images"], other["images"], strict=True):
        assert Path(mine).read_bytes() == Path(theirs).read_bytes()


@pytest.mark.long
def test_the_best_sample_is_kept(models: tuple[Path, Path, Path]) -> None:
    """Of all samples that the same seed gives the one after which the model finds the prompt most likely."""
    from checkpoints_tools.huggingface.best_of import best_samples
    from checkpoints_tools.huggingface.generator import open_generator
    from checkpoints_tools.huggingface.prompts import Prompt
    from checkpoints_tools.huggingface.shipped.likelihood_moma import document_behind
    from mmscale.data.stream.packed import pack_rows
    from mmscale.inference.generate import Sampling
    from mmscale.inference.model import open_run
    from mmscale.tables.routings import Routing

    opened, sampling = open_generator(models[0]), Sampling(temperature=1.0, seed=4, max_tokens=6)
    prompts = [Prompt("draw a two", draw=True), Prompt("seven", draw=True)]
    drawn = opened.sample(prompts, count=6, sampling=sampling)
    kept = best_samples(opened, prompts, count=2, best_of=3, sampling=sampling)
    with open_run(models[0]) as run:  # the trainer's model, one document at a time
        for number, best in enumerate(kept):
            likelihoods = []
            for one in drawn[3 * number : 3 * number + 3]:
                ids, places = document_behind(opened.processor, opened.encode(one.prompt), one.ids, masked=True) or (
                    [],
                    [],
                )
                batch, _ = pack_rows([[np.array(ids)]], vocabulary=run.vocabulary, seq_length=64)
                scores = run.logits(batch, Routing.BATCH)[0].log_softmax(dim=-1)
                likelihoods.append(sum(float(scores[place - 1, ids[place]]) for place in places))
            assert best.likelihood == pytest.approx(max(likelihoods), rel=1e-4)
            assert best.ids == drawn[3 * number + likelihoods.index(max(likelihoods))].ids


@pytest.mark.long
def test_the_processor_of_an_export_draws_alike(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Token by token what the command gives, with what an export's user loads, and the same ranking."""
    import torch
    from transformers import AutoModelForCausalLM, AutoProcessor

    run, export, _ = models
    model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(export, trust_remote_code=True)
    inputs = processor(text="draw a two", draw=True)

    def generated(first: list[Any], last: list[Any]) -> Any:
        processors = [*first, processor.grammar(), *last]
        return model.generate(**inputs, max_new_tokens=6, do_sample=False, logits_processor=processors)

    made = {
        "--guidance": generated([processor.guidance(model, 3.0, unconditional="mask")], []),
        "--cd-k": generated([], [processor.contrastive(model, k=3, alpha=0.2, unconditional="mask")]),
    }
    options = {"--guidance": ("--guidance", "3"), "--cd-k": ("--cd-k", "3", "--cd-alpha", "0.2")}
    for name, ids in made.items():
        way = ("--prompt", "draw a two", "--draw", "--max-tokens", "6", "--temperature", "0", "--unconditional", "mask")
        found = infilled(run, *way, *options[name], "--count", "1", "--out", tmp_path / name)
        (picture,) = (piece for piece in processor.pieces(ids[0]) if not isinstance(piece, str))
        assert (np.asarray(picture) == np.asarray(PIL.Image.open(found["images"][0]))).all()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ways = {"do_sample": True, "max_new_tokens": 6, "num_return_sequences": 3, "temperature": 0.8, "top_k": 0}
        several = model.generate(**inputs, **ways, logits_processor=[processor.grammar()])
    ranked = processor.likelihoods(model, inputs["input_ids"].repeat(3, 1), several)
    way = ("--prompt", "draw a two", "--draw", "--max-tokens", "6", "--best-of", "3", "--count", "1")
    (best,) = infilled(run, *way, "--out", tmp_path / "best")["samples"]
    assert max(ranked) == pytest.approx(best["prompt_log_likelihood"], rel=1e-4) and len(set(ranked)) > 1
    with pytest.raises(ValueError, match="is not one of none, mask"):
        processor.guidance(model, 2.0, unconditional="empty")
    with pytest.raises(ValueError, match="k=0 must be at least 1"):
        processor.contrastive(model, k=0)


@pytest.mark.long
def test_plain_generation_has_no_sentinels(models: tuple[Path, Path, Path]) -> None:
    """Nearly uniform sampling reaches every token that may follow; holes, ends of fillings and roles may not."""
    import torch
    from transformers import AutoModelForCausalLM, AutoProcessor

    from checkpoints_tools.huggingface.generator import open_generator
    from checkpoints_tools.huggingface.prompts import Prompt
    from mmscale.data.vocab import BOI, EOI, PAD, ROLES, Vocabulary
    from mmscale.inference.generate import Sampling

    opened = open_generator(models[0])
    vocabulary = Vocabulary.from_config(opened.config.vocab)
    generated: set[int] = set()
    for one in opened.sample([Prompt("a")], count=60, sampling=Sampling(temperature=1e3)):
        generated |= set(one.ids)
    names = {vocabulary.specials[one] for one in generated if one < len(vocabulary.specials)}
    assert names == {"<boi>", "<eoi>"} and len(generated) > 300
    model = AutoModelForCausalLM.from_pretrained(models[1], trust_remote_code=True, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(models[1], trust_remote_code=True)
    inputs = processor(text=["a"] * 60)
    ways: dict[str, Any] = {"do_sample": True, "temperature": 1e3, "top_k": 0, "max_new_tokens": 40}
    special = set(range(len(vocabulary.specials)))
    ends = {*vocabulary.ends, BOI, EOI}
    roles = {vocabulary.reserved_id(role) for role in ROLES}
    for grammars, may in (([processor.grammar()], ends), ([], ends | roles)):
        out = model.generate(**inputs, **ways, logits_processor=grammars)[:, inputs["input_ids"].shape[1] :]
        found = set(out.flatten().tolist()) - {PAD}  # behind the end of a row
        assert found & special <= may and len(found) > 300


def test_decoding_that_is_refused(models: tuple[Path, Path, Path], masked: Path, tmp_path: Path) -> None:
    run = models[0]
    asked = ("--prompt", "draw a two", "--draw")

    def refused(model: Path, *arguments: str | Path, cause: str, remedy: str, status: int = 2) -> None:
        ended = mmscale("sample", model, *arguments, "--out", tmp_path / "out")
        assert_says(ended, status=status, cause=cause, remedy=remedy)
        assert not (tmp_path / "out").exists()

    refused(run, *asked, "--cd-k", "0", cause="--cd-k 0 is not at least 1", remedy="--cd-k 1")
    for alpha in ("0", "1.5", "nan"):
        cause = f"--cd-alpha {alpha} is not above 0 and at most 1"
        refused(run, *asked, "--cd-k", "4", "--cd-alpha", alpha, cause=cause, remedy="--cd-alpha 0.1")
    refused(run, *asked, "--cd-alpha", "0.1", cause="without --cd-k", remedy="--cd-k 1")
    refused(run, *asked, "--cd-k", "4", "--guidance", "2", cause="are both given", remedy="one of them")
    refused(run, *asked, "--unconditional", "mask", cause="without --guidance or --cd-k", remedy="--guidance 2")
    refused(run, *asked, "--unconditional", "all", cause="'all' is unknown", remedy="none, mask")
    refused(run, *asked, "--best-of", "0", cause="--best-of 0 is not at least 1", remedy="--best-of 4")
    refused(run, *asked, "--best-of", "2", "--temperature", "0", cause="all samples are equal", remedy="one of them")
    refused(run, *asked, "--caption", "a two", cause="--caption is given, and --best-of is not", remedy="--best-of 4")
    refused(run, *asked, "--best-of", "2", "--caption", " ", cause="--caption is empty", remedy="this is a")
    captions = ("--caption", "a", "--caption", "b")
    refused(run, *asked, "--best-of", "2", *captions, cause="2 times for 1 prompts", remedy="one for each")
    refused(run, "--prompt", "a", "--best-of", "2", cause="ranks drawn items", remedy="add --draw")
    refused(run, "--prompt", "", "--draw", "--best-of", "2", cause="a prompt has no text", remedy="--caption")
    refused(run, *asked, "--chat", "--best-of", "2", cause="not with --chat", remedy="leave one of them away")
    holes = ("--infill", "a <hole>")
    refused(run, *holes, "--best-of", "2", cause="--best-of: not with --infill", remedy="leave it away")
    refused(run, *holes, "--cd-k", "2", cause="--cd-k: not with --infill", remedy="leave it away")
    long = ("--prompt", "ab" * 27, "--draw", "--best-of", "2")
    refused(run, *long, cause="the model's context is 64", remedy="shorten the prompt", status=3)
    trained(masked, tmp_path / "plain", "train.steps=1", "train.eval_every=0", "objective.cm3_rate=0")
    way = (*asked, "--guidance", "2", "--unconditional", "mask")
    refused(tmp_path / "plain/masked", *way, cause="not trained with causal masking", remedy="objective.cm3_rate")


def test_holes_that_cannot_be_filled(models: tuple[Path, Path, Path], masked: Path, tmp_path: Path) -> None:
    run, _, picture = models

    def refused(model: Path, *arguments: str | Path, cause: str, remedy: str) -> None:
        ended = mmscale("sample", model, *arguments, "--out", tmp_path / "out")
        assert_says(ended, status=2, cause=cause, remedy=remedy)
        assert not (tmp_path / "out").exists()

    whole = ("--infill", "a", "--image", picture, "--mask", "0,0,1,1")
    refused(run, cause="--prompt and --infill are neither given", remedy="one of them")
    refused(run, *whole, "--prompt", "a", cause="both given", remedy="one of them")
    refused(run, *whole, "--draw", cause="--draw: not with --infill", remedy="leave it away")
    refused(run, "--infill", "a", cause="no hole to fill", remedy="write <hole> in the text")
    refused(run, *whole[:-1], "1,1,2,1", cause="mask 1,1,2,1 is not inside the image of 2 x 2", remedy="--mask")
    refused(run, *whole[:-1], "1,1", cause="'1,1' is not X,Y,WIDTH,HEIGHT", remedy="for example")
    refused(run, "--infill", "<hole>", "--mask", "0,0,1,1", cause="--mask is given with 0 pictures", remedy="--image")
    refused(run, "--prompt", "a", "--mask", "0,0,1,1", cause="without --infill", remedy="--infill")
    dense = ("--infill", "a <hole>")
    trained(masked, tmp_path / "plain", "train.steps=1", "train.eval_every=0", "objective.cm3_rate=0")
    refused(tmp_path / "plain/masked", *dense, cause="not trained to fill holes", remedy="objective.cm3_rate")
    trained(masked, tmp_path / "whole", "train.steps=1", "train.eval_every=0", "objective.image_spans=whole")
    refused(tmp_path / "whole/masked", *whole, cause="image_spans is whole", remedy="0,0,2,2")
