"""A sparse shard: what it answers, and that its record makes a step whole wherever a crash ends the writing."""

from __future__ import annotations

import numpy as np
import pytest

from raysgd.learn.parameters import Range
from raysgd.learn.transforms import FTRL, SGD, AdaGrad, Transform
from raysgd.protocol import sparse_shard
from raysgd.protocol.messages import Gone, Halted, NotYet, Verdict
from raysgd.protocol.sparse import Sparse, SparsePartial, SparsePull, SparsePulled, SparsePush
from raysgd.protocol.sparse_shard import PARAMS, SparseShard, Store
from raysgd.protocol.update import PlannedRows, Rule

SPAN = Range(100, 160)
V = 4


def fresh_store(transform: Transform) -> Store:
    params = np.random.default_rng(0).standard_normal(len(SPAN)).astype(np.float32)
    return Store(3, {PARAMS: params, **{slot: np.zeros_like(params) for slot in transform.slots}})


def shard_of(transform: Transform | None = None, store: Store | None = None, l2: float = 0.1) -> SparseShard:
    transform = transform or AdaGrad()
    rule = Rule(transform, lambda _: 0.5, PlannedRows(8, 80, 10), l2=l2)
    return SparseShard(1, rule, SPAN, store or fresh_store(transform), n_virtual=V, unpenalized=(Range(159, 160),))


def push(node: Range, ids: list[int], values: list[float], step: int = 3, incarnation: int = 0) -> SparsePush:
    vector = Sparse(np.array(ids, np.int32), np.array(values, np.float32))
    return SparsePush(1, step, node, (incarnation,) * len(node), SparsePartial(vector, 1.0, 2))


def complete(shard: SparseShard) -> None:
    step = shard.version
    assert shard.push(push(Range(2, 4), [101, 130, 159], [1, 2, 3], step)).verdict is Verdict.ACCEPTED
    assert shard.push(push(Range(0, 2), [101, 120], [4, 5], step)).verdict is Verdict.ACCEPTED


def pull(shard: SparseShard, version: int, ids: list[int]) -> object:
    return shard.pull(SparsePull(1, version, np.array(ids, np.int32)))


def test_a_step_by_hand() -> None:
    shard = shard_of(SGD(0.5))
    before = shard.store.arrays[PARAMS].copy()
    complete(shard)
    after = before.copy()
    for i, g in {101: 5.0, 120: 5.0, 130: 2.0, 159: 3.0}.items():
        penalty = 0.0 if i == 159 else 0.1 * before[i - 100]
        after[i - 100] -= 0.5 * (g / 8 + penalty)
    np.testing.assert_allclose(shard.store.arrays[PARAMS], after, rtol=1e-6)
    assert shard.version == 4
    assert [(c.step, c.loss, c.rows) for c in shard.commits] == [(3, 2.0, 4)]


def test_both_versions_are_answered_and_no_other() -> None:
    shard = shard_of()
    ids = [100, 101, 120, 158, 159]
    old = shard.store.arrays[PARAMS][np.array(ids) - 100].copy()
    assert pull(shard, 2, ids) == Gone(1, 2, oldest=3)
    complete(shard)
    new = pull(shard, 4, ids)
    again = pull(shard, 3, ids)
    assert isinstance(new, SparsePulled)
    assert isinstance(again, SparsePulled)
    assert np.array_equal(again.values, old)
    assert np.array_equal(new.values, shard.store.arrays[PARAMS][np.array(ids) - 100])
    assert (new.values != old).tolist() == [False, True, True, False, True]
    assert pull(shard, 2, ids) == Gone(1, 2, oldest=3)
    assert pull(shard, 5, ids) == NotYet(1, 5)
    assert isinstance(pull(shard, 4, []), SparsePulled)
    shard.freeze()
    assert pull(shard, 5, ids) == Halted(1, 5, None)


def test_reads_change_nothing() -> None:
    shard = shard_of()
    complete(shard)
    digests = [shard.snapshot(v).digest() for v in (3, 4)]
    for version in (3, 4, 5):
        found = pull(shard, version, [100, 101, 159])
        if isinstance(found, SparsePulled):
            found.values[:] = 99
    snapshot = shard.snapshot(4)
    snapshot.params[:] = 99
    assert [shard.snapshot(v).digest() for v in (3, 4)] == digests
    with pytest.raises(KeyError):
        shard.snapshot(2)


