"""PyTorch DistributedDataParallel over gloo, two processes of one thread, data in memory.

Each process gathers its half of every batch at random from the whole table. ``python -m bench.ddp NAME RANK ROWS BATCH
STEPS`` says the rows a second of both together.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from bench.processes import Child, rendezvous, say
from bench.tables import CLASSES, COLUMNS, PIXELS, images, numbers

N_PROCESSES = 2
HIDDEN = 512


def parts(name: str, n_rows: int) -> tuple[Any, Any, Any, Any]:
    """Rows, labels, model and loss."""
    import torch
    from torch import nn

    if name == "logistic":
        x, y = numbers(n_rows)
        loss = nn.BCEWithLogitsLoss()
        return torch.from_numpy(x), torch.from_numpy(y[:, None]), nn.Linear(COLUMNS, 1), loss
    x, classes = images(n_rows)
    layers = (nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))
    return torch.from_numpy(x), torch.from_numpy(classes), nn.Sequential(*layers), nn.CrossEntropyLoss()


def main(name: str, rank: int, n_rows: int, batch: int, steps: int) -> None:
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    x, y, model, loss = parts(name, n_rows)
    dist.init_process_group("gloo", rank=rank, world_size=N_PROCESSES)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.01, momentum=0.9)
    warm, own = 5, batch // N_PROCESSES
    needed = (warm + steps) * batch
    order = torch.cat([torch.randperm(n_rows) for _ in range(-(-needed // n_rows))])
    dist.broadcast(order, 0)
    began = 0.0
    for step in range(warm + steps):
        if step == warm:
            dist.barrier()
            began = time.perf_counter()
        index = order[step * batch + rank * own :][:own]
        optimizer.zero_grad(set_to_none=True)
        loss(parallel(x.index_select(0, index)), y.index_select(0, index)).backward()
        optimizer.step()
    dist.barrier()
    say(batch * steps / (time.perf_counter() - began))
    dist.destroy_process_group()


def rows_per_s(name: str, n_rows: int, batch: int, steps: int) -> float:
    """Rows a second of both processes together."""
    meeting = rendezvous()
    workers = [Child("bench.ddp", name, rank, n_rows, batch, steps, environment=meeting) for rank in range(N_PROCESSES)]
    found = min(worker.hear() for worker in workers)
    for worker in workers:
        worker.end()
    return float(found)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
