"""The comparison of optimizers: every one trains on the same data, and wrong options are refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mmscale.bench import optim
from mmscale.config import Config
from mmscale.config.load import load
from mmscale.errors import UsageError
from mmscale.runtime import groups

ROOT = Path(__file__).parents[3]


def tiny(*values: str) -> Config:
    """The quickstart's data with a model of one layer."""
    shape = ("model.num_layers=1", "model.hidden_size=32", "model.ffn_hidden_size=32", "train.eval_batches=1")
    return load(ROOT / "configs" / "quickstart.yaml", [*shape, *values])


def test_every_optimizer_trains_from_the_same_weights(digits_documents: Path, tmp_path: Path) -> None:
    """With a learning rate near zero all losses are equal; with a real one they are not."""
    groups.finalize()
    documents = f"data.prepare.documents=[{digits_documents / 'documents.jsonl'}]"
    config = tiny(f"data.path={tmp_path / 'missing'}", documents, "data.prepare.tasks={}")
    found = optim.run(config=config, optimizers=tuple(optim.OPTIMIZERS), lrs=(1e-9, 1e-2), steps=3, seeds=1)
    assert not torch.distributed.is_initialized()
    assert [(one["optimizer"], one["lr"]) for one in found["runs"]] == [
        (name, lr) for name in optim.OPTIMIZERS for lr in (1e-9, 1e-2)
    ]
    still = [one["loss"] for one in found["runs"] if one["lr"] == 1e-9]
    moved = [one["loss"] for one in found["runs"] if one["lr"] == 1e-2]
    assert max(still) - min(still) < 1e-4
    assert all(math.isfinite(loss) and loss < min(still) - 1e-2 for loss in moved)
    assert len(set(moved)) == len(moved)
    for one in found["runs"]:
        least, median, most = one["step_ms"]
        assert 0 < least <= median <= most and one["update_ms"][1] < median
    lines = [line for line in optim.render(found).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 2 * len(optim.OPTIMIZERS)
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"optimizers": "sgd"}, "no optimizer is called sgd"),
        ({"steps": 1}, "steps = 1, seeds = 3"),
        ({"seeds": 0}, "steps = 200, seeds = 0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], cause: str) -> None:
    with pytest.raises(UsageError) as caught:
        optim.run(**options)
    assert cause in caught.value.cause and caught.value.remedy
