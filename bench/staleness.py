"""S10 and the waiting share: what staleness buys where workers are not equally fast; two pictures in docs/.

Four workers and one server in processes of their own, the real state machines and shared memory; logistic regression on
synthetic rows. Computing is slowed by sleeping, because two cores cannot show four workers otherwise:

slow     worker 0 takes ten times as long for every step, for good
pauses   every worker takes ten times as long for one step in twenty, at random
delays   every step takes an exponentially distributed time

time to loss   the parameters are read from the server's board every 20 ms, and scored on held-out rows afterwards
waiting        the share of the workers' time in which they neither compute nor push

What moving the slow worker's share buys BSP is measured on Ray: shares.py.
"""

from __future__ import annotations

import sys
import threading
import time
from functools import cache, partial
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from bench.measure import Asked, Figures, alternate, table
from bench.processes import Child, listen, say
from bench.shares import moved

V, N_WORKERS, ROWS, COLUMNS = 8, 4, 16, 20
#: seconds that a step takes where nothing is slowed
STEP_S = 0.002
PICTURES = Path(__file__).resolve().parent.parent / "docs"
MODES: dict[str, float] = {"BSP": 0, "SSP(4)": 4, "ASP": inf}
STALENESS = (0, 1, 2, 4, 8, 16)


@cache
def truth() -> Any:
    return np.random.default_rng(7).standard_normal(COLUMNS).astype(np.float32)


def rows(seed: list[int], count: int) -> Any:
    """Rows whose label follows ``truth`` with noise."""
    from raysgd.learn.batch import Batch

    random = np.random.default_rng(seed)
    numeric = random.standard_normal((count, COLUMNS)).astype(np.float32)
    noise = random.logistic(size=count)
    return Batch(numeric, np.zeros((count, 0), np.int32), (numeric @ truth() + noise > 0).astype(np.float32))


def problem(steps: int) -> tuple[Any, Any]:
    """Learner and rule."""
    from raysgd.learn.batch import Inputs, Target
    from raysgd.learn.models import LogisticRegression
    from raysgd.learn.transforms import SGD
    from raysgd.protocol.update import PlannedRows, Rule

    learner = LogisticRegression().bind(Inputs(COLUMNS), Target(2))
    return learner, Rule(SGD(momentum=0.9), rate, PlannedRows(V * ROWS, V * ROWS * steps, steps))


def rate(_step: int) -> float:
    return 0.02


def server(staleness: float, steps: int) -> None:
    from raysgd.learn.parameters import Range
    from raysgd.protocol.consistency import Consistency
    from raysgd.protocol.generation import Generation
    from raysgd.protocol.kept import Kept
    from raysgd.protocol.stale import shard_class
    from raysgd.runtime.board import Board
    from raysgd.runtime.shared import SharedServer

    learner, rule = problem(steps)
    n = learner.layout.n_params
    kind = shard_class(Consistency(staleness))
    board = Board.create(n, Kept(kind.BUFFERS))
    zeros = np.zeros(n, np.float32)
    shard = kind(
        0,
        rule,
        np.ones(n, np.bool_),
        n_virtual=V,
        generation=Generation(0, zeros, {"momentum": zeros}),
        consistency=Consistency(staleness),
        buffers=board.params,
        on_write=partial(Board.announce, board),
    )
    shard.fence(Range(0, V), 1)
    serving = SharedServer(shard, board, threading.Lock(), lambda: None)
    say(serving.address)
    while (slots := listen()) is not None:
        if isinstance(slots, str):
            say(max((c.staleness for c in shard.commits), default=0))
        else:
            serving.attach(slots, Range(0, n))
            say("attached")
    serving.close()


def worker(index: int, staleness: float, steps: int, scenario: str) -> None:
    from raysgd.learn.parameters import Range
    from raysgd.protocol.client import Client
    from raysgd.protocol.consistency import Consistency
    from raysgd.protocol.membership import Membership, deal
    from raysgd.runtime.shared import SharedMemory
    from raysgd.runtime.worker import train_loop

    learner, _ = problem(steps)
    spans = (Range(0, learner.layout.n_params),)
    assignment = Membership(V).assign(index, deal(V, N_WORKERS)[index])
    consistency = Consistency(staleness)
    client = Client(assignment, V, spans, start=0, until=steps, consistency=consistency)
    incarnations = tuple(map(assignment.incarnations_of, client.nodes))
    memory = SharedMemory([listen()], client.nodes, incarnations, spans, exact=consistency.exact, timeout_s=600.0)
    say(memory.address)
    listen()
    random = np.random.default_rng([index, 1])

    def batch(step: int, v: int) -> Any:
        if v == assignment.run.begin:
            time.sleep(seconds(scenario, index, random))
        return rows([2, step, v], ROWS)

    report = train_loop(client, memory, learner, batch)
    say((report.wait_s, report.compute_s))
    memory.close()


def seconds(scenario: str, index: int, random: np.random.Generator) -> float:
    """How long a worker's next step takes."""
    if scenario == "slow":
        return STEP_S * (10 if index == 0 else 1)
    if scenario == "pauses":
        return STEP_S * (10 if random.random() < 0.05 else 1)
    return float(random.exponential(STEP_S))


