"""Through shared memory and through actor calls, and with workers of both kinds: the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from ray_runs import spec_of, write_table

from raysgd.errors import RunError
from raysgd.learn.parameters import Range
from raysgd.protocol.membership import Membership, Share
from raysgd.report.progress import Silent
from raysgd.runtime import crew, gang, segment
from raysgd.runtime.board import Board, BoardAddress
from raysgd.runtime.trainer import Trainer
from raysgd.runtime.worker import Task, Worker

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("transports") / "bytes")


def digest(place: Path, name: str) -> str:
    spec = spec_of(place, run__name=name, scaling__num_workers=3, scaling__num_servers=2)
    return Trainer.from_spec(replace(spec, validation=None), report=Silent()).fit().digest


class Chooser:
    """Stands in for the driver's choice; counts the workers that were given shared memory."""

    def __init__(self, choose: Callable[[int], bool]) -> None:
        self.choose, self.asked, self.shared = choose, 0, 0

    def __call__(self, site: str | None, boards: list[gang.Place]) -> list[gang.BoardAddress] | None:
        found = gang.same_node(site, boards)
        self.asked += 1
        if found is None or not self.choose(self.asked - 1):
            return None
        self.shared += 1
        return found


@pytest.mark.skipif(segment.site() is None, reason="memory is shared on x86-64 Linux only")
def test_every_transport_gives_the_same_bytes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = {}
    for name, choose in {
        "memory": lambda _worker: True,
        "calls": lambda _worker: False,
        "mixed": lambda worker: worker == 1,
    }.items():
        chooser = Chooser(choose)
        monkeypatch.setattr(crew, "same_node", chooser)
        digests[name] = digest(place, name)
        assert (chooser.asked, chooser.shared) == (3, {"memory": 3, "calls": 0, "mixed": 1}[name])
    assert digests["memory"] == digests["calls"] == digests["mixed"]


def unreadable(_address: object) -> Board:
    raise RunError("the memory of process 1 cannot be shared: Permission denied")


def test_where_memory_cannot_be_shared_actor_calls_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where /proc hides the processes of others: found out by the worker, not by the driver."""
    monkeypatch.setattr(Board, "attach", unreadable)
    monkeypatch.setattr("raysgd.runtime.worker.die_with_parent", lambda: None)  # this process is no actor
    worker = Worker()
    spans = (Range(0, 1),)
    worker.task = Task(None, None, None, None, None, 1, spans, 0, 0)  # type: ignore[arg-type]
    worker.boards = [BoardAddress(segment.Address(1, 1, 1, b""), b"", 1)]
    assert worker.connect(Share(Membership(1).assign(0, Range(0, 1)), (Range(0, 1),), 0)) is False
