"""Open MPI's all-reduce over its shared memory, and the update in numpy in each of two processes.

``mpirun -n 2 python -m bench.mpi N_PARAMS STEPS`` says the seconds of a step, the slower process's.
"""

from __future__ import annotations

import shutil
import sys
import time
from importlib.util import find_spec

import numpy as np

from bench.processes import Child, say

N_PROCESSES = 2
#: coordinates whose momentum, gradient and parameters stay in the cache during the update
BLOCK = 16_384
#: containers often run as root, which mpirun refuses unless told twice; two processes may share a core; and copying
#: through shared memory was faster here than the kernel's process_vm_readv, where that is allowed at all
ALLOWED = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_btl_vader_single_copy_mechanism": "none",
}


def missing() -> str | None:
    """Why it cannot run; None where it can."""
    if shutil.which("mpirun") is None:
        return "no command mpirun: apt-get install openmpi-bin"
    return None if find_spec("mpi4py") is not None else "mpi4py is not installed: pip install mpi4py"


def main(n_params: int, steps: int) -> None:
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    params, momentum = np.zeros(n_params, np.float32), np.zeros(n_params, np.float32)
    gradient, summed = np.ones(n_params, np.float32), np.empty(n_params, np.float32)
    scale, rate, decay = np.float32(1 / 1024), np.float32(0.1), np.float32(0.9)
    blocks = [
        (summed[a : a + BLOCK], momentum[a : a + BLOCK], params[a : a + BLOCK]) for a in range(0, n_params, BLOCK)
    ]
    began = 0.0
    for step in range(steps // 4 + steps):
        if step == steps // 4:
            world.Barrier()
            began = time.perf_counter()
        world.Allreduce(gradient, summed)
        for g, m, w in blocks:
            np.multiply(g, scale, out=g)
            np.multiply(m, decay, out=m)
            np.add(m, g, out=m)
            np.multiply(m, rate, out=g)
            np.subtract(w, g, out=w)
    seconds = world.allreduce((time.perf_counter() - began) / steps, MPI.MAX)
    if world.rank == 0:
        say(seconds)


def step_seconds(n_params: int, steps: int) -> float:
    child = Child("bench.mpi", n_params, steps, environment=ALLOWED, launcher=("mpirun", "-n", str(N_PROCESSES)))
    try:
        return float(child.hear())
    finally:
        child.end()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
