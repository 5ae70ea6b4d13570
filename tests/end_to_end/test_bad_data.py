"""Data that no run can use: `launch --dry-run`, `train` and the ranks themselves refuse it with the same cause.

A case is a table entry; each is made once and asked of every stage.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmscale.cli import main
from mmscale.config.load import load
from mmscale.data.prepared.manifest import MANIFEST, Manifest, write_manifest
from mmscale.data.vocab import BOS, EOS, Vocabulary
from mmscale.train.stages.table import MAIN, STAGES, Stage
from tests.end_to_end.running import Ended, assert_says, listing, mmscale
from tests.unit.data.corpora import prepare

LONGEST = 64  # model.seq_length of the configuration


@dataclass(frozen=True)
class Made:
    """Where a case's data is: `main` is trained on, `other` may stand beside it."""

    main: Path
    other: Path

    def change(self, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
        """Change a manifest."""
        file = getattr(self, name) / MANIFEST
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    def table(self, name: str, change: Callable[[np.ndarray], None]) -> None:
        """Change the table of the documents to train on."""
        file = getattr(self, name) / "train-00000.meta.npy"
        content = np.load(file)
        change(content)
        np.save(file, content)


@dataclass(frozen=True)
class Case:
    """What is wrong.

    Attributes:
        make: makes it so.
        cause: a pattern of what is said; MAIN and OTHER stand for the folders.
        remedy: likewise.
        overrides: settings.
        by_ranks: whether ranks would find it too, if nobody had looked before.
        stages: whether every stage refuses it, and not the main one alone.
    """

    make: Callable[[Made], Any]
    cause: str
    remedy: str
    overrides: tuple[str, ...] = ("data.path=MAIN",)
    by_ranks: bool = True
    stages: bool = True


def unmake(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


def cut(folder: Path) -> None:
    file = folder / "train-00000.bin"
    file.write_bytes(file.read_bytes()[:-2])


def empty(split: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["splits"].update({split: {"parts": []}})


def nothing(made: Made) -> None:
    """The settings are enough."""


BLEND = ("data.path=null", "data.blend=[{path: MAIN}, {path: OTHER}]")
SETS = ("data.path=MAIN", "data.validation.web=OTHER")
CASES = {
    "no folder": Case(lambda made: unmake(made.main), "there is no folder MAIN", "data prepare"),
    "not prepared": Case(lambda made: (made.main / MANIFEST).unlink(), "MAIN is not a prepared data set", "prepare"),
    "cut off": Case(lambda made: cut(made.main), r"MAIN/train-00000.bin has \d+ bytes instead of", "made again"),
    "no table": Case(lambda made: (made.main / "train-00000.meta.npy").unlink(), "meta.npy cannot be read", "again"),
    "another table": Case(
        lambda made: made.table("main", lambda table: table.__setitem__((0, 0), 9)), "does not add up", "again"
    ),
    "no train split": Case(
        lambda made: made.change("main", lambda content: content["splits"].pop("train")),
        "has no split 'train'",
        "again",
    ),
    "empty train split": Case(
        lambda made: made.change("main", empty("train")), "the split 'train' of MAIN has no documents", "more documents"
    ),
    "empty source of weight 0": Case(
        lambda made: made.change("other", empty("train")),
        "the split 'train' of OTHER has no documents",
        "more documents",
        ("data.path=null", "data.blend=[{path: MAIN}, {path: OTHER, weight: 0}]"),
    ),
    "no held-out split": Case(
        lambda made: made.change("main", lambda content: content["splits"].pop("validation")),
        "no held-out documents to evaluate on every 30 steps",
        "train.eval_every=0.*data.validation",
        by_ranks=False,
        stages=False,  # a stage is evaluated once, if there is something to evaluate on
    ),
    "documents too long": Case(
        nothing,
        r"MAIN \(train\): document \d+ has \d+ tokens, model.seq_length is 16",
        "raise model.seq_length",
        ("data.path=MAIN", "model.seq_length=16"),
    ),
    "held-out documents too long": Case(
        nothing,
        r"OTHER \(validation\): document \d+ has 31 tokens",
        "raise",
        ("data.path=OTHER", "model.seq_length=24"),
    ),
    "another vocabulary": Case(
        lambda made: made.change("main", lambda content: content.update(vocabulary="x")),
        "MAIN was prepared with another vocabulary",
        "vocab.modalities",
    ),
    "another tokenizer in the blend": Case(
        lambda made: made.change("other", lambda content: content.update(tokenizers={"text": "t2"})),
        "text tokenizer of OTHER .* is another than that of the blend's data",
        "--like",
        BLEND,
    ),
    "no label": Case(
        lambda made: made.table("main", lambda table: table.__setitem__((slice(None), -1), 0)),
        "no token of MAIN is trained on",
        "loss",
        by_ranks=False,
    ),
    "no validation set": Case(
        lambda made: unmake(made.other), "data.validation.web: there is no folder OTHER", "data.validation.web", SETS
    ),
    "empty validation set": Case(
        lambda made: [made.change("other", empty(split)) for split in ("train", "validation")],
        "data.validation.web: the split 'train' of OTHER has no documents",
        "more documents",
        SETS,
    ),
    "validation set of another vocabulary": Case(
        lambda made: made.change("other", lambda content: content.update(vocabulary="x")),
        "data.validation.web: OTHER was prepared with another vocabulary",
        "vocab.modalities",
        SETS,
    ),
    "validation set of another tokenizer": Case(
        lambda made: made.change("other", lambda content: content.update(tokenizers={"text": "t2"})),
        "data.validation.web: the text tokenizer of OTHER .* is another than that of the data that is trained on",
        "--like",
        SETS,
    ),
    "validation documents too long": Case(
        nothing,
        r"data.validation.web: OTHER \(validation\): document \d+ has 31 tokens",
        "raise",
        (*SETS, "model.seq_length=24"),
    ),
    "validation set that is trained on": Case(
        lambda made: made.change("main", empty("validation")),
        "data.validation.web: MAIN has no held-out documents, and all others are trained on as MAIN",
        "held_out above 0",
        ("data.path=MAIN", "data.validation.web=MAIN"),
    ),
}


@pytest.fixture
def made(config: Path, tmp_path: Path) -> Made:
    """Two small data sets; held-out documents of the second have 31 tokens, all others at most 20."""
    vocabulary = Vocabulary.from_config(load(config).vocab)
    folders = {"main": 20, "other": 31}
    for name, longest in folders.items():
        splits = {}
        for split, length in (("train", 20), ("validation", longest)):
            documents = [np.array([BOS, *range(20, 18 + length), EOS]) for _ in range(8)]
            folder = prepare(tmp_path / name, documents, vocabulary=vocabulary, parts=1, split=split)
            manifest = Manifest.model_validate_json((folder / MANIFEST).read_text())
            splits[split] = manifest.splits[split]
        changed = {"splits": splits, "tokenizers": {"text": "t1"}, "source": name}
        write_manifest(folder, manifest.model_copy(update=changed))
    return Made(tmp_path / "main", tmp_path / "other")


@pytest.fixture
def dry_run(config: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """`mmscale launch --dry-run` in this process: it imports no torch."""

    def run(*arguments: str) -> Ended:
        capfd.readouterr()
        status = main(["launch", str(config), "--cluster", "local", "--dry-run", *arguments])
        return Ended(status, *capfd.readouterr())

    return run


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_everywhere(
    name: str,
    made: Made,
    config: Path,
    dry_run: Callable[..., Ended],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = CASES[name]
    case.make(made)
    before = listing(tmp_path)

    def filled(text: str) -> str:
        return text.replace("MAIN", str(made.main)).replace("OTHER", str(made.other))

    settings = [*map(filled, case.overrides), f"run.dir={tmp_path / 'runs'}", "parallel.ep=1"]

    def refused(ended: Ended) -> str:
        assert_says(ended, status=3, cause=filled(case.cause), remedy=case.remedy)
        return ended.err.partition("error: ")[2].splitlines()[0]

    said = {"train": refused(mmscale("train", config, *settings))}
    for stage in STAGES:
        if case.stages or stage == MAIN:
            said[stage] = refused(dry_run(*settings, *_own(stage, settings, made), "--stage", stage))
    assert listing(tmp_path) == before
    if case.by_ranks:
        monkeypatch.setattr(Stage, "preflight", lambda *_, **__: None)
        said["ranks"] = refused(mmscale("train", config, *settings))
    assert len(set(said.values())) == 1, said


def _own(stage: str, settings: list[str], made: Made) -> list[str]:
    """The settings of a stage that reads other data than the main run: here the same."""
    if stage != "sft":
        return []
    named = [text.replace("data.", "sft.", 1) for text in settings if text.startswith(("data.path=", "data.blend="))]
    return [text for text in named if text != "sft.path=null"] or [f"sft.path={made.main}"]


def test_what_is_right_is_not_refused(made: Made, dry_run: Callable[..., Ended], tmp_path: Path) -> None:
    sets = (f"data.path={made.main}", f"data.validation.web={made.other}")
    ended = dry_run(*sets, f"run.dir={tmp_path / 'runs'}", "parallel.ep=1")
    assert ended.status == 0, ended
