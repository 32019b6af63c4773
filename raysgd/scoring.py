"""Score one shard of labelled data: the same figures whoever does it, in training's validation and in ``evaluate``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from raysgd.data.dataset import Dataset, counted
from raysgd.data.encode import Encoder
from raysgd.data.loader import read_batch
from raysgd.errors import InputError
from raysgd.learn.batch import Batch, Float32
from raysgd.learn.losses import Loss
from raysgd.learn.metrics import BlockScore, pooled, score_block, tree_sum
from raysgd.learn.models.base import ValueAndGrad

#: Rows that are scored at once. Fixed: BLAS may round differently for other sizes.
SLICE_ROWS = 8_192


def score_shard(
    learner: ValueAndGrad, params: Float32, encoder: Encoder, dataset: Dataset, shard: int
) -> tuple[BlockScore, int]:
    """The scores of one shard (row group) at ``params`` (n_params,), and how many category values were unseen.

    Raises InputError with file and row group where the rows cannot be read or encoded.
    """
    return score_rows(learner.loss, lambda rows: learner.scores(params, rows), encoder, dataset, shard)


def score_rows(
    loss: Loss, scores: Callable[[Batch], Float32], encoder: Encoder, dataset: Dataset, shard: int
) -> tuple[BlockScore, int]:
    """The same, with ``scores`` of a slice of rows from wherever the parameters are."""
    rows, unseen = read_batch(dataset, encoder, shard)
    slices = [rows.slice(begin, begin + SLICE_ROWS) for begin in range(0, max(1, len(rows)), SLICE_ROWS)]
    return _folded([score_block(loss, scores(s), s.label, s.weight) for s in slices]), unseen


def refuse_no_loss(metrics: Mapping[str, float], dataset: Dataset) -> None:
    """Raises InputError where the metrics over a table have no loss, because none of its rows weighs anything."""
    if "loss" in metrics:
        return
    columns, why = dataset.schema, []
    if dataset.nulls == "drop":
        why.append('nulls = "drop" leaves out each that misses a value')
    if columns.weight is not None:
        why.append(f"weights of 0 in column {columns.weight!r} (in float32, where 1e-46 is 0, too) do not count")
    first, *more = (file.path for file in dataset.files)
    where = f"{first} and {counted(len(more), 'more file')}" if more else first
    raise InputError(f"{where}: no row has a weight, so there is no loss: {' and '.join(why)}; give rows that count")


def _folded(blocks: Sequence[BlockScore]) -> BlockScore:
    """The slices of a shard as one block: counts added, float sums along the fixed tree."""
    first = pooled(blocks)[0]
    return replace(
        first,
        rows=sum(b.rows for b in blocks),
        weight=tree_sum([b.weight for b in blocks]),
        loss_sum=tree_sum([b.loss_sum for b in blocks]),
        correct=None if first.correct is None else sum(b.correct or 0 for b in blocks),
        squared_error=None if first.squared_error is None else tree_sum([b.squared_error or 0.0 for b in blocks]),
    )
