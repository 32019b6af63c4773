"""Loss curves: train and validation loss over the steps, the learning rate in a panel below.

matplotlib is imported in here only, when a picture is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import PurePath
from typing import Any

from raysgd.errors import InputError

Record = Mapping[str, Any]

#: File types that people open; matplotlib's other formats are not offered.
FORMATS = ("png", "svg", "pdf")
#: Share of a run's steps whose losses may leave the frame at the top.
EARLY = 0.1


def format_of(out: str) -> str:
    """The picture format that a file name asks for.

    Raises InputError where it is none of :data:`FORMATS`.

    >>> format_of("runs/loss.PNG")
    'png'
    """
    suffix = PurePath(out).suffix[1:].lower()
    if suffix not in FORMATS:
        raise InputError(f"{out} must end in one of {', '.join('.' + f for f in FORMATS)}")
    return suffix


def loss_curve(runs: Mapping[str, Sequence[Record]], picture_format: str = "png") -> bytes:
    """A picture of the losses of one or several runs, as the bytes of a file.

    runs: the lines of each run's ``metrics.jsonl`` (see :mod:`raysgd.report.metrics_log`) by the name to show
    picture_format: "png", "svg" or "pdf"

    Raises InputError where no run has anything to draw, or where matplotlib is missing.
    """
    empty = [name for name, records in runs.items() if not _losses(records)]
    if not runs or empty:
        raise InputError(f"nothing to draw: no loss was logged yet in {', '.join(empty) or 'any run'}")
    figure = _figure()
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for index, (name, records) in enumerate(runs.items()):
        _draw(losses, rates, f"C{index}", name, records)
    _frame(losses, [_losses(records) for records in runs.values()])
    losses.set_ylabel("loss")
    losses.legend(loc="upper right")
    rates.set_ylabel("learning rate")
    rates.set_xlabel("step")
    for axes in (losses, rates):
        axes.grid(alpha=0.3)
    buffer = BytesIO()
    # No date and no version in the file: the same lines give the same bytes.
    metadata: dict[str, None] = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[
        picture_format
    ]
    figure.savefig(buffer, format=picture_format, dpi=120, metadata=metadata)
    return buffer.getvalue()


_KINDS = ("train", "validation")


def _figure() -> Any:
    """An empty figure that no display and no global state knows of."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(f"pictures need matplotlib: pip install 'raysgd[plot]' ({error})") from error
    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw(losses: Any, rates: Any, color: str, name: str, records: Sequence[Record]) -> None:
    label = name.replace("$", r"\$").lstrip("_")  # matplotlib reads $ as mathematics and hides names that begin with _
    steps, values = _points(records, "train", "loss")
    if steps:
        losses.plot(steps, values, color=color, alpha=0.5, linewidth=1, label=f"{label} train")
    steps, values = _points(records, "validation", "loss")
    if steps:
        losses.plot(steps, values, color=color, marker="o", markersize=4, linewidth=1.5, label=f"{label} validation")
    steps, values = _points(records, "train", "learning_rate")
    if steps:
        rates.plot(steps, values, color=color, linewidth=1)


def _points(records: Sequence[Record], kind: str, key: str) -> tuple[list[int], list[float]]:
    """The steps and values of one curve; lines without a number (null) leave a gap of nothing."""
    found = [(r["step"], r[key]) for r in records if r["kind"] == kind and isinstance(r.get(key), int | float)]
    return [step for step, _ in found], [value for _, value in found]


def _losses(records: Sequence[Record]) -> list[tuple[int, float]]:
    """(step, loss) of all lines of a run."""
    return [point for kind in _KINDS for point in zip(*_points(records, kind, "loss"), strict=True)]


def loss_limits(runs: Sequence[Sequence[tuple[int, float]]]) -> tuple[float, float] | None:
    """(bottom, top) of a frame that the first losses of each run leave; None where all of them are to be seen.

    runs: (step, loss) points of each run, at least one each

    What comes after the first tenth of a run's steps is always inside: a run that goes wrong is seen to. What comes
    before is cut off at the top where it would take more than half of the height.

    >>> loss_limits([[(0, 0.75), (10, 0.5), (50, 0.25), (100, 0.25)]])
    >>> loss_limits([[(0, 8.0), (50, 0.5), (100, 0.25)]])
    (0.234375, 0.546875)
    """
    late = [loss for points in runs for step, loss in points if step >= EARLY * max(points)[0]]
    every = [loss for points in runs for _, loss in points]
    low, high = min(every), max(late)
    if max(every) - high <= high - low or high == low:
        return None
    return low - (high - low) / 16, high + 3 * (high - low) / 16


def _frame(axes: Any, runs: Sequence[Sequence[tuple[int, float]]]) -> None:
    """Set the limits of the loss axis, and say what they cut off."""
    limits = loss_limits(runs)
    if limits is None:
        return
    axes.set_ylim(*limits)
    loss, step = max((loss, -step) for points in runs for step, loss in points)
    text = f"▲ above: up to {loss:.3g} at step {-step:,}"
    paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 2}
    axes.text(0.05, 0.97, text, transform=axes.transAxes, va="top", fontsize="small", bbox=paper)
