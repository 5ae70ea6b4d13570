"""The keeper of a local cluster.

The parent process of the local cluster's daemons. It writes SLURM's configuration, starts the daemons and reaps
children. cluster.py starts it and communicates with it through its state file and signals.

All daemons are its children. It is also a subreaper, so that processes of a killed daemon (job steps, ranks) become its
children, and it can end them all.
"""

from __future__ import annotations

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
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from slurm.local import node_networks

STATE = "cluster.json"  # in the cluster's folder, while it runs
START_S, STOP_S = 60.0, 20.0
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_SEARCHED = ("/usr/sbin", "/usr/local/sbin", "/sbin")  # folders of daemons that are not on the PATH of ordinary users

# config_overrides allows nodes to declare sixteen cores on a machine with two. KillWait is SLURM's default, within
# which saves must finish. SLURM notices killed nodes after SlurmdTimeout; less than 10 s would be too short on a busy
# machine. slurmctld pings nodes in rounds. A round with a node that is cut off takes MessageTimeout (10 s), and the
# next one waits for it. With a SlurmdTimeout of 10 s, 24.11 then set healthy nodes DOWN, and requeued their jobs.
_SLURMD_TIMEOUT_S, _SLURMD_TIMEOUT_OF_NEWER_S, _NEWER = 10, 40, 23
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
SlurmdTimeout={slurmd_timeout}
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


class Keeper:
    """The parent of the daemons, in the process that calls `serve`."""

    def __init__(self, folder: Path, nodes: int, *, networks: bool = False) -> None:
        self.folder = folder
        self.networks = networks
        self.network: node_networks.Network | None = None
        self.names = [f"n{number}" for number in range(1, nodes + 1)]
        self.own_names = os.getuid() == 0 and _can_unshare()
        self.daemons: dict[str, int] = {}
        self.restored = 0
        self.environment = os.environ | {"SLURM_CONF": str(folder / "etc" / "slurm.conf")}

    def serve(self) -> None:
        """Run the cluster until SIGTERM or SIGINT; SIGHUP restarts daemons that have ended."""
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        asked: list[int] = []
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda received, _: asked.append(received))
        self._make_folders()
        try:
            if self.networks:
                self.network = node_networks.Network.up()
            self._write_files()
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

    def _make_folders(self) -> None:
        """Create the folders first: this fails in the folder of another cluster, before anything has to be undone."""
        for name in ("etc", "state", "log", "run", *(f"spool/{node}" for node in self.names)):
            (self.folder / name).mkdir(mode=0o700, parents=True)

    def _write_files(self) -> None:
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
            slurmd_timeout=_SLURMD_TIMEOUT_S if _major_version() < _NEWER else _SLURMD_TIMEOUT_OF_NEWER_S,
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
        # --force: munged requires its socket to be accessible to all users, but this cluster is for one user.
        self._start("munged", ["munged", "-F", "--force", *munge, f"--seed-file={run}/munged.seed"])
        until((run / "munge.sock").exists, within_s=START_S, what="munged listens")
        self._start("slurmctld", ["slurmctld", "-D", "-i"])
        for name in self.names:
            if self._start(name, self._node(name)) and self.network is not None:
                self._connect(name)

    def _node(self, name: str) -> list[str]:
        program = str(find("slurmd"))
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
        until(
            lambda: Path(f"/proc/{pid}/ns/net").readlink() != mine,
            within_s=START_S,
            what=f"{name} has a network of its own",
        )
        self.network.connect(name, pid)

    def _start(self, name: str, command: list[str]) -> bool:
        """Start a daemon unless it is running; returns whether it was started."""
        if name in self.daemons:
            return False
        command[0] = str(find(command[0]) or command[0])
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
        if self.own_names:  # the namespaces exist shortly after the start
            mine = names_of(os.getpid())
            until(
                lambda: all(names_of(self.daemons[name]) != mine for name in self.names),
                within_s=START_S,
                what="nodes have names of their own",
            )
        spaces = {name: names_of(self.daemons[name]) for name in self.names}
        state = {
            "keeper": os.getpid(),
            "started": started(os.getpid()),
            "nodes": len(self.names),
            "restored": self.restored,
            "own_names": self.own_names,
            "namespaces": spaces,
            "network": None if self.network is None else asdict(self.network),
        }
        temporary = self.folder / f"{STATE}.tmp"
        temporary.write_text(json.dumps(state))
        temporary.replace(self.folder / STATE)

    def _reap(self) -> None:
        """Reap every child that has ended: daemons and orphans that they left behind."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG)[0]) != 0:
                self.daemons = {name: pid for name, pid in self.daemons.items() if pid != ended}

    def _stop(self) -> None:
        """Ask daemons to end, in reverse order of their start; then kill all remaining descendants of this process."""
        for pid in reversed(self.daemons.values()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 3.0
        while self.daemons and time.monotonic() < deadline:
            self._reap()
            time.sleep(0.02)
        deadline = time.monotonic() + STOP_S
        while time.monotonic() < deadline and (left := list(_descendants(os.getpid()))):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._reap()
            time.sleep(0.02)
        if self.network is not None:
            self.network.down()
        (self.folder / STATE).unlink(missing_ok=True)


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


def names_of(pid: int) -> str:
    """The UTS namespace of a process, which determines its host name."""
    return str(Path(f"/proc/{pid}/ns/uts").readlink())


def started(pid: int) -> str:
    """Start time of a process, which identifies it together with its id. "" if it has ended and is not reaped."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return "" if fields[0] == "Z" else fields[19]


def _die_with_parent(parent: int) -> Callable[[], None]:
    prctl = ctypes.CDLL(None).prctl

    def tie() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return tie


def _major_version() -> int:
    """22 for SLURM 22.05.8."""
    said = subprocess.run([str(find("slurmctld")), "-V"], capture_output=True, text=True, timeout=START_S).stdout
    found = re.search(r"(\d+)\.\d+", said)
    return int(found[1]) if found else 0


def _can_unshare() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True).returncode == 0


def find(program: str) -> str | None:
    """Path of a program, None if it does not exist."""
    return shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", ""), *_SEARCHED]))


def _free_ports(count: int) -> int:
    """The first of `count` consecutive unused ports, below the ephemeral ones."""
    first = 12_000 + secrets.randbelow(8_000)
    for port in range(first, first + 8_000):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for number in range(port, port + count):
                listener = stack.enter_context(socket.socket())
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(("", number))
            return port
    raise ClusterError("no free ports")


def until(done: Callable[[], bool], *, within_s: float, what: str, pause_s: float = 0.05) -> None:
    """Wait until `done` returns true.

    Raises:
        ClusterError: it did not in time.
    """
    deadline = time.monotonic() + within_s
    while not done():
        if time.monotonic() > deadline:
            raise ClusterError(f"waited {within_s:.0f} s in vain: {what}")
        time.sleep(pause_s)
