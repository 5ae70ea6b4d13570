# A real SLURM on this machine: slurmctld and N slurmd in a private folder, for tests and for trying `mmscale launch`.
#   eval "$(python slurm/local_cluster.py up --nodes 3 --print-env)"; sinfo; python slurm/local_cluster.py down
# It is no production set-up: nodes share this machine's cores, and no accounting or cgroups are there.
"""A local SLURM cluster.

`up` starts a keeper, whose children all daemons are; it is a subreaper, so that also what daemons leave behind when
they are killed (job steps, ranks) stays its child, and nothing outlives it. As root every node has a host name and an
/etc/hosts of its own (UTS and mount namespaces); otherwise nodes share the machine's. With `--networks`, as root, every
node has a network interface too (eth0), which can be cut.

Debian: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import getpass
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

if __package__ in (None, ""):  # python slurm/local_cluster.py
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slurm import local_network

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue", "scancel")
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_SEARCHED = ("/usr/sbin", "/usr/local/sbin", "/sbin")  # where daemons are, which plain users have not on their PATH
_START_S, _STOP_S = 60.0, 20.0
_STATE = "cluster.json"
_ADDED = "# Added while it ran:\n"

# config_overrides lets two cores pose as sixteen per node; KillWait is SLURM's default: saves have to fit into it.
# Killed nodes are noticed after SlurmdTimeout at the earliest; less than this is too little on a loaded machine.
_SLURM_CONF = """\
ClusterName=mmscale
SlurmctldHost={host}({controller})
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={dir}/run/munge.sock
CredType=cred/munge
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool/%n
SlurmctldPidFile={dir}/run/slurmctld.pid
SlurmdPidFile={dir}/run/slurmd.%n.pid
SlurmctldLogFile={dir}/log/slurmctld.log
SlurmdLogFile={dir}/log/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
MpiDefault=none
GresTypes=gpu
SlurmctldTimeout=30
SlurmdTimeout=10
KillWait=30
MinJobAge=3600
InactiveLimit=0
SlurmdParameters=config_overrides
NodeName=n[1-{nodes}] {hostname}NodeAddr={addresses} Port=[{first}-{last}] CPUs=16 RealMemory=8000 {gres}State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


class ClusterError(Exception):
    """The cluster cannot be started or found."""


def missing_programs() -> list[str]:
    """Programs that a cluster needs and this machine lacks."""
    return [name for name in PROGRAMS if _find(name) is None]


def default_folder() -> Path:
    """One cluster per user, unless another folder is named."""
    return Path(tempfile.gettempdir()) / f"mmscale-slurm-{os.getuid()}"


