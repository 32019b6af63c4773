"""Processes that talk to the bench in lines of pickled text: started, told, read, ended."""

from __future__ import annotations

import atexit
import base64
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

#: one BLAS thread a process, for every contestant; a Ray of its own for every run
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
    **dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class Child:
    """``python -m MODULE ARGUMENTS``, with a line-wise conversation over its standard streams.

    Told to end where the bench ends before it.

    environment: more of it;  launcher: what stands before ``python``
    """

    def __init__(
        self,
        module: str,
        *arguments: object,
        environment: Mapping[str, str] | None = None,
        launcher: tuple[str, ...] = (),
    ) -> None:
        command = [*launcher, sys.executable, "-m", module, *map(str, arguments)]
        env = {**ENVIRONMENT, **(environment or {})}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        atexit.register(self.process.terminate)

    def tell(self, value: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(pack(value) + "\n")
        self.process.stdin.flush()

    def hear(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended with {self.process.wait()}")
        return unpack(line)

    def end(self) -> None:
        """Close its standard input, on which it ends, and wait."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()
        atexit.unregister(self.process.terminate)


def answer(module: str, *arguments: object, task: object = None, launcher: tuple[str, ...] = ()) -> Any:
    """What ``python -m MODULE ARGUMENTS`` says after it was told ``task``, if there is one."""
    child = Child(module, *arguments, launcher=launcher)
    try:
        if task is not None:
            child.tell(task)
        return child.hear()
    finally:
        child.end()


def rendezvous() -> dict[str, str]:
    """Where the processes of one torch.distributed group meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}


def pack(value: object) -> str:
    """A line of text. Only the bench's own processes read it."""
    return base64.b64encode(pickle.dumps(value)).decode()


def unpack(line: str) -> Any:
    return pickle.loads(base64.b64decode(line))


def say(value: object) -> None:
    """A child's line to the bench."""
    print(pack(value), flush=True)


def listen() -> Any:
    """The bench's next line to this child; None where there is none left."""
    line = sys.stdin.readline()
    return unpack(line) if line else None
