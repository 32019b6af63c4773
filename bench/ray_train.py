"""Ray Train with Ray Data: logistic regression in PyTorch, 2 workers, shuffled batches out of a Parquet file.

``python -m bench.ray_train PATH LABEL BATCH`` says the rows a second of both workers, after a few batches.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.processes import answer, say

N_WORKERS = 2


def loop(config: dict[str, Any]) -> None:
    """One worker's epoch, as Ray's guide writes it: iter_torch_batches with a local shuffle."""
    import torch
    from ray import train
    from ray.train.torch import prepare_model

    torch.set_num_threads(1)
    names = config["names"]
    model = prepare_model(torch.nn.Linear(len(names), 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loss = torch.nn.BCEWithLogitsLoss()
    own, rows, began = config["batch"] // N_WORKERS, 0, 0.0
    batches = train.get_dataset_shard("train").iter_torch_batches(
        batch_size=own, local_shuffle_buffer_size=16 * own, drop_last=True
    )
    for i, batch in enumerate(batches):
        if i == 2:
            rows, began = 0, time.perf_counter()
        x = torch.stack([batch[name] for name in names], dim=1)
        optimizer.zero_grad(set_to_none=True)
        loss(model(x), batch[config["label"]].float()[:, None]).backward()
        optimizer.step()
        rows += len(x)
    Path(config["out"], str(train.get_context().get_world_rank())).write_text(str(rows / (time.perf_counter() - began)))


def main(path: str, label: str, batch: int) -> None:
    import pyarrow.parquet as pq
    import ray
    from ray.train import DataConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    out = sys.stdout
    sys.stdout = sys.stderr  # what Ray prints is not for the bench
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
    with tempfile.TemporaryDirectory(prefix="raysgd-bench-") as directory:
        names = [name for name in pq.read_schema(path).names if name != label]
        data = ray.data.read_parquet(path)
        TorchTrainer(
            loop,
            train_loop_config={"names": names, "label": label, "batch": batch, "out": directory},
            scaling_config=ScalingConfig(num_workers=N_WORKERS),
            run_config=RunConfig(name="bench", storage_path=str(Path(directory, "runs"))),
            datasets={"train": data},
            dataset_config=DataConfig(),
        ).fit()
        found = [float(Path(directory, str(rank)).read_text()) for rank in range(N_WORKERS)]
    ray.shutdown()
    sys.stdout = out
    say(sum(found))


def measured(path: Path, label: str, batch: int) -> tuple[str, dict[str, str]]:
    """A line with the figure of one run, or why there is none."""
    missing = [name for name in ("ray.train", "pandas", "torch") if find_spec(name) is None]
    if missing:
        return "", {"Ray Train": f"{', '.join(missing)} not installed: pip install 'ray[train]'"}
    try:
        found = answer("bench.ray_train", os.fspath(path), label, batch)
    except RuntimeError as error:
        return "", {"Ray Train": str(error)}
    return f"\n\nRay Train with Ray Data, one run: {found / 1e6:.3g} M rows/s after the first batches", {}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
