"""`mmscale sample` from a run and from its export: text and pictures, the trainer's tokens, and what is refused."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.backends.backend_agg  # noqa: F401  these: what forked commands would import one by one
import numpy as np
import PIL.Image
import pytest
import yaml

import checkpoints_tools.huggingface.generator  # noqa: F401
import mmscale.inference.draw
import mmscale.report.figures
from mmscale.checkpoint import integrity
from mmscale.checkpoint.layout import Store
from mmscale.data.vocab import EOI, EOS
from tests.end_to_end.running import ROOT, Ended, assert_says, change_settings, mmscale


def ok(*arguments: str | Path, nproc: int = 1) -> Ended:
    ended = mmscale(*arguments, *(("--nproc", str(nproc)) if nproc > 1 else ()), nproc=nproc)
    assert ended.status == 0, ended
    return ended


def sampled(*arguments: str | Path, nproc: int = 1) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ok("sample", *arguments, "--json", nproc=nproc).out)
    return found


@pytest.fixture(scope="module")
def seven(digits_documents: Path) -> Path:
    """A real digit as a file."""
    questions = map(json.loads, (digits_documents / "digit.jsonl").read_text().splitlines())
    return digits_documents / next(one["content"][0]["path"] for one in questions if one["answer"] == 7)


@pytest.mark.parametrize("name", ["tiny", pytest.param("dense", marks=pytest.mark.long)])
def test_run_and_export_give_the_same_pictures(name: str, exported: Path, seven: Path, tmp_path: Path) -> None:
    ways: list[tuple[str | Path, ...]] = [
        ("--prompt", "two of <image> are", "--image", seven, "--count", "3", "--top-k", "40", "--guidance", "2")
    ]
    if name == "tiny":
        ways.append(("--prompt", "draw a two", "--count", "1", "--temperature", "0", "--guidance", "auto"))
        ways.append(("--prompt", "draw a two", "--count", "2", "--cd-k", "4", "--cd-alpha", "0.5", "--best-of", "3"))
    for way in ways:
        one = sampled(exported / name, *way, "--draw", "--out", tmp_path / "run")
        other = sampled(exported / f"{name}-hf", *way, "--draw", "--out", tmp_path / "hf")
        assert one["step"] == 30 and other["step"] is None
        assert one["routing"] == other["routing"] == ("causal" if name == "tiny" else "none")
        said = [[(sample["text"], sample["tokens"]) for sample in found["samples"]] for found in (one, other)]
        assert said[0] == said[1] and len(one["images"]) >= len(said[0])
        if "auto" in way:
            mine, theirs = one["guidance"], other["guidance"]
            assert mine["items"] > 0 and mine["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
            assert mine["losses"][f"{mine['chosen']:g}"] == min(mine["losses"].values())
        for mine, theirs in zip([*one["images"], one["sheet"]], [*other["images"], other["sheet"]], strict=True):
            assert Path(mine).read_bytes() == Path(theirs).read_bytes()
        assert PIL.Image.open(one["images"][0]).size == (8, 8)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("tiny", ("--routing", "batch")),
        pytest.param("tiny", ("--top-k", "40", "--guidance", "3"), marks=pytest.mark.long),
        pytest.param("tiny", ("--cd-k", "4", "--best-of", "2"), marks=pytest.mark.long),
        pytest.param("dense", ("--temperature", "0"), marks=pytest.mark.long),
    ],
)
def test_tensor_parallel_ranks_give_the_same_pictures(
    name: str, more: tuple[str, ...], exported: Path, tmp_path: Path
) -> None:
    """Resharded from one rank to two, without a cache; also texts of unequal length, and what rank 0 alone writes."""
    prompts = ["--prompt", "draw a two"] + ([] if "batch" in more else ["--prompt", "a", "--draw"])
    way = [exported / name, *prompts, "--count", "2" if "batch" in more else "1", *more]
    one = sampled(*way, "--out", tmp_path / "one")
    two = sampled(*way, "--out", tmp_path / "two", nproc=2)
    kept = ("text", "tokens", "ended")
    assert [[sample.get(key) for key in kept] for sample in one["samples"]] == [
        [sample.get(key) for key in kept] for sample in two["samples"]
    ]
    ranked, again = ([sample.get("prompt_log_likelihood", 0.0) for sample in found["samples"]] for found in (one, two))
    assert ranked == pytest.approx(again, rel=1e-4) and (min(ranked) < 0) == ("--best-of" in more)
    assert two["step"] == 30 and two["routing"] == one["routing"] and len(one["images"]) == len(two["images"]) > 0
    for mine, theirs in zip(one["images"], two["images"], strict=True):
        assert Path(mine).read_bytes() == Path(theirs).read_bytes()


def test_evaluation_over_tensor_parallel_ranks(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, tasks, and the routers' figures: as one process measures them. Rank 0 alone chooses, reads and hashes."""
    hashed, listed = integrity.digest, Store.steps
    monkeypatch.setattr(integrity, "digest", lambda path: hashed(path) if first() else pytest.fail("hashed twice"))
    monkeypatch.setattr(Store, "steps", lambda store: listed(store) if first() else pytest.fail("chosen twice"))
    way = ("eval", exported / "tiny", "--routing", "causal", "--batches", "2", "--json")
    one, two = (json.loads(ok(*way, nproc=nproc).out) for nproc in (1, 2))
    assert one.keys() == two.keys() and one["routers"]
    for name, value in one.items():
        if isinstance(value, float):
            assert two[name] == pytest.approx(value, rel=2e-6, abs=1e-6), name
    for mine, theirs in zip(one["routers"], two["routers"], strict=True):
        assert theirs == pytest.approx(mine, abs=1e-3)


