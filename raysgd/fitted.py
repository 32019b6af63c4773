"""A trained model: the encoder and the parameters. Predicts, evaluates and streams files without Ray.

table ─ encoder ─▶ batch ─ learner, params ─▶ scores ─ loss ─▶ predictions, probabilities
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from raysgd import checkpoint as checkpoints
from raysgd.checkpoint import Checkpoint
from raysgd.data.calls import Calls, here
from raysgd.data.columns import suggestion
from raysgd.data.dataset import ArrowDataset, Dataset, open_dataset
from raysgd.data.encode import Encoder
from raysgd.data.rowfile import RowFile, target
from raysgd.errors import CheckpointError, InputError
from raysgd.learn.batch import Float32, Float64
from raysgd.learn.metrics import BlockScore, combine, pooled
from raysgd.learn.models.base import ValueAndGrad
from raysgd.scoring import refuse_no_loss, score_shard
from raysgd.sections import model_from_dict
from raysgd.storage import Storage

#: Rows that are encoded and scored at once: what prediction holds besides the row group it reads.
BLOCK_ROWS = 65_536

#: What can be predicted in memory: an Arrow table or batch, or columns by name as Arrow takes them.
Rows: TypeAlias = pa.Table | pa.RecordBatch | Mapping[str, Any]

#: Called with (rows done, rows in all).
OnRows: TypeAlias = Callable[[int, int], None]


@dataclass(frozen=True)
class FittedModel:
    """What training leaves: enough to predict, nothing to train with.

    encoder: how rows become arrays, with the column roles and the classes
    learner: the model bound to them
    params: (n_params,) float32
    path: where the checkpoint lies, None where the model was put together by hand
    step: the steps it was trained for
    """

    encoder: Encoder = field(repr=False)
    learner: ValueAndGrad = field(repr=False)
    params: Float32 = field(repr=False)
    path: str | None = None
    step: int | None = None

    @property
    def classes(self) -> tuple[bool | int | str, ...]:
        """The label values in the order of the probabilities; empty where a number is predicted."""
        return self.encoder.classes

    def predict(self, rows: Rows) -> npt.NDArray[Any]:
        """(n_rows,) the most probable class, as the label had it, or the predicted number (float32).

        Raises InputError where a column is missing or unusable, or where a row misses a value and training
        refused or dropped such rows.
        """
        parts = [_values(self._predictions(block)) for block in self._scored(_table(rows))]
        return np.concatenate(parts)

    def predict_proba(self, rows: Rows) -> Float64:
        """(n_rows, n_classes) float64: the probability of each class, in the order of :attr:`classes`.

        Raises InputError as :meth:`predict` does, and where a number is predicted.
        """
        if not self.classes:
            raise InputError("a model that predicts a number has no probabilities; use predict")
        parts = [self._probabilities(block) for block in self._scored(_table(rows))]
        return np.concatenate(parts)

    def evaluate(
        self, data: ArrowDataset | str, on_rows: OnRows | None = None, calls: Calls = here
    ) -> dict[str, float]:
        """The metrics over labelled data, row group by row group: the same figures that a run's validation gives,
        whoever scores them.

        "loss", "rows", and "accuracy", "auc" or "rmse" where they apply; "unseen": category values that training
        did not see. Raises InputError where no row weighs anything.
        """
        spec = data if isinstance(data, ArrowDataset) else ArrowDataset(data)
        dataset = open_dataset(replace(spec, nulls=self.encoder.nulls), self.encoder.columns)
        blocks: list[BlockScore] = []
        done, unseen = 0, 0
        found = calls(_score, (self, dataset), range(len(dataset.shards)))
        for shard, (block, absent) in zip(dataset.shards, found, strict=True):
            blocks.append(block)
            if len(blocks) > 1:  # one histogram in all, not one for each row group
                blocks[0], blocks[-1] = pooled([blocks[0], block])
            done, unseen = done + shard.rows, unseen + absent
            if on_rows is not None:
                on_rows(done, dataset.n_rows)
        metrics = combine(blocks)
        refuse_no_loss(metrics, dataset)
        return {**metrics, "unseen": unseen}

    def predict_file(
        self,
        source: ArrowDataset | str,
        out: str,
        columns: Sequence[str] = (),
        on_rows: OnRows | None = None,
        calls: Calls = here,
    ) -> dict[str, int]:
        """Predicts a table of any size into a file, holding one row group at a time; the same bytes whoever predicts.

        source: the rows, as a path or an ArrowDataset; no label is needed
        out: ends in .parquet, .arrow, .feather or .csv; it appears when it is complete
        columns: columns of the source to carry over

        The file has ``columns``, then "prediction" and, for classes, a "probability_<class>" for each. Rows that
        miss a value get null where training dropped such rows. Returns the number of rows, of unseen category
        values ("unseen") and of rows without a prediction ("missing").
        """
        spec = source if isinstance(source, ArrowDataset) else ArrowDataset(source)
        _, path = target(out)  # what is wrong with it is told before anything is read
        dataset = open_dataset(replace(spec, nulls=self.encoder.nulls), self.encoder.columns, need_label=False)
        schema = self._output_schema(dataset, columns, path)
        counts = {"rows": 0, "unseen": 0, "missing": 0}
        with RowFile(out, schema) as file:
            for batches, unseen, missing in calls(
                _predict, (self, dataset, schema, tuple(columns)), range(len(dataset.shards))
            ):
                for batch in batches:
                    file.write(batch)
                counts["rows"] += sum(batch.num_rows for batch in batches)
                counts["unseen"] += unseen
                counts["missing"] += missing
                if on_rows is not None:
                    on_rows(counts["rows"], dataset.n_rows)
        return counts

    def _blocks(self, dataset: Dataset, shard: int, columns: Sequence[str]) -> Iterator[_Scored]:
        table = dataset.read(shard, list(dict.fromkeys([*self.encoder.columns.features, *columns])))
        try:
            yield from (self._score(block) for block in _slices(table))
        except InputError as error:
            raise InputError([f"{dataset.where(shard)}: {p}" for p in error.problems]) from error

    def _scored(self, table: pa.Table) -> Iterator[_Scored]:
        for block in _slices(table):
            scored = self._score(block)
            if scored.dropped.any():
                count = int(scored.dropped.sum())
                raise InputError(
                    f"{count:,} rows miss a value; training dropped such rows: fill them or leave them out"
                )
            yield scored

    def _score(self, table: pa.Table) -> _Scored:
        batch, unseen = self.encoder.apply(table, with_label=False)
        dropped = np.zeros(len(batch), np.bool_) if batch.weight is None else batch.weight == 0
        return _Scored(table, self.learner.scores(self.params, batch), dropped, unseen)

    def _predictions(self, block: _Scored) -> pa.Array:
        found = self.learner.loss.predictions(block.scores)
        values = pa.array(self.classes).take(pa.array(found)) if self.classes else pa.array(found)
        return _without(values, block.dropped)

    def _probabilities(self, block: _Scored) -> Float64:
        found = self.learner.loss.probabilities(block.scores)
        assert found is not None
        return found

    def _output_schema(self, dataset: Dataset, columns: Sequence[str], out: str) -> pa.Schema:
        existing = dataset.arrow_schema
        problems = [
            f"column {c!r} does not exist{suggestion(c, existing.names)}" for c in columns if c not in existing.names
        ]
        added = [pa.field("prediction", pa.array(self.classes).type if self.classes else pa.float32())]
        added += [pa.field(f"probability_{c}", pa.float64()) for c in self.classes]
        names = [*columns, *(field.name for field in added)]
        problems += [f"{out} would have two columns {name!r}" for name in dict.fromkeys(names) if names.count(name) > 1]
        if any(os.path.realpath(file.path) == os.path.realpath(out) for file in dataset.files):
            problems.append(f"{out} is one of the files to read: choose another name")
        if problems:
            raise InputError(problems)
        return pa.schema([*(existing.field(name) for name in columns), *added])

    def _output(self, block: _Scored, schema: pa.Schema, columns: Sequence[str]) -> pa.RecordBatch:
        arrays = [_one_array(block.table.column(name)) for name in columns]
        arrays.append(self._predictions(block))
        if self.classes:
            arrays += [_without(pa.array(p), block.dropped) for p in self._probabilities(block).T.copy()]
        return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _score(shared: tuple[FittedModel, Dataset], shard: int) -> tuple[BlockScore, int]:
    """The scores of a shard of labelled data, and how many category values were unseen."""
    model, dataset = shared
    return score_shard(model.learner, model.params, model.encoder, dataset, shard)


def _predict(
    shared: tuple[FittedModel, Dataset, pa.Schema, tuple[str, ...]], shard: int
) -> tuple[list[pa.RecordBatch], int, int]:
    """The predictions for a shard, how many category values were unseen, how many rows have no prediction."""
    model, dataset, schema, columns = shared
    blocks = list(model._blocks(dataset, shard, columns))
    batches = [model._output(block, schema, columns) for block in blocks]
    return batches, sum(b.unseen for b in blocks), sum(int(b.dropped.sum()) for b in blocks)


@dataclass(frozen=True)
class _Scored:
    """Rows, their scores (n_rows, k) float32, and which of them training would have dropped."""

    table: pa.Table
    scores: Float32
    dropped: npt.NDArray[np.bool_]
    unseen: int


def load(path: str | os.PathLike[str], which: str | int = "best") -> FittedModel:
    """The model of a run: of its best checkpoint by validation loss, of its last one, or of a step's.

    path: the run's directory, local or a URI
    which: "best", "last" or a step

    Damaged checkpoints are passed over with a warning. Raises InputError where there is no run,
    CheckpointError where no checkpoint can be used.

    >>> load("/no/such/run")
    Traceback (most recent call last):
        ...
    raysgd.errors.InputError: there is no run at /no/such/run
    """
    found = checkpoints.load(open_run(path), which)
    for sentence in found.skipped:
        warnings.warn(f"a damaged checkpoint was passed over: {sentence}", stacklevel=2)
    return from_checkpoint(found)


def open_run(path: str | os.PathLike[str]) -> Storage:
    """The storage of an existing run. Raises InputError where there is none."""
    storage = Storage.open(path)
    if not any(storage.exists(name) for name in (checkpoints.DIRECTORY, "config.toml", "status.json")):
        raise InputError(f"there is no run at {storage.uri}")
    return storage


def from_checkpoint(found: Checkpoint) -> FittedModel:
    """The model that a verified checkpoint holds. Raises CheckpointError where its manifest does not fit."""
    manifest = found.manifest
    try:
        encoder = Encoder.from_json(manifest["encoder"])
        learner = model_from_dict(manifest["model"]).bind(encoder.inputs, encoder.target)
        layout = checkpoints.layout_of(manifest)
    except (KeyError, TypeError, ValueError, AttributeError, pa.ArrowException) as error:
        raise CheckpointError(f"{found.path}: the manifest is not of this form: {error!r}") from error
    if layout != learner.layout:
        raise CheckpointError(
            f"{found.path}: the parameters are {layout.arrays}, the model has {learner.layout.arrays}"
        )
    return FittedModel(encoder, learner, found.params, found.path, found.step)


def _table(rows: Rows) -> pa.Table:
    if isinstance(rows, pa.Table):
        return rows
    if isinstance(rows, pa.RecordBatch):
        return pa.Table.from_batches([rows])
    if isinstance(rows, Mapping):
        try:
            return pa.table(dict(rows))
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise InputError(f"rows must be columns of equal length by name: {error}") from error
    raise InputError(f"rows must be a pyarrow Table, a RecordBatch or columns by name, got {type(rows).__name__}")


def _slices(table: pa.Table) -> Iterator[pa.Table]:
    """Blocks of rows as views; an empty table is one empty block."""
    for begin in range(0, max(1, table.num_rows), BLOCK_ROWS):
        yield table.slice(begin, BLOCK_ROWS)


def _without(values: pa.Array, dropped: npt.NDArray[np.bool_]) -> pa.Array:
    """``values`` with null where ``dropped``."""
    return pc.if_else(pa.array(dropped), pa.scalar(None, values.type), values) if dropped.any() else values


def _values(values: pa.Array) -> npt.NDArray[Any]:
    found: npt.NDArray[Any] = values.to_numpy(zero_copy_only=False)
    return found


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    combined = column.combine_chunks()
    return combined if isinstance(combined, pa.Array) else pa.concat_arrays(combined.chunks)