@dataclass(frozen=True)
class Cluster:
    """A running cluster.

    Attributes:
        folder: its private folder.
    """

    folder: Path

    @classmethod
    def up(cls, folder: Path, *, nodes: int, networks: bool = False) -> Cluster:
        """Start a cluster and wait until all of its nodes are idle.

        Args:
            folder: private folder, made with mode 0700; no cluster may be in it.
            nodes: how many, named n1, n2, ...
            networks: each node gets an eth0 of its own.

        Raises:
            ClusterError: programs are missing, one is there already, or it does not come up.
        """
        if networks and not local_network.possible():
            raise ClusterError("networks of nodes need root, `ip` and `unshare`")
        lacking = missing_programs()
        if lacking:
            raise ClusterError(
                f"no {', '.join(lacking)} on this machine; Debian: "
                "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
            )
        if (folder / _STATE).exists():
            cluster = cls(folder)
            if cluster.keeper() is not None:
                raise ClusterError(f"a cluster runs in {folder} already; end it with `down`")
            shutil.rmtree(folder)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ClusterError(f"{folder} is not empty and holds no cluster")
        command = [sys.executable, str(Path(__file__).resolve()), "serve", "--dir", str(folder), "--nodes", str(nodes)]
        command += ["--networks"] if networks else []
        with (folder / "keeper.log").open("wb") as log:
            keeper = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        try:
            cluster = cls(folder)
            _until(
                lambda: keeper.poll() is not None or cluster._idle() == nodes, within_s=_START_S, what="nodes are idle"
            )
            if keeper.poll() is not None:
                raise ClusterError(f"the cluster did not start: {_tail(folder / 'keeper.log')}")
        except ClusterError as error:
            keeper.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                keeper.wait(_STOP_S)
            raise ClusterError(f"{error}\n{_tail(folder / 'log' / 'slurmctld.log')}") from None
        return cluster

    def down(self) -> None:
        """End all jobs and daemons and remove the folder. Nothing happens if no cluster is there."""
        keeper = self.keeper()
        if keeper is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(keeper, signal.SIGTERM)
            _until(lambda: self.keeper() is None, within_s=_STOP_S + 10, what=f"keeper {keeper} ends")
        with contextlib.suppress(ClusterError):  # a killed keeper leaves its state, and its bridge
            if network := self._state()["network"]:
                local_network.Network(**network).down()
        if (self.folder / "keeper.log").exists():
            shutil.rmtree(self.folder)

    def environment(self) -> dict[str, str]:
        """Variables under which SLURM's commands and `mmscale` talk to this cluster."""
        state = self._state()
        variables = {"SLURM_CONF": str(self.folder / "etc" / "slurm.conf")}
        if not state["own_names"]:  # n1, n2 resolve nowhere
            variables["MASTER_ADDR"] = "127.0.0.1"
        return variables

    def keeper(self) -> int | None:
        """Process id of the keeper, None if it is gone."""
        try:
            state = self._state()
            return int(state["keeper"]) if _started(int(state["keeper"])) == state["started"] else None
        except (ClusterError, OSError):
            return None

    def run(self, *command: str, timeout_s: float = 60.0) -> str:
        """What a command of SLURM prints.

        Raises:
            ClusterError: it failed.
        """
        ended = subprocess.run(
            command, env=os.environ | self.environment(), capture_output=True, text=True, timeout=timeout_s
        )
        if ended.returncode:
            raise ClusterError(f"{shlex.join(command)}: {ended.stderr.strip()}")
        return ended.stdout

    def configure(self, *lines: str) -> None:
        """Add lines to slurm.conf, instead of those that an earlier call added, and have them read.

        Args:
            lines: settings that a running SLURM takes over, e.g. SlurmctldParameters=preempt_send_user_signal.
        """
        file = self.folder / "etc" / "slurm.conf"
        text = file.read_text().partition(_ADDED)[0]
        temporary = file.with_suffix(".tmp")
        temporary.write_text(text + _ADDED + "".join(f"{line}\n" for line in lines))
        temporary.replace(file)
        self.run("scontrol", "reconfigure")

    def slurmd(self, node: str) -> int:
        """Process id of a node's slurmd."""
        return int((self.folder / "run" / f"slurmd.{node}.pid").read_text())

    def cut(self, node: str) -> None:
        """Cut a node off from all others, while its processes live on; for clusters whose nodes have networks."""
        local_network.cut(self._state()["network"]["links"][node])

    @property
    def own_names(self) -> bool:
        """Whether every node has a host name of its own."""
        return bool(self._state()["own_names"])

    def processes(self, node: str) -> list[int]:
        """All processes of a node, its slurmd left out; for clusters whose nodes have names of their own."""
        if not self._state()["own_names"]:
            raise ClusterError("nodes share the machine's name, and nobody can tell whose a process is")
        place = self._state()["namespaces"][node]
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and _names_of(int(entry.name)) == place:
                    found.append(int(entry.name))
        return [pid for pid in found if pid != self.slurmd(node)]

    def restore(self) -> None:
        """Start daemons again that were killed, and wait until every node is usable."""
        keeper = self.keeper()
        if keeper is None:
            raise ClusterError(f"no cluster runs in {self.folder}")
        nodes, before = int(self._state()["nodes"]), self._state()["restored"]
        os.kill(keeper, signal.SIGHUP)
        _until(lambda: self._state()["restored"] > before, within_s=_START_S, what="the keeper starts daemons")
        _until(lambda: all(self._answers(f"n{n + 1}") for n in range(nodes)), within_s=_START_S, what="slurmds start")

        def back() -> bool:
            states = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T").split("\n")
            bad = {
                line.split()[0]: line.split()[1] for line in states if line and re.search(r"down|drain|comp|\*", line)
            }
            for node, state in bad.items():
                # A node whose slurmd died under a job waits for that job's end for ever, unless it is taken down first.
                to = ["State=DOWN", "Reason=restored"] if "comp" in state else ["State=RESUME"]
                with contextlib.suppress(ClusterError):  # it comes up by itself
                    self.run("scontrol", "update", f"NodeName={node}", *to)
            return not bad and len([line for line in states if line]) == nodes

        _until(back, within_s=_START_S, what="all nodes are back", pause_s=0.5)

    def _answers(self, node: str) -> bool:
        try:
            return _started(self.slurmd(node)) != ""
        except (OSError, ValueError):
            return False

    def _idle(self) -> int:
        if not (self.folder / _STATE).exists():
            return 0
        with contextlib.suppress(ClusterError, subprocess.TimeoutExpired):
            return self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split().count("idle")
        return 0

    def _state(self) -> dict:
        try:
            return json.loads((self.folder / _STATE).read_text())
        except FileNotFoundError:
            raise ClusterError(f"no cluster runs in {self.folder}") from None


# --- the keeper -----------------------------------------------------------------------------------------------------


