"""``Trainer.fit``: open, decide, place, train, and leave a run directory that tells the truth."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from raysgd import checkpoint as checkpoints
from raysgd import config, fitted
from raysgd.data.dataset import ArrowDataset, counted
from raysgd.errors import DivergedError, InputError, Interrupted, RaysgdError, RunError, SaveError
from raysgd.footprint import Footprint, available_here, footprint, learner_of
from raysgd.learn.models.base import Model
from raysgd.learn.transforms import FTRL, SGD, AdaGrad
from raysgd.outlook import outlook, remaining
from raysgd.plan import Plan, Tables, hash_bits, open_tables, plan_from_manifest, plan_from_statistics
from raysgd.protocol.membership import backoff
from raysgd.report import metrics_log, status
from raysgd.report.metrics_log import MetricsLog
from raysgd.report.plot import loss_curve
from raysgd.report.progress import Report, report_to
from raysgd.report.status import Status
from raysgd.resume import PICTURE, Beginning, beginning, clear, close_books, complete, curve_from, forget_diverging
from raysgd.runtime.attempt import Attempt
from raysgd.runtime.calls import ActorLostError, first_line, gather
from raysgd.runtime.crew import RollBackError
from raysgd.runtime.gang import Gang, shared_out
from raysgd.runtime.session import Session, cores, session, will_start
from raysgd.spec import RunConfig, RunSpec, ScalingConfig, TrainConfig
from raysgd.storage import Storage

#: seconds that the processes of our own cluster may take to start
START_TIMEOUT_S = 180.0

#: how often a run that diverges halves its learning rate before it gives up
HALVINGS = 10


@dataclass(frozen=True)
class Result:
    """What a run left.

    metrics: of the last validation ("valid_loss", ...), and "train_loss" of the last epoch
    checkpoint: the path of the last one;  path: the run's directory
    digest: SHA-256 over parameters, optimizer state and step;  step: steps committed
    stopped: whether ``stop_after_steps`` ended it before the last step
    history: the lines of metrics.jsonl
    """

    metrics: dict[str, float]
    checkpoint: str
    path: str
    digest: str
    step: int
    stopped: bool
    history: list[dict[str, Any]] = field(repr=False)

    @cached_property
    def model(self) -> fitted.FittedModel:
        """The model of the best checkpoint by validation loss."""
        return fitted.load(self.path, "best")


class Trainer:
    """Trains a model on a table with Ray actors; see :class:`raysgd.spec.RunSpec` for what the sections mean.

    model, data, validation, optimizer, batch_size (rows a step over all workers), epochs, seed, virtual_workers,
    staleness, local_steps, clip_norm and on_divergence determine the trained bytes; scaling_config and run_config never
    do. ``fresh`` deletes what the run's directory holds.

    Raises InputError with every violation, here where the arguments show it and in :meth:`fit` where the data does.
    """

    def __init__(
        self,
        *,
        model: Model,
        data: ArrowDataset,
        validation: ArrowDataset | None = None,
        optimizer: SGD | AdaGrad | FTRL | None = None,
        batch_size: int = 512,
        epochs: int = 1,
        seed: int = 0,
        virtual_workers: int = 8,
        staleness: float = 0,
        local_steps: int = 1,
        clip_norm: float | None = None,
        on_divergence: str = "stop",
        scaling_config: ScalingConfig | None = None,
        run_config: RunConfig | None = None,
        fresh: bool = False,
        report: Report | None = None,
    ) -> None:
        self.spec = RunSpec(
            data,
            validation,
            model,
            SGD() if optimizer is None else optimizer,
            TrainConfig(batch_size, epochs, seed, virtual_workers, staleness, local_steps, clip_norm, on_divergence),
            ScalingConfig() if scaling_config is None else scaling_config,
            RunConfig() if run_config is None else run_config,
        )
        self.fresh = fresh
        self._plan: Plan | None = None
        #: the newest of each virtual worker, from one gang of actors to the next
        self._incarnations: list[int] | None = None
        self.report = report_to(sys.stdout) if report is None else report
        if problems := self.spec.problems():
            raise InputError(problems)
        if self.spec.run.name is None:
            self.spec = replace(self.spec, run=replace(self.spec.run, name="run"))

    @classmethod
    def from_spec(cls, spec: RunSpec, *, fresh: bool = False, report: Report | None = None) -> Trainer:
        """The trainer of a whole spec, as config.py reads it from TOML."""
        train = spec.train
        return cls(
            model=spec.model,
            data=spec.data,
            validation=spec.validation,
            optimizer=spec.optimizer,
            batch_size=train.batch_size,
            epochs=train.epochs,
            seed=train.seed,
            virtual_workers=train.virtual_workers,
            staleness=train.staleness,
            local_steps=train.local_steps,
            clip_norm=train.clip_norm,
            on_divergence=train.on_divergence,
            scaling_config=spec.scaling,
            run_config=spec.run,
            fresh=fresh,
            report=report,
        )

    def dry_run(self) -> dict[str, Any]:
        """What would be done, needed and taken; nothing is started, nothing that is written stays.

        From footers, the run's directory, and the statistics of a few row groups.
        """
        tables, begin = self._open()
        needed = self._needed(tables)
        plan = None if begin.checkpoint is None else plan_from_manifest(self.spec, tables, begin.checkpoint.manifest)
        facts = {
            "run": self._storage.uri,
            "training_rows": tables.train.n_rows,
            "training_shards": len(tables.train.shards),
            "validation_rows": None if tables.validation is None else tables.validation.n_rows,
            "columns": tables.train.describe(),
            "begins_at_step": begin.step,
            "memory": None if needed is None else needed.describe(),
            **outlook(self.spec, tables, plan),
        }
        return remaining(facts)

    def fit(self) -> Result:
        """Train, or continue the run of this name; returns when the last step is committed and saved.

        Raises InputError (bad input), RunError (an actor died; DivergedError: a step was not finite), and
        Interrupted after Ctrl-C or SIGTERM; the run can then be continued by the same call.
        """
        tables, _ = self._open()
        with self._storage.lock() as storage:
            self._storage = storage
            # Once more: another process may have ended the run before the lock was ours.
            begin = beginning(storage, self.spec, tables, self.fresh)
            if self.fresh:
                clear(storage)
            plan = (
                None if begin.checkpoint is None else plan_from_manifest(self.spec, tables, begin.checkpoint.manifest)
            )
            for line in (*tables.train.describe(), *begin.notes):
                self.report.say(line)
            if plan is not None and complete(begin, plan):
                close_books(storage, begin, plan)
                if not storage.exists(PICTURE):
                    self._draw()
                self.report.say(f"nothing to do: {storage.uri} has reached step {begin.step:,}")
                return self._result()
            if plan is not None:
                self.report.say(f"continuing {storage.uri} at step {begin.step:,} (attempt {begin.attempt})")
            self._attempt(tables, begin, plan)
            return self._result()

    def _needed(self, tables: Tables) -> Footprint | None:
        """Memory for the parameters, where the schema tells. Raises InputError where there are too many servers."""
        learner = learner_of(self.spec, tables.train.schema)
        return None if learner is None else footprint(self.spec, learner)

    @cached_property
    def _storage(self) -> Storage:
        assert self.spec.run.name is not None
        return Storage.open(self.spec.run.storage_path).child(self.spec.run.name)

    def _open(self) -> tuple[Tables, Beginning]:
        tables = open_tables(self.spec)
        alone = will_start(self.spec.run.address)
        if (needed := self._needed(tables)) is not None and alone:
            needed.refuse(available_here())
        return tables, beginning(self._storage, self.spec, tables, self.fresh)

    def _attempt(self, tables: Tables, begin: Beginning, plan: Plan | None) -> None:
        """Run one attempt; whatever happens is in status.json before it is raised."""
        keeper = _Keeper(self._storage, Status("running", step=begin.step, attempt=begin.attempt), self.report.say)
        try:
            scaling = self.spec.scaling
            room, cpus = scaling.local_room(cores()), scaling.local_cpus(cores())
            about = {"raysgd": "train", "run": str(self.spec.run.name), "storage": self._storage.uri}
            with session(cpus, self.spec.run.address, scaling.resources, room, about) as cluster:
                for line in cluster.notes:
                    self.report.say(line)
                with self._storage.saving("config.toml"):
                    self._storage.write_atomic("config.toml", config.dumps(self.spec).encode())
                keeper.tell("running")
                losses = 0
                while (lost := self._lives(cluster, tables, begin, plan, keeper)) is not None:
                    cluster.check()
                    if isinstance(lost, DivergedError):
                        forget_diverging(self._storage)
                    again = beginning(self._storage, self.spec, tables, fresh=False)
                    charge = int(getattr(lost, "charged", True))  # a node that goes as announced is no loss
                    losses = charge if again.step > begin.step else losses + charge
                    begin, plan = self._back(again, begin, losses, lost)
                    time.sleep(0.0 if isinstance(lost, DivergedError) else backoff(losses))
        except KeyboardInterrupt as error:
            code = getattr(error, "exit_code", 130)
            saved = keeper.status.step
            where = f"from the checkpoint of step {saved:,}" if saved else "at the beginning"
            message = f"interrupted; the same command continues {where}"
            keeper.tell("interrupted", exit_code=code, message=message)
            raise Interrupted(code, message) from None
        except BaseException as error:
            code = 2 if isinstance(error, InputError) else 1
            message = str(error) if isinstance(error, RaysgdError) else repr(error)
            keeper.tell("failed", exit_code=code, message=message)
            raise
        finally:
            self.report.close()
        self._draw()

    def _lives(
        self, cluster: Session, tables: Tables, begin: Beginning, plan: Plan | None, keeper: _Keeper
    ) -> RunError | None:
        """Train with a gang of actors, until the end (None), or until so much is lost that others must begin anew."""
        # Our own cluster has room by construction: there only the start of processes can take long.
        gang = Gang(self.spec.scaling, START_TIMEOUT_S if cluster.started else None)
        gang.check_cluster, gang.memory, gang.say = cluster.check, cluster.memory, self.report.say
        gang.name = str(self.spec.run.name)
        try:
            self._train(gang, tables, begin, plan, keeper)
        except (RollBackError, ActorLostError) as error:
            return error
        except DivergedError as error:
            if self.spec.train.on_divergence == "stop":
                raise
            return error
        finally:
            gang.close()
        return None

    def _back(self, again: Beginning, before: Beginning, losses: int, lost: RunError) -> tuple[Beginning, Plan | None]:
        """Where to begin after a loss: at the newest checkpoint; after a divergence it is the best one.

        Raises the error where too much was lost in vain, or the learning rate was halved as often as may be.
        """
        plan, step = self._plan, again.step
        if isinstance(lost, DivergedError):
            assert plan is not None
            if len(plan.lowered) >= HALVINGS:
                raise lost
            plan = replace(plan, lowered=(*plan.lowered, step))
            self.report.say(f"{lost}")
            times = f"{len(plan.lowered)} of at most {HALVINGS} times"
            self.report.say(f"back to step {step:,}, with half the learning rate from there on ({times})")
            return replace(again, attempt=before.attempt), plan
        borne = self.spec.run.failure_config.max_failures
        if 0 <= borne < losses:
            count = f"losses without progress: {losses}, {borne} are borne (run.failure_config.max_failures)"
            raise RunError(f"{first_line(lost)}; {count}")
        same = " to the same bytes" if self.spec.train.staleness == 0 else ""
        self.report.say(f"{first_line(lost)}; all go back to step {step:,}, and on from there{same}")
        return replace(again, attempt=before.attempt), plan

    def _train(self, gang: Gang, tables: Tables, begin: Beginning, plan: Plan | None, keeper: _Keeper) -> None:
        gang.place()
        if plan is None:
            plan, notes = self._new_plan(gang, tables)
            for line in notes:
                self.report.say(line)
        if self._plan is None:  # later, what a gang before held may not be free yet
            footprint(self.spec, plan.learner).refuse(gang.memory())
        self._plan = plan
        for line in plan.describe():
            self.report.say(line)
        keeper.tell("running", total_steps=plan.total_steps)
        with MetricsLog(self._storage, say=self.report.say) as log:
            log.rewind(begin.step, validated=bool(begin.scores))
            attempt = Attempt(
                plan, self._storage, self.report, curve_from(log, begin, plan), gang, begin.attempt, keeper.saved
            )
            attempt.scores = begin.scores
            if begin.checkpoint is not None:
                attempt.crew.canary = begin.checkpoint.manifest.get("canary")
            incarnations = attempt.crew.membership.incarnations
            if self._incarnations is not None:  # no push from before a return to a checkpoint passes for one of now
                incarnations[:] = self._incarnations
            self._incarnations = incarnations
            generation, tallies = None, None
            if begin.checkpoint is not None:
                generation = begin.checkpoint.generation
                tallies = begin.checkpoint.tallies_of(self.spec.scaling.num_servers)
            attempt.begin(generation, tallies)
            if generation is not None:
                generation.release()  # the servers have it
            try:
                attempt.run()
            except KeyboardInterrupt:
                self.report.say("interrupted: writing a checkpoint")
                try:
                    attempt.halt()
                except RunError as error:  # who asked to end the run is heard whatever else is wrong
                    self.report.say(f"warning: no checkpoint could be written: {first_line(error)}")
                raise
            finally:
                attempt.close()
        keeper.move("succeeded" if attempt.step == plan.total_steps else "stopped", step=attempt.step)

    def _new_plan(self, gang: Gang, tables: Tables) -> tuple[Plan, list[str]]:
        """The statistics pass, shared out over the workers, and the plan that follows from it."""
        self.report.say(f"reading the statistics of {counted(tables.train.n_rows, 'row')}")
        shares = shared_out(gang.workers, len(tables.train.shards))
        vocabularies = not hash_bits(self.spec)
        calls = [
            gang.workers[number].actor.statistics.remote(tables.train, share, vocabularies)
            for number, share in shares.items()
        ]
        found = gather(calls, "the statistics pass", gang.refuse_hung)
        return plan_from_statistics(self.spec, tables, [s for share in found for s in share])

    def _draw(self) -> None:
        """The loss curve beside the metrics; a run does not fail for want of a drawing library."""
        try:
            picture = loss_curve({str(self.spec.run.name): metrics_log.read(self._storage)})
            with self._storage.saving(PICTURE):
                self._storage.write_atomic(PICTURE, picture)
        except (InputError, SaveError) as error:
            self.report.say(f"no picture of the loss curve: {error}")

    def _result(self) -> Result:
        last = checkpoints.load(self._storage, "last")
        history = metrics_log.read(self._storage)
        metrics = dict(last.manifest.get("metrics", {}))
        if (loss := metrics_log.epoch_loss(history)) is not None:
            metrics["train_loss"] = loss
        standing = status.read(self._storage)
        stopped = standing is not None and standing.total_steps is not None and last.step < standing.total_steps
        return Result(metrics, last.path, self._storage.uri, last.digest(), last.step, stopped, history)


class _Keeper:
    """Writes status.json at every change."""

    def __init__(self, storage: Storage, first: Status, say: Callable[[str], None]) -> None:
        self.storage = storage
        self.status = first
        self._say = say
        self._warned = False
        self._lock = threading.Lock()

    def move(self, state: status.State, **changes: Any) -> None:
        """Raises SaveError where it cannot be written."""
        with self._lock:
            self.status = self.status.moved(state, **changes)
            self.status = status.write(self.storage, self.status)

    def tell(self, state: status.State, **changes: Any) -> None:
        """The same, where what is told matters more than that it is written down: with a warning, once."""
        try:
            self.move(state, **changes)
            self._warned = False
        except RunError as error:
            if not self._warned and str(error) != self.status.message:
                self._say(f"warning: {error}")
            self._warned = True

    def saved(self, step: int, digest: str) -> None:
        """A checkpoint of ``step`` is published; told by the thread that wrote it."""
        self.tell("running", step=step, digest=digest)
