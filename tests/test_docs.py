"""The documents tell the truth where a program can check it: examples, names, files, links."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any, TypeGuard

import pytest

import raysgd
from raysgd import config
from raysgd.cli import cli
from raysgd.data.dataset import ArrowDataset
from raysgd.sections import MODELS, OPTIMIZERS, SCHEDULES
from raysgd.spec import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainConfig, config_fields

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def blocks(language: str) -> list[Any]:
    """The fenced blocks in a language, each a test parameter named by its page and position."""
    return [
        pytest.param(text, id=f"{page.name}-{index}")
        for page in PAGES
        for index, (found, text) in enumerate(FENCE.findall(page.read_text()))
        if found == language
    ]


def is_public_name(node: ast.AST) -> TypeGuard[ast.Attribute]:
    """Whether an expression is ``raysgd.Name``."""
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "raysgd"


@pytest.mark.parametrize("text", blocks("python"))
def test_python_examples_name_what_exists(text: str) -> None:
    """Every ``raysgd.Name`` exists and takes the keywords that the example gives it."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if is_public_name(node):
            assert node.attr in raysgd.__all__
        if isinstance(node, ast.Call) and is_public_name(node.func):
            keywords = {str(keyword.arg): None for keyword in node.keywords}
            inspect.signature(getattr(raysgd, node.func.attr)).bind(*[None] * len(node.args), **keywords)


@pytest.mark.parametrize("text", blocks("sh"))
def test_shell_examples_name_commands_and_options_that_exist(text: str) -> None:
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] != ["raysgd"]:
            continue
        command = cli.commands[words[1]]
        options = {name for parameter in command.params for name in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= options, line


@pytest.mark.parametrize("text", blocks("toml"))
def test_toml_examples_are_configs(text: str) -> None:
    """An example's sections, put into a minimal config, make a valid one."""
    minimal: dict[str, Any] = {"data.path": "flights", "data.label": "late", "model.type": "logistic_regression"}
    tables = tomllib.loads(text)
    missing = {key: value for key, value in minimal.items() if key.split(".")[0] not in tables}
    config.loads(text, overrides=missing)


def test_config_page_names_every_key() -> None:
    """Each section of docs/config.md has the keys and the types of its section, and no others in its first column."""
    page = (ROOT / "docs" / "config.md").read_text()
    sections = dict(re.findall(r"^## \[(\w+)\](.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    run = [*config_fields(RunConfig, skip=("checkpoint_config", "failure_config")), *config_fields(CheckpointConfig)]
    expected = {
        "data": {*config_fields(ArrowDataset, skip=("filesystem",)), "validation"},
        "model": {*MODELS, *(key for cls in MODELS.values() for key in config_fields(cls))},
        "optimizer": {*OPTIMIZERS, *SCHEDULES},
        "train": {*config_fields(TrainConfig)},
        "scaling": {*config_fields(ScalingConfig)},
        "run": {*run, *config_fields(FailureConfig)},
    }
    first_column = {
        name: {
            word
            for row in re.findall(r"^\| ([^|]*`[^|]*) \|", text, re.MULTILINE)
            for word in re.findall(r"`(\w+)`", row)
        }
        for name, text in sections.items()
    }
    assert {name: words - {"type"} for name, words in first_column.items()} == expected
    for cls in (*OPTIMIZERS.values(), *SCHEDULES.values()):
        assert [key for key in config_fields(cls) if f"`{key}`" not in sections["optimizer"]] == []


def test_the_flights_config_is_the_documented_one() -> None:
    spec = config.load(ROOT / "jobs" / "flights.toml")
    assert spec.optimizer == raysgd.SGD(
        learning_rate=raysgd.ExponentialDecay(0.1, decay_rate=0.5, every="1epoch"), momentum=0.9
    )
    assert (spec.train.batch_size, spec.train.epochs, spec.train.seed, spec.train.virtual_workers) == (512, 5, 0, 8)
    assert (spec.scaling.num_workers, spec.scaling.num_servers) == (2, 1)
    assert Path(str(spec.data.path)).resolve() == ROOT / "data" / "flights" / "train"
    assert Path(str(spec.run.storage_path)).resolve() == ROOT / "runs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = [target for target in LINK.findall(page.read_text()) if "://" not in target]
    assert [target for target in targets if not (page.parent / target).exists()] == []


def named_files(text: str) -> set[str]:
    """The paths in a page: in backticks with a slash, and the tree in the fenced block that begins with ``raysgd/``."""
    found = {path for path in re.findall(r"`((?:raysgd|tests|jobs|docs)/[\w./-]*)`", text) if path}
    tree = next(block for language, block in FENCE.findall(text) if not language and block.startswith("raysgd/"))
    folders: list[tuple[int, str]] = []
    for line in tree.splitlines():
        indent = len(line) - len(line.lstrip())
        folders = [(depth, name) for depth, name in folders if depth < indent]
        base = "".join(name for _, name in folders)
        first, *others = line.split()
        found |= {base + first}
        folder = first if first.endswith("/") else ""
        found |= {base + folder + name.strip("(),:") for name in others if re.fullmatch(r"\w+\.py[,:)]*", name)}
        if folder:
            folders.append((indent, folder))
    return found


def test_architecture_names_files_that_exist() -> None:
    named = named_files((ROOT / "docs" / "architecture.md").read_text())
    assert sorted(path for path in named if not (ROOT / path).exists()) == []


def test_architecture_names_every_module() -> None:
    named = named_files((ROOT / "docs" / "architecture.md").read_text())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "raysgd").rglob("*.py")}
    unnamed = {path for path in modules - named if not path.endswith("/__init__.py")}
    assert unnamed == set()


def test_every_public_name_is_there_and_documented() -> None:
    assert sorted(raysgd.__all__) == sorted(set(raysgd.__all__))
    for name in raysgd.__all__:
        if inspect.isclass(value := getattr(raysgd, name)) or inspect.isfunction(value):
            documented = (value.__doc__ or "").strip()
            # A dataclass without a docstring gets its signature for one.
            assert documented, name
            assert not documented.startswith(f"{name}("), name


def test_the_changelog_begins_with_what_is_not_released() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"


@pytest.mark.parametrize(
    "page",
    [*PAGES, *sorted((ROOT / "clusters").iterdir()), *ROOT.glob("*.yaml"), *sorted((ROOT / "jobs").glob("*.py"))],
    ids=lambda page: page.name,
)
def test_how_it_is_installed_and_where_the_config_lies_is_told_in_one_way(page: Path) -> None:
    """It is on no package index, so from a clone; on a head the clone is ~/raysgd, in a job the working directory."""
    text = page.read_text()
    assert re.findall(r"pip install (?:-\S+ )*'?raysgd(?!\[)\b.*", text) == []
    assert set(re.findall(r"ray submit \S+ jobs/train\.py -- (\S+)", text)) <= {"raysgd/jobs/RUN.toml", "$(raysgd"}
    assert set(re.findall(r"python jobs/train\.py (\S+)", text)) <= {"jobs/RUN.toml"}
