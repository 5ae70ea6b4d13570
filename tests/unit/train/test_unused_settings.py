"""Settings of the main run's evaluations that a stage does without are named, and `@best` of a stage says so too."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmscale.cli.named_files import split_step
from mmscale.config.load import resolve
from mmscale.errors import UsageError
from mmscale.train.stages.table import MAIN, STAGES

BEST = "checkpoint.keep_best=eval/loss"
STOP = "train.stop_when={metric: eval/loss, patience: 1}"
GIVEN = {(): (), (BEST,): ("checkpoint.keep_best",), (BEST, STOP): ("checkpoint.keep_best", "train.stop_when")}
# Stages that do not ask the main run's questions; fine-tuning has questions of its own (`sft.tasks`).
WITHOUT_QUESTIONS = {"sft": True, "auxiliary": False, MAIN: False}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("given", GIVEN)
def test_what_a_stage_does_without(stage: str, given: tuple[str, ...]) -> None:
    model = {"kind": "dense", "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 2}
    config = resolve({"model": model, "data": {"path": "d"}}, ["train.eval_every=5", *given])
    assert STAGES[stage].unused(config) == (() if stage == MAIN else GIVEN[given])


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("own", [(), ("sft.tasks=[which.jsonl, what.jsonl]",)])
def test_questions_that_a_stage_does_not_ask(stage: str, own: tuple[str, ...]) -> None:
    model = {"kind": "dense", "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 2}
    config = resolve({"model": model, "data": {"path": "d"}}, ["train.tasks=[which.jsonl]", *own])
    named = "train.tasks" in STAGES[stage].unused(config)
    assert named is (WITHOUT_QUESTIONS[stage] and not own)


@pytest.mark.parametrize("stage", [name for name in STAGES if name != MAIN])
def test_the_best_checkpoint_of_a_stage(stage: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    folder = STAGES[stage].folder(run)
    folder.mkdir(parents=True)
    (run / "config.yaml").write_text("{}")
    with pytest.raises(UsageError, match="no checkpoint of this run is known to be the best one") as caught:
        split_step(f"{folder}@best")
    assert caught.value.remedy == "name a step"
