"""``raysgd up-check``: what is good, doubtful or wrong with a cluster before a run, from what its nodes told.

Pure: facts in, lines out; ``raysgd/runtime/look.py`` gathers the facts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

Level = Literal["ok", "warning", "error"]

#: bytes of /dev/shm without which Ray's processes die of writing into it
SHM_NEEDED = 64 << 20

#: seconds that clocks may differ before it is told; before storage in a cloud refuses what a node signs
SKEW_TOLD_S, SKEW_REFUSED_S = 2.0, 600.0


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What one node told.

    versions: by package; raysgd with the hash of its source
    token: whether its processes prove that they belong to the cluster
    shm_total, shm_free: bytes of /dev/shm; None where there is none
    store: bytes of Ray's object store, which lies there
    skew_s: seconds by which its clock is ahead of this process's, as far as two calls can tell
    blas_threads: of an actor's BLAS; None where it does not tell
    arithmetic: hash of a computation: equal where bytes are
    storage: what is wrong with writing to the storage; "" where nothing is
    sees_others, seen: whether it reads what this process wrote to the storage, and this process what it wrote
    """

    name: str
    versions: dict[str, str] = field(default_factory=dict)
    token: bool = True
    shm_total: int | None = None
    shm_free: int | None = None
    store: int = 0
    skew_s: float = 0.0
    blas_threads: int | None = 1
    cpu: str = ""
    arithmetic: str = ""
    storage: str = ""
    sees_others: bool = True
    seen: bool = True


@dataclass(frozen=True, slots=True)
class ClusterFacts:
    """What is known of a cluster.

    versions: of this process;  storage_path: where runs will lie;  client: whether this process is on Ray Client
    started: whether there was none, and one of this machine alone was started to look at
    nodes: those that answered;  silent: why each other one did not, by name
    """

    versions: dict[str, str]
    storage_path: str
    nodes: tuple[NodeFacts, ...]
    silent: dict[str, str] = field(default_factory=dict)
    storage: str = ""
    client: bool = False
    started: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """One thing that was checked, what was found, and what to do about it."""

    level: Level
    what: str
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.level:<8}{self.what}: {self.found}" + (f": {self.remedy}" if self.remedy else "")


def judge(facts: ClusterFacts) -> list[Line]:
    """A line for each thing that is checked, and for each version that is not the same everywhere."""
    checks: Sequence[Callable[[ClusterFacts], Iterator[Line]]] = (
        _cluster, _answers, _versions, _token, _storage, _shm, _clocks, _threads, _arithmetic, _client,
    )  # fmt: skip
    return [line for check in checks for line in check(facts)]


def failed(lines: Sequence[Line]) -> bool:
    """Whether a run should not begin."""
    return any(line.level == "error" for line in lines)


def _cluster(facts: ClusterFacts) -> Iterator[Line]:
    if facts.started:
        found = "none was given and none is around this process: a Ray of this machine alone was started to look at"
        yield Line("ok", "cluster", f"{found}; --address names another")


def _answers(facts: ClusterFacts) -> Iterator[Line]:
    for name, why in facts.silent.items():
        yield Line("error", "nodes", f"{name} did not answer: {why}", "look at it, or take it out of the cluster")
    if facts.nodes and not facts.silent:
        yield Line("ok", "nodes", f"{len(facts.nodes)}: {_names(facts.nodes)}")
    if not facts.nodes and not facts.silent:
        yield Line("error", "nodes", "the cluster has none", "start Ray on them (ray up, or ray start)")


def _versions(facts: ClusterFacts) -> Iterator[Line]:
    same = True
    for package, mine in facts.versions.items():
        others: dict[str, list[NodeFacts]] = {}
        for node in facts.nodes:
            others.setdefault(node.versions.get(package, "not installed"), []).append(node)
        if set(others) - {mine}:
            same = False
            told = "; ".join(f"{version} on {_names(nodes)}" for version, nodes in others.items() if version != mine)
            remedy = "install the same everywhere (constraints.txt has the tested versions), then restart Ray there"
            yield Line("error", f"version of {package}", f"{mine} here, {told}", remedy)
    if same:
        yield Line("ok", "versions", ", ".join(f"{name} {version}" for name, version in facts.versions.items()))


def _token(facts: ClusterFacts) -> Iterator[Line]:
    if not facts.nodes:
        return
    if without := [node for node in facts.nodes if not node.token]:
        remedy = "start Ray with RAY_AUTH_MODE=token and the same ~/.ray/auth_token on every node"
        found = f"off on {_names(without)}: whoever reaches the cluster's ports can run code on it"
        yield Line("warning", "authentication", found, remedy)
    else:
        yield Line("ok", "authentication", "by token")


