"""Tables of choices: schema, help, documentation, code and exported model name the same things."""

from __future__ import annotations

from typing import Any

import pytest

from mmscale.config.explain import explain
from mmscale.config.load import resolve
from mmscale.errors import ConfigError
from mmscale.tables import settings
from mmscale.tables.eval_tasks import EVAL_TASKS
from mmscale.tables.routings import CAUSAL_ROUTINGS, ROUTINGS, Needs, Routing
from mmscale.tables.run_scores import RUN_SCORES
from mmscale.tables.settings import (
    DATA_ORDERS,
    FROZEN,
    IMAGE_FITS,
    IMAGE_SPANS,
    IMAGE_TOKENIZERS,
    KINDS,
    LOSS_WEIGHTS,
    LOSSES,
    MOMENTS,
    NORMS,
    OPTIMIZERS,
    RANKINGS,
    READERS,
    ROPE_SCALINGS,
    SCHEDULES,
    SCORES,
    TEXT_TOKENIZERS,
    UNTIED,
)
from mmscale.tables.table import Table

TABLES = [value for value in vars(settings).values() if isinstance(value, Table)]
SETTINGS = [(table, key) for table in TABLES for key in table.settings]
SMALL: dict[str, Any] = {
    "model": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "kind": "dense"}
}


def test_there_are_tables() -> None:
    assert [
        KINDS,
        NORMS,
        UNTIED,
        FROZEN,
        RANKINGS,
        SCORES,
        LOSS_WEIGHTS,
        ROPE_SCALINGS,
        SCHEDULES,
        OPTIMIZERS,
        LOSSES,
        MOMENTS,
        TEXT_TOKENIZERS,
        IMAGE_TOKENIZERS,
        DATA_ORDERS,
        IMAGE_SPANS,
        READERS,
        IMAGE_FITS,
    ] == TABLES


@pytest.mark.parametrize(("table", "key"), SETTINGS, ids=[key for _, key in SETTINGS])
def test_a_setting_takes_the_names_of_its_table(table: Table[Any], key: str) -> None:
    entry = explain(key)
    assert all(name in entry["type"] for name in table)
    several = isinstance(entry["default"], list)  # a list of names
    assert entry["allowed"] == (None if "plug-in" in entry["type"] or several else list(table))
    assert all(name in table for name in (entry["default"] if several else [entry["default"]]))
    assert table.help in entry["meaning"] or key.startswith("auxiliary.")
    with pytest.raises(ConfigError) as caught:
        resolve(SMALL, [f"{key}=nonsense", "data.prepare.documents=[some.jsonl]"])
    assert all(name in caught.value.cause for name in table)


@pytest.mark.parametrize("table", [*TABLES, ROUTINGS, RUN_SCORES, EVAL_TASKS], ids=lambda table: table.title)
def test_every_choice_says_what_it_means(table: Table[Any]) -> None:
    for name, choice in table.items():
        assert choice.meaning and not choice.meaning.endswith("."), name
        assert ";" not in choice.meaning and ": " not in choice.meaning, "the help lists them as `name: meaning; ...`"


def test_code_has_an_entry_for_every_name() -> None:
    from checkpoints_tools import upcycle
    from checkpoints_tools.huggingface.shipped import configuration_moma
    from mmscale.config.data.rules import IMAGE_RULES
    from mmscale.data.modalities.image_kinds import FITS, LOADS
    from mmscale.inference.built_in_tasks import BUILT_IN_TASKS
    from mmscale.inference.score_documents import VALUES
    from mmscale.inference.supported_routing import LACKING
    from mmscale.layers.frozen import PARTS as FROZEN_PARTS
    from mmscale.model.decisions import DECISIONS
    from mmscale.model.ranking import RANKINGS as FUNCTIONS
    from mmscale.model.rope import SCALINGS
    from mmscale.model.token_choice import SCORES as SCORE_FUNCTIONS
    from mmscale.train.optim.schedule import SHAPES
    from mmscale.train.steps.loss_weights import FUNCTIONS as LOSS_FUNCTIONS

    assert list(FUNCTIONS) == list(RANKINGS) == list(configuration_moma.CHOICES)
    assert list(LOSS_FUNCTIONS) == list(LOSS_WEIGHTS)
    assert list(SCORE_FUNCTIONS) == list(SCORES) == list(configuration_moma.SCORES)
    assert list(FROZEN_PARTS) == list(FROZEN)
    assert list(SHAPES) == list(SCHEDULES)
    assert list(SCALINGS) == list(ROPE_SCALINGS)
    assert list(NORMS) == list(configuration_moma.NORMS) == list(upcycle.PRESERVES)
    assert tuple(DECISIONS) == CAUSAL_ROUTINGS == configuration_moma.ROUTINGS
    assert list(ROUTINGS) == list(Routing)
    assert list(VALUES) == list(RUN_SCORES)
    assert list(BUILT_IN_TASKS) == list(EVAL_TASKS)
    assert list(IMAGE_RULES) == list(IMAGE_TOKENIZERS) == list(FITS)
    assert set(IMAGE_TOKENIZERS) <= set(LOADS)
    assert {*LACKING, Needs.NOTHING} == set(Needs)
