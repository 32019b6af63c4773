"""Whether a cluster can ever give what a run asks for: a table of clusters, and what is said of them."""

from __future__ import annotations

import pytest

from raysgd.capacity import Growth, NodeType, covers, never, resource_problems
from raysgd.spec import ScalingConfig

ONE, TWO, STAYS, GOES = {"CPU": 1.0}, {"CPU": 2.0}, {"stays": 0.5}, {"goes": 1.0}


def growing(resources: dict[str, float], more: int) -> Growth:
    return Growth((NodeType("kind", resources, more),), more)


SPOT = growing({"CPU": 4.0, "goes": 1.0}, 3)


#: scaling, nodes, what can be added, what is said
CASES: list[tuple[ScalingConfig, list[dict[str, float]], Growth | None, str | None]] = [
    (ScalingConfig(2), [{"CPU": 4.0}], None, None),
    (ScalingConfig(4), [{"CPU": 4.0}], None, "4.5 CPU are asked for: the cluster has 4 in all"),
    (ScalingConfig(4), [{"CPU": 4.0}], SPOT, None),
    (ScalingConfig(17), [{"CPU": 4.0}], SPOT, "17.5 CPU are asked for: the cluster has 4 in all, 12 can be added"),
    (ScalingConfig((1, 99)), [{"CPU": 4.0}], None, None),
    # nobody knows what the nodes have that can come: nothing shows that they are too few
    (ScalingConfig(99), [ONE], growing({}, 1), None),
    (ScalingConfig(99), [ONE], growing({}, 0), "99.5 CPU are asked for: the cluster has 1 in all, 0 can be added"),
    # in all there would be enough, but no node is large enough
    (
        ScalingConfig(1, worker_cpus=3.0),
        [TWO] * 5,
        None,
        "a worker asks for 3 CPU: no node has as much (at most 2 CPU)",
    ),
    (ScalingConfig(1, worker_cpus=3.0), [TWO], SPOT, None),
    (
        ScalingConfig(1, server_resources=STAYS),
        [TWO],
        SPOT,
        "a server asks for 0.5 CPU, 0.5 stays: no node has as much",
    ),
    (ScalingConfig(2, worker_resources=GOES), [TWO], SPOT, None),
    (
        ScalingConfig(4, worker_resources=GOES),
        [TWO],
        SPOT,
        "4 goes are asked for: the cluster has 0 in all, 3 can be added",
    ),
]


@pytest.mark.parametrize(("scaling", "nodes", "growth", "said"), CASES)
def test_never(scaling: ScalingConfig, nodes: list[dict[str, float]], growth: Growth | None, said: str | None) -> None:
    sentences = never(scaling.asks, nodes, growth)
    assert len(sentences) == (said is not None)
    assert all(sentence.startswith(str(said)) for sentence in sentences)


def test_sums_of_parts_are_not_taken_for_too_much() -> None:
    """0.1 three times is more than 0.3 in floating point; Ray counts in ten-thousandths."""
    assert covers({"CPU": 0.3}, {"CPU": 0.1 + 0.1 + 0.1})
    assert not covers({"CPU": 0.3}, {"CPU": 0.3001})


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"stays": 0.001, "gpu_node": 2}, None),
        ("stays", "worker_resources must be a table of amounts by name, as { spot = 1 }, got 'stays'"),
        ({"stays": "1"}, "worker_resources.stays must be a number > 0, got '1'"),
        ({"stays": 1.5}, "worker_resources.stays must be a whole number, or less than 1, got 1.5"),
        ({"": 1}, "worker_resources must have names, got ''"),
        ({"GPU": 1}, "worker_resources must not name 'GPU': only resources of your own, which a node was started with"),
    ],
)
def test_resources_of_ones_own(given: object, sentence: str | None) -> None:
    assert resource_problems("worker_resources", given) == ([] if sentence is None else [sentence])