def _storage(facts: ClusterFacts) -> Iterator[Line]:
    where = facts.storage_path
    if facts.storage:
        remedy = "give a directory or a bucket that this machine can write to (--storage-path)"
        yield Line("error", "storage", f"{where} cannot be written here: {facts.storage}", remedy)
        return
    remedy = "mount the same directory at the same place on every node, or use a bucket (--storage-path s3://...)"
    apart = [n for n in facts.nodes if not n.storage and not (n.sees_others and n.seen)]
    for node in (n for n in facts.nodes if n.storage):
        yield Line("error", "storage", f"{where} cannot be written on {node.name}: {node.storage}", remedy)
    if apart:
        yield Line("error", "storage", f"{where} is another directory on {_names(apart)} than here", remedy)
    if not apart and not any(n.storage for n in facts.nodes) and facts.nodes:
        yield Line("ok", "storage", f"{where} can be written and is the same on every node")


def _shm(facts: ClusterFacts) -> Iterator[Line]:
    full = [n for n in facts.nodes if n.shm_free is not None and n.shm_free < SHM_NEEDED]
    small = [n for n in facts.nodes if n not in full and n.shm_total is not None and n.shm_total < n.store]
    for node in full:
        assert node.shm_free is not None
        found = f"full on {node.name}: {_megabytes(node.shm_free)} free; what writes there is killed"
        yield Line("error", "/dev/shm", found, "remove what fills it, or give it more (mount -o remount,size=...)")
    for node in small:
        assert node.shm_total is not None
        found = f"{_megabytes(node.shm_total)} on {node.name}, less than Ray's object store ({_megabytes(node.store)})"
        remedy = "give it more (docker run --shm-size, or a memory volume in Kubernetes), or Ray a smaller store"
        yield Line("warning", "/dev/shm", f"{found}, which then lies on disk", remedy)
    if facts.nodes and not full and not small:
        free = [n.shm_free for n in facts.nodes if n.shm_free is not None]
        yield Line("ok", "/dev/shm", f"{_megabytes(min(free))} free at the least" if free else "not used here")


def _clocks(facts: ClusterFacts) -> Iterator[Line]:
    if not facts.nodes:
        return
    worst = max(facts.nodes, key=lambda n: abs(n.skew_s))
    level: Level = "ok"
    if abs(worst.skew_s) > SKEW_TOLD_S:
        level = "error" if abs(worst.skew_s) > SKEW_REFUSED_S and "://" in facts.storage_path else "warning"
    found = f"{abs(worst.skew_s):.1f} s apart at the most ({worst.name})"
    why = "storage in a cloud refuses what such a node signs: " if level == "error" else ""
    yield Line(level, "clocks", found, "" if level == "ok" else f"{why}run a time service (chrony) on every node")


def _threads(facts: ClusterFacts) -> Iterator[Line]:
    many = [n for n in facts.nodes if n.blas_threads is not None and n.blas_threads != 1]
    if many:
        found = f"{many[0].blas_threads} in the actors of {_names(many)}: sums in another order give other bytes"
        yield Line("error", "BLAS threads", found, "unset what overrides OPENBLAS_NUM_THREADS=1 there")
    elif facts.nodes:
        unknown = [n for n in facts.nodes if n.blas_threads is None]
        note = f" (unknown on {_names(unknown)})" if unknown else ""
        yield Line("ok", "BLAS threads", f"1 in an actor{note}")


def _arithmetic(facts: ClusterFacts) -> Iterator[Line]:
    if not facts.nodes:
        return
    kinds: dict[str, list[NodeFacts]] = {}
    for node in facts.nodes:
        kinds.setdefault(node.arithmetic, []).append(node)
    cpus = sorted({n.cpu for n in facts.nodes})
    if len(kinds) == 1:
        note = "" if len(cpus) == 1 else "; all compute the same bytes"
        yield Line("ok", "processors", ", ".join(cpus) + note)
        return
    told = "; ".join(f"{', '.join(sorted({n.cpu for n in nodes}))} on {_names(nodes)}" for nodes in kinds.values())
    remedy = "use machines of one type, or set OPENBLAS_CORETYPE to the same value on all of them"
    yield Line("warning", "processors", f"{told} compute different bytes: a run refuses workers of one kind", remedy)


def _client(facts: ClusterFacts) -> Iterator[Line]:
    if facts.client:
        remedy = "begin runs on the cluster: ray submit, or ray job submit"
        yield Line("warning", "Ray Client", "this process is on it (ray://), a slow way for parameters", remedy)


def _names(nodes: Sequence[NodeFacts]) -> str:
    return ", ".join(node.name for node in nodes)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
