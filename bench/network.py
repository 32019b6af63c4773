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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
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


def alone(job: Training) -> float:
    """The same on one node with one worker."""
    history = answer("bench.training", task=replace(job, num_workers=1))
    return median(job.batch_size / line["rows_per_s"] for line in history[job.warm_epochs :])


def run(asked: Asked) -> str:
    """A line for each model, rate and number of local steps."""
    if reason := lacking():
        return f"skipped: {reason}"
    found: list[list[object]] = []
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
                computing = alone(training)
                for bits in RATES:
                    if bits:
                        links.limit(1, bits)
                        links.limit(2, bits)
                    for local_steps in (1, 8):
                        told = replace(training, local_steps=local_steps)
                        took = step_s(links, address, told)
                        placed = replace(job, workers=2, nodes=2, local_steps=local_steps, compute_s=computing / 2)
                        found.append(line(name, placed, bits, took))
                for number in (1, 2):
                    links.unlimit(number)
    finally:
        links.remove()
    head = ["model", "parameters", "network", "local steps", "predicted, ms", "measured, ms", "off by"]
    return table(head, found)


def line(name: str, job: Job, bits: float, took: float) -> list[object]:
    """Computing is measured by itself, since it is not what is limited here."""
    network = Network.gbit(bits / 1e9, 0.05e-3) if bits else Network(float("inf"), 0.05e-3)
    cost = predict(job, Machine(cores=1), network)
    rate = "no limit" if not bits else f"{bits / 1e6:,.0f} Mbit/s"
    shown = [f"{1e3 * seconds:.3g}" for seconds in (cost.step_s, took)]
    return [name, f"{job.n_params:,}", rate, job.local_steps, *shown, f"{100 * (cost.step_s / took - 1):+.0f}%"]


if __name__ == "__main__":
    train(sys.argv[2])
