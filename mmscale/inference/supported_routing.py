"""The routing modes that a checkpoint supports, from its settings and files: checked before torch is loaded."""

from __future__ import annotations

from pathlib import Path

from mmscale.checkpoint.layout import Store
from mmscale.checkpoint.settings import CONFIG, config_of
from mmscale.config import Config, ModelConfig
from mmscale.config.derived import with_auxiliary_routers
from mmscale.errors import UsageError, shell_command
from mmscale.tables.routings import Needs, Routing
from mmscale.train.stages.origin import find_routers

LACKING = {
    Needs.AUXILIARY: (
        "there are no auxiliary routers for step {step} of this run",
        "train them: {train}; or use --routing batch, and read its numbers with care: expert choice sees the future",
    ),
    Needs.THRESHOLDS: (
        "this run kept no averages of its routers' cut-offs",
        "train with model.experts.threshold_decay=0.99, or use --routing causal",
    ),
}


def require(model: ModelConfig, routing: Routing, *, step: int, config: Path | str = "CONFIG") -> None:
    """Refuse a routing that a checkpoint does not support.

    Args:
        model: of the checkpoint, with auxiliary routers if there are any.
        routing: mode by which experts are assigned to tokens.
        step: of the checkpoint, for the message.
        config: the run's configuration, for the message.

    Raises:
        UsageError: it has no auxiliary routers, or no thresholds.
    """
    needs = routing.mode.needs
    if not model.routes or needs.held_by(model):
        return
    cause, remedy = LACKING[needs]
    train = shell_command("train", config, "--stage", "auxiliary")
    raise UsageError(f"--routing {routing}: {cause.format(step=step)}", remedy=remedy.format(train=train))


def saved_model(run: Path, step: int | None) -> tuple[int, ModelConfig]:
    """The step of a checkpoint, and its model, with auxiliary routers if there are any.

    Args:
        run: the run's folder.
        step: the checkpoint; None: the newest.

    Raises:
        CheckpointError: there is none, or its configuration is missing.
    """
    store = Store.of_run(run)
    chosen = store.choose(step)
    config = config_of(store.info(chosen), where=store.path(chosen), run=run)
    routers = find_routers(run, chosen) if config.model.routes else None
    return chosen, (config if routers is None else with_width(config, routers[1])).model


def check_routing(run: Path, step: int | None, routing: Routing) -> None:
    """Refuse a routing that a run's checkpoint does not support.

    Args:
        run: the run's folder.
        step: the checkpoint; None: the newest.
        routing: mode by which experts are assigned to tokens.

    Raises:
        UsageError: it has no auxiliary routers, or no thresholds.
        CheckpointError: as `saved_model`.
    """
    chosen, model = saved_model(run, step)
    require(model, routing, step=chosen, config=run / CONFIG)


def with_width(config: Config, width: int) -> Config:
    """The configuration whose model holds auxiliary routers of this width."""
    config = with_auxiliary_routers(config)
    auxiliary = config.model.auxiliary.model_copy(update={"width": width})
    return config.model_copy(update={"model": config.model.model_copy(update={"auxiliary": auxiliary})})
