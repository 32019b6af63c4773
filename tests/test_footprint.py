"""What the parameters take, against what the processes really reserve; and what is told where that is too much."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from raysgd.data.columns import Columns
from raysgd.data.dataset import ArrowDataset
from raysgd.errors import InputError
from raysgd.footprint import Footprint, available_here, footprint, learner_of
from raysgd.learn.models import (
    MLP,
    FactorizationMachine,
    HashedLogisticRegression,
    LinearRegression,
    LogisticRegression,
    SoftmaxRegression,
)
from raysgd.learn.models.base import Model
from raysgd.learn.parameters import even_split
from raysgd.learn.transforms import SGD
from raysgd.protocol.kept import Kept
from raysgd.protocol.membership import deal
from raysgd.protocol.tree import cover
from raysgd.runtime.board import Board
from raysgd.runtime.shared import Slots
from raysgd.spec import RunSpec, ScalingConfig, TrainConfig

NUMBERS = Columns((("x", 783), ("y", 1)), (), "late", None)
WITH_CODES = Columns((("x", 3),), ("kind", "place"), "late", None)


def spec(model: Model, workers: int = 1, servers: int = 1, **train: float) -> RunSpec:
    scaling = ScalingConfig(num_workers=workers, num_servers=servers)
    data = ArrowDataset("train", label="late")
    return RunSpec(data, None, model, SGD(0.1, momentum=0.9), TrainConfig(**train), scaling)  # type: ignore[arg-type]


def needed(model: Model, workers: int = 1, servers: int = 1, columns: Columns = NUMBERS) -> Footprint:
    learner = learner_of(spec(model), columns)
    assert learner is not None
    return footprint(spec(model, workers, servers), learner)


@pytest.mark.skipif(sys.platform != "linux", reason="shared memory is a memfd")
@pytest.mark.parametrize("workers", [1, 2, 3, 8])
@pytest.mark.parametrize("servers", [1, 3])
def test_it_is_what_is_reserved(workers: int, servers: int) -> None:
    """The boards of the servers and the slots of the workers; a page here and there, and the ring of commits, aside."""
    model = MLP(hidden=(512, 512), loss="squared")
    found, span = needed(model, workers, servers), even_split(needed(model).n_params, servers)
    board = Board.create(max(map(len, span)), Kept(2, ("momentum",)))
    empty = Board.create(1, Kept(2, ("momentum",)))
    assert found.server == pytest.approx(board.segment.address.size - empty.segment.address.size, abs=50_000)
    slots = [len(cover(run, 8)) for run in deal(8, workers)]
    made = Slots.create(max(slots), found.n_params, servers)
    assert found.worker >= made.segment.address.size + 4 * found.n_params - 50_000
    assert found.driver == 2 * 4 * found.n_params
    for segment in (board.segment, empty.segment, made.segment):
        segment.close()


@pytest.mark.parametrize(
    ("model", "columns", "n_params"),
    [
        (LinearRegression(), NUMBERS, 785),
        (LogisticRegression(), NUMBERS, 785),
        (LogisticRegression(), WITH_CODES, None),
        (SoftmaxRegression(), NUMBERS, None),
        (MLP(hidden=(4,), loss="cross_entropy"), NUMBERS, None),
        (MLP(hidden=(4,), loss="squared"), NUMBERS, 784 * 4 + 4 + 4 + 1),
        (HashedLogisticRegression(hash_bits=10), WITH_CODES, 1024 + 3 + 1),
        (FactorizationMachine(hash_bits=10, factors=2), WITH_CODES, 3 * 1024 + 3 * 3 + 1),
    ],
)
def test_when_the_schema_tells_the_size(model: Model, columns: Columns, n_params: int | None) -> None:
    learner = learner_of(spec(model), columns)
    assert (None if learner is None else learner.layout.n_params) == n_params


def test_a_hashed_model_takes_one_buffer_and_workers_next_to_nothing() -> None:
    found = needed(HashedLogisticRegression(hash_bits=20), 2, 2, WITH_CODES)
    assert found.server == pytest.approx(2 * 4 * (1 << 20) / 2, rel=0.1)
    assert (found.worker, found.driver) == (0, 2 * 4 * found.n_params)


def test_staleness_takes_a_third_buffer() -> None:
    learner = learner_of(spec(LogisticRegression()), NUMBERS)
    assert learner is not None
    exact, stale = (footprint(spec(LogisticRegression(), staleness=k), learner) for k in (0, 2))
    assert (stale.server, exact.server) == (3 * 2 * 4 * 785, 2 * 2 * 4 * 785)


def test_too_many_servers_are_refused() -> None:
    with pytest.raises(InputError, match=r"scaling\.num_servers must be in \[1, 99\] for 785 parameters, got 100"):
        needed(LogisticRegression(), servers=100)


def test_what_does_not_fit_is_told_with_its_size() -> None:
    found = Footprint(10**10, 2, 3, 80 * 10**9, 120 * 10**9, 80 * 10**9)
    for places, there in (([25 * 10**9], "25.0 GB"), ([500 * 10**9, 99 * 10**9], "599.0 GB on 2 nodes")):
        with pytest.raises(InputError) as caught:
            found.refuse(places)
        assert str(caught.value) == (
            "the model does not fit into memory: 10,000,000,000 parameters need 80.0 GB a server, 120.0 GB a worker, "
            f"80.0 GB the driver: 600.0 GB with 2 servers and 3 workers; available: {there}. "
            "Take a smaller model, fewer workers, or larger or more machines"
        )
    found.refuse([])
    found.refuse([600 * 10**9])
    found.refuse([120 * 10**9] * 5)
    with pytest.raises(InputError):
        found.refuse([119 * 10**9] * 99)


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="reads /proc/meminfo")
def test_there_is_some_memory_here() -> None:
    (found,) = available_here()
    total = re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert total is not None
    assert 0 < found <= 1024 * int(total[1])


def test_replicas_are_servers_too() -> None:
    learner = learner_of(spec(LogisticRegression()), NUMBERS)
    assert learner is not None
    one = spec(LogisticRegression())
    two = replace(one, scaling=replace(one.scaling, replicas=1))
    with_one, without = footprint(two, learner), footprint(one, learner)
    assert with_one.total - without.total == without.server
    assert "2 servers and 1 workers" in with_one.describe()
