"""The fixed tree: shape, covers, and a sum that does not depend on who sends what, or when."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysgd.learn.batch import Float32
from raysgd.learn.parameters import Range
from raysgd.protocol.membership import deal
from raysgd.protocol.tree import EMPTY, Partial, TreeSum, cover, depth, is_node, split, sum_leaves


def leaves(n: int, seed: int = 0, absent: frozenset[int] = frozenset()) -> list[Partial]:
    values = np.random.default_rng(seed).standard_normal((n, 17)).astype(np.float32) * 1e3
    return [EMPTY if v in absent else Partial(values[v], float(values[v, 0]), 3) for v in range(n)]


def serial(node: Range, parts: list[Partial]) -> np.ndarray | None:
    """The definition, written down once more: left plus right, absent leaves skipped."""
    if len(node) == 1:
        return parts[node.begin].gradient
    half = 1
    while half * 2 < len(node):
        half *= 2
    left = serial(Range(node.begin, node.begin + half), parts)
    right = serial(Range(node.begin + half, node.end), parts)
    if left is None or right is None:
        return right if left is None else left
    return left + right


@pytest.mark.parametrize(("n", "left"), [(2, 1), (3, 2), (4, 2), (5, 4), (7, 4), (8, 4), (9, 8), (1000, 512)])
def test_a_node_splits_at_the_largest_power_of_two_below_its_size(n: int, left: int) -> None:
    assert split(Range(3, 3 + n)) == (Range(3, 3 + left), Range(3 + left, 3 + n))


@given(st.integers(1, 70), st.data())
def test_a_cover_is_disjoint_whole_and_small(n: int, data: st.DataObject) -> None:
    begin = data.draw(st.integers(0, n - 1))
    run = Range(begin, data.draw(st.integers(begin + 1, n)))
    nodes = cover(run, n)
    assert [v for node in nodes for v in range(node.begin, node.end)] == list(range(run.begin, run.end))
    assert all(is_node(node, n) for node in nodes)
    assert len(nodes) <= max(1, 2 * (n - 1).bit_length())


def test_three_workers_over_eight_leaves_push_five_vectors() -> None:
    assert sum(len(cover(run, 8)) for run in deal(8, 3)) == 5
    assert [len(cover(run, 8)) for run in deal(8, 4)] == [1, 1, 1, 1]


def summed(node: Range, parts: list[Partial]) -> Partial:
    """By ``sum_leaves``, with as many vectors as it asks for."""

    def leaf(v: int, out: Float32) -> Partial:
        gradient = parts[v].gradient
        if gradient is None:
            return parts[v]
        np.copyto(out, gradient)
        return Partial(out, parts[v].loss, parts[v].rows)

    size = next(len(p.gradient) for p in parts if p.gradient is not None)
    return sum_leaves(node, leaf, [np.empty(size, np.float32) for _ in range(depth(len(node)) + 1)])


@given(st.integers(1, 12), st.data())
def test_the_sum_is_the_same_bytes_for_any_workers_and_any_order(n: int, data: st.DataObject) -> None:
    absent = frozenset(data.draw(st.sets(st.integers(0, n - 1), max_size=n - 1)))
    parts = leaves(n, data.draw(st.integers(0, 99)), absent)
    want = serial(Range(0, n), parts)
    assert want is not None
    nodes = [node for run in deal(n, data.draw(st.integers(1, n))) for node in cover(run, n)]
    tree = TreeSum(n)
    for node in data.draw(st.permutations(nodes)):
        assert tree.offer(node, summed(node, parts))
    total = tree.total()
    assert total.gradient is not None
    assert total.gradient.tobytes() == want.tobytes()
    assert total.rows == 3 * (n - len(absent))
    blocks = [tree.total(slice(begin, begin + 5)).gradient for begin in range(0, 17, 5)]
    assert b"".join(b.tobytes() for b in blocks if b is not None) == want.tobytes()


def test_the_order_matters_so_the_tests_can_fail() -> None:
    parts = leaves(8)
    forward = serial(Range(0, 8), parts)
    rotated = serial(Range(0, 8), parts[1:] + parts[:1])
    assert forward is not None
    assert rotated is not None
    assert forward.tobytes() != rotated.tobytes()


def test_a_negative_zero_survives_absent_leaves() -> None:
    minus = Partial(np.array([-0.0], np.float32), 0.0, 1)
    total = summed(Range(0, 3), [EMPTY, minus, EMPTY])
    assert total.gradient is not None
    assert np.signbit(total.gradient[0])


def test_an_ancestor_refuses_and_replaces_its_descendants() -> None:
    parts = leaves(8)
    tree = TreeSum(8)
    quarter, half = Range(0, 2), Range(0, 4)
    assert tree.offer(quarter, parts[0])
    assert not tree.offer(quarter, parts[0])
    assert tree.offer(half, parts[1])
    assert set(tree.parts) == {half}
    assert not tree.offer(quarter, parts[0])
    assert not tree.complete


@pytest.mark.parametrize("node", [Range(0, 3), Range(1, 3), Range(4, 9), Range(-1, 1), Range(2, 2)])
def test_what_is_no_node_is_told_apart(node: Range) -> None:
    assert not is_node(node, 8)


def test_deal_is_contiguous_even_and_whole() -> None:
    for n in range(1, 20):
        for workers in range(1, n + 1):
            runs = deal(n, workers)
            assert runs[0].begin == 0
            assert runs[-1].end == n
            assert all(a.end == b.begin for a, b in pairwise(runs))
            assert {len(r) for r in runs} <= {n // workers, -(-n // workers)}
