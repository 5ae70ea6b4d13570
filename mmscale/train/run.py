"""Runs one attempt of a stage, from a configuration to an exit status: data, ranks and model, then attempt.py.

The parts of single stages are in stages/.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path

from mmscale.config import Config
from mmscale.data.prepared.questions import task_items
from mmscale.data.stream.mixture import open_mixture
from mmscale.data.stream.passes import open_passes
from mmscale.data.vocab import Vocabulary
from mmscale.resilience.signals import StopRequest
from mmscale.runtime import groups as process_groups
from mmscale.runtime.activity import ActivityReporter
from mmscale.runtime.groups import from_first
from mmscale.runtime.rank_env import RankEnv, grace_of
from mmscale.train import training_lock
from mmscale.train.assembly import resolve_share, start
from mmscale.train.attempt import Attempt
from mmscale.train.stages.auxiliary_stage import AuxiliaryStage
from mmscale.train.stages.built import BuiltStage, StageInputs
from mmscale.train.stages.main import MainStage
from mmscale.train.stages.sft_stage import SftStage
from mmscale.train.stages.table import MAIN, STAGES
from mmscale.train.training_lock import Claim

BUILDERS: Mapping[str, Callable[[StageInputs], BuiltStage]] = {
    MAIN: MainStage,
    "auxiliary": AuxiliaryStage,
    "sft": SftStage,
}


def main(
    config: Config,
    env: RankEnv,
    *,
    stage: str = MAIN,
    yes: bool = False,
    grace_s: float | None = None,
    starting: ActivityReporter | None = None,
    claim: Claim | None = None,
) -> int:
    """Run one attempt on this rank.

    Args:
        config: the run's configuration; `model.experts.share` may be 'auto'.
        env: this process's place among the ranks.
        stage: a name in `STAGES`.
        yes: resume from a checkpoint although the objective or the data have changed since.
        grace_s: time that a stop request leaves for a save [seconds]; default: the launcher's value, or a minute.
        starting: shows the progress of the start until the first step is logged; default: nothing is shown.
        claim: the run's lock, if rank 0 has taken it before; default: it is taken here.

    Returns:
        0: trained to the last step; 75: stopped on request after a committed save.

    Raises:
        MmscaleError: an error that the user can fix; the same on every rank if possible.
    """
    starting = starting or ActivityReporter("", enabled=False)
    entry = STAGES[stage]
    entry.preflight(config, world_size=env.world_size, yes=yes)
    config = resolve_share(entry.inherit(config))
    settings = entry.settings(config)
    vocabulary = Vocabulary.from_config(settings.vocab)
    starting.update("opening the data")
    train_data = open_mixture(settings, "train", vocabulary=vocabulary)
    held_out, asked = open_passes(settings, vocabulary=vocabulary), task_items(settings)
    starting.update("starting 1 rank" if env.world_size == 1 else f"waiting for all {env.world_size} ranks")
    groups = start(settings, env)
    tasks = from_first(asked)  # the same on every rank, even if a node still sees an older version of the file
    starting.update("building the model")
    run = Path(config.run.dir) / config.run.name
    given = StageInputs(entry.recorded(config), settings, run, entry.folder(run), env, groups, entry.unused(config))
    try:
        with (
            StopRequest(grace_s=grace_of(grace_s)) as stop,
            training_lock.held_by_ranks(run, entry, env, from_first=from_first, claim=claim) as fence,
            contextlib.ExitStack() as stack,
        ):
            build = BUILDERS[entry.name]
            attempt = Attempt(entry, given, build, train_data, held_out, tasks, stop, fence, stack, starting)
            return attempt.run(yes=yes)
    finally:
        process_groups.finalize()
