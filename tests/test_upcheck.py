"""What ``raysgd up-check`` says of a cluster: a table of facts and lines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from raysgd.runtime.node_facts import cpu
from raysgd.upcheck import ClusterFacts, Line, NodeFacts, failed, judge

VERSIONS = {"Python": "3.11.7", "ray": "2.60.0", "numpy": "2.4.6", "pyarrow": "26.0.1", "raysgd": "0.1 (aaaa)"}
GOOD = NodeFacts(
    "10.0.0.1 (head)", VERSIONS, shm_total=4 << 30, shm_free=3 << 30, store=2 << 30, cpu="EPYC (26/2)", arithmetic="a1"
)
OTHER = replace(GOOD, name="10.0.0.2")


def facts(**changes: Any) -> ClusterFacts:
    """A cluster of two good nodes, but for ``changes``: of the second one, and with ``of_`` of the cluster itself."""
    own = {name.removeprefix("of_"): value for name, value in changes.items() if name.startswith("of_")}
    node = replace(OTHER, **{name: value for name, value in changes.items() if not name.startswith("of_")})
    return ClusterFacts(**{"versions": VERSIONS, "storage_path": "/shared/runs", "nodes": (GOOD, node), **own})


def bad(found: ClusterFacts) -> list[Line]:
    return [line for line in judge(found) if line.level != "ok"]


def test_a_good_cluster() -> None:
    lines = judge(facts())
    assert [line.what for line in lines] == [
        "nodes", "versions", "authentication", "storage", "/dev/shm", "clocks", "BLAS threads", "processors",
    ]  # fmt: skip
    assert {line.level for line in lines} == {"ok"}
    assert not failed(lines)


CASES: list[tuple[dict[str, Any], str, str, str]] = [
    ({"versions": VERSIONS | {"numpy": "2.3.0"}}, "error", "version of numpy", "2.4.6 here, 2.3.0 on 10.0.0.2"),
    ({"versions": {"Python": "3.12.1"}}, "error", "version of Python", "3.11.7 here, 3.12.1 on 10.0.0.2"),
    ({"versions": VERSIONS | {"raysgd": "0.1 (bbbb)"}}, "error", "version of raysgd", "0.1 (aaaa) here, 0.1 (bbbb) on"),
    ({"token": False}, "warning", "authentication", "off on 10.0.0.2"),
    (
        {"storage": "there is no such directory"},
        "error",
        "storage",
        "/shared/runs cannot be written on 10.0.0.2: there",
    ),
    ({"sees_others": False}, "error", "storage", "/shared/runs is another directory on 10.0.0.2 than here"),
    ({"seen": False}, "error", "storage", "/shared/runs is another directory on 10.0.0.2 than here"),
    ({"of_storage": "Permission denied"}, "error", "storage", "/shared/runs cannot be written here: Permission denied"),
    ({"shm_free": 1_000_000}, "error", "/dev/shm", "full on 10.0.0.2: 1 MB free"),
    ({"shm_total": 64 << 20, "shm_free": 64 << 20}, "warning", "/dev/shm", "67 MB on 10.0.0.2, less than Ray's object"),
    ({"skew_s": 3.0}, "warning", "clocks", "3.0 s apart at the most (10.0.0.2)"),
    ({"skew_s": -700.0}, "warning", "clocks", "700.0 s apart at the most (10.0.0.2)"),
    ({"skew_s": -700.0, "of_storage_path": "s3://b/runs"}, "error", "clocks", "700.0 s apart at the most (10.0.0.2)"),
    ({"blas_threads": 8}, "error", "BLAS threads", "8 in the actors of 10.0.0.2"),
    (
        {"cpu": "Xeon (6/85)", "arithmetic": "b2"},
        "warning",
        "processors",
        "EPYC (26/2) on 10.0.0.1 (head); Xeon (6/85) on",
    ),
    ({"of_client": True}, "warning", "Ray Client", "this process is on it (ray://)"),
    (
        {"of_silent": {"10.0.0.3": "no answer within 20 s"}},
        "error",
        "nodes",
        "10.0.0.3 did not answer: no answer within",
    ),
]


@pytest.mark.parametrize(("changes", "level", "what", "found"), CASES)
def test_one_thing_is_wrong(changes: dict[str, Any], level: str, what: str, found: str) -> None:
    """It is told with a remedy, and the exit code follows the worst line."""
    lines = bad(facts(**changes))
    named = [line for line in lines if line.what == what]
    assert [line.level for line in named] == [level]
    assert named[0].found.startswith(found)
    assert named[0].remedy
    assert str(named[0]).startswith(f"{level:<8}{what}: {found}")
    assert failed(lines) == (level == "error")
    assert {line.what for line in lines} - {what} <= {f"version of {name}" for name in VERSIONS}


def test_a_package_that_is_missing_on_a_node() -> None:
    lines = bad(facts(versions={k: v for k, v in VERSIONS.items() if k != "raysgd"}))
    assert [(line.what, line.found) for line in lines] == [
        ("version of raysgd", "0.1 (aaaa) here, not installed on 10.0.0.2")
    ]


def test_other_processors_that_compute_the_same() -> None:
    (line,) = [line for line in judge(facts(cpu="EPYC (25/1)")) if line.what == "processors"]
    assert (line.level, line.found) == ("ok", "EPYC (25/1), EPYC (26/2); all compute the same bytes")


def test_a_cluster_without_nodes() -> None:
    assert [line.level for line in judge(facts(of_nodes=()))].count("error") == 1


def test_what_a_node_does_not_tell_is_no_fault() -> None:
    lines = judge(facts(blas_threads=None, shm_total=None, shm_free=None))
    assert not [line for line in lines if line.level != "ok"]
    assert "1 in an actor (unknown on 10.0.0.2)" in [line.found for line in lines]


def test_a_cluster_that_was_started_to_look_at_is_told() -> None:
    first = judge(facts(of_started=True))[0]
    assert (first.level, first.what) == ("ok", "cluster")
    assert "a Ray of this machine alone was started to look at" in first.found
    assert "cluster" not in [line.what for line in judge(facts())]


def test_a_processor_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "processor\t: 0\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n"
    monkeypatch.setattr("pathlib.Path.read_text", lambda _: text)
    assert cpu() == "AMD EPYC (family 26, model 2)"
