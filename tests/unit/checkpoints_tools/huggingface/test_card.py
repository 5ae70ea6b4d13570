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


def test_accuracies_are_no_losses_and_a_blend_is_named_whole(tmp_path: Path) -> None:
    line = {"step": 10, "attempt": 1, "loss": 2.0, "eval/loss": 1.25, "eval/accuracy/which": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line))
    blend = [{"path": "data/a", "weight": {0: 2.0, 15: 3.0}}, {"path": "data/b"}]
    config = Config.model_validate(CONFIG.model_dump(exclude={"data"}) | {"data": {"blend": blend}})
    read = ModelCard(card(config, REPORT, run=tmp_path, step=20))
    kinds = {one.metric_name: one.metric_type for one in read.data.eval_results or ()}
    assert kinds == {"loss per token": "loss", "accuracy of which": "accuracy"}
    assert "- blend: data/a (weight 3), data/b (weight 1)\n" in read.text


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
        ["accuracy of which, batch routing", "held-out split"],
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
