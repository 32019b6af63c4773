"""The cluster files are ones that Ray accepts, start Ray with authentication, and agree with the tested versions."""

from __future__ import annotations

import importlib.util
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


#: the files of ``ray up``; those of a cloud start and stop machines
CLOUD = ["cluster.yaml", "clusters/gcp.yaml"]
FILES = [*CLOUD, "clusters/local.yaml"]


def read(file: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / file).read_text())
    return loaded


@pytest.fixture(scope="module", params=FILES)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return read(request.param)


@pytest.fixture(scope="module", params=CLOUD)
def cloud(request: pytest.FixtureRequest) -> dict[str, Any]:
    return read(request.param)


@pytest.fixture(scope="module")
def kuberay() -> dict[str, Any]:
    return read("clusters/kuberay.yaml")


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    """The schema that ``ray up`` checks a cluster file against."""
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    loaded: dict[str, Any] = json.loads((Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    return loaded


def pins() -> dict[str, str]:
    """The versions in constraints.txt by lower-case name."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    return {name.lower().replace("_", "-"): version for name, version in (line.split("==") for line in lines)}


def test_ray_accepts_it(config: dict[str, Any], schema: dict[str, Any]) -> None:
    jsonschema.validate(config, schema)


def test_ray_would_not_accept_anything(config: dict[str, Any], schema: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        jsonschema.validate(config | {"max_worker": 4}, schema)


@pytest.mark.parametrize("file", [*FILES, "clusters/kuberay.yaml"])
def test_three_places_are_edited(file: str) -> None:
    places = re.findall(r"# EDIT (\d)", (ROOT / file).read_text())
    assert sorted(places) == ["1", "2", "3"]


def test_ray_prepares_it(config: dict[str, Any]) -> None:
    """What ``ray up`` does with a file before it asks a cloud: fills in, checks types and counts."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(config)
    validate_config(prepared)
    assert sum(kind["max_workers"] for kind in prepared["available_node_types"].values()) >= 2


def test_node_types_agree_with_each_other(cloud: dict[str, Any]) -> None:
    """The head stays, and servers can ask to be there; workers go."""
    types = cloud["available_node_types"]
    head, worker = types[cloud["head_node_type"]], types["worker"]
    assert (worker["min_workers"], worker["max_workers"]) == (0, cloud["max_workers"])
    assert head["resources"]["raysgd_stays"] == 1
    assert worker["resources"]["raysgd_goes"] == 1
    spot = ("InstanceMarketOptions", "scheduling")
    assert [name in head["node_config"] for name in spot] == [False, False]
    assert any(name in worker["node_config"] for name in spot)
    sizes = ("InstanceType", "machineType")
    assert [head["node_config"].get(s) for s in sizes] == [worker["node_config"].get(s) for s in sizes]


def test_the_head_of_a_list_of_machines_has_the_resource() -> None:
    head = " ".join(read("clusters/local.yaml")["head_start_ray_commands"])
    assert """--resources='{"raysgd_stays":1}'""" in head
    assert "RAY_enable_autoscaler_v2=0" in head


@pytest.mark.parametrize("key", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_every_node_authenticates(config: dict[str, Any], key: str) -> None:
    starts = [command for command in config[key] if "ray start" in command]
    assert len(starts) == 1
    assert re.search(r"RAY_AUTH_MODE=token (RAY_\w+=0 )?(~/raysgd-env/bin/)?ray start", starts[0])
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"]


def test_the_dashboard_listens_on_loopback(config: dict[str, Any]) -> None:
    head = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head
    assert "0.0.0.0" not in head


def test_versions_agree(cloud: dict[str, Any], kuberay: dict[str, Any]) -> None:
    image = f"rayproject/ray:{pins()['ray']}-py311"
    assert cloud["docker"]["image"] == image
    assert f"FROM {image}\n" in (ROOT / "clusters" / "Dockerfile").read_text()
    assert kuberay["spec"]["rayVersion"] == pins()["ray"]


def test_the_tested_versions_are_installed(config: dict[str, Any]) -> None:
    assert (
        len([c for c in config["setup_commands"] if "pip install --quiet -c ~/raysgd/constraints.txt ~/raysgd" in c])
        == 1
    )
    assert config["file_mounts"]["~/raysgd"] == "."
    assert "-c /home/ray/raysgd/constraints.txt /home/ray/raysgd" in (ROOT / "clusters" / "Dockerfile").read_text()


def test_every_direct_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {spec.split("[")[0].split("=")[0].split(">")[0].strip().lower() for group in groups for spec in group}
    assert names - {"raysgd"} <= set(pins())
    assert all(version.replace(".", "").isdigit() for version in pins().values())


def test_no_folder_of_the_package_is_left_behind(config: dict[str, Any]) -> None:
    """An exclusion without a leading slash holds at every depth: ``data`` would leave out raysgd/data/."""
    folders = {path.name for path in (ROOT / "raysgd").rglob("*") if path.is_dir() and path.name != "__pycache__"}
    assert folders.isdisjoint(config["rsync_exclude"])


def test_kuberay_authenticates(kuberay: dict[str, Any]) -> None:
    assert (kuberay["apiVersion"], kuberay["kind"]) == ("ray.io/v1", "RayCluster")
    assert kuberay["spec"]["authOptions"] == {"mode": "token"}
    assert kuberay["spec"]["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "127.0.0.1"


def test_kuberay_grows_from_none(kuberay: dict[str, Any]) -> None:
    assert kuberay["spec"]["enableInTreeAutoscaling"] is True
    (group,) = kuberay["spec"]["workerGroupSpecs"]
    assert group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]
    assert "nodeSelector" in group["template"]["spec"]
    assert "nodeSelector" not in kuberay["spec"]["headGroupSpec"]["template"]["spec"]


def test_kuberay_pods_are_alike(kuberay: dict[str, Any]) -> None:
    """The same image, size, shared storage and /dev/shm; the resources are JSON in quotes for a shell."""
    head, (worker,) = kuberay["spec"]["headGroupSpec"], kuberay["spec"]["workerGroupSpecs"]
    pods = [group["template"]["spec"] for group in (head, worker)]
    containers = [pod["containers"] for pod in pods]
    assert [len(c) for c in containers] == [1, 1]
    for name in ("image", "resources", "volumeMounts"):
        assert containers[0][0][name] == containers[1][0][name]
    assert pods[0]["volumes"] == pods[1]["volumes"]
    mounted = {mount["name"]: mount["mountPath"] for mount in containers[0][0]["volumeMounts"]}
    assert mounted == {"shared": "/shared", "shm": "/dev/shm"}
    volumes = {volume["name"]: volume for volume in pods[0]["volumes"]}
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    assert "persistentVolumeClaim" in volumes["shared"]
    resources = [json.loads(json.loads(group["rayStartParams"]["resources"])) for group in (head, worker)]
    assert resources == [{"raysgd_stays": 1}, {"raysgd_goes": 1}]
