"""What a run tells Ray's metrics arrives where Prometheus would fetch it; the dashboard asks for what is there."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray._raylet import GcsClient
from ray_runs import ROOT, Marked, raysgd_command, wait_for, write_table
from test_job_submit import RAY, free_ports

from raysgd.runtime.meters import METRICS, TAGS

SETTINGS = {"train.epochs": 300, "scaling.num_workers": 2, "scaling.num_servers": 2, "run.log_every": 20}


def scraped(port: int) -> dict[str, dict[tuple[str, ...], float]]:
    """By name without Ray's prefix: the values of our metrics, by the run and the worker or server."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
    except OSError:
        return {}
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("ray_raysgd_"):
                tags = tuple(v for k, v in sorted(sample.labels.items()) if k in ("run", "server", "worker"))
                found.setdefault(sample.name.removeprefix("ray_"), {})[tags] = sample.value
    return found


def test_the_metrics_arrive(tmp_path: Path) -> None:
    place = write_table(tmp_path / "data")
    temp_dir = tempfile.mkdtemp(prefix="rs", dir="/tmp")
    port, metrics_port, agent_port, client_port = free_ports(4)
    environment = {"RAYSGD_FAILPOINTS": "worker.compute:sleep=0.01", "RAY_metrics_report_interval_ms": "500"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    head = Marked(
        [*RAY, "start", "--head", "--block", "--num-cpus=3", f"--port={port}", f"--temp-dir={temp_dir}",
         f"--metrics-export-port={metrics_port}", f"--dashboard-agent-listen-port={agent_port}",
         f"--ray-client-server-port={client_port}", "--include-dashboard=false", "--object-store-memory=100000000"],
        place,
        {"PATH": path, "PYTHONUNBUFFERED": "1", **environment},
    )  # fmt: skip
    run = None
    try:
        wait_for("the head", lambda: "Ray runtime started" in head.text, 90)
        sets = [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
        address = f"127.0.0.1:{port}"
        arguments = ["train", str(place / "run.toml"), "--name", "metered", "--address", address, "-q", *sets]
        run = Marked(raysgd_command(*arguments), place, {"RAY_metrics_report_interval_ms": "500"})

        def all_there() -> dict[str, dict[tuple[str, ...], float]] | None:
            assert run is not None
            assert run.process.poll() is None, run.text
            found = scraped(metrics_port)
            return found if set(found) == set(METRICS) and found["raysgd_step"]["metered",] > 0 else None

        found = wait_for(f"all metrics; there are {sorted(scraped(metrics_port))}", all_there, 90)
        jobs = GcsClient(address=address).get_all_job_info().values()
    finally:
        if run is not None:
            run.end()
        head.end()
        shutil.rmtree(temp_dir, ignore_errors=True)
    [job] = [dict(job.config.metadata) for job in jobs if job.config.metadata.get("raysgd")]
    assert {k: job[k] for k in ("raysgd", "run", "storage")} == {
        "raysgd": "train",
        "run": "metered",
        "storage": str(place / "runs" / "metered"),
    }
    assert found["raysgd_total_steps"] == {("metered",): 6000}
    assert found["raysgd_workers"] == {("metered",): 2}
    assert 0 < found["raysgd_train_loss"]["metered",] < 1
    assert set(found["raysgd_server_step"]) == {("metered", "0"), ("metered", "1")}
    assert sum(found["raysgd_worker_virtual_workers"].values()) == 8
    assert all(0 <= share <= 1 for share in found["raysgd_worker_waiting_share"].values())
    assert all(pushed > 0 for pushed in found["raysgd_worker_pushed_bytes"].values())


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    dashboard = json.loads((ROOT / "clusters" / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    assert queries
    named = {name for query in queries for name in re.findall(r"\bray_(raysgd_\w+)", query)}
    assert named == set(METRICS)
    tags = {name: set(re.findall(r"\{\{(\w+)\}\}", t["legendFormat"])) for p in dashboard["panels"]
            for t in p["targets"] for name in re.findall(r"\bray_(raysgd_\w+)", t["expr"])}  # fmt: skip
    for name, used in tags.items():
        assert used <= {"run", TAGS.get(name, "run")}, name


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_says_what_it_is(name: str) -> None:
    assert re.fullmatch(r"raysgd_[a-z_]+", name)
    assert METRICS[name].endswith(".")
