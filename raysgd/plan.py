"""Everything that determines the trained bytes, worked out before the first step; no Ray.

spec ─ open ─▶ tables ─ statistics of the training data ─▶ plan: encoder, learner, sampler, update rule
                      └ or the manifest of a checkpoint ─▶ the same plan, without reading the data
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from raysgd.checkpoint import layout_of
from raysgd.data.columns import is_string, other_kinds, value_type
from raysgd.data.dataset import Dataset, open_dataset
from raysgd.data.encode import Encoder, text_label
from raysgd.data.moments import ShardStatistics, merge
from raysgd.data.sampler import Sampler
from raysgd.data.spread import choose_fragment_rows, choose_window_rows, label_spread
from raysgd.errors import CheckpointError, InputError
from raysgd.learn.batch import Float32
from raysgd.learn.losses import runs
from raysgd.learn.models.base import ValueAndGrad
from raysgd.learn.models.hashed import BoundHashed
from raysgd.learn.parameters import Range, block_width, even_split
from raysgd.learn.schedules import Lowered, as_schedule
from raysgd.protocol.compute import LocalSteps
from raysgd.protocol.consistency import Consistency
from raysgd.protocol.generation import Generation
from raysgd.protocol.kept import Kept
from raysgd.protocol.rounds import Rounds
from raysgd.protocol.shard import ServerShard
from raysgd.protocol.sparse_shard import SparseShard, make_sparse_shard
from raysgd.protocol.stale import shard_class
from raysgd.protocol.tally import Tally
from raysgd.protocol.update import PlannedRows, Rule, norm_sums
from raysgd.sections import model_to_dict
from raysgd.spec import RunSpec


@dataclass(frozen=True)
class Tables:
    """The opened data sets of a run: footers read, schemas checked, roles of the columns settled."""

    train: Dataset
    validation: Dataset | None

    @property
    def fingerprints(self) -> dict[str, str | None]:
        """What stands for the data where two runs are compared."""
        validation = None if self.validation is None else self.validation.fingerprint
        return {"train": self.train.fingerprint, "validation": validation}


def open_tables(spec: RunSpec) -> Tables:
    """Open the data; the validation data takes the training data's column roles and null policy.

    Raises InputError with everything that footers and schemas tell, and where a batch is larger than the table.
    """
    train = open_dataset(spec.data)
    label = train.schema.label
    is_text = label is not None and is_string(value_type(train.arrow_schema.field(label).type))
    if is_text and spec.model.target_kind == "number":
        raise InputError(text_label(label))
    validation = None
    if spec.validation is not None:
        try:
            validation = open_dataset(replace(spec.validation, nulls=spec.data.nulls), train.schema)
        except InputError as error:
            raise InputError([f"validation: {problem}" for problem in error.problems]) from error
        if problems := other_kinds(validation.arrow_schema, train.arrow_schema, validation.schema):
            raise InputError([f"validation: {problem}" for problem in problems])
    if train.n_rows < spec.train.batch_size:
        raise InputError(
            f"train.batch_size must be at most the number of training rows ({train.n_rows:,}), "
            f"got {spec.train.batch_size:,}"
        )
    return Tables(train, validation)


@dataclass(frozen=True)
class Plan:
    """What every worker and server of a run agrees on. A pure function of data, config and seed."""

    spec: RunSpec
    tables: Tables
    encoder: Encoder
    learner: ValueAndGrad
    sampler: Sampler
    #: mean sample weight of a training row, rows dropped by the null policy counting 0
    mean_weight: float
    #: the steps from which on the learning rate is halved, because training diverged after them
    lowered: tuple[int, ...] = ()

    @property
    def steps_per_epoch(self) -> int:
        return self.sampler.steps_per_epoch

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.spec.train.epochs

    @property
    def end_step(self) -> int:
        """Where an attempt ends: ``stop_after_steps`` cuts it short, at the end of a round, without changing any
        schedule."""
        return self.rounds.end(self.total_steps, self.spec.run.stop_after_steps)

    @property
    def rule(self) -> Rule:
        """The update that every server shard applies."""
        train = self.spec.train
        planned = PlannedRows(train.batch_size, self.sampler.n_rows, self.steps_per_epoch, self.mean_weight)
        rate = as_schedule(self.spec.optimizer.learning_rate).resolve(self.steps_per_epoch, self.total_steps)
        if self.lowered:
            rate = Lowered(rate, self.lowered)
        return Rule(self.spec.optimizer, rate, planned, self.spec.model.l2, self.rounds, train.clip_norm)

    @property
    def rounds(self) -> Rounds:
        """The steps that workers take between two pushes."""
        return Rounds(self.spec.train.local_steps, self.steps_per_epoch)

    @property
    def consistency(self) -> Consistency:
        return Consistency(self.spec.train.staleness)

    @property
    def local(self) -> LocalSteps | None:
        """How virtual workers walk by themselves between two pushes; None where they take one step."""
        if self.rounds.local_steps == 1:
            return None
        layout = self.learner.layout
        penalized = runs(layout.penalized(Range(0, layout.n_params)))
        return LocalSteps(self.rule, self.spec.train.virtual_workers, penalized)

    def spans(self) -> tuple[Range, ...]:
        """The server shards' ranges of the flat vector. Raises InputError where there are too few parameters."""
        try:
            return even_split(self.learner.layout.n_params, self.spec.scaling.num_servers)
        except ValueError as error:
            raise InputError(f"scaling.{error}") from error

    @property
    def sparse(self) -> bool:
        """Whether a step touches few of the parameters: then only those are pulled, pushed and updated."""
        return isinstance(self.learner, BoundHashed)

    @property
    def buffers(self) -> int:
        """How many vectors of parameters each server keeps."""
        return 1 if self.sparse else shard_class(self.consistency).BUFFERS

    @property
    def kept(self) -> Kept:
        """What a server keeps where its node can see it."""
        n_virtual, touched, norms = self.spec.train.virtual_workers, 0, 0
        if isinstance(self.learner, BoundHashed):
            touched = self.learner.touched(n_virtual * self.sampler.rows_per_draw)
        if self.rule.clip_norm is not None and len(self.spans()) > 1:
            norms = norm_sums(max(map(len, self.spans())), block_width(self.learner.layout.n_params))
        clocks = 0 if self.consistency.exact else n_virtual
        return Kept(self.buffers, tuple(self.spec.optimizer.slots), clocks, touched, norms)

    def initial(self) -> Generation:
        """Version 0: small random weights from the seed, optimizer state zero."""
        params: Float32 = self.learner.initial(self.spec.train.seed)
        return Generation(0, params, {slot: np.zeros_like(params) for slot in self.spec.optimizer.slots})

    def shards(
        self, generation: Generation | None, tallies: Sequence[Tally] | None = None
    ) -> list[Callable[..., ServerShard | SparseShard]]:
        """What makes the state machine of each server shard, beginning at ``generation``; pickles.

        tallies: by shard, what else is in the generation, where it was copied while virtual workers stood apart

        The generation's steps become rounds, as the protocol counts. None: version 0, which the shards make themselves.
        """
        makers = list(zip(self.successors(), self.spans(), strict=True))
        if self.sparse:
            return [
                partial(make, generation=None if generation is None else generation.cut(span)) for make, span in makers
            ]
        if generation is None:
            seed, slots = self.spec.train.seed, tuple(self.spec.optimizer.slots)
            return [partial(_at_version_0, make, self.learner, seed, span, slots) for make, span in makers]
        begin = replace(generation, step=self.rounds.at(generation.step))
        if tallies is None:
            return [partial(make, generation=begin.cut(span)) for make, span in makers]
        told = zip(makers, tallies, strict=True)
        return [partial(make, generation=begin.cut(span), tally=tally) for (make, span), tally in told]

    def successors(self) -> list[Callable[..., ServerShard | SparseShard]]:
        """What makes the state machine of each server shard, but for what it begins at; pickles."""
        layout, spans, train = self.learner.layout, self.spans(), self.spec.train
        if isinstance(self.learner, BoundHashed):
            make = partial(make_sparse_shard, n_virtual=train.virtual_workers, seed=train.seed)
            return [partial(make, i, self.rule, span, self.learner) for i, span in enumerate(spans)]
        return [
            partial(
                shard_class(self.consistency),
                i,
                self.rule,
                layout.penalized(span),
                n_virtual=train.virtual_workers,
                n_shards=len(spans),
                width=block_width(layout.n_params),
                consistency=self.consistency,
            )
            for i, span in enumerate(spans)
        ]

    def facts(self) -> dict[str, Any]:
        """The plan's part of a checkpoint's manifest: enough to continue without reading the statistics again."""
        return {
            "config": self.spec.determining(),
            "fingerprints": self.tables.fingerprints,
            "model": model_to_dict(self.spec.model),
            "encoder": self.encoder.to_json(),
            "plan": {
                "window_rows": self.sampler.window_rows,
                "fragment_rows": self.sampler.fragment_rows,
                "mean_weight": self.mean_weight,
                "lowered": list(self.lowered),
            },
        }

    def describe(self) -> list[str]:
        """Lines for people: what will be trained on what."""
        layout = self.learner.layout
        arrays = ", ".join(f"{a.name} {'x'.join(map(str, a.shape))}" for a in layout.arrays)
        train = self.spec.train
        return [
            f"model: {layout.n_params:,} parameters ({arrays})",
            f"steps: {self.steps_per_epoch:,} an epoch, {self.total_steps:,} in all; batches of {train.batch_size:,} "
            f"rows over {train.virtual_workers} virtual workers; windows of {self.sampler.window_rows:,} rows",
        ]


