"""Does the label depend on the place in the file, and how much must then be shuffled jointly?

    between shards: B = sum_i n_i (m_i - m)^2        within: W = sum_i sum_j (y_ij - m_i)^2
    correlation of two rows of one shard:  rho = s_b^2 / (s_b^2 + s_w^2)       (analysis of variance)

A step draws B rows from one window of each of V virtual workers. Where a window holds k units (shards or fragments) out
of the K of its run, the mean label of its batches varies by

    excess = rho * batch_size / (k V) * (1 - k / K)

times the variance that independent draws would have. The window grows until that is small.

Source: Wilson and Hilferty, "The distribution of chi-square", 1931, for the test.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import cbrt, inf, sqrt

from raysgd.data.moments import ShardStatistics, Statistics

#: Standard deviations beyond which shards differ by more than chance (one in 30,000).
SIGNIFICANT = 4.0
#: Excess variance of the batches' mean label that is not worth a larger window.
TOLERATED_EXCESS = 0.25
#: Fragments that each virtual worker's run should hold where shards differ.
FRAGMENTS_PER_RUN = 8
#: Share of the label's variance that may lie between the runs of virtual workers.
TOLERATED_BETWEEN_RUNS = 0.1


@dataclass(frozen=True, slots=True)
class LabelSpread:
    """How the labels of shards differ.

    z:           standard deviations beyond what chance gives
    correlation: rho above, in [0, 1]
    """

    z: float
    correlation: float

    @property
    def differs(self) -> bool:
        """Shards differ by more than chance."""
        return self.z > SIGNIFICANT


def label_spread(shards: Sequence[ShardStatistics]) -> LabelSpread:
    """Compare the labels of shards: frequencies of classes (Pearson's test), or means of a number (F-test).

    >>> from raysgd.data.moments import Moments
    >>> def shard(index, zeros, ones):
    ...     counts = {0: zeros, 1: ones}
    ...     return ShardStatistics(index, Statistics(zeros + ones, 0, Moments.join([]), (), None, counts, 0.0))
    >>> label_spread([shard(0, 50, 50), shard(1, 48, 52)]).differs
    False
    >>> label_spread([shard(0, 99, 1), shard(1, 1, 99)]).differs
    True
    """
    values = [s.values for s in shards if s.values.rows > s.values.dropped]
    if len(values) < 2:
        return LabelSpread(0.0, 0.0)
    if all(v.classes is not None for v in values):
        return _class_spread(values)
    return _number_spread(values)


def _class_spread(values: Sequence[Statistics]) -> LabelSpread:
    counts = [v.classes or {} for v in values]
    rows = [sum(c.values()) for c in counts]
    total: Counter[object] = Counter()
    for c in counts:
        total.update(c)
    n = sum(rows)
    if len(total) < 2:
        return LabelSpread(0.0, 0.0)
    agreement = sum(sum(x * x for x in c.values()) / r for c, r in zip(counts, rows, strict=True))
    between = agreement - sum(x * x for x in total.values()) / n
    pearson = n * (sum(x * x / (r * total[k]) for c, r in zip(counts, rows, strict=True) for k, x in c.items()) - 1)
    freedom = (len(values) - 1) * (len(total) - 1)
    return LabelSpread(_z(pearson, freedom), _correlation(between, n - agreement, rows))


def _number_spread(values: Sequence[Statistics]) -> LabelSpread:
    moments = [(int(v.label.n[0]), float(v.label.mean[0]), float(v.label.m2[0])) for v in values if v.label is not None]
    rows = [n for n, _, _ in moments]
    n = sum(rows)
    if len(rows) < 2 or n <= len(rows):
        return LabelSpread(0.0, 0.0)
    mean = sum(k * m for k, m, _ in moments) / n
    between = sum(k * (m - mean) ** 2 for k, m, _ in moments)
    within = sum(m2 for _, _, m2 in moments)
    noise = within / (n - len(rows))
    statistic = between / noise if noise > 0 else (inf if between > 0 else 0.0)
    return LabelSpread(_z(statistic, len(rows) - 1), _correlation(between, within, rows))


def _z(chi2: float, freedom: int) -> float:
    spread = 2 / (9 * freedom)
    return (cbrt(max(chi2, 0.0) / freedom) - (1 - spread)) / sqrt(spread)


def _correlation(between: float, within: float, rows: Sequence[int]) -> float:
    n, k = sum(rows), len(rows)
    if n <= k:
        return 0.0
    size = (n - sum(r * r for r in rows) / n) / (k - 1)
    mean_between, mean_within = between / (k - 1), within / (n - k)
    component = max(0.0, (mean_between - mean_within) / size)
    return component / (component + mean_within) if component > 0 else 0.0


def choose_fragment_rows(spread: LabelSpread, shard_rows: Sequence[int], virtual_workers: int) -> int | None:
    """Rows of a fragment, where shards differ and are so few that virtual workers would see different labels; or None.

    A run of k shards keeps rho / k of the label's variance to itself: batches are then stratified, not random, and the
    virtual workers' gradients differ. A fragment costs: each of its shards is decoded by several virtual workers.

    >>> choose_fragment_rows(LabelSpread(100.0, 1.0), [16_384] * 18, virtual_workers=8)
    4608
    >>> choose_fragment_rows(LabelSpread(1.0, 0.0), [16_384] * 18, virtual_workers=8) is None
    True
    """
    wanted = FRAGMENTS_PER_RUN * virtual_workers
    between = spread.correlation * virtual_workers / len(shard_rows)
    if not spread.differs or len(shard_rows) >= wanted or between <= TOLERATED_BETWEEN_RUNS:
        return None
    return max(1, -(-sum(shard_rows) // wanted))


def choose_window_rows(
    spread: LabelSpread,
    shard_rows: Sequence[int],
    *,
    batch_size: int,
    virtual_workers: int,
    window_rows: int,
    max_window_rows: int,
    fragment_rows: int | None = None,
) -> tuple[int, str | None]:
    """Rows of a window, and a warning where the limit is too low for the order of this file.

    window_rows:     what the config asks for: returned where the labels of shards differ by no more than chance
    max_window_rows: the most rows that may be shuffled jointly
    fragment_rows:   as given to the sampler

    >>> choose_window_rows(LabelSpread(100.0, 1.0), [1000] * 8000, batch_size=512, virtual_workers=8,
    ...     window_rows=65_536, max_window_rows=1_048_576)
    (262144, None)
    """
    run = -(-sum(shard_rows) // virtual_workers)
    unit = sum(shard_rows) / len(shard_rows)
    if fragment_rows is not None:
        unit = min(unit, fragment_rows)

    def excess(rows: int) -> float:
        units = max(1.0, rows / unit)
        return spread.correlation * batch_size / (units * virtual_workers) * max(0.0, 1 - rows / run)

    if not spread.differs:
        return window_rows, None
    rows = window_rows
    while rows < min(run, max_window_rows) and excess(rows) > TOLERATED_EXCESS:
        rows *= 2
    rows = min(rows, max(run, window_rows), max_window_rows)
    if excess(rows) <= TOLERATED_EXCESS:
        return rows, None
    return rows, (
        f"the label depends on the place in the file, and windows of max_window_rows = {max_window_rows:,} rows do "
        f"not mix it: the label's share varies {1 + excess(rows):.1f} times as much between batches as it should. "
        "Training may end worse than on shuffled data: raise max_window_rows, or shuffle the files "
        "once with `raysgd prepare`"
    )