def first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def test_ranks_end_alike_at_a_damaged_checkpoint(exported: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(exported / "bare", tmp_path / "bare"))
    (file,) = (run / "checkpoints").glob("step_*/__0_0.distcp")
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    ended = mmscale("eval", run, "--nproc", "2", nproc=2)
    assert_says(ended, status=4, cause=r"step_0*30 is damaged: __0_0.distcp has another content", remedy="RUN@STEP")
    assert ended.others == ended.err  # rank 1, which has read nothing, ends with the same words


def test_a_run_of_a_gpu_machine_is_evaluated_anywhere(exported: Path, tmp_path: Path) -> None:
    """Its layout, kernels and number format are no part of the model; the slots that FP8 rounded up are."""
    run = Path(shutil.copytree(exported / "tiny", tmp_path / "tiny"))
    settings = yaml.safe_load((run / "config.yaml").read_text())  # as its checkpoint's

    def loss(nproc: int, *, experts: dict[str, Any], model: dict[str, Any], precision: dict[str, Any]) -> float:
        changed = copy.deepcopy(settings)
        changed["model"] |= model | {"experts": changed["model"]["experts"] | experts}
        changed["model"]["depth"]["multiple"] = experts.get("capacity_multiple", 8)
        changed["precision"] |= precision
        change_settings(run, lambda own: own.update(changed))
        found = json.loads(ok("eval", run, "--batches", "2", "--json", nproc=nproc).out)["loss"]
        assert isinstance(found, float)
        return found

    kernels = {"backend": "te", "gradient_accumulation_fusion": "on"}
    slots = loss(1, experts={"capacity_multiple": 16}, model={}, precision={})
    graphs = {"capacity_multiple": 16, "compute": "grouped_mm", "cuda_graph": True}
    assert loss(1, experts=graphs, model=kernels, precision={}) == slots
    fp8 = {"fp8": "tensorwise", "fp8_skip_first": 1}
    assert loss(2, experts={"compute": "te"}, model=kernels, precision=fp8) == pytest.approx(slots, rel=2e-6)


def test_ranks_that_do_not_fit(exported: Path) -> None:
    run, export, prompt = exported / "tiny", exported / "tiny-hf", ("--prompt", "a")
    cases: list[tuple[tuple[str | Path, ...], int, str, str]] = [
        (("eval", run), 3, "num_attention_heads", ""),
        (("eval", export), 2, "in one process", "leave --nproc out"),
        (("sample", export, *prompt), 2, "in one process", "leave --nproc out"),
    ]
    for command, nproc, cause, remedy in cases:
        ended = mmscale(*command, "--nproc", str(nproc), nproc=nproc)
        assert_says(ended, status=2, cause=cause, remedy=remedy)