def _at_version_0(
    make: Callable[..., Any], learner: ValueAndGrad, seed: int, span: Range, slots: tuple[str, ...], **kept: Any
) -> Any:
    """A shard at its part of the initial parameters, made where it is kept: they need not travel."""
    params = learner.initial(seed)[span.slice]
    return make(generation=Generation(0, params, {slot: np.zeros_like(params) for slot in slots}), **kept)


def hash_bits(spec: RunSpec) -> int:
    """To how many bits categories are hashed; 0 where they have vocabularies."""
    return int(getattr(spec.model, "hash_bits", 0))


def plan_from_statistics(spec: RunSpec, tables: Tables, shards: Sequence[ShardStatistics]) -> tuple[Plan, list[str]]:
    """The plan of a new run, from the statistics of every training shard; and lines that people should read.

    Raises InputError with the violations that the statistics pass found.
    """
    statistics = merge(shards)
    encoder = Encoder.fit(statistics, tables.train.schema, spec.model.target_kind, spec.data.nulls, hash_bits(spec))
    rows = tables.train.shard_rows
    n_virtual = spec.train.virtual_workers
    spread = label_spread(shards)
    fragment_rows = choose_fragment_rows(spread, rows, n_virtual)
    window_rows, warning = choose_window_rows(
        spread,
        rows,
        batch_size=spec.train.batch_size,
        virtual_workers=n_virtual,
        window_rows=spec.data.window_rows,
        max_window_rows=spec.data.max_window_rows,
        fragment_rows=fragment_rows,
    )
    notes = statistics.describe()
    if window_rows != spec.data.window_rows or fragment_rows is not None:
        instead = f" instead of {spec.data.window_rows:,}" if window_rows != spec.data.window_rows else ""
        notes.append(
            "the label depends on the place in the file: "
            f"rows are shuffled jointly in windows of {window_rows:,} rows{instead}"
            + (f", from fragments of {fragment_rows:,} rows" if fragment_rows is not None else "")
        )
    if warning is not None:
        notes.append(f"warning: {warning}")
    plan = _plan(
        spec,
        tables,
        encoder,
        window_rows=window_rows,
        fragment_rows=fragment_rows,
        mean_weight=statistics.mean_weight,
    )
    return plan, notes


