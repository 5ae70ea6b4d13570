"""A bridge with one virtual link per node, any of which can be cut.

A network for the nodes of the local cluster: a bridge on this machine, and a separate eth0 in each node. It needs root
and `ip`. cluster.py defines the nodes and starts the processes in them.

A node's network namespace belongs to its processes: the kernel removes its link with the last of them, and only the
bridge has to be deleted.
"""

from __future__ import annotations

import secrets
import shutil
import subprocess
from dataclasses import dataclass, field


@dataclass
class Network:
    """One bridge.

    Attributes:
        bridge: name of its interface on this machine.
        prefix: the first three numbers of its addresses.
        links: this machine's end of each node's link.
    """

    bridge: str
    prefix: str
    links: dict[str, str] = field(default_factory=dict)

    @classmethod
    def up(cls) -> Network:
        """Create a bridge with addresses that are unused on this machine."""
        used = _ip("-o", "addr", "show")
        while True:
            name, prefix = f"mm{secrets.token_hex(2)}", f"10.{secrets.randbelow(64) + 128}.{secrets.randbelow(256)}"
            if f" {prefix}." not in used and name not in used:
                break
        _ip("link", "add", name, "type", "bridge")
        made = cls(name, prefix)
        try:
            _ip("addr", "add", f"{prefix}.1/24", "dev", name)
            _ip("link", "set", name, "up")
        except OSError:
            made.down()
            raise
        return made

    def address(self, number: int) -> str:
        """Address of the node with a number from 0."""
        return f"{self.prefix}.{11 + number}"

    def inside(self, number: int) -> str:
        """Shell lines that wait in a node's namespace for its link, and bring it up."""
        wait = "for try in $(seq 400); do ip link show eth0 >/dev/null 2>&1 && break; sleep 0.05; done"
        return f"ip link set lo up; {wait}; ip addr add {self.address(number)}/24 dev eth0; ip link set eth0 up"

    def connect(self, node: str, pid: int) -> None:
        """Create the link into the namespace of a process, which waits for it."""
        link = f"{self.bridge}{secrets.token_hex(2)}"
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        _ip("link", "set", link, "master", self.bridge, "up")
        self.links[node] = link

    def down(self) -> None:
        """Delete the bridge and the links that are left."""
        for link in (*self.links.values(), self.bridge):
            subprocess.run(["ip", "link", "delete", link], capture_output=True)


def possible() -> bool:
    """Whether this process may make bridges and network namespaces."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return False
    try:
        Network.up().down()
    except OSError:
        return False
    return subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode == 0


def cut(link: str) -> None:
    """Take a link down: packets are dropped without an error."""
    _ip("link", "set", link, "down")


def _ip(*arguments: str) -> str:
    ended = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if ended.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {ended.stderr.strip()}")
    return ended.stdout
