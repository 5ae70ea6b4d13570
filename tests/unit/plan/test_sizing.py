# mmscale/plan/sizing.py and `mmscale plan --data`: proposals for any data, machine and budget load as configurations.
"""Tests of sizing."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import PIL.Image
import pytest

from mmscale.cli import main
from mmscale.config.load import load, resolve
from mmscale.config.rules import violations
from mmscale.data.prepared.survey import survey
from mmscale.errors import UsageError
from mmscale.plan import sizing
from mmscale.plan.layouts import evaluate
from mmscale.plan.proposal import yaml_lines
from mmscale.plan.search import Search, search
from mmscale.plan.sizing import SHAPES, propose
from mmscale.plan.sizing_inputs import Facts, Items, Machine
from mmscale.plan.vocabulary import PASSES
from mmscale.tables.gpus import GPUS

LAPTOP = Machine("laptop", "cpu", 2, 40e9)
MACHINES = [LAPTOP, Machine("one core", "cpu", 1, 10e9), *(Machine.of_gpus(gpu, 8) for gpu in GPUS.values())]
FILES = ("documents.jsonl",)
FACTS = {
    "icons": Facts(FILES, 3342, 3342, characters=90_000, edge=48, most_images=1, most_bytes=60, distinct_images=1671),
    "digits": Facts(FILES, 15_000, 15_000, characters=300_000, edge=8, channels=1, most_images=1, most_bytes=30),
    "text": Facts(FILES, 2000, 0, characters=40_000_000, most_bytes=90_000),
    "photographs": Facts(FILES, 10**7, 2 * 10**7, characters=10**10, edge=1024, most_images=6, most_bytes=5000),
    "prepared": Facts(
        ("data/x",), 500, 400, ids={"text": 384, "image": 64}, tokens={"text": 9000, "image": 25_600}, longest=700
    ),
    "speech": Facts(
        FILES,
        2000,
        1000,
        characters=30_000,
        edge=8,
        channels=1,
        most_images=1,
        most_bytes=30,
        others=(Items("audio", 2000, 2, 40),),
    ),
    "prepared speech": Facts(
        ("data/x",),
        500,
        400,
        ids={"text": 384, "image": 64, "audio": 128},
        marked=("audio",),
        tokens={"text": 9000, "image": 0, "audio": 30_000},
        longest=300,
    ),
}


@pytest.mark.parametrize("budget_s", [1800.0, 8 * 3600.0, 14 * 86_400.0])
@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
@pytest.mark.parametrize("facts", FACTS.values(), ids=FACTS)
def test_every_proposal_is_a_configuration(facts: Facts, machine: Machine, budget_s: float, tmp_path: Path) -> None:
    found = propose(facts, machine, budget_s=budget_s)
    config = resolve(found.settings)
    assert violations(config, world_size=machine.ranks) == []
    assert found.seconds <= budget_s and found.passes <= PASSES * 1.05
    file = tmp_path / "mine.yaml"
    file.write_text("\n".join(yaml_lines(found, command=["test"])) + "\n")
    assert config == load(file)
    assert config.model.seq_length >= (facts.longest or 0)
    image = config.data.prepare.image if config.data.prepare and facts.images else None
    assert image is None or image.size % image.patch == 0
    assert all(rule.reason and rule.source for rule in found.rules)
    wanted = facts.ids or {"text", *(["image"] if facts.images else []), *(one.modality for one in facts.others)}
    assert set(config.vocab.names) == set(wanted)
    assert set(config.vocab.marked) == {name for name in wanted if name not in ("text", "image")}
    assert set(config.model.experts.counts) == (set(wanted) if len(wanted) > 1 else set())


@pytest.mark.parametrize("number", [1, 8])
@pytest.mark.parametrize("name", ["text", "photographs", "speech"])
def test_a_proposal_fits_into_memory(name: str, number: int) -> None:
    """Less memory gives another layout, then a smaller model, then none."""
    sizes = []
    for memory in (80.0, 20.0):
        machine = Machine.of_gpus(GPUS["h100"], number, memory=memory)
        found = propose(FACTS[name], machine, budget_s=60 * 86_400.0)
        config = resolve(found.settings)
        assert evaluate(config, number, gpu_memory=memory, gpu=GPUS["h100"]).fits
        assert violations(config, world_size=number) == []
        text = "\n".join(yaml_lines(found, command=["test"]))
        assert ("parallel" in found.settings) == ("# parallel: the fastest of" in text)
        sizes.append(config.model.hidden_size)
    assert sizes == sorted(sizes, reverse=True)


def test_a_layout_that_splits_sequences_pads_their_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Context parallelism cuts every document into 2 * cp pieces; no other proposal needs padding."""
    long = replace(FACTS["prepared"], documents=500_000, tokens={"text": 9e9, "image": 25e9}, longest=32_768)
    machine = Machine.of_gpus(GPUS["h100"], 8, memory=40.0)
    plain = propose(long, machine, budget_s=60 * 86_400.0)
    assert plain.settings["parallel"].get("cp", 1) == 1 and "document_multiple" not in plain.settings["data"]

    def split(*given: Any, **options: Any) -> Search:
        found = search(*given, **options)
        return replace(found, layouts=[one for one in found.layouts if one.config.parallel.cp > 1])

    monkeypatch.setattr(sizing, "search", split)
    found = propose(long, machine, budget_s=60 * 86_400.0)
    config = resolve(found.settings)
    assert config.parallel.cp > 1 and config.data.document_multiple % (2 * config.parallel.cp) == 0
    assert violations(config, world_size=8) == []
    assert "document_multiple" in "\n".join(yaml_lines(found, command=["test"]))