def train(staleness: float, steps: int, scenario: str) -> tuple[list[tuple[float, Any]], float, int]:
    """(seconds, parameters) while it trains; the workers' waiting share; the greatest staleness of a push."""
    from raysgd.runtime.board import NEWEST, Board

    host = Child("bench.staleness", "server", staleness, steps)
    address = host.hear()
    workers = [Child("bench.staleness", "worker", i, staleness, steps, scenario) for i in range(N_WORKERS)]
    for child in workers:
        child.tell(address)
        host.tell(child.hear())
        host.hear()
    board, seen = Board.attach(address), []
    out = np.empty(address.size, np.float32)
    for child in workers:
        child.tell("go")
    began = time.perf_counter()
    while board.words[NEWEST] < steps:
        if board.copy(out) is not None:
            seen.append((time.perf_counter() - began, out.copy()))
        time.sleep(0.02)
    waited = [child.hear() for child in workers]
    host.tell("staleness")
    stale = int(host.hear())
    for child in (*workers, host):
        child.end()
    return seen, sum(w for w, _ in waited) / sum(w + c for w, c in waited), stale


def losses(seen: list[tuple[float, Any]]) -> list[tuple[float, float]]:
    """(seconds, held-out loss) of each reading."""
    learner, _ = problem(1)
    held_out, out = rows([3], 20_000), np.empty(learner.layout.n_params, np.float32)
    return [(s, learner.value_and_grad(params, held_out, out) / 20_000) for s, params in seen]


def time_to(curve: list[tuple[float, float]], loss: float) -> float:
    return next((s for s, value in curve if value <= loss), inf)


def slowed(scenario: str, asked: Asked) -> tuple[list[list[object]], dict[str, list[tuple[float, float]]]]:
    """Seconds to the loss that BSP reaches at 60% of its steps, by mode; and the curves of the last round."""
    steps = 60 if asked.quick else 300
    curves: dict[str, list[tuple[float, float]]] = {}
    target = [0.0]

    def run(name: str) -> float:
        curves[name] = losses(train(MODES[name], steps, scenario)[0])
        if not target[0]:
            curve = curves[name]
            target[0] = curve[int(0.6 * len(curve))][1]
        return time_to(curves[name], target[0])

    found: dict[str, Figures] = alternate({name: partial(run, name) for name in MODES}, asked.rounds)
    return [[scenario, name, found[name], found[name].ratio(found["BSP"])] for name in MODES], curves


def waiting(asked: Asked) -> list[tuple[int, Figures, int]]:
    """The waiting share and the greatest staleness seen, by staleness allowed."""
    steps, most = (40 if asked.quick else 300), dict.fromkeys(STALENESS, 0)

    def run(k: int) -> float:
        _, share, stale = train(k, steps, "delays")
        most[k] = max(most[k], stale)
        return share

    found = alternate({str(k): partial(run, k) for k in STALENESS}, asked.rounds)
    return [(k, found[str(k)], most[k]) for k in STALENESS]


def draw(curves: dict[str, dict[str, list[tuple[float, float]]]], shares: list[tuple[int, Figures, int]]) -> str:
    """The two pictures; where they are."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(10, 4), sharey=True, layout="constrained")
    titles = {"slow": "one of four workers ten times slower", "pauses": "random pauses"}
    for axis, (scenario, by_mode) in zip(axes, curves.items(), strict=True):
        for name, curve in by_mode.items():
            axis.plot([s for s, _ in curve], [loss for _, loss in curve], label=name)
        axis.set(title=titles[scenario], xlabel="seconds")
        axis.legend()
    axes[0].set_ylabel("held-out log loss")
    figure.savefig(PICTURES / "slow-worker.png", dpi=100)
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    axis.plot([str(k) for k, _, _ in shares], [sorted(f.values)[len(f.values) // 2] for _, f, _ in shares], "o-")
    axis.set(xlabel="staleness allowed, steps", ylabel="share of the workers' time spent waiting", ylim=(0, None))
    figure.savefig(PICTURES / "waiting.png", dpi=100)
    return "pictures: docs/slow-worker.png, docs/waiting.png"


def run(asked: Asked) -> str:
    """The tables of S10 and of the waiting share."""
    slow, slow_curves = slowed("slow", asked)
    pauses, pause_curves = slowed("pauses", asked)
    moving, moves = moved(asked)
    shares = waiting(asked)
    told = "" if asked.quick else "\n\n" + draw({"slow": slow_curves, "pauses": pause_curves}, shares)
    first = table(["scenario", "mode", "seconds to the loss", "against BSP"], [*slow, *pauses, *moving])
    first += "".join(f"\n\n{line}" for line in moves)
    second = table(["staleness allowed", "waiting share", "greatest seen"], [list(row) for row in shares])
    return f"{first}\n\n{second}{told}"


if __name__ == "__main__":
    if sys.argv[1] == "server":
        server(float(sys.argv[2]), int(sys.argv[3]))
    else:
        worker(int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