def plan_from_manifest(spec: RunSpec, tables: Tables, manifest: Mapping[str, Any]) -> Plan:
    """The plan of a run that continues; nothing is read but the manifest.

    Raises CheckpointError where the manifest does not fit the spec, InputError where there are too few parameters.
    """
    try:
        stored = manifest["plan"]
        encoder = Encoder.from_json(manifest["encoder"])
        plan = _plan(
            spec,
            tables,
            encoder,
            window_rows=int(stored["window_rows"]),
            fragment_rows=stored["fragment_rows"],
            mean_weight=float(stored["mean_weight"]),
        )
        plan = replace(plan, lowered=tuple(int(step) for step in stored.get("lowered", ())))
        fits = layout_of(manifest) == plan.learner.layout and sorted(manifest["slots"]) == sorted(spec.optimizer.slots)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the manifest's plan or encoder is not of this form: {error!r}") from error
    if not fits:
        raise CheckpointError("the manifest's arrays are not those of the model and the optimizer of its config")
    return plan


def _plan(
    spec: RunSpec,
    tables: Tables,
    encoder: Encoder,
    *,
    window_rows: int,
    fragment_rows: int | None,
    mean_weight: float,
) -> Plan:
    learner = spec.model.bind(encoder.inputs, encoder.target)
    train = spec.train
    sampler = Sampler(
        tables.train.shard_rows,
        train.batch_size,
        train.virtual_workers,
        train.seed,
        window_rows,
        fragment_rows=fragment_rows,
    )
    plan = Plan(spec, tables, encoder, learner, sampler, mean_weight)
    plan.spans()
    return plan