@pytest.mark.parametrize("transform", [SGD(0.5, momentum=0.9), AdaGrad(), FTRL(l1=0.1)], ids=["sgd", "adagrad", "ftrl"])
def test_a_crash_anywhere_in_the_writing_is_made_good(monkeypatch: pytest.MonkeyPatch, transform: Transform) -> None:
    monkeypatch.setattr(sparse_shard, "BLOCK", 2)
    whole = shard_of(transform)
    complete(whole)
    expected, before = whole.snapshot(4).digest(), whole.snapshot(3).digest()
    record = whole.store.record
    assert record is not None
    n_writes = sum(1 for _ in Store(3, fresh_store(transform).arrays, record).writes())
    assert n_writes >= 2 * (1 + len(transform.slots))
    for crash in range(n_writes + 1):
        store = fresh_store(transform)
        store.record = record  # sealed
        writing = store.writes()
        for _ in range(crash):
            next(writing)
        assert store.version == 3
        successor = shard_of(transform, store)
        assert successor.version == 4
        assert successor.snapshot(4).digest() == expected
        assert successor.snapshot(3).digest() == before
        again = shard_of(transform, store)  # and once more: nothing is applied twice
        assert again.snapshot(4).digest() == expected
        assert again.push(push(Range(0, 4), [101], [1.0], step=3)).verdict is Verdict.DUPLICATE


def test_what_is_not_finite_is_never_sealed() -> None:
    shard = shard_of()
    before = shard.snapshot(3).digest()
    assert shard.push(push(Range(0, 4), [101], [np.inf])).verdict is Verdict.ACCEPTED
    assert (shard.version, shard.diverged, shard.store.record) == (3, 3, None)
    assert shard.snapshot(3).digest() == before
    assert pull(shard, 4, [101]) == Halted(1, 4, 3)
    assert shard.push(push(Range(0, 4), [101], [1.0])).verdict is Verdict.FROZEN


@pytest.mark.parametrize(
    ("ids", "values"),
    [
        ([99], [1.0]),
        ([160], [1.0]),
        ([102, 101], [1.0, 1.0]),
        ([101, 101], [1.0, 1.0]),
        ([101], [1.0, 2.0]),
    ],
)
def test_malformed_vectors_are_refused(ids: list[int], values: list[float]) -> None:
    assert shard_of().push(push(Range(0, 4), ids, values)).verdict is Verdict.MALFORMED


def test_the_fence() -> None:
    shard = shard_of()
    assert shard.fence(Range(0, 2), 5) == 3
    assert shard.push(push(Range(0, 2), [101], [1.0])).verdict is Verdict.FENCED
    assert shard.push(push(Range(0, 2), [101], [1.0], incarnation=5)).verdict is Verdict.ACCEPTED
    assert shard.push(push(Range(0, 1), [101], [1.0], incarnation=5)).verdict is Verdict.DUPLICATE
    assert shard.push(push(Range(2, 4), [101], [1.0], step=4)).verdict is Verdict.EARLY
    assert shard.push(push(Range(1, 3), [101], [1.0])).verdict is Verdict.MALFORMED


def test_a_part_without_rows() -> None:
    shard = shard_of()
    empty = SparsePush(1, 3, Range(0, 2), (0, 0), SparsePartial(None, 0.0, 0))
    assert shard.push(empty).verdict is Verdict.ACCEPTED
    assert shard.push(push(Range(2, 4), [101], [1.0])).verdict is Verdict.ACCEPTED
    assert shard.version == 4
    for node in (Range(0, 2), Range(2, 4)):
        shard.push(SparsePush(1, 4, node, (0, 0), SparsePartial(None, 0.0, 0)))
    assert shard.version == 5
    assert shard.snapshot(5).params.tobytes() == shard.snapshot(4).params.tobytes()


def test_bytes_follow_what_is_touched() -> None:
    shard = shard_of()
    complete(shard)
    pull(shard, 4, [100, 101, 102])
    assert (shard.pushed_bytes, shard.pulled_bytes) == (5 * 8, 3 * 8)
