"""What the start of a run says about its tasks."""

from __future__ import annotations

from pathlib import Path

from mmscale.config import Config
from mmscale.data.prepared.tasks import TaskItem
from mmscale.train.evaluated_on import EvaluatedOn

MODEL = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 1, "kind": "dense"}


def test_the_start_event_has_the_accuracy_of_guessing_of_tasks_with_choices(tmp_path: Path) -> None:
    names = ("which", "spelled")
    for name in names:
        (tmp_path / f"{name}.jsonl").touch()
    tasks = [f"{name}={tmp_path / name}.jsonl" for name in names]
    config = Config.model_validate(
        {"model": MODEL, "vocab": {"modalities": [{"name": "text", "size": 64}]}, "train": {"tasks": tasks}}
    )
    choices = [TaskItem((1, 2, 3), (2, 3), tuple((n,) for n in range(3, 3 + number))) for number in (2, 4)]
    found = EvaluatedOn.of(config, {}, {"which": choices, "spelled": [TaskItem((1, 2, 3), (2, 3), ())]})
    places = [str(tmp_path / f"{name}.jsonl") for name in names]
    asked = {"which": {"number": 2, "place": places[0]}, "spelled": {"number": 1, "place": places[1]}}
    assert found.start_fields == {"guessing": {"which": 0.375}, "questions": asked}  # half, and a quarter
    spelled = Config.model_validate(config.model_dump() | {"train": {"tasks": tasks[1:]}})
    assert EvaluatedOn.of(spelled, {}, {"spelled": [TaskItem((1, 2, 3), (2, 3), ())]}).start_fields == {
        "questions": {"spelled": asked["spelled"]}
    }
