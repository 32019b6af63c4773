"""Kills a process that saves, prunes or deletes checkpoints, at every moment at which it can be killed.

    python tests/kill_sweep.py WAY SCENARIO KIND PLACE

For each moment ``PLACE/base`` is copied to ``PLACE/NAME@N`` and a process is forked that acts on the copy and is killed
when it reaches NAME the Nth time; N grows until the process survives. Prints the [NAME, N] of those that were killed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs as pafs

from raysgd import checkpoint, failpoints
from raysgd.learn.parameters import Array, Layout
from raysgd.protocol.generation import Generation
from raysgd.storage import Storage

LAYOUT = Layout((Array("weights", (3, 2)), Array("bias", (2,), penalized=False)))

#: the seed of the values that a step has when it is saved again
OTHER = 999

#: what Python announces to audit hooks before it changes a directory
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "shutil.rmtree")


def generation(step: int, seed: int | None = None) -> Generation:
    rng = np.random.default_rng(step if seed is None else seed)
    params, momentum = rng.normal(size=(2, LAYOUT.n_params)).astype(np.float32)
    return Generation(step, params, {"momentum": momentum})


def save(storage: Storage, step: int, seed: int | None = None) -> None:
    """A checkpoint; that of step 20 has the least validation loss."""
    facts = {"attempt": 1, "metrics": {"valid_loss": abs(step - 20.0)}}
    checkpoint.save(storage, generation(step, seed), LAYOUT, facts)


def open_storage(kind: str, run: Path) -> Storage:
    """A run's directory on a disk, or on a file system of which nothing is known."""
    if kind == "local":
        return Storage.open(run)
    return Storage(pafs.SubTreeFileSystem(str(run.parent), pafs.LocalFileSystem()), run.name)


@dataclass(frozen=True)
class Scenario:
    """steps: saved before; old, new: the step and the seed of the last checkpoint before and after ``act``, if any."""

    steps: tuple[int, ...]
    act: Callable[[Storage], None]
    old: tuple[int, int] | None
    new: tuple[int, int] | None
    leftovers: bool = False


def _save_and_prune(storage: Storage) -> None:
    save(storage, 40)
    checkpoint.prune(storage, 1)


SCENARIOS = {
    "first": Scenario((), lambda s: save(s, 30), None, (30, 30)),
    "new": Scenario((10, 20), lambda s: save(s, 30), (20, 20), (30, 30)),
    "leftovers": Scenario((10, 20), lambda s: save(s, 30), (20, 20), (30, 30), leftovers=True),
    "again": Scenario((10, 20), lambda s: save(s, 20, OTHER), (20, 20), (20, OTHER)),
    "only": Scenario((20,), lambda s: save(s, 20, OTHER), (20, 20), (20, OTHER)),
    "prune": Scenario((10, 20, 30, 40, 50), lambda s: checkpoint.prune(s, 2), (50, 50), (50, 50)),
    "new-prune": Scenario((10, 20, 30), _save_and_prune, (30, 30), (40, 40)),
    "delete": Scenario((10, 20), lambda s: s.delete_dir(checkpoint.DIRECTORY), (20, 20), None),
}


def prepare(kind: str, scenario: Scenario, run: Path) -> Storage:
    run.mkdir()
    storage = open_storage(kind, run)
    for step in scenario.steps:
        save(storage, step)
    if scenario.leftovers:
        here = ("step-00000030", "step-00000020.2")
        killed = [f".writing-{name}" for name in here] + [".deleting-step-00000005"] if kind == "local" else here
        for name in killed:
            (run / checkpoint.DIRECTORY / name).mkdir()
            (run / checkpoint.DIRECTORY / name / checkpoint.PARAMS).write_bytes(b"half")
            (run / checkpoint.DIRECTORY / name / f".{checkpoint.STATE}.1-0123abcd.tmp").write_bytes(b"")
    return storage


def at_failpoint(name: str, count: int, run: Path) -> None:  # noqa: ARG001 - all arming functions look alike
    failpoints.arm(f"{name}@{count}:kill")


def at_call(name: str, count: int, run: Path) -> None:  # noqa: ARG001
    """Die before the ``count``-th call that changes something below ``run``."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in CHANGES) and (event != "open" or str(run) in os.fsdecode(arguments[0])):
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def killed(kind: str, scenario: Scenario, place: Path, name: str, count: int, arm: Callable[..., None]) -> bool:
    """Whether the forked process was killed; if not, it has ended well."""
    run = place / f"{name}@{count}"
    shutil.copytree(place / "base", run)
    child = os.fork()
    if child == 0:
        try:
            arm(name, count, run)
            scenario.act(open_storage(kind, run))
        except BaseException:  # noqa: BLE001 - whatever it is, the forked process must not go on as this one
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), f"{run} ended with {status}"
    return status != 0


def main(way: str, scenario: str, kind: str, place: str) -> None:
    names, arm = {"failpoints": (tuple(failpoints.NAMES), at_failpoint), "calls": (("call",), at_call)}[way]
    found = []
    for name in names:
        count = 1
        while killed(kind, SCENARIOS[scenario], Path(place), name, count, arm):
            found.append((name, count))
            count += 1
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
