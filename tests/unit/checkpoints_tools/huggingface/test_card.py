"""The model card's metadata, as the Hugging Face Hub reads them."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from checkpoints_tools.huggingface.card import card
from checkpoints_tools.huggingface.model_config import generation_config
from mmscale.config import Config, DataConfig
from mmscale.data.prepared.manifest import read_manifest
from mmscale.data.prepared.prepare import prepare
from tests.unit.data import samples

SHAPE = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 2}
CONFIG = Config.model_validate(
    {
        "run": {"name": "tiny"},
        "vocab": {"modalities": [{"name": "text", "size": 64}]},
        "model": {"kind": "dense", **SHAPE},
    }
)
PARENT = {"path": "p", "manifest": "m", "config_digest": "d", "code_version": "v"}
REPORT: dict[str, Any] = {
    "data": {"folder": "set", "image_tokenizer": "none"},
    "gate": {"compared": 6, "tokens": 60, "max_abs": 1e-6, "tolerance": 1e-4, "argmax_same": 60, "generated": 7},
    "origin": {"parents": [PARENT]},
    "model": {"class": "Qwen3ForCausalLM", "routing": None},
    "versions": {"mmscale": "1"},
}
METRICS = [
    {"step": 10, "attempt": 1, "loss": 2.0, "eval/loss": 1.23456, "eval/validation/web/loss": 1.75},
    {"step": 30, "attempt": 1, "eval/loss": 9.0},  # behind the exported step
]


@pytest.mark.parametrize("licence", ["", "apache-2.0"])
def test_the_hub_reads_licence_tags_and_results(licence: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, METRICS)))
    read = ModelCard(card(CONFIG, REPORT, run=tmp_path, step=20, licence=licence))
    data = read.data
    assert data.license == (licence or None)
    assert (data.library_name, data.pipeline_tag, data.model_name) == ("transformers", "text-generation", "tiny")
    assert data.tags == ["mixed-modal", "early-fusion", "mmscale"]
    found = {(one.dataset_type, one.metric_type, one.metric_name): one.metric_value for one in data.eval_results}
    assert found == {("held-out", "loss", "loss per token"): 1.2346, ("web", "loss", "loss per token"): 1.75}
    assert read.text.lstrip().startswith("# tiny, step 20")


def test_a_run_that_was_never_evaluated(tmp_path: Path) -> None:
    read = ModelCard(card(CONFIG, REPORT, run=tmp_path, step=20))
    assert read.data.eval_results is None and "None were logged." in read.text


def test_documents_on_both_sides_of_the_held_out_split_are_named(tmp_path: Path) -> None:
    """Of the attempts up to the exported step."""
    events = [{"time": 1.0, "attempt": 1, "event": "start", "step": 0, "leaks": ["9 of 13 items are in training too"]}]
    events.append({"time": 2.0, "attempt": 2, "event": "resume", "step": 30, "leaks": ["another"]})
    (tmp_path / "events.jsonl").write_text("\n".join(map(json.dumps, events)))
    text = ModelCard(card(CONFIG, REPORT, run=tmp_path, step=20)).text
    results = text[text.index("## Results") : text.index("## Data")]
    assert "9 of 13 items are in training too." in results and "another" not in results


def test_generation_has_no_length_of_its_own() -> None:
    """A length there would contradict max_new_tokens, and transformers would warn of both."""
    assert "max_length" not in generation_config(CONFIG)


def test_every_kind_of_figure_has_its_type_and_questions_are_no_held_out_documents(tmp_path: Path) -> None:
    """The number of questions and the 95 % interval are in the table: 3 of 6 is 18.8 % to 81.2 %."""
    asked = {"which": {"number": 6, "place": "icons/names.jsonl"}}
    event = {"time": 1.0, "attempt": 1, "event": "start", "step": 0, "questions": asked}
    (tmp_path / "events.jsonl").write_text(json.dumps(event))
    line = {"step": 10, "attempt": 1, "loss": 2.0, "eval/loss": 1.25, "eval/bits_per_byte/text": 1.5}
    line |= {"eval/accuracy/which": 0.5, "eval/accuracy/other": 0.25}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line))
    read = ModelCard(card(CONFIG, REPORT, run=tmp_path, step=20))
    results = read.data.eval_results or []
    found = {one.metric_name: (one.metric_type, one.dataset_type, one.dataset_name) for one in results}
    assert found == {
        "loss per token": ("loss", "held-out", "held-out split of the training data"),
        "bits per byte of text": ("bits_per_byte", "held-out", "held-out split of the training data"),
        "accuracy of which": ("accuracy", "task which", "6 questions of icons/names.jsonl"),
        "accuracy of other": ("accuracy", "task other", "questions of other"),  # an older version recorded no number
    }
    row = "| accuracy of which | 6 questions of icons/names.jsonl | 0.5000 (95 %: 0.1876 to 0.8124) | 10 |"
    assert row in read.text
    assert "| accuracy of other | questions of other | 0.2500 | 10 |" in read.text


def test_a_part_of_the_held_out_documents_is_named(tmp_path: Path) -> None:
    extents = {"": {"batches": 2, "available": 24}, "web": {"batches": 3, "available": 3}}
    event = {"time": 1.0, "attempt": 1, "event": "start", "step": 0, "extents": extents}
    (tmp_path / "events.jsonl").write_text(json.dumps(event))
    (tmp_path / "metrics.jsonl").write_text(json.dumps(METRICS[0]))
    read = ModelCard(card(CONFIG, REPORT, run=tmp_path, step=20))
    assert "| loss per token | held-out split, first 2 of 24 batches | 1.2346 | 10 |" in read.text
    assert "| loss per token | validation web | 1.7500 | 10 |" in read.text
    splits = {one.dataset_type: one.dataset_split for one in read.data.eval_results or ()}
    assert splits == {"held-out": "first 2 of 24 batches", "web": None}


def test_every_set_of_a_blend_is_listed(tmp_path: Path) -> None:
    """Folder, weight, documents, tokens and digest of each; the report of the export describes only one set."""
    for name, number in {"a": 5, "b": 3}.items():
        texts = [{"id": f"{name}{n}", "content": [samples.text(f"once upon a time {n}")]} for n in range(number)]
        file = samples.write_jsonl(tmp_path / f"{name}.jsonl", texts)
        prepare(samples.config(documents=[str(file)], vocab={"text": 300}), tmp_path / name, progress=False)
    blend: list[dict[str, Any]] = [{"path": str(tmp_path / "a"), "weight": {0: 2.0, 15: 3.0}}]
    blend += [{"path": str(tmp_path / "b")}, {"path": "gone"}]
    config = CONFIG.model_copy(update={"data": DataConfig.model_validate({"blend": blend})})
    data = REPORT["data"] | {"source": "of-a", "documents": 5, "tokens": {"text": 1}}
    text = card(config, REPORT | {"data": data}, run=tmp_path, step=20)
    shown = text[text.index("## Data") : text.index("## Conversion")].splitlines()
    sets = [line for line in shown if line.startswith("  - ")]
    for name, weight, line in zip("ab", (3, 1), sets, strict=False):
        manifest = read_manifest(tmp_path / name)
        train = manifest.splits["train"]
        counts = f"{train.documents} documents, tokens {train.tokens('text'):,} text"
        assert line == f"  - {tmp_path / name}: weight {weight}, {counts}, source {manifest.source}"
    assert sets[2] == "  - gone: weight 1, not at hand for this export"
    assert "- tokenizers of: set" in shown and not any(line.startswith(("- documents", "- tokens:")) for line in shown)
    assert "of-a" not in "".join(shown)


def test_results_and_counts_are_in_words(tmp_path: Path) -> None:
    """No key of metrics.jsonl and no Python object; the z-loss, which is no result, is left out."""
    figures = (
        "loss",
        "loss/text",
        "causal/loss/image",
        "source/a/loss",
        "bits_per_byte/text",
        "accuracy/which",
        "conditional_loss/text_given_image",
        "z_loss",
    )
    line = {"step": 10, "attempt": 1} | {f"eval/{name}": 0.5 for name in figures}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line))
    model = {"kind": "moma", "experts": {"counts": {"text": 2}}, **SHAPE}
    config = Config.model_validate(CONFIG.model_dump(exclude={"model"}) | {"model": model})
    data = REPORT["data"] | {"tokens": {"text": 13999, "image": 72064}}
    read = ModelCard(card(config, REPORT | {"data": data}, run=tmp_path, step=20))
    rows = [line.strip("| ").split(" | ")[:2] for line in read.text.splitlines() if line.endswith("| 0.5000 | 10 |")]
    assert sorted(rows) == [
        ["accuracy of which, batch routing", "questions of which"],
        ["bits per byte of text, batch routing", "held-out split"],
        ["loss per image token, causal routing", "held-out split"],
        ["loss per text token, batch routing", "held-out split"],
        ["loss per token of text given image, batch routing", "held-out split"],
        ["loss per token, batch routing", "held-out split"],
        ["loss per token, batch routing", "source a"],
    ]
    assert {one.metric_name for one in read.data.eval_results or ()} == {name for name, _ in rows}
    assert "- tokens: 13,999 text + 72,064 image" in read.text


@pytest.mark.parametrize("pictures", [True, False])
def test_the_example_has_a_prompt_of_the_data(pictures: bool, tmp_path: Path) -> None:
    """Of a document that draws, or the first words of a text; without the data it says what is wanted."""
    draws = [
        {"id": str(n), "content": [{"type": "text", "text": f'draw "flag" number {n}'}, samples.image(f"{n}.png")]}
        for n in range(20)
    ]
    reads = [{"id": f"r{n}", "content": [samples.image(f"{n}.png"), samples.text("a flag")]} for n in range(20)]
    texts = [{"id": f"t{n}", "content": [samples.text(f"once  upon a time {n} there was")]} for n in range(20)]
    for n in range(20):
        samples.save_picture(tmp_path / f"{n}.png", n)
    file = samples.write_jsonl(tmp_path / "d.jsonl", [*reads, *draws] if pictures else texts)
    settings = samples.config(documents=[str(file)], vocab=None if pictures else {"text": 300})
    prepare(settings, tmp_path / "set", progress=False)
    config = settings.model_copy(update={"data": DataConfig(path=str(tmp_path / "set"))})
    report = REPORT | {"data": {"folder": "set", "image_tokenizer": "abc" if pictures else "none"}}
    shown = card(config, report, run=tmp_path, step=20)
    (line,) = [line for line in shown.splitlines() if line.startswith("inputs = ")]
    called = ast.parse(line).body[0].value  # type: ignore[attr-defined]
    given = {word.arg: word.value.value for word in called.keywords}
    assert given["draw"] is pictures
    assert given["text"].startswith('draw "flag" number ' if pictures else "once upon a time")
    shutil.rmtree(tmp_path / "set")
    assert "a prompt in the words of the training documents" in card(config, report, run=tmp_path, step=20)