class _Keeper:
    """Holds the daemons, in the process that `serve` runs in."""

    def __init__(self, folder: Path, nodes: int, *, networks: bool = False) -> None:
        self.folder = folder
        self.network = local_network.Network.up() if networks else None
        self.names = [f"n{number}" for number in range(1, nodes + 1)]
        self.own_names = os.getuid() == 0 and _can_unshare()
        self.daemons: dict[str, int] = {}
        self.restored = 0
        self.environment = os.environ | {"SLURM_CONF": str(folder / "etc" / "slurm.conf")}

    def serve(self) -> None:
        """Run the cluster until SIGTERM or SIGINT; SIGHUP starts daemons again that have ended."""
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        asked: list[int] = []
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda received, _: asked.append(received))
        self._write_files()
        try:
            self._start_missing()
            self._write_state()
            while True:
                self._reap()
                if signal.SIGTERM in asked or signal.SIGINT in asked:
                    break
                if signal.SIGHUP in asked:
                    asked.clear()
                    self._start_missing()
                    self.restored += 1
                    self._write_state()
                time.sleep(0.05)
        finally:
            self._stop()

    def _write_files(self) -> None:
        for name in ("etc", "state", "log", "run", *(f"spool/{node}" for node in self.names)):
            (self.folder / name).mkdir(mode=0o700, parents=True)
        port = _free_ports(len(self.names) + 1)
        host = socket.gethostname()
        devices = [f"/dev/tty{number}" for number in range(8)]
        fake_gpus = all(Path(device).exists() for device in devices)  # without cgroups only existence is checked
        text = _SLURM_CONF.format(
            host=host,
            port=port,
            user=getpass.getuser(),
            dir=self.folder,
            nodes=len(self.names),
            hostname="" if self.own_names else f"NodeHostname={host} ",
            controller="127.0.0.1" if self.network is None else f"{self.network.prefix}.1",
            addresses="127.0.0.1" if self.network is None else f"{self.network.prefix}.[11-{10 + len(self.names)}]",
            first=port + 1,
            last=port + len(self.names),
            gres="Gres=gpu:8 " if fake_gpus else "",
        )
        etc = self.folder / "etc"
        (etc / "slurm.conf").write_text(text)
        (etc / "gres.conf").write_text(
            f"NodeName=n[1-{len(self.names)}] Name=gpu File=/dev/tty[0-7]\n" if fake_gpus else ""
        )
        prefix = "127.0.0" if self.network is None else self.network.prefix
        names = "".join(f"{prefix}.{number} {name}\n" for number, name in enumerate(self.names, start=11))
        (etc / "hosts").write_text(f"127.0.0.1 localhost {host}\n{names}")
        key = os.open(etc / "munge.key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(key, secrets.token_bytes(128))
        os.close(key)

    def _start_missing(self) -> None:
        run, log = self.folder / "run", self.folder / "log"
        munge = [f"--{name}={run}/{file}" for name, file in (("socket", "munge.sock"), ("pid-file", "munged.pid"))]
        munge += [f"--key-file={self.folder}/etc/munge.key", f"--log-file={log}/munged.log"]
        # --force: it wants its socket open to all users, and this cluster is for one.
        self._start("munged", ["munged", "-F", "--force", *munge, f"--seed-file={run}/munged.seed"])
        _until((run / "munge.sock").exists, within_s=_START_S, what="munged listens")
        self._start("slurmctld", ["slurmctld", "-D", "-i"])
        for name in self.names:
            if self._start(name, self._node(name)) and self.network is not None:
                self._connect(name)

    def _node(self, name: str) -> list[str]:
        program = str(_find("slurmd"))
        if not self.own_names:
            return [program, "-D", "-N", name]
        hosts = shlex.quote(str(self.folder / "etc" / "hosts"))
        inside = f"hostname {name}; mount --bind {hosts} /etc/hosts; "
        spaces = ["--uts", "--mount"]
        if self.network is not None:
            spaces.append("--net")
            inside += f"{self.network.inside(self.names.index(name))}; "
        inside += f"exec {program} -D -N {name}"
        return ["unshare", *spaces, "--propagation", "private", "bash", "-c", inside]

    def _connect(self, name: str) -> None:
        assert self.network is not None
        mine = Path("/proc/self/ns/net").readlink()
        pid = self.daemons[name]
        _until(
            lambda: Path(f"/proc/{pid}/ns/net").readlink() != mine,
            within_s=_START_S,
            what=f"{name} has a network of its own",
        )
        self.network.connect(name, pid)

    def _start(self, name: str, command: list[str]) -> bool:
        """Start a daemon that does not run; whether it did not."""
        if name in self.daemons:
            return False
        command[0] = str(_find(command[0]) or command[0])
        with (self.folder / "log" / f"{name}.out").open("ab") as output:
            process = subprocess.Popen(
                command,
                env=self.environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=_die_with_parent(os.getpid()),
            )
        process.returncode = 0  # reaped by _reap(), not by subprocess
        self.daemons[name] = process.pid
        return True

    def _write_state(self) -> None:
        if self.own_names:  # the namespaces are there a moment after the start
            mine = _names_of(os.getpid())
            _until(
                lambda: all(_names_of(self.daemons[name]) != mine for name in self.names),
                within_s=_START_S,
                what="nodes have names of their own",
            )
        spaces = {name: _names_of(self.daemons[name]) for name in self.names}
        state = {
            "keeper": os.getpid(),
            "started": _started(os.getpid()),
            "nodes": len(self.names),
            "restored": self.restored,
            "own_names": self.own_names,
            "namespaces": spaces,
            "network": None if self.network is None else asdict(self.network),
        }
        temporary = self.folder / f"{_STATE}.tmp"
        temporary.write_text(json.dumps(state))
        temporary.replace(self.folder / _STATE)

    def _reap(self) -> None:
        """Take in every child that has ended, daemons and what they left behind."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG)[0]) != 0:
                self.daemons = {name: pid for name, pid in self.daemons.items() if pid != ended}

    def _stop(self) -> None:
        """Ask daemons in reverse order of their start; then end whatever still descends from this process."""
        for pid in reversed(self.daemons.values()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 3.0
        while self.daemons and time.monotonic() < deadline:
            self._reap()
            time.sleep(0.02)
        deadline = time.monotonic() + _STOP_S
        while time.monotonic() < deadline and (left := list(_descendants(os.getpid()))):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._reap()
            time.sleep(0.02)
        if self.network is not None:
            self.network.down()
        (self.folder / _STATE).unlink(missing_ok=True)


def _descendants(root: int) -> Iterator[int]:
    """Processes below one, zombies left out."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                children.setdefault(int(parent), []).append(int(entry.name) if state != "Z" else -int(entry.name))
    waiting = [root]
    while waiting:
        for pid in children.get(waiting.pop(), []):
            if pid > 0:
                yield pid
            waiting.append(abs(pid))


def _names_of(pid: int) -> str:
    """The UTS namespace of a process: which host name it sees."""
    return str(Path(f"/proc/{pid}/ns/uts").readlink())


def _started(pid: int) -> str:
    """When a process was started: with its id this names it for good. "" for one that has ended and is not reaped."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return "" if fields[0] == "Z" else fields[19]


def _die_with_parent(parent: int) -> Callable[[], None]:
    prctl = ctypes.CDLL(None).prctl

    def tie() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return tie


def _can_unshare() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True).returncode == 0


def _find(program: str) -> str | None:
    return shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", ""), *_SEARCHED]))


def _free_ports(count: int) -> int:
    """The first of `count` neighbouring ports that nobody listens on, below the ephemeral ones."""
    first = 12_000 + secrets.randbelow(8_000)
    for port in range(first, first + 8_000):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for number in range(port, port + count):
                listener = stack.enter_context(socket.socket())
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(("", number))
            return port
    raise ClusterError("no free ports")


def _until(done: Callable[[], bool], *, within_s: float, what: str, pause_s: float = 0.05) -> None:
    deadline = time.monotonic() + within_s
    while not done():
        if time.monotonic() > deadline:
            raise ClusterError(f"waited {within_s:.0f} s in vain: {what}")
        time.sleep(pause_s)


def _tail(file: Path, lines: int = 10) -> str:
    return "\n".join(file.read_text(errors="replace").splitlines()[-lines:]) if file.exists() else ""


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("up", "start a cluster"),
        ("down", "end it"),
        ("env", "print the shell lines that select it"),
        ("restore", "start killed daemons again"),
        ("serve", "run it in the foreground"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--dir", type=Path, default=default_folder(), help="private folder [%(default)s]")
        if name in ("up", "serve"):
            command.add_argument("--nodes", type=int, default=2, help="number of nodes [%(default)s]")
            command.add_argument("--networks", action="store_true", help="each node gets an eth0 of its own (root)")
        if name == "up":
            command.add_argument("--print-env", action="store_true", help="print only the shell lines to export")
    arguments = parser.parse_args()
    folder = arguments.dir.resolve()
    try:
        if arguments.command == "serve":
            _Keeper(folder, arguments.nodes, networks=arguments.networks).serve()
        elif arguments.command == "up":
            lines = _exports(Cluster.up(folder, nodes=arguments.nodes, networks=arguments.networks))
            print(lines if arguments.print_env else f"{arguments.nodes} nodes are up in {folder}; now run\n{lines}")
        elif arguments.command == "down":
            Cluster(folder).down()
        elif arguments.command == "restore":
            Cluster(folder).restore()
        else:
            print(_exports(Cluster(folder)))
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _exports(cluster: Cluster) -> str:
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in cluster.environment().items())


if __name__ == "__main__":
    sys.exit(main())
