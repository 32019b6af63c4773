"""cluster.yaml is one that Ray accepts, starts Ray with authentication, and agrees with the tested versions."""

from __future__ import annotations

import importlib.util
import json
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return loaded


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


def test_node_types_agree_with_each_other(config: dict[str, Any]) -> None:
    types = config["available_node_types"]
    assert config["head_node_type"] in types
    assert types["worker"]["max_workers"] == config["max_workers"]
    assert "InstanceMarketOptions" not in types[config["head_node_type"]]["node_config"]


@pytest.mark.parametrize("key", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_every_node_authenticates(config: dict[str, Any], key: str) -> None:
    starts = [command for command in config[key] if "ray start" in command]
    assert len(starts) == 1
    assert "RAY_AUTH_MODE=token ray start" in starts[0]
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"]


def test_the_dashboard_listens_on_loopback(config: dict[str, Any]) -> None:
    head = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head
    assert "0.0.0.0" not in head


def test_versions_agree(config: dict[str, Any]) -> None:
    assert config["docker"]["image"] == f"rayproject/ray:{pins()['ray']}-py311"


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
