"""Joining a cluster that is not there ends at once, with one sentence; Ray itself is not asked."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

import raysgd
from raysgd import cli
from raysgd.errors import RunError
from raysgd.runtime import session as sessions
from raysgd.runtime import trainer as trainers
from raysgd.runtime.session import refuse_absent, session
from raysgd.runtime.token import refuse_strangers


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would try for minutes. One that other tests have started is not looked at."""

    def init(*_: Any, **__: Any) -> None:
        raise AssertionError("Ray was asked")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def closed() -> Iterator[str]:
    """An address that is ours, and at which nobody listens."""
    with socket.socket() as held:
        held.bind(("0.0.0.0", 0))  # Ray asks for 127.0.0.1 by the machine's other address
        yield f"127.0.0.1:{held.getsockname()[1]}"


@pytest.mark.parametrize("by", ["address", "RAY_ADDRESS", "auto", "client"])
def test_nobody_listens(closed: str, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"address": closed, "RAY_ADDRESS": None, "auto": "auto", "client": f"ray://{closed}"}[by]
    if by in ("RAY_ADDRESS", "auto"):
        monkeypatch.setenv("RAY_ADDRESS", closed)
    with pytest.raises(RunError) as caught, session(1, given):
        pass
    sentence = str(caught.value)
    assert sentence.startswith(f"no Ray cluster at {given or closed}")
    assert closed.rpartition(":")[2] in sentence
    assert "Connection refused" in sentence
    assert "--address or RAY_ADDRESS" in sentence


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where packets vanish: the connection is given up in seconds."""

    def silent(where: tuple[str, int], timeout: float) -> socket.socket:
        assert where == ("192.0.2.2", 7999)
        assert timeout <= 10
        raise TimeoutError("timed out")

    monkeypatch.setattr(sessions.socket, "create_connection", silent)
    with pytest.raises(RunError, match=r"no Ray cluster at 192\.0\.2\.2:7999: .*no answer within 8 s"):
        refuse_absent("192.0.2.2:7999")


def test_a_name_that_is_none() -> None:
    with pytest.raises(RunError, match=r"no Ray cluster at nowhere\.invalid:6379: "):
        refuse_absent("nowhere.invalid:6379")


def test_somebody_listens() -> None:
    with socket.create_server(("0.0.0.0", 0)) as server:
        refuse_absent(f"127.0.0.1:{server.getsockname()[1]}")


def test_another_service_answers() -> None:
    """A port that speaks gRPC and is none of Ray's, as a proxy does."""
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("0.0.0.0:0")
    server.start()
    try:
        with pytest.raises(RunError, match=f"what answers at .*:{port} is no Ray cluster: give the port"):
            refuse_strangers(f"127.0.0.1:{port}")
    finally:
        server.stop(None)


def test_up_check_says_so(closed: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["up-check", "--address", closed, "--storage-path", str(tmp_path / "runs")])
    assert code == cli.FAILED
    assert f"raysgd: no Ray cluster at {closed}" in capsys.readouterr().err


def test_a_run_starts_a_cluster_with_room_to_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many workers as four cores bear; the rest of the range is said to be out of reach."""
    asked: dict[str, Any] = {}

    def init(_: str, **options: Any) -> None:
        asked.update(options)
        raise RunError("enough")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    for module in (sessions, trainers):
        monkeypatch.setattr(module, "cores", lambda: 4)
    pq.write_table(pa.table({"x": [0.0, 1.0] * 8, "late": [True, False] * 8}), tmp_path / "a.parquet")
    trainer = raysgd.Trainer(
        model=raysgd.LogisticRegression(),
        data=raysgd.ArrowDataset(str(tmp_path / "a.parquet"), label="late"),
        batch_size=8,
        scaling_config=raysgd.ScalingConfig(num_workers=(1, 8)),
        run_config=raysgd.RunConfig(storage_path=str(tmp_path)),
    )
    with pytest.raises(RunError, match="enough"):
        trainer.fit()
    assert asked["num_cpus"] == 4  # three workers, and half a CPU for the server
    assert trainer.spec.scaling.local_room(4) == ", room for 3 of at most 8 workers"
