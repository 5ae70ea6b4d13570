# A real SLURM on this machine: slurmctld and N slurmd in a private folder, for tests and for trying `mmscale launch`.
#   eval "$(python slurm/local/cluster.py up --nodes 3 --print-env)"; sinfo; python slurm/local/cluster.py down
# It is no production set-up: nodes share this machine's cores, and no accounting or cgroups are there.
"""A local SLURM cluster.

`up` starts a keeper (keeper.py), whose children all daemons are. As root every node has a host name and an
/etc/hosts of its own (UTS and mount namespaces); otherwise nodes share the machine's. With `--networks`, as root, every
node has a network interface too (eth0), which can be cut.

Debian: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # python slurm/local/cluster.py
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from slurm.local import node_networks
from slurm.local.keeper import START_S, STATE, STOP_S, ClusterError, Keeper, find, names_of, started, until

__all__ = ["Cluster", "ClusterError", "missing_programs"]

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue", "scancel")
_ADDED = "# Added while it ran:\n"


def missing_programs() -> list[str]:
    """Programs that a cluster needs and this machine lacks."""
    return [name for name in PROGRAMS if find(name) is None]


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
        if networks and not node_networks.possible():
            raise ClusterError("networks of nodes need root, `ip` and `unshare`")
        lacking = missing_programs()
        if lacking:
            raise ClusterError(
                f"no {', '.join(lacking)} on this machine; Debian: "
                "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
            )
        if (folder / STATE).exists():
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
            until(
                lambda: keeper.poll() is not None or cluster._idle() == nodes, within_s=START_S, what="nodes are idle"
            )
            if keeper.poll() is not None:
                raise ClusterError(f"the cluster did not start: {_tail(folder / 'keeper.log')}")
        except ClusterError as error:
            keeper.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                keeper.wait(STOP_S)
            raise ClusterError(f"{error}\n{_tail(folder / 'log' / 'slurmctld.log')}") from None
        return cluster

    def down(self) -> None:
        """End all jobs and daemons and remove the folder. Nothing happens if no cluster is there."""
        keeper = self.keeper()
        if keeper is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(keeper, signal.SIGTERM)
            until(lambda: self.keeper() is None, within_s=STOP_S + 10, what=f"keeper {keeper} ends")
        with contextlib.suppress(ClusterError):  # a killed keeper leaves its state, and its bridge
            if network := self._state()["network"]:
                node_networks.Network(**network).down()
        if (self.folder / "keeper.log").exists():
            shutil.rmtree(self.folder)

    def environment(self) -> dict[str, str]:
        """Variables with which SLURM's commands and `mmscale` use this cluster."""
        state = self._state()
        variables = {"SLURM_CONF": str(self.folder / "etc" / "slurm.conf")}
        if not state["own_names"]:  # the names n1, n2 cannot be resolved
            variables["MASTER_ADDR"] = "127.0.0.1"
        return variables

    def keeper(self) -> int | None:
        """Process id of the keeper, None if it is gone."""
        try:
            state = self._state()
            return int(state["keeper"]) if started(int(state["keeper"])) == state["started"] else None
        except (ClusterError, OSError):
            return None

    def run(self, *command: str, timeout_s: float = 60.0) -> str:
        """The output of a SLURM command.

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
        """Add lines to slurm.conf, replacing those of an earlier call, and make SLURM read it.

        Args:
            lines: settings that a running SLURM can reload, e.g. SlurmctldParameters=preempt_send_user_signal.
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

    def stop_controller(self) -> None:
        """End slurmctld, which saves its state first; jobs continue. `start_controller` starts it again."""
        pid = int((self.folder / "run" / "slurmctld.pid").read_text())
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        until(lambda: not Path(f"/proc/{pid}").exists(), within_s=STOP_S, what="slurmctld ends")

    def start_controller(self) -> None:
        """Start slurmctld again and wait until it answers; unlike `restore` this changes no node's state."""
        keeper, before = self.keeper(), self._state()["restored"]
        if keeper is None:
            raise ClusterError(f"no cluster runs in {self.folder}")
        os.kill(keeper, signal.SIGHUP)
        until(lambda: self._state()["restored"] > before, within_s=START_S, what="the keeper starts slurmctld")
        until(self._controller_answers, within_s=START_S, what="slurmctld answers", pause_s=0.5)

    def _controller_answers(self) -> bool:
        with contextlib.suppress(ClusterError, subprocess.TimeoutExpired):
            return "UP" in self.run("scontrol", "ping")
        return False

    def cut(self, node: str) -> None:
        """Cut a node off from all others while its processes keep running; for clusters whose nodes have networks."""
        node_networks.cut(self._state()["network"]["links"][node])

    @property
    def own_names(self) -> bool:
        """Whether every node has its own host name."""
        return bool(self._state()["own_names"])

    def processes(self, node: str) -> list[int]:
        """All processes of a node except its slurmd; for clusters whose nodes have their own names."""
        if not self._state()["own_names"]:
            raise ClusterError("nodes share the machine's name, and the owner of a process cannot be determined")
        place = self._state()["namespaces"][node]
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and names_of(int(entry.name)) == place:
                    found.append(int(entry.name))
        return [pid for pid in found if pid != self.slurmd(node)]

    def kill(self, node: str) -> None:
        """Kill all processes of a node, including its slurmd; for clusters whose nodes have their own names."""
        for pid in [self.slurmd(node), *self.processes(node)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def restore(self) -> None:
        """Restart daemons that were killed, and wait until every node is usable."""
        keeper = self.keeper()
        if keeper is None:
            raise ClusterError(f"no cluster runs in {self.folder}")
        nodes, before = int(self._state()["nodes"]), self._state()["restored"]
        os.kill(keeper, signal.SIGHUP)
        until(lambda: self._state()["restored"] > before, within_s=START_S, what="the keeper starts daemons")
        until(lambda: all(self._answers(f"n{n + 1}") for n in range(nodes)), within_s=START_S, what="slurmds start")

        def back() -> bool:
            states = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T").split("\n")
            bad = {
                line.split()[0]: line.split()[1] for line in states if line and re.search(r"down|drain|comp|\*", line)
            }
            for node, state in bad.items():
                # A node whose slurmd died during a job waits for that job's end forever, unless it is set to DOWN
                # first.
                to = ["State=DOWN", "Reason=restored"] if "comp" in state else ["State=RESUME"]
                with contextlib.suppress(ClusterError):  # it comes up by itself
                    self.run("scontrol", "update", f"NodeName={node}", *to)
            return not bad and len([line for line in states if line]) == nodes

        until(back, within_s=START_S, what="all nodes are back", pause_s=0.5)

    def _answers(self, node: str) -> bool:
        try:
            return started(self.slurmd(node)) != ""
        except (OSError, ValueError):
            return False

    def _idle(self) -> int:
        if not (self.folder / STATE).exists():
            return 0
        with contextlib.suppress(ClusterError, subprocess.TimeoutExpired):
            return self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split().count("idle")
        return 0

    def _state(self) -> dict:
        try:
            return json.loads((self.folder / STATE).read_text())
        except FileNotFoundError:
            raise ClusterError(f"no cluster runs in {self.folder}") from None


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
            Keeper(folder, arguments.nodes, networks=arguments.networks).serve()
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
