"""What a run will need and take, before anything is started: for ``--dry-run``. No Ray.

From footers, the config, and the statistics of a few row groups, which tell how long the vector of parameters is; where
the run has a checkpoint, that tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from raysgd.cost import FLOAT, Job, memory, predict
from raysgd.data.encode import Encoder
from raysgd.data.moments import merge, refuse, shard_statistics
from raysgd.data.sampler import Sampler
from raysgd.errors import InputError
from raysgd.learn.models.base import ValueAndGrad
from raysgd.learn.parameters import Layout
from raysgd.plan import Plan, Tables, hash_bits
from raysgd.protocol.consistency import Consistency
from raysgd.protocol.rounds import Rounds
from raysgd.protocol.stale import shard_class
from raysgd.spec import RunSpec

#: Row groups of which a dry run reads the statistics: evenly over the table, so that most categories are seen.
SAMPLED = 4


def outlook(spec: RunSpec, tables: Tables, plan: Plan | None = None) -> dict[str, Any]:
    """Rows, steps, parameters, memory and time of a run, as far as they can be told; None where they cannot.

    plan: of a run that continues

    Raises InputError where values in the row groups that are read cannot be used, as missing ones where they are
    refused; and with what only all rows together show, where the table has no others.
    """
    train, scaling = spec.train, spec.scaling
    sampler = plan.sampler if plan is not None else _sampler(spec, tables)
    total = sampler.steps_per_epoch * train.epochs
    facts: dict[str, Any] = {
        "epochs": train.epochs,
        "steps_per_epoch": sampler.steps_per_epoch,
        "total_steps": total,
        "ends_at_step": Rounds(train.local_steps, sampler.steps_per_epoch).end(total, spec.run.stop_after_steps),
        "batch_size": train.batch_size,
        "virtual_workers": train.virtual_workers,
        "workers": scaling.num_workers,
        "servers": scaling.num_servers,
        "cpus": scaling.cpus,
    }
    learner, exact, note = (plan.learner, True, None) if plan is not None else _learner(spec, tables)
    facts |= {"parameters": None if learner is None else learner.layout.n_params, "parameters_exact": exact}
    if learner is not None:
        facts |= _needs(spec, tables, learner)
    return facts | ({} if note is None else {"note": note})


def remaining(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a dry run found, with the seconds that the steps which are left will take: a run may have some behind it.

    >>> remaining({"begins_at_step": 60, "ends_at_step": 100, "predicted_step_ms": 50.0, "predicted_seconds": 5.0})
    {'begins_at_step': 60, 'ends_at_step': 100, 'predicted_step_ms': 50.0, 'predicted_seconds': 2.0, 'steps_left': 40}
    """
    left = max(0, facts["ends_at_step"] - facts["begins_at_step"])
    step_ms = facts.get("predicted_step_ms")
    seconds = {} if step_ms is None else {"predicted_seconds": round(left * step_ms / 1e3, 1)}
    return {**facts, **seconds, "steps_left": left}


def _sampler(spec: RunSpec, tables: Tables) -> Sampler:
    train = spec.train
    rows = tables.train.shard_rows
    return Sampler(rows, train.batch_size, train.virtual_workers, train.seed, spec.data.window_rows)


def _learner(spec: RunSpec, tables: Tables) -> tuple[ValueAndGrad | None, bool, str | None]:
    """The model bound to what a few row groups show; whether that is exact; why there is none."""
    table, count = tables.train, len(tables.train.shards)
    sampled = sorted({i * count // SAMPLED for i in range(SAMPLED)})
    whole = len(sampled) == count
    bits = hash_bits(spec)
    found = [shard_statistics(table, index, vocabularies=not bits) for index in sampled]
    try:
        refuse(found)
    except InputError as error:
        rest = f"only {len(sampled)} of {count} row groups were read: others may have more"
        raise InputError([*error.problems, *([] if whole else [rest])]) from None
    try:
        statistics = merge([replace(one, index=i) for i, one in enumerate(found)])
        encoder = Encoder.fit(statistics, table.schema, spec.model.target_kind, spec.data.nulls, bits)
        learner = spec.model.bind(encoder.inputs, encoder.target)
    except InputError as error:
        if whole:
            raise
        return None, False, f"{len(sampled)} of {count} row groups do not show the parameters: {error.problems[0]}"
    fixed = (not encoder.inputs.categories or bool(bits)) and not encoder.classes
    return learner, whole or fixed, None


def _needs(spec: RunSpec, tables: Tables, learner: ValueAndGrad) -> dict[str, Any]:
    """Bytes a step, memory and, for dense models, time."""
    scaling, train, rows = spec.scaling, spec.train, tables.train.n_rows
    inputs = learner.inputs
    row_bytes = FLOAT * (inputs.numeric + len(inputs.categories) + 1 + (tables.train.schema.weight is not None))
    share = -(-rows // train.virtual_workers)
    slots = len(spec.optimizer.slots)
    job = Job(
        n_params=learner.layout.n_params,
        batch_size=train.batch_size,
        virtual_workers=train.virtual_workers,
        workers=scaling.least_workers,
        servers=scaling.num_servers,
        local_steps=train.local_steps,
        row_flops=row_flops(learner.layout),
        row_codes=len(inputs.categories),
        slots=slots,
    )
    facts: dict[str, Any] = {}
    sparse = bool(inputs.hash_bits)
    if sparse:  # a step touches few of the weights: how many is not known before
        server = FLOAT * -(-job.n_params // job.servers) * (1 + slots)
        window = min(spec.data.window_rows, share) * row_bytes
        worker = min(scaling.cache_bytes, rows * row_bytes) + (job.carried + 1) * window
        return {"worker_memory_bytes": worker, "server_memory_bytes": server}
    needed = memory(
        job,
        window_bytes=min(spec.data.window_rows, share) * row_bytes,
        cache_bytes=min(scaling.cache_bytes, rows * row_bytes),
        buffers=shard_class(Consistency(train.staleness)).BUFFERS,
    )
    facts |= {"worker_memory_bytes": needed.worker, "server_memory_bytes": needed.server}
    cost = predict(job)
    steps = -(-rows // train.batch_size) * train.epochs
    facts |= {
        "pushed_bytes_per_step": cost.pushed // train.local_steps,
        "pulled_bytes_per_step": cost.pulled // train.local_steps,
        "predicted_step_ms": round(1e3 * cost.step_s, 4),
        "predicted_rows_per_s": round(train.batch_size / cost.step_s),
        "predicted_seconds": round(steps * cost.step_s, 1),
        "predicted_for": "shards decoded, one node of the cost model's machine (docs/cost.md)",
    }
    return facts


def row_flops(layout: Layout) -> float:
    """Operations that a row takes: 2 for each weight that it meets, forward, by the weights, and by what came in.

    The first layer's input needs no gradient; codes are looked up and counted otherwise.

    >>> from raysgd.learn.batch import Inputs, Target
    >>> from raysgd.learn.models import MLP
    >>> bound = MLP(hidden=(8,)).bind(Inputs(2, (5,)), Target(2))
    >>> row_flops(bound.layout) == 4 * 2 * 8 + 6 * 8
    True
    """
    total = 0.0
    for array in layout.arrays:
        if len(array.shape) < 2 or array.name.endswith("codes"):
            continue
        deep = array.name.startswith("layer") and not array.name.startswith("layer0")
        total += (6.0 if deep else 4.0) * array.shape[0] * array.shape[1]
    return total
