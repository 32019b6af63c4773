"""What all tests share: the environment, the flights data, and the check that no process is left over."""

from __future__ import annotations

import importlib.util
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

# Before numpy and Ray are imported. Child processes inherit the mark, by which they are found at the end.
MARK = f"RAYSGD_TEST_SESSION={uuid.uuid4().hex}"
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ.update([MARK.split("=")])
os.environ.pop("RAY_ADDRESS", None)

ROOT = Path(__file__).resolve().parent.parent


def marked_processes() -> list[str]:
    """The command lines of the living processes that this test session started (Linux; elsewhere none)."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            environment = (directory / "environ").read_bytes().split(b"\0")
            command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if MARK.encode() in environment and command:
            found.append(f"{directory.name} {command[:200]}")
    return found


@pytest.fixture(scope="session", autouse=True)
def no_process_left() -> Iterator[None]:
    """Set up first, so torn down last: ten seconds after the end every process of the tests is gone."""
    yield
    deadline = time.monotonic() + 10
    while (left := marked_processes()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left, "processes of this test session are still there:\n" + "\n".join(left)


@pytest.fixture(scope="session")
def flights_job() -> ModuleType:
    """The script jobs/flights.py as a module."""
    spec = importlib.util.spec_from_file_location("flights_job", ROOT / "jobs" / "flights.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def flights(flights_job: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared flights data set in file order: a directory with train/ and valid/."""
    out: Path = tmp_path_factory.mktemp("data") / "flights"
    flights_job.prepare(out)
    return out


@dataclass(frozen=True)
class Reference:
    """What scikit-learn reaches on the held-out flights."""

    log_loss: float
    auc: float


@pytest.fixture(scope="session")
def flights_reference(flights: Path) -> Reference:
    """scikit-learn's LogisticRegression(C=1e4), same rows and columns: numbers standardized, categories one-hot."""
    import numpy as np
    import pyarrow.parquet as pq
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss, roc_auc_score

    def columns(name: str) -> dict[str, np.ndarray]:
        # A file at a time: reading a directory would import pyarrow.dataset, and pandas with it.
        tables = [pq.ParquetFile(file).read() for file in sorted((flights / name).glob("*.parquet"))]
        return {c: np.concatenate([t[c].to_numpy() for t in tables]) for c in tables[0].column_names}

    train, valid = columns("train"), columns("valid")

    def features(table: dict[str, np.ndarray]) -> np.ndarray:
        numbers = [(table[c] - train[c].mean()) / train[c].std() for c in ("dep_delay", "distance", "hour", "month")]
        one_hot = [table[c] == value for c in ("carrier", "origin", "dest") for value in np.unique(train[c])]
        return np.column_stack([*numbers, *one_hot])

    model = LogisticRegression(C=1e4, solver="newton-cholesky", tol=1e-8, max_iter=100)
    model.fit(features(train), train["late"])
    assert model.n_iter_[0] < 100
    late = model.predict_proba(features(valid))[:, 1]
    return Reference(float(log_loss(valid["late"], late)), float(roc_auc_score(valid["late"], late)))


@pytest.fixture(scope="session")
def flights_sorted(flights_job: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with train/ sorted by label."""
    out: Path = tmp_path_factory.mktemp("data") / "flights"
    flights_job.prepare(out, order="sorted")
    return out


@pytest.fixture(scope="session")
def flights_shuffled(flights_job: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with train/ shuffled."""
    out: Path = tmp_path_factory.mktemp("data") / "flights"
    flights_job.prepare(out, order="shuffled")
    return out
