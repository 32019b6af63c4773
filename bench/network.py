"""Two Ray nodes with a limited network between them: steps a second, against the cost model's prediction.

Each node is in a network namespace, with a token bucket on its link. A worker on each, the server on the first. Root.

one node, two nodes without a limit    what the model is told of this machine: computing, calls, the object store
1 Gbit/s, 100 Mbit/s                   what it predicts, for BSP and for 8 local steps
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from bench.cost import LOGISTIC, MLP, MLP_FLOPS, MLP_PARAMS
from bench.measure import Asked, table
from bench.namespaces import Network as Links
from bench.namespaces import lacking
from bench.processes import ENVIRONMENT, answer, listen, say
from bench.tables import COLUMNS, write_images, write_numbers
from bench.training import Job as Training
from raysgd.cost import Job, Machine, Network, predict

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
PICTURES = Path(__file__).resolve().parent.parent / "docs"
#: bits a second of each node's link, each way; 0: no limit
RATES = (0, 1_000_000_000, 100_000_000)


@contextmanager
def two_nodes(links: Links) -> Iterator[str]:
    """A head with room for a worker and the server, and a node with room for a worker; the cluster's address."""
    directory, started = tempfile.mkdtemp(prefix="rb", dir="/tmp"), []
    address = f"{links.address(1)}:6379"
    try:
        for number, cpus, options in (
            (1, 2, ["--head", "--port=6379", f"--temp-dir={directory}", "--include-dashboard=false"]),
            (2, 1, [f"--address={address}"]),
        ):
            where = [f"--node-ip-address={links.address(number)}", f"--num-cpus={cpus}", "--block"]
            command = [*links.inside(number), *RAY, "start", *options, *where, "--object-store-memory=300000000"]
            log = (Path(directory) / f"node{number}.log").open("w+")
            environment = {**ENVIRONMENT, "PYTHONUNBUFFERED": "1"}
            started.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True))
            until = time.monotonic() + 90
            while "Ray runtime started" not in Path(log.name).read_text():
                assert time.monotonic() < until, Path(log.name).read_text()
                time.sleep(0.1)
        yield address
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(60)
        shutil.rmtree(directory, ignore_errors=True)


def train(address: str) -> None:
    """In the head's namespace: for each job that it is told, says the lines of metrics.jsonl."""
    os.environ["RAY_ADDRESS"] = address
    while (job := listen()) is not None:
        with tempfile.TemporaryDirectory(prefix="raysgd-bench-") as directory:
            say(job.fit(directory))


def step_s(links: Links, address: str, job: Training) -> float:
    """The median over the measured epochs."""
    history = answer("bench.network", "train", address, task=job, launcher=tuple(links.inside(1)))
    return median(job.batch_size / line["rows_per_s"] for line in history[job.warm_epochs :])


def computing_s(job: Training) -> float:
    """What a step of both workers takes on one node where they seldom meet: they compute, side by side as over two."""
    history = answer("bench.training", task=replace(job, local_steps=8))
    return median(job.batch_size / line["rows_per_s"] for line in history[job.warm_epochs :])


def run(asked: Asked) -> str:
    """A line for each model, rate and number of local steps, and a picture."""
    if reason := lacking():
        return f"skipped: {reason}"
    found: list[Seen] = []
    links = Links()
    links.create()
    try:
        links.add()
        links.add()
        with tempfile.TemporaryDirectory(prefix="raysgd-bench-") as place, two_nodes(links) as address:
            numbers = write_numbers(Path(place), 65_536, 4096)
            images = write_images(Path(place), 8_192, 512)
            for name, model, path, label, batch, job in (
                ("logistic regression", LOGISTIC, numbers, "label", 2048, Job(COLUMNS + 1, 2048)),
                ("MLP", MLP, images, "digit", 512, Job(MLP_PARAMS, 512, row_flops=MLP_FLOPS)),
            ):
                training = Training(model, str(path), label, batch, 8, 3 if asked.quick else 8, 3, 2, cache_bytes=2**29)
                computing = computing_s(training)
                for bits in RATES:
                    if bits:
                        links.limit(1, bits)
                        links.limit(2, bits)
                    for local_steps in (1, 8):
                        told = replace(training, local_steps=local_steps)
                        took = step_s(links, address, told)
                        placed = replace(job, workers=2, nodes=2, local_steps=local_steps, compute_s=computing)
                        found.append(Seen(name, placed, bits, took))
                for number in (1, 2):
                    links.unlimit(number)
    finally:
        links.remove()
    head = ["model", "parameters", "network", "local steps", "predicted, ms", "measured, ms", "off by"]
    text = table(head, [seen.line() for seen in found])
    return text if asked.quick else f"{text}\n\n{draw(found)}"


@dataclass(frozen=True)
class Seen:
    """A job over a link of ``bits`` a second (0: no limit), and what a step took: computing is told to the model,
    measured by itself, since it is not what is limited here."""

    name: str
    job: Job
    bits: int
    took: float

    @property
    def predicted(self) -> float:
        network = Network.gbit(self.bits / 1e9, 0.05e-3) if self.bits else Network(float("inf"), 0.05e-3)
        return predict(self.job, Machine(cores=1), network).step_s

    @property
    def rate(self) -> str:
        return f"{self.bits / 1e6:,.0f} Mbit/s" if self.bits else "no limit"

    def line(self) -> list[object]:
        """What the table shows."""
        shown = [f"{1e3 * seconds:.3g}" for seconds in (self.predicted, self.took)]
        off = f"{100 * (self.predicted / self.took - 1):+.0f}%"
        return [self.name, f"{self.job.n_params:,}", self.rate, self.job.local_steps, *shown, off]


def draw(found: Sequence[Seen]) -> str:
    """Steps a second, measured and predicted with 30% each way, as a picture; where it is."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(seen.name for seen in found))
    figure, axes = plt.subplots(1, len(names), figsize=(10, 4), layout="constrained")
    for axis, name in zip(axes, names, strict=True):
        mine = [seen for seen in found if seen.name == name]
        at, predicted = range(len(mine)), [1 / seen.predicted for seen in mine]
        axis.bar(at, [1 / seen.took for seen in mine], color="tab:blue", label="measured")
        off = [[0.3 * value for value in predicted]] * 2
        axis.errorbar(at, predicted, yerr=off, fmt="o", color="black", capsize=4, label="predicted, ± 30%")
        axis.set_xticks(at, [f"{seen.rate}\nH = {seen.job.local_steps}" for seen in mine], fontsize=7)
        axis.set(title=f"{name}, {mine[0].job.n_params:,} parameters", ylabel="steps a second", yscale="log")
        axis.set_ylim(top=3 * max(1.3 * value for value in predicted))
        axis.legend(loc="upper center", ncols=2)
    figure.savefig(PICTURES / "network.png", dpi=100)
    plt.close(figure)
    return "picture: docs/network.png"


if __name__ == "__main__":
    train(sys.argv[2])
