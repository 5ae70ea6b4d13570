"""Which settings changed since a checkpoint, and which of these make it another experiment."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mmscale.checkpoint.shape import check_shape, shape_of
from mmscale.config import Config
from mmscale.config.changes import changes, describe, function_changes
from mmscale.config.effects import EFFECTS, Effect, entry_of
from mmscale.config.keys import all_keys
from mmscale.config.load import resolve
from mmscale.errors import CheckpointError

MODEL: dict[str, Any] = {
    "vocab": {"modalities": [{"name": "text", "size": 64}, {"name": "image", "size": 64}]},
    "data": {"path": "data/one"},
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 4,
        "seq_length": 64,
        "experts": {"counts": {"text": 2, "image": 2}, "share": {"text": 0.5, "image": 0.5}},
        "depth": {"every": 2, "capacity": 0.5, "multiple": 8},
    },
}


def config(*overrides: str) -> Config:
    return resolve(MODEL, overrides)


def saved(*overrides: str) -> dict[str, Any]:
    """As it comes back from a checkpoint."""
    content: dict[str, Any] = json.loads(json.dumps(config(*overrides).model_dump(mode="json")))
    return content


def test_nothing_changed() -> None:
    assert changes(saved(), config()) == []


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optim.lr=2e-4", "optim.lr: 0.0001 -> 0.0002"),
        ("train.steps=7", "train.steps: 1000 -> 7"),
        ("checkpoint.keep=5", "checkpoint.keep: 3 -> 5"),
        ("parallel.ep=2", "parallel.ep: 1 -> 2"),
        ("data.workers=2", "data.workers: 0 -> 2"),
        ("data.cache=there", 'data.cache: null -> "there"'),
        ("train.micro_batch_size=2", "train.micro_batch_size: 1 -> 2"),
        ("model.dropout=0.1", "model.dropout: 0.0 -> 0.1"),
    ],
)
def test_some_settings_may_change_and_are_shown(override: str, line: str) -> None:
    found = changes(saved(), config(override))
    assert describe(found, confirmed=False) == [line]
    assert describe(found, confirmed=True) == []


STOP = "train.stop_when={metric: eval/loss, patience: 2}"


@pytest.mark.parametrize(
    ("before", "after", "line"),
    [
        ((STOP,), (), 'train.stop_when: {"metric": "eval/loss", "patience": 2} -> null'),
        ((), (STOP,), 'train.stop_when: null -> {"metric": "eval/loss", "patience": 2}'),
        ((STOP,), (STOP.replace("2", "3"),), "train.stop_when.patience: 2 -> 3"),
        ((), ("model.depth=null",), 'model.depth: {"every": 2, "capacity": 0.5, '),
    ],
)
def test_a_section_that_comes_or_goes_is_one_line(before: tuple[str, ...], after: tuple[str, ...], line: str) -> None:
    every = "train.eval_every=5"
    (found,) = describe(changes(saved(every, *before), config(every, *after)), confirmed=False)
    assert found.startswith(line) and (found == line or found.endswith(" -> null"))


@pytest.mark.parametrize(
    "override",
    [
        "data.path=data/two",
        "data.balance=false",
        "data.pack_window=64",
        "train.z_loss=0",
        "train.modality_weights.image=0.5",
        "train.global_batch_size=16",
        "model.experts.share={text: 0.6, image: 0.4}",
        "model.experts.scope=micro_batch",
        "model.experts.capacity_factor=2",
        "model.experts.choice=competitive",
        "model.depth.capacity=0.25",
        "model.depth.choice=per_modality",
        "model.seq_length=128",
        "run.seed=5",
        "model.norm_eps=1e-6",
        "model.rope_base=500000",
        "model.experts.capacity_multiple=8",
        "model.depth.multiple=16",
    ],
)
def test_what_is_optimized_or_read_does_not_change_by_accident(override: str) -> None:
    refused = describe(changes(saved(), config(override)), confirmed=True)
    assert refused and all(line.startswith(override.split("=")[0]) for line in refused)


def test_the_micro_batch_matters_where_experts_choose_among_it() -> None:
    scope = "model.experts.scope=micro_batch"
    found = changes(saved(scope), config(scope, "train.micro_batch_size=2"))
    assert describe(found, confirmed=True) == ["train.micro_batch_size: 1 -> 2"]


def test_a_share_that_is_measured_later_is_no_change() -> None:
    unresolved = {**MODEL, "model": {**MODEL["model"], "experts": {"counts": {"text": 2, "image": 2}}}}
    assert changes(saved(), resolve(unresolved)) == []


@pytest.mark.parametrize(
    ("old", "new", "asked"),
    [
        ((), ("data.seed=1234",), []),  # run.seed's default: the same order
        ((), ("data.seed=5",), ["data.seed: null -> 5"]),
        (("data.seed=5",), (), ["data.seed: 5 -> null"]),
        (("run.seed=5", "data.seed=5"), ("run.seed=5",), []),
        (("data.seed=5",), ("data.seed=5", "run.seed=6"), []),
        ((), ("data.seed=1234", "run.seed=6"), []),
        ((), ("run.seed=6",), ["run.seed: 1234 -> 6"]),
    ],
)
def test_the_seed_of_the_order_is_confirmed(old: tuple[str, ...], new: tuple[str, ...], asked: list[str]) -> None:
    before = saved(*old)
    assert describe(changes(before, config(*new)), confirmed=True) == asked
    if before["data"]["seed"] is None:  # a checkpoint from before the setting existed
        del before["data"]["seed"]
        assert len(describe(changes(before, config(*new)), confirmed=True)) == len(asked)


def test_old_checkpoints_keep_the_choice_that_they_were_trained_with() -> None:
    old = saved()
    del old["model"]["experts"]["choice"]
    assert changes(old, config()) == []
    refused = describe(changes(old, config("model.experts.choice=softmax")), confirmed=True)
    assert refused == ['model.experts.choice: "sigmoid" -> "softmax"']


def test_settings_that_one_version_does_not_know() -> None:
    old = saved()
    del old["checkpoint"]["keep_every"]
    old["optim"]["nesterov"] = True
    lines = describe(changes(old, config()), confirmed=False)
    assert lines == ["optim.nesterov: true -> (none)"]


def test_every_setting_of_the_schema_is_in_the_table() -> None:
    """Whoever adds a setting says what its change does to a run that goes on."""
    leaves = [name for name, key in all_keys().items() if key.section is None]
    unknown = [name for name in leaves if entry_of(name) is None]
    assert not unknown, f"say in mmscale/config/effects.py what a change of these does: {unknown}"
    assert [name for name in EFFECTS if name not in all_keys()] == [], "no such setting"
    sections = {name for name in EFFECTS if all_keys()[name].section is not None}
    assert sections == {
        *("vocab", "optim", "auxiliary", "sft", "parallel", "precision", "checkpoint", "resilience", "log"),
        *(
            "model.depth",
            "model.experts.token_choice",
            "model.auxiliary",
            "model.rope_scaling",
            "data.prepare",
            "train.loss_weights",
            "train.stop_when",
        ),
    }, "these settings need a line each"


@pytest.mark.parametrize(
    "override",
    [
        "vocab.pad_multiple=64",
        "model.num_layers=4",
        "model.depth=null",
        "model.experts.counts={text: 4, image: 4}",
        "model.experts.token_choice={}",
    ],
)
def test_another_model_is_a_matter_of_shape(override: str) -> None:
    """`--yes` does not help: check_shape refuses it."""
    made = config(override)
    key = override.split("=")[0]
    assert Effect.SHAPE in {change.effect for change in changes(saved(), made) if change.key.startswith(key)}
    with pytest.raises(CheckpointError, match="another model"):
        check_shape(made, shape_of(config()), where="here")


@pytest.mark.parametrize(
    ("override", "confirmed"),
    [("scores=softmax", True), ("top_k=2", True), ("capacity_factor=1.25", True), ("bias_rate=0", False)],
)
def test_how_tokens_choose_may_change(override: str, confirmed: bool) -> None:
    given = ("model.experts.counts={text: 4, image: 4}", "model.experts.token_choice={}")
    found = changes(saved(*given), config(*given, f"model.experts.token_choice.{override}"))
    assert [change.confirmed for change in found] == [confirmed]


def test_checkpoints_from_before_token_choice_have_none() -> None:
    old = saved()
    del old["model"]["experts"]["token_choice"]
    assert changes(old, config()) == []


def test_what_changes_the_function_of_the_same_weights() -> None:
    lines = function_changes(saved(), config("model.norm_eps=1e-6", "train.z_loss=0", "model.seq_length=128"))
    assert [line.partition(":")[0] for line in lines] == ["model.seq_length", "model.norm_eps"]
    dense = ("model.kind=dense", "model.experts.counts={}", "model.depth=null")
    assert function_changes(saved(*dense), config(*dense, "model.seq_length=128")) == []


def without(key: str) -> dict[str, Any]:
    """A saved configuration from before a setting or a section existed."""
    found = saved()
    *parents, last = key.split(".")
    section = found
    for parent in parents:
        section = section[parent]
    del section[last]
    return found


@pytest.mark.parametrize("key", ["log.every", "optim.muon", "checkpoint.mirror", "resilience", "auxiliary.optim.beta2"])
def test_a_setting_that_is_newer_than_the_checkpoint_has_not_changed_at_its_default(key: str) -> None:
    assert changes(without(key), config()) == []


@pytest.mark.parametrize(
    ("key", "override"),
    [
        ("log.every", "log.every=3"),
        ("optim.muon", "optim.muon.steps=7"),
        ("auxiliary.optim.beta2", "auxiliary.optim.beta2=0.9"),
    ],
)
def test_a_newer_setting_is_shown_at_another_value(key: str, override: str) -> None:
    name, value = override.split("=")
    assert f"{name}: (none) -> {value}" in describe(changes(without(key), config(override)), confirmed=False)


def test_names_with_dots_are_shown() -> None:
    """Options of plug-ins have the name of their class."""
    hook = "train.hooks={'mine.hooks:Count': {every: 1}}"
    assert describe(changes(saved(), config(hook)), confirmed=False) == [
        "train.hooks.mine.hooks:Count.every: (none) -> 1"
    ]
    assert changes(saved(hook), config(hook)) == []


def test_a_newer_setting_that_changes_the_objective_is_shown_at_its_default() -> None:
    found = changes(without("model.experts.scope"), config())
    assert describe(found, confirmed=True) == ['model.experts.scope: (none) -> "sequence"']
