"""Guidance, CD-K and best-of where they meet token choice, and items of another modality than images.

A run and its export decode alike: tokens, pictures, recordings, and the likelihoods that rank them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from checkpoints_tools.huggingface.best_of import best_samples
from checkpoints_tools.huggingface.generator import open_generator
from checkpoints_tools.huggingface.prompts import Prompt
from mmscale.inference.generate import Sampling
from tests.end_to_end.running import ok
from tests.unit.data.modalities.test_audio import tone, wav

CHOICE = {"counts": {"text": 2, "image": 2}, "token_choice": {"top_k": 2}}
WORDS = ("low", "high")


@dataclass(frozen=True)
class Subject:
    """A model and what it is asked for.

    Attributes:
        model: settings of `model` besides the tiny ones.
        item: the modality to begin.
        prompts: two of different lengths.
        masked: trained with causal masking.
    """

    model: dict[str, Any]
    item: str = "image"
    prompts: tuple[str, str] = ("draw a two", "a")
    masked: bool = True


DENSE: dict[str, Any] = {"kind": "dense", "experts": {}}
SUBJECTS = {
    "token choice": Subject({"experts": CHOICE}),
    "audio": Subject(DENSE, item="audio", prompts=("a low tone", "high")),
    "audio, token choice": Subject(
        {"experts": {**CHOICE, "counts": {"text": 2, "audio": 2}}}, item="audio", prompts=("a low tone", "high")
    ),
    "audio, no holes": Subject(DENSE, item="audio", prompts=("a low tone", "high"), masked=False),
}
MASK = ("--unconditional", "mask")
WAYS: dict[str, tuple[str, ...]] = {
    "guided": ("--guidance", "2"),
    "contrasted": ("--cd-k", "3", "--cd-alpha", "0.3", "--top-k", "20"),
    "best": ("--best-of", "3", "--guidance", "2"),
    "best by a caption": ("--best-of", "2", "--cd-k", "3", "--caption", "this is a two", "--caption", "it is a"),
}


def recordings(folder: Path) -> list[str]:
    """JSONL of 60 tones with their names, before or after them."""
    lines = []
    for number in range(60):
        (folder / f"{number}.wav").write_bytes(wav(tone(300.0 + 20 * number + 1500.0 * (number % 2))))
        text = {"type": "text", "text": f"{'a ' * (number % 3 == 0)}{WORDS[number % 2]} tone"}
        item = {"type": "audio", "path": f"{number}.wav"}
        lines.append(json.dumps({"id": str(number), "content": [item, text] if number % 4 == 3 else [text, item]}))
    return lines


def configuration(subject: Subject, folder: Path, tiny: dict[str, Any]) -> Path:
    """A configuration beside its documents."""
    prepare = tiny["data"]["prepare"]
    vocab = {**tiny["vocab"], "reserved": subject.masked}
    if subject.item == "audio":
        (folder / "tones.jsonl").write_text("\n".join(recordings(folder)))
        audio = {"rate": 8000, "seconds": 0.4, "bands": 16, "frames": 4}
        prepare = {"documents": [str(folder / "tones.jsonl")], "held_out": 0.2, "modalities": {"audio": audio}}
        named = [{"name": "text", "size": 384}, {"name": "audio", "size": 128, "marks": True}]
        vocab = {"modalities": named, "pad_multiple": 64, "reserved": subject.masked}
    made = {
        **tiny,
        "run": {"name": "subject", "dir": str(folder)},
        "vocab": vocab,
        "model": {**tiny["model"], "depth": None, **subject.model},
        "data": {"prepare": prepare, "path": str(folder / "set")},
        "train": {**tiny["train"], "steps": 20, "eval_every": 0},
        "objective": {"cm3_rate": 0.6 * subject.masked, "image_spans": "partial"},
        "parallel": {},
        "checkpoint": {"every": 0, "asynchronous": False},
    }
    file = folder / "subject.yaml"
    file.write_text(yaml.safe_dump(made))
    return file


@pytest.fixture(scope="module", params=list(SUBJECTS))
def subject(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny: dict[str, Any]
) -> tuple[Subject, Path]:
    """A subject, and the folder of its run `subject` and its export `hf`."""
    chosen, folder = SUBJECTS[request.param], tmp_path_factory.mktemp("subject")
    file = configuration(chosen, folder, tiny)
    ok("data", "prepare", file, "--out", folder / "set")
    ok("train", file)
    ok("convert", "to-hf", folder / "subject", folder / "hf", timeout_s=600)
    return chosen, folder


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_run_and_export_decode_alike(subject: tuple[Subject, Path], way: str, tmp_path: Path) -> None:
    chosen, folder = subject
    prompts = [word for prompt in chosen.prompts for word in ("--prompt", prompt)]
    asked = (*prompts, "--begin", chosen.item, "--count", "2", "--max-tokens", "12", *WAYS[way])
    asked += MASK if chosen.masked else ()
    runs = ((name, folder / name) for name in ("subject", "hf"))
    found: list[Any] = [
        json.loads(ok("sample", path, *asked, "--out", tmp_path / name, "--json")) for name, path in runs
    ]
    for mine, theirs in zip(found[0]["samples"], found[1]["samples"], strict=True):
        assert {key: mine[key] for key in ("text", "tokens", "ended")} == {
            key: theirs[key] for key in ("text", "tokens", "ended")
        }
        assert ("prompt_log_likelihood" in mine) == way.startswith("best")
        if way.startswith("best"):
            assert mine["prompt_log_likelihood"] == pytest.approx(theirs["prompt_log_likelihood"], rel=1e-4)
    files = [one["images"] if chosen.item == "image" else one["files"][chosen.item] for one in found]
    assert len(files[0]) == len(files[1]) >= 4
    for mine, theirs in zip(*files, strict=True):
        assert Path(mine).read_bytes() == Path(theirs).read_bytes()


@pytest.mark.long
def test_the_best_is_the_most_likely_of_its_samples(subject: tuple[Subject, Path]) -> None:
    """Against the likelihood of each sample alone, with the same seed."""
    chosen, folder = subject
    opened, sampling = open_generator(folder / "subject"), Sampling(temperature=1.0, seed=4, max_tokens=12)
    prompts = [Prompt(text, draw=chosen.item == "image", begin=chosen.item) for text in chosen.prompts]
    every = best_samples(opened, prompts, count=6, best_of=1, sampling=sampling)
    best = best_samples(opened, prompts, count=2, best_of=3, sampling=sampling)
    alone = np.array([one.likelihood for one in every]).reshape(4, 3)
    assert len(set(alone.ravel().tolist())) > 6 and (alone < 0).all()
    for row, one in enumerate(best):
        assert one.likelihood == pytest.approx(alone[row].max(), rel=1e-4)
        assert one.ids == every[3 * row + int(alone[row].argmax())].ids
