"""The protocol in one process: the same state machines that the Ray actors hold, under a seeded, hostile network.

Messages are delivered in random order, repeated, lost; workers and servers die, hang, are announced to go, join, while
the dead go on pushing garbage. Whatever the schedule, BSP must end in the same bytes. This is the oracle of the tests,
and the plainest way to train without Ray: ``simulate(problem, steps)``.

    in flight: [request | reply | compute] ──one at random──▶ state machine ──▶ more in flight
    events: [joined | left | ...] ──▶ Membership.handle ──▶ Assign ──▶ fences, clocks, fresh clients
"""

from raysgd.simulate.problem import Faults, Outcome, Problem
from raysgd.simulate.simulation import Simulation, simulate

__all__ = ["Faults", "Outcome", "Problem", "Simulation", "simulate"]
