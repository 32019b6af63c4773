"""The cluster that the other tests stand on."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.mark.usefixtures("ray_cluster")
def test_cluster_runs_actors_that_see_the_environment() -> None:
    import ray

    class Actor:
        def environment(self, array: np.ndarray) -> tuple[str | None, str | None, float]:
            import os

            return os.environ.get("RAY_AUTH_MODE"), os.environ.get("OPENBLAS_NUM_THREADS"), float(array.sum())

    handle = ray.remote(num_cpus=1)(Actor).remote()
    seen = ray.get(handle.environment.remote(np.ones(3, dtype=np.float32)), timeout=60)
    assert seen == ("disabled", "1", 3.0)
    assert ray.cluster_resources()["CPU"] == 8
    ray.kill(handle)
