"""What befalls workers' processes: they are killed, hang and wake, are announced to go, join. And the dice."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING

from raysgd.protocol.membership import HANGS_IN_ONE_STEP, Draining, Left, Silent
from raysgd.protocol.shares import Measured
from raysgd.simulate import driver, replicas
from raysgd.simulate.servers import strike

if TYPE_CHECKING:
    from raysgd.simulate.simulation import Simulation


class Process(Enum):
    """What a worker's process really does, whatever is believed of it."""

    RUNNING = "running"
    DEAD = "dead"
    #: it takes nothing in until it wakes
    HUNG = "hung"


def befall(sim: Simulation) -> None:
    """After a commit: throw the dice for each kind of fault. What they bring comes later, by a timer."""
    faults, chance = sim.faults, sim.random.random
    for probability, fault in (
        (faults.kill, kill),
        (faults.kill_all, kill_all),
        (faults.hang, hang),
        (faults.join, join),
        (faults.drain, drain),
        (faults.slow, slow),
        (faults.server_kill, partial(strike, memory_lost=False)),
        (faults.node_loss, partial(strike, memory_lost=True)),
        (faults.replica_kill, replicas.strike),
        (faults.midway, pause),
    ):
        if probability and chance() < probability:
            fault(sim)


def on_a_worker(kind: str) -> Callable[[Callable[[Simulation, int], None]], Callable[[Simulation], None]]:
    """A fault that befalls one worker, by chance, of those that are living and running; it counts as ``kind``."""

    def decorate(fault: Callable[[Simulation, int], None]) -> Callable[[Simulation], None]:
        def befalls(sim: Simulation) -> None:
            running = [w for w in sim.membership.living if sim.processes[w] is Process.RUNNING]
            if running:
                sim.outcome.faults[kind] += 1
                fault(sim, sim.random.choice(running))

        return befalls

    return decorate


def end(sim: Simulation, worker: int) -> None:
    """A worker is lost: dead, or only believed dead, and running on."""
    if sim.random.random() < 0.5:
        sim.processes[worker] = Process.DEAD
    sim.later(sim.random.randrange(20), partial(sim.take, Left(worker, "lost")))


@on_a_worker("kill")
def kill(sim: Simulation, worker: int) -> None:
    end(sim, worker)


def kill_all(sim: Simulation) -> None:
    sim.outcome.faults["kill_all"] += 1
    for worker in sim.membership.living:
        end(sim, worker)


def join(sim: Simulation) -> None:
    sim.outcome.faults["join"] += 1
    sim.later(0, sim.join)


@on_a_worker("drain")
def drain(sim: Simulation, worker: int) -> None:
    """Announced, and gone after a while."""
    sim.later(0, partial(sim.take, Draining(worker)))
    sim.later(30 + sim.random.randrange(100), partial(end, sim, worker))


def pause(sim: Simulation) -> None:
    """The driver finds that it is time for a checkpoint."""
    sim.later(sim.random.randrange(20), partial(driver.midway, sim))


def slow(sim: Simulation) -> None:
    sim.outcome.faults["slow"] += 1
    sim.later(0, partial(compare, sim))


def compare(sim: Simulation) -> None:
    """The carriers' rates are measured, twice in a row: any of them may be ten times slower than the others."""
    carriers = {a.worker: len(a.run) for a in sim.membership.assignments}
    if carriers:
        seconds = {w: sim.random.choice([1.0, 1.5, 2.0, 10.0]) for w in carriers}
        step_s = max(n * seconds[w] for w, n in carriers.items())
        before = sim.membership.assignments
        for _ in range(2):
            sim.take(Measured(float(sim.now), step_s, seconds))
        sim.outcome.faults["share moved"] += sim.membership.assignments != before


@on_a_worker("hang")
def hang(sim: Simulation, worker: int) -> None:
    """Silent, then believed dead, and perhaps awake again: before it is, or after."""
    sim.processes[worker] = Process.HUNG
    sim.later(20 + sim.random.randrange(60), partial(notice, sim, worker))
    if sim.random.random() < 0.7:
        sim.later(sim.random.randrange(200), partial(wake, sim, worker))


def notice(sim: Simulation, worker: int) -> None:
    """The watcher reports a silent worker. As many as would blame the step are reported as lost: here no step hangs."""
    step = min(sim.told)
    sim.hangs[step] += 1
    if sim.hangs[step] < HANGS_IN_ONE_STEP:
        sim.take(Silent(worker, step, 3.0))
    else:
        sim.take(Left(worker, "silent"))


def wake(sim: Simulation, worker: int) -> None:
    if sim.processes[worker] is not Process.HUNG:
        return
    sim.processes[worker] = Process.RUNNING
    for index, seat in enumerate(sim.seats):
        if seat.worker == worker:
            mail, seat.mail = seat.mail, []
            if not seat.begun:
                sim.begin_seat(index)
            for content in mail:
                sim.receive(index, content)
            sim.send(index, seat.client.retry())
