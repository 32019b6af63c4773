"""The real Trainer in a process of its own, on a local Ray of its own, and its speed with decoded shards warm."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from bench.processes import answer, listen, say

#: An epoch deals the shards anew, so after k of them a worker of two still lacks one in 2^k.
WARM_EPOCHS = 7


@dataclass(frozen=True)
class Job:
    """A run: ``epochs`` measured ones after ``warm_epochs``, no validation, one checkpoint at the end.

    model: as in TOML;  cache_bytes: of each worker;  adagrad: instead of momentum 0.9
    """

    model: dict[str, Any]
    table: str
    label: str
    batch_size: int
    virtual_workers: int
    epochs: int
    warm_epochs: int = WARM_EPOCHS
    num_workers: int = 2
    num_servers: int = 1
    learning_rate: float = 0.01
    cache_bytes: int = 2**30
    adagrad: bool = False
    local_steps: int = 1

    def fit(self, directory: str) -> list[dict[str, Any]]:
        """Train; returns the lines of metrics.jsonl, one an epoch."""
        import raysgd
        from raysgd.report.progress import Silent
        from raysgd.sections import model_from_dict

        every = f"{self.warm_epochs}epoch"  # without validation data this only ends a segment, at a known time
        epochs = self.warm_epochs + self.epochs
        rate = self.learning_rate
        return (
            raysgd.Trainer(
                model=model_from_dict(self.model),
                data=raysgd.ArrowDataset(self.table, label=self.label),
                optimizer=raysgd.AdaGrad(rate) if self.adagrad else raysgd.SGD(rate, momentum=0.9),
                batch_size=self.batch_size,
                virtual_workers=self.virtual_workers,
                epochs=epochs,
                local_steps=self.local_steps,
                scaling_config=raysgd.ScalingConfig(
                    num_workers=self.num_workers, num_servers=self.num_servers, cache_bytes=self.cache_bytes
                ),
                run_config=raysgd.RunConfig(
                    name="bench",
                    storage_path=directory,
                    validate_every=every,
                    checkpoint_every=f"{epochs}epoch",
                    log_every="1epoch",
                ),
                report=Silent(),
            )
            .fit()
            .history
        )

    def rows_per_s(self) -> float:
        """Rows a second over the measured epochs: from the end of the last warm one to the end of the run."""
        return speed(answer("bench.training", task=self), self.warm_epochs)


def speed(history: list[dict[str, Any]], warm_epochs: int) -> float:
    """Rows a second after the warm epochs, from lines of metrics.jsonl, one an epoch.

    >>> lines = [{"rows": 10, "time": "2026-01-01T00:00:01.000Z"}, {"rows": 20, "time": "2026-01-01T00:00:03.000Z"}]
    >>> speed(lines, 1)
    5.0
    """
    first, last = history[warm_epochs - 1], history[-1]
    seconds = [datetime.fromisoformat(line["time"]).timestamp() for line in (first, last)]
    return float((last["rows"] - first["rows"]) / (seconds[1] - seconds[0]))


def main() -> None:
    job = listen()
    with tempfile.TemporaryDirectory(prefix="raysgd-bench-") as directory:
        say(job.fit(directory))


if __name__ == "__main__":
    main()
