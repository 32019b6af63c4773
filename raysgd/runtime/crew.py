"""Who carries what, through losses and joins: carries out what :class:`Membership` decides.

    a worker died, hung, or came; a server died
        ─▶ stop the runs that go on ─▶ replace dead servers ─▶ fence at every server ─▶ read the clocks
        ─▶ new memory for everybody ─▶ the runs again, from the clocks

Nothing of a step that was at hand is kept: it is computed again, to the same bytes, and a server that had it already
drops what comes twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import ray

from raysgd.errors import RunError
from raysgd.plan import Plan
from raysgd.protocol.ledger import Parts
from raysgd.protocol.membership import (
    Assign,
    Committed,
    Draining,
    Event,
    Fail,
    Joined,
    Kill,
    Left,
    Membership,
    Share,
    Silent,
    Start,
    Stillborn,
    Wait,
)
from raysgd.runtime.calls import WATCH_S, ActorLostError, ResultLostError, call, first_line, gather, result
from raysgd.runtime.drain import Notices
from raysgd.runtime.gang import Gang, same_node, shared_out
from raysgd.runtime.place import by_node
from raysgd.runtime.rates import Rates
from raysgd.runtime.replicas import Replicas
from raysgd.runtime.report import LoopReport
from raysgd.runtime.reserve import free_cpus
from raysgd.runtime.transport import ServerLostError
from raysgd.runtime.worker import Task

T = TypeVar("T")

#: seconds after the begin at which spare servers are asked for: a short run does without
SPARE_AFTER_S = 2.0

#: seconds to wait for each replica at the begin
REPLICA_S = 60.0

#: seconds to wait for a worker where none is left
NOBODY_S = 120.0


class RollBackError(RunError):
    """The state of a server is lost: the run goes back to its newest checkpoint. charged: to the budget of losses"""

    def __init__(self, message: str, charged: bool = True) -> None:
        self.charged = charged
        super().__init__(message)


class _Changed(Exception):  # noqa: N818 - nothing is wrong: others carry the virtual workers from here on
    """Who carries the virtual workers is to change."""


class Crew:
    """The gang at work.

    step: () -> steps committed, as far as is known;  say: tells people
    """

    def __init__(self, gang: Gang, plan: Plan, step: Callable[[], int], say: Callable[[str], None]) -> None:
        scaling, failure = plan.spec.scaling, plan.spec.run.failure_config
        self.gang, self.plan, self.step, self.say = gang, plan, step, say
        self.n_virtual = plan.spec.train.virtual_workers
        self.membership = Membership(self.n_virtual, scaling.least_workers, scaling.most_workers, failure.max_failures)
        self.task = Task.of(plan)
        #: by worker: what it carries
        self.shares: dict[int, Share] = {}
        #: whether every carrier has pulled the version at which the last run ended
        self.pulled = False
        #: what a worker's canary must be, and the workers whose is
        self.canary: str | None = None
        self._same: set[int] = set()
        #: calls of ``run`` on their way, by whose they are; the number of the newest
        self._runs: dict[Any, int] = {}
        self._number = 0
        #: who was found lost, and is not replaced yet; whether one of them was charged since the last deal
        self._losses: list[RunError] = []
        self._charged = False
        #: whether others are to carry the virtual workers
        self._due = False
        self._rates = Rates()
        self.notices = Notices()
        self._began = time.monotonic()
        #: called with the version that all servers hold, when everybody has stopped and before others carry on
        self.settled: Callable[[int], None] = lambda _version: None
        self.replicas = Replicas(gang)
        gang.watch = self._pulse

    def begin(self, shards: Sequence[Callable[..., Any]]) -> None:
        """Start the servers and give every worker that is there its virtual workers."""
        self.gang.begin(shards, self.plan.spans(), self.plan.kept)
        self.replicas.ask()
        self.replicas.come(timeout=REPLICA_S)
        members = list(self.gang.workers.items())
        for i in by_node([member.site for _, member in members], [place for place, _ in self.gang.boards]):
            self._decide(Joined(members[i][0], members[i][1].site))
        self._regroup()

    def run(self, start: int, until: int, watch: Callable[[], None]) -> list[LoopReport]:
        """Train from version ``start`` until ``until`` is committed everywhere, whoever dies or joins meanwhile."""
        return self.surviving(partial(self._run, start, until, watch))

    def pause(self) -> int:
        """Have everybody stop; the newest version that all servers hold."""
        self.surviving(self._stop_runs)
        return self.surviving(self._version)

    def resume(self) -> None:
        """Deal the virtual workers anew after a pause: who was stopped has begun steps that others finished."""
        self._regroup()

    @property
    def running(self) -> bool:
        """Whether somebody trains at the moment."""
        return bool(self._runs)

    def score(self, version: int, count: int) -> list[Any]:
        """Scores of ``count`` validation shards at the version where the last run ended."""
        return self.surviving(partial(self._score, version, count))

    def committed(self, step: int) -> None:
        """The run has reached ``step``: losses before are forgotten."""
        self._decide(Committed(step))

    def surviving(self, action: Callable[[], T]) -> T:
        """The result of ``action``, which is begun again whenever somebody is lost or joins meanwhile."""
        while True:
            try:
                return action()
            except _Changed:
                pass
            except (ActorLostError, ServerLostError) as error:
                self._losses.append(error)
            self._regroup()

    def suspect(self, version: int) -> tuple[float, str] | None:
        """Of the rows of the round that could not be applied at ``version`` the one with the largest gradient: its
        size, and where it is."""
        asked = [self.gang.workers[n].actor.suspect.remote(share, version) for n, share in self.shares.items()]
        found = [suspect for suspect in self.gang.call(asked, "looking for the row") if suspect is not None]
        return max(found, default=None)

    def parts(self) -> Parts:
        """The nodes that are pushed under the present assignments, left to right, and their incarnations."""
        told = ((n, share.assignment.incarnations_of(n)) for share in self.shares.values() for n in share.nodes)
        return tuple(sorted(told))

    # -- what is done by everybody

    def _run(self, start: int, until: int, watch: Callable[[], None]) -> list[LoopReport]:
        self._number += 1
        self._runs = {}
        for number, share in self.shares.items():
            from_here = replace(share, start=max(share.start, start))
            self._runs[self.gang.workers[number].actor.run.remote(from_here, until, self._number)] = number
        ended: list[LoopReport] = []
        while self._runs:
            done, _ = ray.wait(list(self._runs), num_returns=1, timeout=WATCH_S)
            for ref in done:
                number = self._runs.pop(ref)
                ended.append(result(ref, f"training, worker {number}"))
                if ended[-1].done.reason in ("frozen", "gone"):
                    raise ServerLostError(f"worker {number} ended: {ended[-1].done.reason}")
            watch()
            self._watch()
        self.pulled = True
        return ended

    def _score(self, version: int, count: int) -> list[Any]:
        if not self.pulled:  # who came since has no parameters yet
            self._run(version, version, lambda: None)
        dealt = shared_out(list(self.shares), count)
        calls = [self.gang.workers[number].actor.score.remote(version, share) for number, share in dealt.items()]
        return gather(calls, "validation", self._pulse)

    # -- who is alive

    def _watch(self) -> None:
        """Look who is alive and who has come; raises where that changes who carries what."""
        self._pulse()
        self._heed()
        for number in self._welcome():
            self.say(f"worker {number} joined at step {self.step():,}: {len(self.gang.workers)} workers")
        self.replicas.ask()
        self._due = self.replicas.come() or self._due
        if time.monotonic() - self._began > SPARE_AFTER_S:
            self.gang.ask_spares()
            self.gang.look_for_spares()
        told = {number: worker.pulse.told for number, worker in self.gang.workers.items()}
        measured = self._rates.take(self.membership.assignments, told)
        if measured is not None and self.plan.consistency.exact:  # elsewhere no step waits for the slowest
            self._decide(measured)
        if self._due:
            raise _Changed

    def _heed(self) -> None:
        """Have workers hand over whose node is announced to go, and servers, unless replicas take their places."""
        for number in self.notices.look(self.gang, movable=not self.gang.scaling.replicas):
            self.say(f"the node of worker {number} will go: it hands over at step {self.step():,}")
            self._decide(Draining(number))

    def _welcome(self) -> list[int]:
        """Tell the membership of the workers that have come; who they are."""
        joined = self.gang.joined()
        while self.gang.stillborn:
            why = first_line(self.gang.stillborn[0])
            self.say(f"{why}; another one is asked for")
            self._decide(Stillborn(why))
            self.gang.stillborn.pop(0)
        for number in joined:
            self._decide(Joined(number, self.gang.workers[number].site))
        return joined

    def _pulse(self) -> None:
        """Raises ActorLostError where an actor is dead; a hung one is made so; RunError where the cluster is dead."""
        self.gang.check_cluster()
        for number, worker in list(self.gang.workers.items()):
            if self.gang.hung(worker):
                self._decide(Silent(number, self.step(), worker.pulse.silent_s))
        for index, server in enumerate(self.gang.servers):
            if self.gang.hung(server):
                why = f"server {index} hung for {server.pulse.silent_s:.1f} s: no answer, and no CPU time"
                self.gang.bury(server)
                raise ActorLostError(why, server.id)
        for index, why in self.replicas.watch().items():
            self.say(f"the replica of server {index} is lost at step {self.step():,} ({why}); another is asked for")

    def _decide(self, event: Event) -> None:
        """Tell the membership, and do what it decides; new assignments take effect when it is next safe."""
        for decision in self.membership.handle(event):
            if isinstance(decision, Assign | Wait):
                self._due = True
                if isinstance(decision, Assign) and decision.why:
                    self.say(f"shares move at step {self.step():,}: {decision.why}")
            elif isinstance(decision, Start):
                self.gang.ask_workers(decision.count, decision.after_s)
            elif isinstance(decision, Kill):
                self.say(f"worker {decision.worker} is killed: {decision.why}")
                self._left(decision.worker, decision.why)
            else:
                assert isinstance(decision, Fail)
                raise RunError(decision.why)

    def _left(self, number: int, why: str) -> None:
        """A worker is gone. Several that go at once, such as with their node, are one loss."""
        charged = self._charges(self.gang.workers[number].site)
        self.gang.lost(self.gang.workers[number])
        self._decide(Left(number, why, charged))

    def _charges(self, site: str | None) -> bool:
        """Whether a loss there counts: the first of several at once, unless it was announced."""
        charged = not self._charged and not self.notices.concern(site)
        self._charged = self._charged or charged
        return charged

    def _lost(self, error: RunError) -> None:
        """Somebody is dead: make it true, and decide what follows. Nothing, where that was done already."""
        self.gang.check_cluster()
        if not isinstance(error, ActorLostError):
            self._find_lost(error)
            return
        for number, worker in list(self.gang.workers.items()):
            if worker.id == error.actor:
                self.say(f"worker {number} is lost at step {self.step():,}{_for_memory(error)}; the others go on")
                self._left(number, first_line(error))
                return
        for index, server in enumerate(self.gang.servers):
            if server.id == error.actor:
                self._server_lost(index, error)
                return
        if error.actor is None:
            self._find_lost(error)

    def _find_lost(self, error: RunError) -> None:
        """Somebody is lost, and nobody said who: a server? a worker? Raises the error where all are alive."""
        found = False
        for number, worker in list(self.gang.workers.items()) if isinstance(error, ActorLostError) else ():
            try:
                call([worker.actor.beat.remote()], f"worker {number}", timeout=10.0)
            except ActorLostError:
                self.say(f"worker {number} is lost at step {self.step():,}{_for_memory(error)}; the others go on")
                self._left(number, first_line(error))
                found = True
            except RunError:
                continue  # silent: its pulse is felt as ever
        for index, server in enumerate(list(self.gang.servers)):
            try:
                call([server.actor.beat.remote()], f"server {index}", timeout=10.0)
            except RunError as lost:
                self._server_lost(index, lost)
                found = True
        if not found and not isinstance(error, ResultLostError):
            raise error
        if not found:  # it is asked for again
            self._charge(first_line(error))

    def _charge(self, why: str, site: str | None = None) -> None:
        """Count a loss, unless one of the same moment was counted or it was announced; raises RunError where it is one
        too many."""
        for decision in self.membership.charge(why) if self._charges(site) else []:
            assert isinstance(decision, Fail)
            raise RunError(decision.why)

    def _server_lost(self, index: int, error: RunError) -> None:
        site = self.gang.servers[index].site
        announced = self.notices.concern(site)
        self._charge(f"server {index} was lost: {first_line(error)}", site)
        self._stop_runs()
        self._due = True
        make, span, since = self.plan.successors()[index], self.plan.spans()[index], self.plan.rounds.at(self.step())
        if self.gang.succeed(index, make, span, since):
            self.replicas.rejoin(index, same=self.plan.consistency.exact)
            self.say(f"server {index} is lost at step {self.step():,}; its spare goes on from its memory")
            return
        self.gang.bury(self.gang.servers[index])
        if self.replicas.promote(index):
            how = f"({first_line(error)}); its replica on another node takes its place"
            self.say(f"server {index} is lost at step {self.step():,} {how}")
            return
        raise RollBackError(f"server {index} was lost with its state: {first_line(error)}", charged=not announced)

    # -- dealing anew

    def _regroup(self) -> None:
        """Replace who is lost, and deal anew, until nobody else is lost meanwhile."""
        while True:
            try:
                while self._losses:
                    self._lost(self._losses[0])
                    self._losses.pop(0)
                self._stop_runs()
                self._await_carriers()
                self._due = self.pulled = False
                if self.shares:
                    self.settled(self._version())
                self.membership.refence()  # who was stopped has memory that nobody reads any more
                self._deal()
            except ActorLostError as error:
                self._losses.insert(0, error)
            if not self._due and not self._losses:
                self._charged = False
                return

    def _refuse_others(self, carriers: Sequence[int]) -> None:
        """Refuse workers that would train other bytes; raises RunError where they differ from the beginning."""
        new = [number for number in carriers if number not in self._same]
        hashes = self.gang.call([self.gang.workers[n].actor.canary.remote() for n in new], "comparing the processors")
        first, self.canary = self.canary is None, self.canary or hashes[0]
        for number, found in zip(new, hashes, strict=True):
            if found == self.canary:
                self._same.add(number)
            elif first or not self._same:
                raise RunError(f"worker {number} cannot take part: {OTHER_BYTES}; or begin anew (--fresh)")
            else:
                self.say(f"worker {number} is refused: {OTHER_BYTES}")
                self._refused(number)

    def _refused(self, number: int) -> None:
        """Send a worker away for good: nobody is asked for in its place."""
        self.gang.lost(self.gang.workers[number])
        for decision in self.membership.handle(Left(number, OTHER_BYTES)):
            if not isinstance(decision, Start):
                self._due = True
            if isinstance(decision, Fail):
                raise RunError(decision.why)

    def _version(self) -> int:
        """The newest version that all servers hold."""
        clocks = self.gang.call([s.clocks.remote() for s in self.gang.server_actors], "reading the clocks")
        return min(int(c.min()) for c in clocks)

    def _stop_runs(self) -> None:
        """Have every call of ``run`` end, and wait for that; nobody pushes any more."""
        for number in set(self._runs.values()) & set(self.gang.workers):
            self.gang.workers[number].actor.stop.remote(self._number)
        while runs := {ref: number for ref, number in self._runs.items() if number in self.gang.workers}:
            done, _ = ray.wait(list(runs), num_returns=1, timeout=WATCH_S)
            for ref in done:
                del self._runs[ref]
                try:
                    result(ref, f"training, worker {runs[ref]}")
                except ServerLostError:
                    continue  # who is lost is found out, or known
            if not done:
                self._pulse()
        self._runs = {}

    def _await_carriers(self) -> None:
        """Wait until somebody can carry the virtual workers."""
        deadline = time.monotonic() + NOBODY_S
        while not self.membership.assignments:
            if time.monotonic() > deadline:
                raise RunError(
                    f"no worker came within {NOBODY_S:g} s after the last one was lost: "
                    f"a worker asks for {self.gang.scaling.worker_cpus:g} CPUs; {free_cpus()}"
                )
            self._welcome()
            time.sleep(0.05)

    def _deal(self) -> None:
        """Carry out the newest assignments: fence, read the clocks, connect."""
        gang, plan, assignments = self.gang, self.plan, self.membership.assignments
        servers, spans = gang.server_actors, plan.spans()
        gang.call([s.regroup.remote() for s in servers], "fencing")
        gang.call([s.fence.remote(a.run, a.incarnations[0]) for s in servers for a in assignments], "fencing")
        for index in self.replicas.follow(plan.successors(), spans, plan.kept):
            self.say(f"server {index} has a replica on another node from step {self.step():,} on")
        clocks = gang.call([s.held_clocks.remote() for s in servers], "reading the clocks")
        self.shares = {a.worker: Share.at(a, self.n_virtual, clocks) for a in assignments}
        carriers = list(self.shares)
        if plan.consistency.exact and not plan.sparse:  # relays copy whole vectors
            gang.relay(carriers, spans, self.n_virtual, min(share.start for share in self.shares.values()))
        prepared = []
        for number in carriers:
            boards = same_node(gang.workers[number].site, gang.reachable(number))
            prepared.append(gang.workers[number].actor.prepare.remote(self.task, servers, boards, gang.readers(number)))
        gang.call(prepared, "preparing the workers")
        self._refuse_others(carriers)
        if self._due:
            return  # somebody was refused: dealt anew, to the others
        connected = [gang.workers[number].actor.connect.remote(share) for number, share in self.shares.items()]
        sharing = sum(gang.call(connected, "connecting the workers"))
        if sharing < len(carriers):
            self.say(f"{sharing} of {len(carriers)} workers share memory on their node")


def _for_memory(error: RunError) -> str:
    """What people are told where Ray killed somebody for memory: it will again, unless something is done."""
    return ", killed because its node ran out of memory" if "ran out of memory" in first_line(error) else ""


#: why a worker whose canary differs is refused, and what to do
OTHER_BYTES = (
    "its processor computes other bytes than those of the run (another family, another BLAS, or other settings of it): "
    "use machines of one type, or set OPENBLAS_CORETYPE to the same value on all of them"
)