def test_tokens_are_the_trainers(exported: Path, seven: Path) -> None:
    """Greedy with the cache, token for token what the trainer's causal forward says, which has no cache."""
    import torch

    from checkpoints_tools.huggingface.generator import open_generator
    from checkpoints_tools.huggingface.prompts import Prompt
    from mmscale.data.stream.packed import pack_rows
    from mmscale.inference.generate import Sampling
    from mmscale.inference.model import open_run
    from mmscale.tables.routings import Routing
    from tests.unit.inference.test_generate import allowed_of

    asked = [Prompt("draw a seven"), Prompt("", (seven,)), Prompt("this is a <image>, <image>", (seven, seven), True)]
    for name, routing in (("tiny", Routing.CAUSAL), ("dense", Routing.BATCH)):
        generator = open_generator(exported / name)
        found = generator.sample(asked, sampling=Sampling(temperature=0.0))
        codes, vocab = generator.processor.codes, generator.config.vocab
        assert codes is not None
        without_code = generator.processor.image_range[0] + codes.count
        drawn = 0
        with open_run(exported / name) as model:
            for prompt, one in zip(asked, found, strict=True):
                ids = generator.encode(prompt)
                length = len(ids)
                whole = np.array([*ids, *one.ids, *([EOS] if one.ended else [])], dtype=np.int64)
                batch, _ = pack_rows([[whole]], vocabulary=model.vocabulary, seq_length=model.config.model.seq_length)
                logits = model.logits(batch, routing)[0]
                for at in range(length, len(whole)):
                    may = allowed_of(
                        whole[:at].tolist(), 64 - at, image=generator.processor.image_range, tokens=codes.tokens
                    ) - set(range(without_code, generator.processor.image_range[1]))
                    may &= set(range(vocab.size))
                    best = torch.tensor(sorted(may))
                    scores = logits[at - 1][best]
                    assert int(best[scores.argmax()]) == whole[at], (name, at)
                assert one.ended or len(whole) == 64
                drawn += one.ids.count(EOI)
            assert drawn


def test_text_goes_on_and_pictures_are_read(exported: Path, seven: Path, tmp_path: Path) -> None:
    """An image alone is a prompt; what comes back is printed, and nothing is written where nothing was drawn."""
    ended = ok(
        "sample", exported / "tiny", "--prompt", "", "--image", seven, "--max-tokens", "3", "--out", tmp_path / "o"
    )
    assert ended.out.count("'' -> ") == 4 and "4 samples with 0 images" in ended.err
    assert not (tmp_path / "o").exists() and "note:" not in ended.err
    with PIL.Image.open(seven) as picture:
        picture.resize((20, 10)).save(tmp_path / "wide.png")
    ended = ok("sample", exported / "tiny", "--prompt", "", "--image", tmp_path / "wide.png", "--out", tmp_path / "o")
    assert "wide.png has 20 x 10 pixels, scaled and cropped to 8 x 8" in ended.err


def test_routings(exported: Path, tmp_path: Path) -> None:
    for routing in ("causal", "top1", "batch"):
        found = sampled(exported / "tiny", "--prompt", "draw a two", "--routing", routing, "--draw", "--out", tmp_path)
        assert found["routing"] == routing and len(found["images"]) >= 4
    assert "batch routing" in ok("sample", exported / "bare", "--prompt", "draw a two", "--out", tmp_path).out


