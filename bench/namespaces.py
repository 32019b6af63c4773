"""A network of our own: namespaces that hang on one switch, each with an address, and links that can be cut or slowed.

    switch (a namespace with a bridge)
      ├── 10.78.0.1
      └── 10.78.0.2

It takes Linux and root. Files and processes are the machine's, its own network is not touched.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from dataclasses import dataclass, field

SUBNET = "10.78.0"

#: seconds for which a limited link may send at full speed after a pause
BURST_S = 0.0005


def lacking() -> str | None:
    """Why no network can be made here; None: one can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs Linux and root, for namespaces"
    if shutil.which("ip") is None:
        return "needs ip: apt-get install iproute2"
    network = Network()
    try:
        network.create()
        network.add()
    except subprocess.CalledProcessError as error:
        return f"namespaces are not allowed here: {error.stderr.decode().strip()}"
    finally:
        network.remove()
    return None


@dataclass
class Network:
    """A switch, and the namespaces that hang on it, by number from 1."""

    name: str = field(default_factory=lambda: f"rs{secrets.token_hex(3)}")
    hosts: int = 0

    def create(self) -> None:
        _ip("netns", "add", self.name)
        for words in ("link add br0 type bridge", "link set br0 up", "link set lo up"):
            _ip("-n", self.name, *words.split())

    def add(self) -> int:
        """One more namespace; its number."""
        self.hosts += 1
        n, host = self.hosts, f"{self.name}-{self.hosts}"
        _ip("netns", "add", host)
        _ip("-n", self.name, *f"link add v{n} type veth peer name eth0 netns {host}".split())
        _ip("-n", self.name, *f"link set v{n} master br0 up".split())
        for words in ("link set lo up", f"addr add {self.address(n)}/24 dev eth0", "link set eth0 up"):
            _ip("-n", host, *words.split())
        # Ray finds a machine's address by the way out of the network, so there is one.
        _ip("-n", host, *f"route add default via {SUBNET}.254".split())
        return n

    def address(self, number: int) -> str:
        return f"{SUBNET}.{number}"

    def inside(self, number: int) -> list[str]:
        """Words that run what follows them in a namespace."""
        return ["ip", "netns", "exec", f"{self.name}-{number}"]

    def cut(self, number: int) -> None:
        """Nothing goes to the namespace or comes from it any more; nobody is told."""
        _ip("-n", self.name, "link", "set", f"v{number}", "nomaster")

    def limit(self, number: int, bits: float) -> None:
        """Let a namespace send and get so many bits a second, each way. CalledProcessError where the kernel cannot."""
        burst = max(16_000, int(bits / 8 * BURST_S))
        how = f"root tbf rate {int(bits)}bit burst {burst} latency 200ms".split()
        host = f"{self.name}-{number}"
        for where in ((self.name, f"v{number}"), (host, "eth0")):
            words = ["netns", "exec", where[0], "tc", "qdisc", "replace", "dev", where[1], *how]
            _ip(*words)

    def unlimit(self, number: int) -> None:
        """Links as they were."""
        for where in ((self.name, f"v{number}"), (f"{self.name}-{number}", "eth0")):
            _ip("netns", "exec", where[0], "tc", "qdisc", "del", "dev", where[1], "root")

    def heal(self, number: int) -> None:
        _ip("-n", self.name, "link", "set", f"v{number}", "master", "br0")

    def remove(self) -> None:
        """All of it goes; processes in it keep what they have and reach nobody."""
        there = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
        for name in (line.split()[0] for line in there.splitlines()):
            if name == self.name or name.startswith(f"{self.name}-"):
                _ip("netns", "del", name)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
