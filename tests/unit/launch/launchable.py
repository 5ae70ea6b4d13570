"""A run that can be launched: its configuration, its data and a profile of a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.unit.data.corpora import corpus, prepare


def write_launchable(folder: Path, **profile: Any) -> None:
    """Write `set`, `tiny.yaml` of the run `runs/tiny`, and `cluster.yaml`.

    Args:
        folder: where to.
        profile: more entries of cluster.yaml.
    """
    prepare(folder / "set", corpus(40))
    model = {"kind": "moma", "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 2}
    content = {
        "run": {"name": "tiny", "dir": str(folder / "runs")},
        "vocab": {"modalities": [{"name": "text", "size": 100}, {"name": "image", "size": 32}]},
        "data": {"path": str(folder / "set")},
        "model": {**model, "seq_length": 128, "experts": {"counts": {"text": 2, "image": 2}}},
        "train": {"micro_batch_size": 1, "global_batch_size": 8},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content))
    cluster = {"nodes": 1, "tasks_per_node": 1, "time": "30m", "signal_delay": "60s"}
    (folder / "cluster.yaml").write_text(yaml.safe_dump(cluster | profile))