def test_the_example_counts_every_digit_that_was_asked_for(
    exported: Path, digits_documents: Path, tmp_path: Path
) -> None:
    asked = ("--prompt", "draw a two", "--prompt", "draw a nine", "--count", "5", "--draw", "--out", tmp_path)
    (tmp_path / "samples.json").write_text(json.dumps(sampled(exported / "tiny", *asked)))
    program = [sys.executable, ROOT / "examples/digits/recognise.py", digits_documents, tmp_path / "samples.json"]
    ended = subprocess.run([*program, "--json"], capture_output=True, text=True, check=True, timeout=300)
    found = json.loads(ended.stdout)
    assert found["asked"] == 10 and found["right"] == sum(row["right"] for row in found["by_word"].values())
    assert {word: row["asked"] for word, row in found["by_word"].items()} == {"two": 5, "nine": 5}
    assert found["share"] == found["right"] / 10 and found["ceiling"] > 0.97


@pytest.mark.parametrize(
    ("arguments", "status", "cause", "remedy"),
    [
        (("tiny", "--prompt", "draw " * 80), 3, "the model's context is 64", "shorten the prompt"),
        (("tiny", "--prompt", "", *["--image", "{seven}"] * 10, "--draw"), 3, "begins an image", "shorten the prompt"),
        (("tiny", "--prompt", "a", "--draw", "--max-tokens", "4"), 3, "begins an image", "--max-tokens 5"),
        (("tiny", "--prompt", "a", "--image", "missing.png"), 3, "missing.png cannot be read", "another picture"),
        (("tiny", "--prompt", "a", "--image", "text.png"), 3, "text.png cannot be read", "another picture"),
        (("tiny", "--prompt", "<image><image>", "--image", "{seven}"), 2, "2 <image> for 1 images", "as many --image"),
        (("tiny", "--prompt", "\udce4"), 3, "no valid UTF-8", "encoding"),
        (("tiny", "--prompt", "a", "--guidance", "much"), 2, "'much' is no number from 0 on, nor auto", "--guidance 2"),
        (("tiny", "--prompt", "a", "--routing", "best"), 2, "'best' is not a routing", "causal"),
        (("tiny", "--prompt", "a", "--routing", "threshold"), 4, "no averaged cut-offs", ""),
        (("tiny-hf", "--prompt", "a", "--routing", "threshold"), 4, "needs tensors", "--routing"),
        (("tiny-hf@3", "--prompt", "a"), 2, "has no steps", "tiny-hf"),
        (("tiny-hf", "--prompt", "a", "--routing", "batch"), 2, "batch routing needs a run", "--routing causal"),
        (("bare", "--prompt", "a", "--routing", "causal"), 4, "has no auxiliary routers", "--stage auxiliary"),
        (("bare", "--prompt", "a", "--guidance", "2"), 2, "--guidance: not with batch routing", "--stage auxiliary"),
        (("bare", "--prompt", "a", "--best-of", "2"), 2, "--best-of: not with batch routing", "--stage auxiliary"),
        (
            ("tiny", "--prompt", "a", "--cd-k", "2", "--unconditional", "mask"),
            2,
            "no tokens for holes",
            "vocab.reserved",
        ),
        (("nothing", "--prompt", "a"), 4, "there is no folder", "run.dir/run.name"),
    ],
)
def test_refused(
    exported: Path, seven: Path, tmp_path: Path, arguments: tuple[str, ...], status: int, cause: str, remedy: str
) -> None:
    (tmp_path / "text.png").write_text("no picture")
    name, *rest = (one.format(seven=seven) for one in arguments)
    rest = [str(tmp_path / one) if one.endswith(".png") and "/" not in one else one for one in rest]
    ended = mmscale("sample", f"{exported}/{name}", *rest, "--out", tmp_path / "none")
    assert_says(ended, status=status, cause=cause, remedy=remedy)
    assert not (tmp_path / "none").exists()


def test_a_damaged_export_is_not_loaded(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported / "tiny-hf", tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    ended = mmscale("sample", tmp_path / "hf", "--prompt", "a", "--out", tmp_path / "none")
    assert_says(ended, status=4, cause="is damaged", remedy="export it again")
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    del settings["mmscale"]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(settings))
    ended = mmscale("sample", tmp_path / "hf", "--prompt", "a", "--out", tmp_path / "none")
    assert_says(ended, status=4, cause="was not exported by mmscale", remedy="to-hf")
