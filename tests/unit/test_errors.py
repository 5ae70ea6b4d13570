"""Errors that users act on."""

import pickle

import pytest

from mmscale import errors

STATUSES = {
    errors.MmscaleError: 1,
    errors.LaunchError: 1,
    errors.UsageError: 2,
    errors.ConfigError: 2,
    errors.DataError: 3,
    errors.CheckpointError: 4,
    errors.TrainingError: 5,
}


def test_cause_and_remedy() -> None:
    assert str(errors.ConfigError("tp is 3", remedy="use 2 or 4")) == "tp is 3; use 2 or 4"
    assert str(errors.ConfigError("tp is 3")) == "tp is 3"


@pytest.mark.parametrize(("kind", "status"), STATUSES.items())
def test_exit_status(kind: type[errors.MmscaleError], status: int) -> None:
    assert kind.exit_status == status
    assert issubclass(kind, errors.MmscaleError)


@pytest.mark.parametrize("kind", STATUSES)
def test_error_survives_the_way_from_a_worker_process(kind: type[errors.MmscaleError]) -> None:
    error = pickle.loads(pickle.dumps(kind("cause", remedy="remedy")))
    assert type(error) is kind
    assert (error.cause, error.remedy, str(error)) == ("cause", "remedy", "cause; remedy")
