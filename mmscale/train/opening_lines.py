"""The lines that an attempt prints before its first step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mmscale.data.stream.mixture import Mixture
from mmscale.plan import plan
from mmscale.resilience.inject import Faults
from mmscale.runs.extents import Extent
from mmscale.train.evaluated_on import EvaluatedOn
from mmscale.train.log.exposure import exposure
from mmscale.train.stages.built import BuiltStage, StageInputs
from mmscale.train.steps.evaluation import partly_read

MOST_CHANGES = 50  # largest number of changed settings that an event lists


def opening_lines(
    given: StageInputs,
    stage: BuiltStage,
    *,
    attempt: int,
    begins_at: int,
    train_data: Mixture,
    evaluated_on: EvaluatedOn,
    extents: Mapping[str, Extent],
    faults: Faults,
    changed: Sequence[str],
) -> Iterator[str]:
    """What is trained, on which data, what is evaluated, and what has changed.

    Args:
        given: the inputs of the stage.
        stage: its parts.
        attempt: its number.
        begins_at: sequences consumed before the stage's first step.
        train_data: the training data, from the stage's position on.
        evaluated_on: validation sets and tasks.
        extents: how much of a held-out set is read, by its name.
        faults: faults that a test injects.
        changed: one line for each change since the checkpoint.
    """
    config = given.settings
    parameters = plan(given.config)["parameters"] if given.folder == given.run else {}
    yield from stage.announce(attempt=attempt)
    left = max(0, config.train.steps - stage.state.step) * config.train.global_batch_size
    # Earlier steps of the stage may have had batches of another size.
    sequences = stage.state.sequences + left
    yield exposure(config, train_data, sequences=sequences, begins_at=begins_at, parameters=parameters)
    yield from evaluated_on.lines
    if given.unused:
        yield f"note: {' and '.join(given.unused)}: of the main run only, this stage does without"
    yield from partly_read(extents, batches=config.train.eval_batches)
    yield from faults.warnings()
    for change in changed:
        yield f"changed since the checkpoint: {change}"