def test_memory_that_no_model_fits_into() -> None:
    with pytest.raises(UsageError, match=r"no model fits into 0\.02 GiB a device") as caught:
        propose(FACTS["speech"], Machine.of_gpus(GPUS["h100"], 1, memory=0.02), budget_s=86_400.0)
    assert "--gpu h200" in caught.value.remedy


def test_ids_that_texts_cannot_fill_are_not_proposed(tmp_path: Path) -> None:
    """Captions of one pattern with few names have no more pairs to merge, however often they are repeated."""
    names = ["".join(Random(n).choices("abcdefghijklmnopqrstuvwxyz", k=9)) for n in range(20)]
    records = [
        {"id": name, "content": [{"type": "text", "text": f"the flag of {name}, which this is"}]} for name in names
    ]
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records) * 150)
    facts = survey([str(file)])
    assert facts.text_ids is not None and facts.characters is not None
    proposal = propose(facts, LAPTOP, budget_s=600)
    (text,) = proposal.settings["vocab"]["modalities"]
    by_characters = propose(replace(facts, text_ids=None), LAPTOP, budget_s=600).settings["vocab"]["modalities"][0]
    assert text["size"] <= facts.text_ids < by_characters["size"]
    assert any(f"repeat enough for {facts.text_ids:,} ids" in rule.reason for rule in proposal.rules)
    ids = replace(facts, text_ids=340)
    (reason,) = [rule.reason for rule in propose(ids, LAPTOP, budget_s=600).rules if "repeat enough" in rule.reason]
    assert reason.endswith("340 ids, bytes and special tokens included; 320 is the multiple of 64 below")
    tiny = propose(replace(facts, text_ids=270), LAPTOP, budget_s=600).settings["vocab"]["modalities"][0]
    assert tiny["size"] == 320  # bytes and special tokens


def test_there_is_something_to_evaluate_on() -> None:
    """Few documents hold out more of them; a prepared set that holds out none is not evaluated."""
    few, many = (replace(FACTS["text"], documents=number) for number in (80, 50_000))
    assert propose(few, LAPTOP, budget_s=1800.0).settings["data"]["prepare"]["held_out"] == 0.2
    assert "held_out" not in propose(many, LAPTOP, budget_s=1800.0).settings["data"]["prepare"]
    for held_out in (0, 9):
        train = propose(replace(FACTS["prepared"], held_out=held_out), LAPTOP, budget_s=1800.0).settings["train"]
        assert (train["eval_every"] > 0) == (held_out > 0)


@pytest.mark.parametrize(
    ("splits", "held_out"),
    [
        ((None, None, None), None),
        (("train", "validation", "train"), 40),
        ((None, "validation", None), 40),
        (("train", "train", "train"), 0),
        (("train", "train", None), None),
    ],
)
def test_a_split_that_documents_name_is_not_overruled(
    splits: tuple[str | None, ...], held_out: int | None, tmp_path: Path
) -> None:
    """`data.prepare.held_out` is proposed only if a hash decides what is held out."""
    lines = [
        {"id": f"{copy}-{number}", "content": [{"type": "text", "text": f"line {copy} of {number}"}]}
        | ({} if split is None else {"split": split})
        for copy in range(40)
        for number, split in enumerate(splits)
    ]
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = survey([str(file)])
    assert facts.held_out == held_out
    proposal = propose(facts, LAPTOP, budget_s=600)
    assert ("held_out" in proposal.settings["data"]["prepare"]) == (held_out is None)
    assert (proposal.settings["train"]["eval_every"] > 0) == (held_out != 0)
    assert any(rule.setting == "held-out documents" for rule in proposal.rules) == (held_out is not None)


def test_memory_decides_layout_and_size() -> None:
    """Photographs for 60 days on eight devices: the layout changes first, then the size of the model."""
    said = {}
    for memory in (80.0, 24.0):
        machine = Machine.of_gpus(GPUS["h100"], 8, memory=memory)
        found = propose(FACTS["photographs"], machine, budget_s=60 * 86_400.0)
        said[memory] = (found.settings["model"]["hidden_size"], found.settings.get("parallel", {}))
    assert said[80.0][0] >= said[24.0][0] and said[24.0][1] != {}


