# Settings that must be made before any test imports torch. Fixtures for one folder are next to its tests.
"""Global set-up of the test suite."""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests import digits

# With more than one OpenMP thread in the parent, forked ranks (tests/support.py) hang in their first large matmul.
# Also, spinning threads would slow down small machines.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["GOMP_SPINCOUNT"] = "0"
# Tests are not ranks of a run, but variables of a launcher around pytest would make them look like it.
for _name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "MMSCALE_LAUNCHER"):
    os.environ.pop(_name, None)
# No deadlines: a property must not fail because a busy machine takes long for an example or for drawing it.
hypothesis.settings.register_profile(
    "any_machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any_machine")
# Modules and collected tests are no garbage. Looking for it among them takes 0.4 s of CPU time, a dozen times.
gc.disable()
# A fork must not collect its parent's garbage: destroying a process group waits for threads that the fork does not
# have, and crashes. (mmscale/checkpoint/forked.py does the same for the forks of a trainer.)
os.register_at_fork(after_in_child=gc.freeze)


@pytest.fixture(scope="session")
def digits_documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the handwritten digits as documents, without shifted copies."""
    return digits.write(tmp_path_factory.mktemp("documents") / "digits")


@pytest.fixture
def signals_heard() -> Iterator[None]:
    """Default handlers for SIGHUP and SIGINT, as in a terminal: under nohup or in the background they are ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGINT)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def pytest_collection_finish() -> None:
    """Keep modules and tests out of garbage collections, each of which takes 0.4 s of CPU time with them.

    Refuse tensorstore in this process: after it is used here, it aborts in every rank that is forked later.
    """
    gc.collect()
    gc.freeze()
    gc.enable()
    tensorstore: Any = sys.modules.get("tensorstore")
    if tensorstore is None:
        return
    real, parent = tensorstore.open, os.getpid()

    def opened(*arguments: Any, **options: Any) -> Any:
        assert os.getpid() != parent, "use tensorstore in a fork: `run_ranks` of tests/support.py with world_size=1"
        return real(*arguments, **options)

    tensorstore.open = opened
