"""Several machines on one: each has processes, a network address, a home, /dev/shm and an sshd of its own.

    site (a network and processes of its own) ── bridge 10.77.0.254
      ├── head  10.77.0.1   sshd
      ├── w1    10.77.0.2   sshd
      └── w2    10.77.0.3   sshd

Linux namespaces, so it takes root. Nothing of the real machine's network is touched, and all processes end with the
first one of the site, whatever a test did. Files are shared, but for the homes, /tmp/ray, /run and /dev/shm.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NETWORK = "10.77.0"

PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"

#: the first process of a machine: it takes in what loses its parent, and with it all others end
FIRST = "sleep infinity & wait"

NAMESPACES = ["--mount", "--pid", "--net", "--uts", "--ipc"]


#: what this machine tells its BLAS, which determines the bytes: machines that are told otherwise are refused as workers
BLAS = " ".join(f"{name}={value}" for name, value in os.environ.items() if name.startswith("OPENBLAS_"))


def installation(settings: str = "") -> str:
    """A script in the place of ``pip install``, for where there may be no package index: an environment that finds the
    packages installed here, and what lies in ~/raysgd.

    settings: NAME=value for all shells
    """
    return f"""set -e
cd ~/raysgd-env 2>/dev/null || {{ {sys.base_prefix}/bin/python3 -m venv --without-pip ~/raysgd-env; cd ~/raysgd-env; }}
printf '%s\\n' ~/raysgd {Path(pytest.__file__).parent.parent} > "$(echo lib/python3*)/site-packages/installed.pth"
for command in ray:ray.scripts.scripts raysgd:raysgd; do
    file=bin/${{command%:*}}
    printf '#!/bin/sh\\nexec %s -m %s "$@"\\n' ~/raysgd-env/bin/python ${{command#*:}} > $file
    chmod +x $file
done
grep -qs INSTALLED ~/.bashrc || echo 'export INSTALLED=1 {settings} {BLAS}' >> ~/.bashrc
"""


def lacking() -> str | None:
    """Why there can be no machines here; None: there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs Linux and root, for namespaces"
    missing = [name for name in ("unshare", "nsenter", "ip", "rsync", "ssh-keygen") if shutil.which(name) is None]
    if not sshd():
        missing.append("sshd")
    if missing:
        return f"needs {', '.join(missing)}: apt-get install openssh-server rsync iproute2"
    links = "ip link add br0 type bridge && ip link add veth1 type veth peer name veth2"
    tried = subprocess.run(["unshare", *NAMESPACES, "-f", "bash", "-c", links], capture_output=True, check=False)
    return f"namespaces are not allowed here: {tried.stderr.decode().strip()}" if tried.returncode else None


def needs_machines() -> None:
    """Skip the module, loudly and by name, where there can be no machines."""
    if reason := lacking():
        pytest.skip(f"NOT RUN, real machines over ssh: {reason}", allow_module_level=True)


def sshd() -> str | None:
    return shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


@dataclass
class Place:
    """Somewhere to run commands: the site itself, or one of its machines.

    pid: of its first process, as the real machine counts;  process: what holds its namespaces
    """

    name: str
    home: Path
    pid: int
    process: subprocess.Popen[bytes]

    def command(self, *words: str) -> list[str]:
        """The command line that runs ``words`` there, in its home."""
        inside = ["nsenter", f"--target={self.pid}", *NAMESPACES, f"--wd={self.home}"]
        environment = {"HOME": str(self.home), "TERM": "dumb", "PATH": PATH, "RAY_USAGE_STATS_ENABLED": "0"}
        return [*inside, "env", "-i", *(f"{k}={v}" for k, v in environment.items()), *words]

    def shell(self, script: str) -> list[str]:
        """The command line that runs a script there as if somebody had logged in."""
        return self.command("bash", "-lc", f"[ -f ~/.bashrc ] && . ~/.bashrc; {script}")

    def run(self, *words: str, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
        """What such a shell says, its errors too, and returns."""
        done = subprocess.run(
            self.shell(" ".join(words)),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        done.stdout += done.stderr
        return done

    def must(self, *words: str, timeout: float = 120.0) -> str:
        """The same; fails where it does not return 0."""
        done = self.run(*words, timeout=timeout)
        assert done.returncode == 0, f"{self.name}: {' '.join(words)}: {done.returncode}\n{done.stdout}"
        return done.stdout


@dataclass
class Site(Place):
    """The network that the machines hang on, and the seat of the user, who has the key to all of them."""

    base: Path = Path()
    machines: dict[str, Machine] = field(default_factory=dict)
    begun: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def key(self) -> Path:
        return self.base / "key"

    @classmethod
    def make(cls, base: Path) -> Site:
        (base / "site").mkdir(parents=True)
        Path("/tmp/ray").mkdir(exist_ok=True)  # what is mounted there is seen in the namespaces only
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", base / "key"], check=True)
        process, pid = _begun(["setpriv", "--pdeathsig", "KILL"], base / "site", "")
        site = cls("site", base / "site", pid, process, base)
        site.net(
            "ip link add br0 type bridge",
            f"ip addr add {NETWORK}.254/24 dev br0",
            "ip link set br0 up",
            "ip link set lo up",
        )
        return site

    def net(self, *commands: str) -> None:
        """Commands in the network of the site, with the processes of the real machine in sight."""
        for command in commands:
            subprocess.run(["nsenter", f"--target={self.pid}", "--net", *command.split()], check=True)

    def add(self, name: str, shm: str = "1g") -> Machine:
        """One more machine. shm: the size of its /dev/shm"""
        number = len(self.machines) + 1
        home = self.base / name
        (home / ".ssh").mkdir(parents=True)
        (home / ".ssh" / "authorized_keys").write_bytes(self.key.with_suffix(".pub").read_bytes())
        (home / ".ssh" / "authorized_keys").chmod(0o600)
        process, pid = _begun(self.command(), home, f"mount -t tmpfs -o size={shm} tmpfs /dev/shm; hostname {name};")
        machine = Machine(name, home, pid, process, f"{NETWORK}.{number}")
        self.net(
            f"ip link add v{number} type veth peer name eth0 netns {pid}",
            f"ip link set v{number} master br0 up",
        )
        address = f"ip addr add {machine.address}/24 dev eth0; ip link set eth0 up"
        # Ray finds a machine's address by the way out of the network, so there is one.
        machine.must(f"ip link set lo up; {address}; ip route add default via {NETWORK}.254")
        machine.must("ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/host")
        options = "-f /dev/null -h ~/.ssh/host -o PidFile=none -o StrictModes=no -o MaxStartups=100"
        machine.must(f"{sshd()} {options} -o AuthorizedKeysFile={home}/.ssh/authorized_keys -E {home}/sshd.log")
        self.machines[name] = machine
        return machine

    def begin(self, script: str) -> subprocess.Popen[str]:
        """A script that goes on at the user's seat; it ends with the site at the latest."""
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.begun.append(subprocess.Popen(self.shell(script), text=True, **pipes))
        return self.begun[-1]

    def end(self) -> None:
        """All machines and all processes are gone."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        for place in (self, *self.machines.values()):
            place.process.wait(30)
        for process in self.begun:
            process.communicate(timeout=30)
        with suppress(OSError):
            Path("/tmp/ray").rmdir()  # unless somebody else uses it


@dataclass
class Machine(Place):
    """One machine. address: on the site's network"""

    address: str = ""

    def lose(self) -> None:
        """The machine is gone, from one moment to the next."""
        os.kill(self.pid, signal.SIGKILL)


def _begun(before: Sequence[str], home: Path, setup: str) -> tuple[subprocess.Popen[bytes], int]:
    """Namespaces within those of ``before``, in which root lives in ``home``; and the pid of their first process."""
    people = Path("/etc/passwd").read_text().splitlines()
    root = [line for line in people if not line.startswith("root:")] + [f"root:x:0:0:root:{home}:/bin/bash"]
    (home / "passwd").write_text("\n".join(root) + "\n")
    mark = f": {home};"
    mounts = f"mount --bind {home}/passwd /etc/passwd; mount -t tmpfs tmpfs /tmp/ray; mount -t tmpfs tmpfs /run;"
    script = f"{mark} set -e; {mounts} mkdir /run/sshd; {setup} touch {home}/up; {FIRST}"
    process = subprocess.Popen(
        [*before, "unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "bash", "-c", script]
    )
    deadline = time.monotonic() + 30
    while not (home / "up").exists():
        assert process.poll() is None, f"{home.name}: no namespaces: {process.returncode}"
        assert time.monotonic() < deadline, f"{home.name}: no namespaces within 30 s"
        time.sleep(0.05)
    return process, _first(mark)


def _first(mark: str) -> int:
    """The shell whose script begins with ``mark``."""
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (directory / "cmdline").read_bytes().split(b"\0")
            if words[0] == b"bash" and words[2].startswith(mark.encode()):
                return int(directory.name)
    raise AssertionError(f"nobody runs {mark}")


def made_site(base: Path) -> Iterator[Site]:
    """A site for the duration of a fixture."""
    site = Site.make(base)
    try:
        yield site
    finally:
        site.end()
