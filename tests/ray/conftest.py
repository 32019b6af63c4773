"""One local Ray cluster for all tests in this directory."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator

import pytest

CPUS = 8


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this directory ``ray``, so that ``-m 'not ray'`` leaves them out."""
    here = str(__file__).removesuffix("conftest.py")
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.ray)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A cluster of this session's own, with 8 logical CPUs, shut down at the end.

    ``no_process_left`` (tests/conftest.py) checks afterwards that nothing of it lives on.
    """
    import ray

    # Short, because Ray puts sockets below it, whose paths may have 107 bytes.
    temp_dir = tempfile.mkdtemp(prefix="rs", dir="/tmp")
    ray.init(
        "local",
        num_cpus=CPUS,
        include_dashboard=False,
        object_store_memory=256 * 2**20,
        log_to_driver=False,
        _temp_dir=temp_dir,
    )
    yield
    ray.shutdown()
    shutil.rmtree(temp_dir, ignore_errors=True)
