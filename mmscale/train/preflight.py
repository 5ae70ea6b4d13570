"""What can be told wrong with a run before any rank starts: layout, data, the checkpoint it would go on from.

It reads a few small files, writes nothing, and imports no torch, so that the launcher says it once, within a second.
"""

from __future__ import annotations

from pathlib import Path

from mmscale.checkpoint.layout import Store
from mmscale.checkpoint.shape import check_shape
from mmscale.config import Config
from mmscale.config.rules import check
from mmscale.data.manifest import check_vocabulary, named_sources, read_manifest
from mmscale.data.vocab import Vocabulary
from mmscale.errors import ConfigError


def preflight(config: Config, *, world_size: int) -> None:
    """Refuse a run that cannot work.

    Args:
        config: the run's configuration.
        world_size: number of ranks.

    Raises:
        ConfigError: the layout does not fit, no data set is named, or a new run would start among old checkpoints.
        DataError: a data set is missing, truncated, or was prepared with another vocabulary.
        CheckpointError: the newest checkpoint holds another model.
    """
    check(config, world_size=world_size)
    vocabulary = Vocabulary.from_config(config.vocab)
    for entry in named_sources(config):
        folder = Path(entry.path)
        check_vocabulary(folder, read_manifest(folder), vocabulary)
    store = Store.of_run(Path(config.run.dir) / config.run.name)
    steps = store.steps()
    if not steps:
        return
    if not config.checkpoint.resume:
        # Retention and the next start go by step numbers: they would prefer the old run's later checkpoints.
        raise ConfigError(
            f"checkpoint.resume is false, but {store.root} holds checkpoints up to step {steps[-1]}",
            remedy="start a new run with another run.name, or remove that folder",
        )
    check_shape(config, store.info(steps[-1]).get("shape", {}), where=str(store.path(steps[-1])))
