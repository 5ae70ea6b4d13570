"""Explanations of settings: complete, and helpful for a key that does not exist."""

from __future__ import annotations

import pytest

from mmscale.config import keys
from mmscale.config.explain import explain
from mmscale.config.load import resolve
from mmscale.errors import ConfigError, UsageError

# Whole numbers that count nothing with a name: widths, and the seed.
_WITHOUT_UNIT = {
    "data.prepare.modalities",
    "run.seed",
    "data.seed",
    "data.prepare.canaries.seed",
    "model.hidden_size",
    "model.ffn_hidden_size",
    "model.kv_channels",
    "model.auxiliary.width",
    "model.experts.shared_ffn_hidden_size",
}


@pytest.mark.parametrize("key", sorted(keys.all_keys()))
def test_every_key_has_a_meaning_and_every_count_a_unit(key: str) -> None:
    entry = explain(key)
    assert entry["meaning"]
    if "whole number" in entry.get("type", "") and key not in _WITHOUT_UNIT:
        assert entry["unit"]


def test_a_setting() -> None:
    assert explain("train.steps") == {
        "key": "train.steps",
        "meaning": "Optimizer steps.",
        "default": 1000,
        "type": "a whole number of at least 1",
        "unit": "steps",
        "required": False,
        "allowed": None,
        "source": "",
    }


def test_a_choice_lists_its_values() -> None:
    assert explain("model.kind")["allowed"] == ["dense", "moe", "moma"]
    assert explain("log.tensorboard")["allowed"] == [True, False]


def test_required_and_nullable() -> None:
    assert explain("model.num_layers")["required"]
    assert explain("model.num_query_groups")["type"] == "a whole number of at least 1, or null"
    assert explain("optim.lr")["source"] == "MoMa Table 5"


def test_a_section_lists_its_keys() -> None:
    entry = explain("model.depth")
    assert entry["keys"] == ["model.depth.every", "model.depth.capacity", "model.depth.multiple", "model.depth.choice"]
    assert entry["default"] is None


def test_lists_and_mappings_by_index_and_name() -> None:
    assert explain("vocab.modalities.0.size")["unit"] == "ids"
    assert explain("model.experts.counts.text")["unit"] == "experts"
    assert explain("vocab.modalities")["default"][1] == {"name": "image", "size": 8192, "marks": False}


def test_no_key_lists_everything() -> None:
    everything = explain()["keys"]
    assert "optim.lr" in everything
    assert not [key for key in everything if "*" in key]


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("train.lr", "did you mean `optim.lr`?"),
        ("model.hiden_size", "did you mean `model.hidden_size`?"),
        ("zzz", "`mmscale config explain` without a key lists all of them"),
    ],
)
def test_unknown_keys(key: str, remedy: str) -> None:
    with pytest.raises(UsageError) as caught:
        explain(key)
    assert caught.value.cause == f"{key} is not a setting"
    assert caught.value.remedy == remedy


@pytest.mark.parametrize(
    ("override", "wants"),
    [
        ("model.untie=[nonsense]", 'model.untie.0 is "nonsense", wants one of attention, ffn, norms, final_norm'),
        ("parallel.recompute_modules=[mlp,x]", 'parallel.recompute_modules.1 is "x", wants one of core_attn, mlp'),
        ("parallel.pp_layers=[1,a]", 'parallel.pp_layers.1 is "a", wants a whole number of at least 1 [layers]'),
        ("parallel.pp_layers=[true]", "parallel.pp_layers.0 is true, wants a whole number of at least 1 [layers]"),
        ("vocab.modalities=[3]", "vocab.modalities.0 is 3, wants a mapping with name, size, marks"),
    ],
)
def test_an_entry_of_a_list_has_the_setting_of_the_list(override: str, wants: str) -> None:
    """What it should be, and a remedy that is a command which works."""
    with pytest.raises(ConfigError) as caught:
        resolve(
            {"model": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4}}, [override]
        )
    assert wants in caught.value.cause
    key = override.partition("=")[0]
    assert f"mmscale config explain {key}`" in str(caught.value.remedy)
    assert explain(f"{key}.0")["meaning"] == explain(key)["meaning"]
