"""Running contestants in alternation, and what their figures come to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Asked:
    """What the command line asks of every part.

    rounds: runs of each contestant;  quick: small sizes, to see whether it works;  seconds: how long the soak lasts
    """

    rounds: int = 3
    quick: bool = False
    seconds: float = 600.0


@dataclass(frozen=True)
class Figures:
    """One contestant's figures over the rounds, in the order in which they were measured."""

    values: tuple[float, ...]

    def __str__(self) -> str:
        return f"{median(self.values):.4g} ({min(self.values):.4g} to {max(self.values):.4g})"

    def ratio(self, other: Figures) -> Figures:
        """This over the other, round by round: a machine that drifts drifts for both."""
        return Figures(tuple(a / b for a, b in zip(self.values, other.values, strict=True)))

    def times(self, factor: float) -> Figures:
        """The same in another unit."""
        return Figures(tuple(factor * value for value in self.values))

    def minus(self, other: Figures) -> Figures:
        """This less the other, round by round."""
        return Figures(tuple(a - b for a, b in zip(self.values, other.values, strict=True)))


def alternate(contestants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, Figures]:
    """Measure each contestant once a round, the order turned round by round.

    >>> alternate({"a": lambda: 1.0, "b": lambda: 2.0}, rounds=2)["b"].values
    (2.0, 2.0)
    """
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds):
        names = list(contestants)
        for name in names if turn % 2 == 0 else reversed(names):
            found[name].append(contestants[name]())
    return {name: Figures(tuple(values)) for name, values in found.items()}


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table.

    >>> print(table(["n", "ms"], [[1, 2.5]]))
    | n | ms |
    |---|---|
    | 1 | 2.5 |
    """
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "|" + "|".join(cells) + "|" if i == 1 else "| " + " | ".join(cells) + " |"
        for i, cells in enumerate([str(cell) for cell in line] for line in lines)
    )


def comparison(found: Mapping[str, Figures], ours: Sequence[str], unit: str, factor: float = 1.0) -> str:
    """Every contestant's figures times ``factor``, and each of ours over them, round by round.

    >>> one = {"ours": Figures((3.0,)), "peer": Figures((2.0,))}
    >>> print(comparison(one, ["ours"], "rows/s"))
    | contestant | rows/s | ours / it |
    |---|---|---|
    | ours | 3 (3 to 3) |  |
    | peer | 2 (2 to 2) | 1.5 (1.5 to 1.5) |
    """
    rows = [
        [name, figures.times(factor), *("" if own == name else found[own].ratio(figures) for own in ours)]
        for name, figures in found.items()
    ]
    return table(["contestant", unit, *(f"{own} / it" for own in ours)], rows)


def skipped(reasons: Mapping[str, str]) -> str:
    """A line for each contestant that could not run; empty where all could.

    >>> skipped({"vw": "no command vw"})
    '\\n\\nskipped: vw (no command vw)'
    """
    return "".join(f"\n\nskipped: {name} ({reason})" for name, reason in reasons.items())
