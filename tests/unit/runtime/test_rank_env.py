"""Discovery of the rank environment: every launcher, and every way its variables can be wrong."""

import socket
import subprocess
import sys

import pytest

from mmscale.errors import ConfigError
from mmscale.runtime import rank_env
from mmscale.runtime.rank_env import RankEnv, Rendezvous, discover, expand_hostlist, expand_tasks_per_node

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "7",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_NODELIST": "gpu[07-09],big1",
    "SLURM_JOB_NODELIST": "gpu[01-09],big1",
}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}


@pytest.fixture
def mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 of 4 ranks that mpirun started, without MPI."""
    met = Rendezvous(rank=1, world_size=4, local_rank=1, local_world_size=2, master_addr="host0", master_port=1234)
    monkeypatch.setattr(rank_env, "rendezvous_by_mpi4py", lambda: met)


@pytest.fixture
def no_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_env, "rendezvous_by_mpi4py", lambda: pytest.fail("no MPI rendezvous expected"))


def test_single_process() -> None:
    env = discover({})
    assert env == RankEnv()
    assert env.is_first


def test_torchrun() -> None:
    env = discover(TORCHRUN)
    assert env == RankEnv(5, 8, 1, 4, "node0", 29500, "torchrun")
    assert env.init_method == "tcp://node0:29500"
    assert not env.is_first


def test_local_ranks_speak_torchrun_but_say_who_they_are() -> None:
    assert discover({**TORCHRUN, "MMSCALE_LAUNCHER": "local"}).source == "local"


def test_torchrun_wins_over_slurm_and_mpi_around_it() -> None:
    assert discover({**SLURM, **OPEN_MPI, **TORCHRUN}).rank == 5


def test_slurm() -> None:
    env = discover(SLURM)
    assert (env.rank, env.world_size, env.local_rank, env.local_world_size) == (5, 7, 1, 2)
    assert (env.master_addr, env.source) == ("gpu07", "slurm")  # the step's first node, not the job's
    assert 20_000 <= env.master_port < 30_000


def test_slurm_port_is_common_to_ranks_and_differs_between_jobs_and_steps() -> None:
    def port(**changed: str) -> int:
        return discover({**SLURM, **changed}).master_port

    assert port() == port(SLURM_PROCID="6", SLURM_LOCALID="0", SLURM_NODEID="3")
    assert len({port(), port(SLURM_JOB_ID="4712"), port(SLURM_STEP_ID="1")}) == 3


def test_slurm_without_step_variables_uses_those_of_the_job() -> None:
    environ = {name: value for name, value in SLURM.items() if not name.startswith("SLURM_STEP_")}
    env = discover({**environ, "SLURM_STEPID": "0", "SLURM_TASKS_PER_NODE": "2(x3),1"})
    assert (env.world_size, env.master_addr, env.local_world_size) == (7, "gpu01", 2)


def test_slurm_user_may_choose_the_address() -> None:
    env = discover({**SLURM, "MASTER_ADDR": "ib-gpu07", "MASTER_PORT": "4000"})
    assert env.init_method == "tcp://ib-gpu07:4000"


def test_batch_script_with_one_task_is_a_single_process() -> None:
    assert discover({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}) == RankEnv()


def test_allocation_shell_is_a_single_process() -> None:
    assert discover({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}) == RankEnv()


@pytest.mark.usefixtures("mpi")
def test_mpi() -> None:
    env = discover(OPEN_MPI)
    assert env == RankEnv(1, 4, 1, 2, "host0", 1234, "mpi")


@pytest.mark.usefixtures("mpi")
def test_mpich() -> None:
    assert discover({"PMI_RANK": "1", "PMI_SIZE": "4"}).rank == 1


@pytest.mark.usefixtures("no_mpi")
def test_mpi_with_one_rank_needs_no_rendezvous() -> None:
    environ = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}
    assert discover(environ) == RankEnv(source="mpi")


@pytest.mark.usefixtures("no_mpi")
def test_srun_with_pmi_is_slurm() -> None:
    assert discover({**SLURM, "PMI_RANK": "5", "PMI_SIZE": "7"}).source == "slurm"


@pytest.mark.usefixtures("mpi")
def test_choice_overrules() -> None:
    assert discover({**SLURM, **OPEN_MPI, "MMSCALE_LAUNCHER": "mpi"}).source == "mpi"
    assert discover({**SLURM, **OPEN_MPI, "MMSCALE_LAUNCHER": "slurm"}).source == "slurm"
    assert discover({**TORCHRUN, "MMSCALE_LAUNCHER": "single"}) == RankEnv()


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"RANK": "0"}, "torchrun: RANK set but not WORLD_SIZE, LOCAL_RANK"),
        ({**TORCHRUN, "RANK": "eight"}, "RANK='eight' is not a whole number"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK='-1' is not a whole number"),
        ({**TORCHRUN, "RANK": "8"}, "rank 8 is not below the world size 8"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, "local rank 4, 4 ranks on this node and world size 8 do not fit"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "16"}, "do not fit together"),
        ({"MMSCALE_LAUNCHER": "pbs"}, "MMSCALE_LAUNCHER='pbs' is not a launcher; use one of slurm, torchrun"),
        ({"MMSCALE_LAUNCHER": "torchrun"}, "MMSCALE_LAUNCHER set but not RANK"),
        ({"MMSCALE_LAUNCHER": "mpi"}, "neither OMPI_COMM_WORLD_RANK nor PMI_RANK is set"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, "runs this command once, not 4 times; put `srun` before it"),
        ({**SLURM, **OPEN_MPI}, "rank 5 of 7 by SLURM and rank 1 of 4 by OMPI_COMM_WORLD_RANK"),
        ({**SLURM, "SLURM_LOCALID": ""}, "SLURM_LOCALID='' is not a whole number"),
        ({**SLURM, "SLURM_STEP_NODELIST": "gpu[1-"}, "'gpu[1-' has a bracket without its partner"),
        ({**SLURM, "SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST and SLURM_JOB_NODELIST are both empty"),
        (
            {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"},
            "started rank 0 of 2, but mpi4py sees rank 1 of 4",
        ),
    ],
)
@pytest.mark.usefixtures("mpi")
def test_inconsistent_environment_is_explained(environ: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        discover(environ)
    assert words in str(caught.value)


def test_mpi_without_mpi4py_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ConfigError, match="mpi4py is not installed; pip install"):
        discover(OPEN_MPI)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("", []),
        ("login", ["login"]),
        ("a,b-1.cluster.org", ["a", "b-1.cluster.org"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[08-11,20],x", ["n08", "n09", "n10", "n11", "n20", "x"]),
        ("r[1-2]c[0-1]", ["r1c0", "r1c1", "r2c0", "r2c1"]),
        ("n[1,3]-ib,m5", ["n1-ib", "n3-ib", "m5"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
    ],
)
def test_hostlists(text: str, hosts: list[str]) -> None:
    assert expand_hostlist(text) == hosts


@pytest.mark.parametrize("text", ["n[1-", "n1]", "n[a-b]", "n[]", "n[1--2]"])
def test_broken_hostlists(text: str) -> None:
    with pytest.raises(ConfigError, match="host list"):
        expand_hostlist(text)


def test_tasks_per_node() -> None:
    assert expand_tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert expand_tasks_per_node("4") == [4]
    assert expand_tasks_per_node("") == []


def test_a_socket_that_listens_keeps_its_port() -> None:
    with rank_env.listen() as listener:
        port = rank_env.port_of(listener)
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("", port))
        with socket.create_connection(("127.0.0.1", port)):
            pass


def test_the_socket_belongs_to_local_ranks() -> None:
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    given = {**place, "MASTER_PORT": "1234", rank_env.STORE_FD: "7"}
    assert rank_env.discover({**given, "MMSCALE_LAUNCHER": "local"}).store_fd == 7
    assert rank_env.discover({**given, "MMSCALE_LAUNCHER": "torchrun"}).store_fd is None  # of a launcher further out


def test_an_unused_port_is_nobodys_and_none_that_an_outgoing_connection_may_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port = rank_env.unused_port()
    assert 20_000 <= port < 30_000
    monkeypatch.setattr(rank_env.secrets, "randbelow", lambda _: port - 20_000)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("", port))
        listener.listen()
        assert rank_env.unused_port() != port


def test_no_torch_is_imported() -> None:
    program = "import sys, mmscale.runtime.rank_env, mmscale.runtime.local_ranks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=300).returncode == 0