def test_icons_on_a_laptop() -> None:
    """The values of configs/emoji.yaml, which were found by trying, for data of its size."""
    config = resolve(propose(FACTS["icons"], LAPTOP, budget_s=1800.0).settings)
    assert config.data.prepare is not None
    image = config.data.prepare.image
    assert (image.size // image.patch) ** 2 == 64
    assert (config.vocab.modalities[0].size, config.vocab.modalities[1].size) == (896, 512)
    assert (config.model.hidden_size, config.model.num_layers) == (128, 4)
    assert 2e-3 <= config.optim.lr <= 4e-3


def test_more_time_makes_a_larger_model() -> None:
    sizes = [
        resolve(propose(FACTS["photographs"], MACHINES[2], budget_s=days * 86_400.0).settings).model.hidden_size
        for days in (0.01, 1, 100)
    ]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    assert {width % heads for width, _, heads in SHAPES} == {0}


def test_a_budget_that_is_too_short_is_refused() -> None:
    with pytest.raises(UsageError, match="the budget is enough for"):
        propose(FACTS["text"], MACHINES[1], budget_s=0.5)


def documents(folder: Path, number: int = 60) -> Path:
    (folder / "img").mkdir(parents=True)
    lines = []
    for n in range(number):
        PIL.Image.new("L", (16, 20), (n * 37) % 256).save(folder / f"img/{n}.png")
        content = [{"type": "text", "text": f"draw number {n % 7}"}, {"type": "image", "path": f"img/{n}.png"}]
        lines.append(json.dumps({"id": str(n), "content": content}))
    file = folder / "documents.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def test_from_documents_to_a_proposal_for_the_prepared_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is printed is run: plan, prepare, and the plan of the prepared data."""
    monkeypatch.chdir(tmp_path)
    file, spec = documents(tmp_path), tmp_path / "mine.yaml"
    assert main(["plan", "--data", str(file), "--budget", "10m", "--out", str(spec)]) == 0
    said = capsys.readouterr().out
    assert "60 documents with 60 pictures" in said and "Step Law" in said
    (command,) = (line.partition("next: mmscale ")[2] for line in said.splitlines() if line.startswith("next: "))
    assert main(command.split()) == 0
    config = load(spec)
    assert config.data.prepare is not None and config.data.prepare.image.channels == 1
    assert main(["plan", "--data", "data/mine", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    settings = found["settings"]
    assert settings["vocab"]["modalities"] == [{"name": one.name, "size": one.size} for one in config.vocab.modalities]
    assert settings["data"] == {"path": "data/mine"}
    capsys.readouterr()
    assert main(["plan", "--data", str(file), "--out", str(spec)]) == 2
    assert "exists" in capsys.readouterr().err
    # The file says how it was made, whatever is in the names.
    named = tmp_path / "_my data.jsonl"
    file.rename(named)
    asked = ["plan", "--data", str(named), "--budget", "10m", "--gpu", "a100", "--gpus", "2", "--gpu-memory", "40.0"]
    assert main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["run"]["name"] == "my_data"
    assert main([*asked, "--out", "named.yaml"]) == 0
    (header, *_) = (tmp_path / "named.yaml").read_text().splitlines()
    assert shlex.split(header.removeprefix("# Proposed by: ")) == ["mmscale", *asked, "--out", "named.yaml"]
    capsys.readouterr()
    # A plan of the configuration uses the shares of its data.
    assert main(["plan", str(spec), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert not any("equal shares are assumed" in line for line in planned["assumptions"])
    assert planned["duration"]["gpu_hours"] == pytest.approx(24 * planned["duration"]["days"] * planned["gpus"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "--data", "configs/quickstart.yaml", "--out", "configs/quickstart.yaml"], "exists"),
        (["plan", "--data", "missing", "--out", "configs/quickstart.yaml/deeper/x.yaml"], "quickstart.yaml is a file"),
        (["plan"], "neither CONFIG nor --data"),
        (["plan", "configs/quickstart.yaml", "--data", "x"], "both given"),
        (["plan", "--data", "configs/quickstart.yaml", "--budget", "soon"], "is not a time"),
    ],
)
def test_wrong_use(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("budget_s", [120.0, 30 * 86_400.0])
def test_the_rule_of_patches_says_how_often_pictures_are_read(budget_s: float) -> None:
    found = propose(FACTS["icons"], LAPTOP, budget_s=budget_s)
    (rule,) = (one.reason for one in found.rules if one.setting == "data.prepare.image")
    often = found.passes >= PASSES / 2  # the rule counts the tokens of the smallest model
    assert (f"reads all pictures {PASSES} times" in rule, f"less than {PASSES} times" in rule) == (often, not often)


def test_records_that_are_no_documents_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = documents(tmp_path)
    assert main(["plan", "--data", str(file), "--budget", "10m"]) == 0
    assert "no documents" not in capsys.readouterr().out
    with file.open("a") as stream:
        stream.write(json.dumps({"id": "x", "content": [{"type": "text", "text": "a"}], "spilt": "train"}) + "\n")
        stream.write("{\n")
    assert main(["plan", "--data", str(file), "--budget", "10m"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "60 documents with 60 pictures" in said
    assert "note: 2 of the records that were read are no documents and are left out, the first is " in said
    assert "documents.jsonl:61: unknown key 'spilt': " in said
    assert "did you mean 'split'?" in said
