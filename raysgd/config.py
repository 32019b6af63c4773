"""TOML and ``--set`` to the dataclasses that live beside their algorithms, and back.

    [data] path validation label ...   [model] type ...   [optimizer] type learning_rate ...   [train] ...
    [scaling] ...   [run] ... num_to_keep   [run.failure_config] ...

Relative paths resolve against the TOML's directory. Everything wrong with a config is in one error.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import tomli_w

from raysgd.data.dataset import ArrowDataset
from raysgd.errors import InputError
from raysgd.learn.models import LogisticRegression
from raysgd.learn.transforms import SGD
from raysgd.sections import (
    MODELS,
    OPTIMIZERS,
    Table,
    build,
    field_table,
    from_table,
    model_from_dict,
    model_to_dict,
    nearest,
    to_table,
)
from raysgd.spec import (
    CheckpointConfig,
    FailureConfig,
    RunConfig,
    RunSpec,
    ScalingConfig,
    TrainConfig,
    config_fields,
)

__all__ = ["dumps", "load", "loads", "model_from_dict", "model_to_dict"]

SECTIONS = ("data", "model", "optimizer", "train", "scaling", "run")

#: The fields of RunConfig that are dataclasses: the keys of the first lie in [run] itself, the second is a table in it.
_CONFIGS_OF_RUN = ("checkpoint_config", "failure_config")


def load(path: str | os.PathLike[str], sets: Iterable[str] = (), overrides: Mapping[str, Any] | None = None) -> RunSpec:
    """The run that a TOML file describes; without ``run.name`` it is called as the file.

    path: a TOML file; relative paths in it resolve against its directory
    sets: ``section.key=value`` each, the value as TOML, else as text
    overrides: ``{"section.key": value}``, stronger than ``sets``

    Raises InputError with every violation, or with the line that is no TOML.
    """
    file = Path(path)
    spec = loads(_text(file), Path(os.path.abspath(file)).parent, sets, overrides, source=str(path))
    return spec if spec.run.name is not None else replace(spec, run=replace(spec.run, name=file.stem))


def loads(
    text: str,
    directory: str | os.PathLike[str] = ".",
    sets: Iterable[str] = (),
    overrides: Mapping[str, Any] | None = None,
    source: str = "the config",
) -> RunSpec:
    """The run that a TOML text describes; see :func:`load`. ``source`` names the text in error sentences.

    >>> spec = loads('data = {path = "/flights", label = "late"}\\nmodel.type = "mlp"', sets=["train.epochs=3"])
    >>> spec.model.hidden, spec.train.epochs
    ((64,), 3)
    """
    tables = _parse(text, source)
    problems: list[str] = []
    for sentence in sets:
        problems += _override(tables, sentence)
    for key, value in (overrides or {}).items():
        problems += _put(tables, key, value)
    try:
        spec = _Reader(tables, Path(os.path.abspath(directory)), problems).spec()
        problems += spec.problems()
    except RecursionError:
        raise InputError(f"{source} is nested too deeply") from None
    if problems:
        raise InputError(problems)
    return spec


def dumps(spec: RunSpec) -> str:
    """The TOML text of a run, every field resolved: ``loads(dumps(spec)) == spec`` where its paths are absolute.

    A file system that was given as an object has no text and is left out.
    """
    data = field_table(spec.data, skip=("filesystem",))
    if spec.data.filesystem is None:
        data["path"] = _absolute(data["path"], Path.cwd())
    if spec.validation is not None:
        data["validation"] = field_table(spec.validation, skip=("filesystem",))["path"]
        if spec.validation.filesystem is None:
            data["validation"] = _absolute(data["validation"], Path.cwd())
    run = field_table(spec.run, skip=_CONFIGS_OF_RUN) | field_table(spec.run.checkpoint_config)
    run["storage_path"] = _absolute(run["storage_path"], Path.cwd())
    run["failure_config"] = field_table(spec.run.failure_config)
    tables = {
        "data": data,
        "model": to_table(spec.model, MODELS),
        "optimizer": to_table(spec.optimizer, OPTIMIZERS),
        "train": field_table(spec.train),
        "scaling": field_table(spec.scaling),
        "run": run,
    }
    return tomli_w.dumps(tables)


@dataclass
class _Reader:
    """Builds each section; where one cannot be built, a stand-in that has no violations takes its place."""

    tables: Table
    directory: Path
    problems: list[str]

    def spec(self) -> RunSpec:
        for name in self.tables:
            if name not in SECTIONS:
                self.problems.append(f"unknown section [{name}]; {nearest(name, SECTIONS)}")
        data, validation = self._data()
        return RunSpec(
            data=data,
            validation=validation,
            model=self._try(self._model, LogisticRegression()),
            optimizer=self._try(
                lambda: from_table(self._section("optimizer"), OPTIMIZERS, "optimizer", default="sgd"), SGD()
            ),
            train=self._try(lambda: build(TrainConfig, self._section("train"), "train"), TrainConfig()),
            scaling=self._try(lambda: build(ScalingConfig, self._section("scaling"), "scaling"), ScalingConfig()),
            run=self._try(self._run, RunConfig()),
        )

    def _try(self, make: Callable[[], Any], stand_in: Any) -> Any:
        try:
            return make()
        except InputError as error:
            self.problems += error.problems
            return stand_in

    def _section(self, name: str, keys: Collection[str] | None = None) -> Table:
        """A copy of the section's table; with ``keys``, unknown ones are left out and told."""
        table = self.tables.get(name, {})
        if not isinstance(table, Mapping):
            raise InputError(f"{name} must be a section, got {table!r}")
        for key in table:
            if keys is not None and key not in keys:
                self.problems.append(f"unknown key {name}.{key}; {nearest(key, keys)}")
        return {key: value for key, value in table.items() if keys is None or key in keys}

    def _data(self) -> tuple[ArrowDataset, ArrowDataset | None]:
        keys = config_fields(ArrowDataset, skip=("filesystem",))
        stand_in = ArrowDataset("data", label="label")
        values = self._try(lambda: self._section("data", [*keys, "validation"]), {"path": "data", "label": "label"})
        if "path" not in values:
            self.problems.append("data.path is missing: a file, directory, glob or list of them")
            values["path"] = "data"
        for name in ("path", "validation"):
            if name in values:
                values[name] = _absolute(values[name], self.directory)
        validation = values.pop("validation", None)
        data = self._try(lambda: ArrowDataset(**values), stand_in)
        return data, None if validation is None else replace(data, path=validation)

    def _model(self) -> Any:
        if "model" not in self.tables:
            raise InputError(f"section [model] is missing; model.type is one of {', '.join(MODELS)}")
        return from_table(self.tables["model"], MODELS, "model")

    def _run(self) -> RunConfig:
        own = config_fields(RunConfig, skip=("checkpoint_config",))
        values = self._section("run", [*own, *config_fields(CheckpointConfig)])
        failures = self._try(lambda: self._failure_config(values.pop("failure_config", {})), FailureConfig())
        values["storage_path"] = _absolute(values.get("storage_path", RunConfig().storage_path), self.directory)
        kept = {f.name: values.pop(f.name) for f in fields(CheckpointConfig) if f.name in values}
        return RunConfig(**values, checkpoint_config=CheckpointConfig(**kept), failure_config=failures)

    def _failure_config(self, table: Any) -> FailureConfig:
        if not isinstance(table, Mapping):
            raise InputError(f"run.failure_config must be a table, got {table!r}")
        return cast(FailureConfig, build(FailureConfig, table, "run.failure_config"))


def _text(file: Path) -> str:
    try:
        data = file.read_bytes()
        return data.decode("utf-8-sig")  # some editors write a byte order mark
    except FileNotFoundError:
        raise InputError(f"{file} does not exist: give the path of a run's TOML file") from None
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"{file} is no UTF-8 text (at line {line})") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from None


def _parse(text: str, source: str) -> Table:
    try:
        return tomllib.loads(text)
    except ValueError as error:  # its own, and integers of thousands of digits
        raise InputError(f"{source} is no TOML: {error}") from None
    except RecursionError:
        raise InputError(f"{source} is no TOML of ours: it is nested too deeply") from None


def _override(tables: Table, sentence: str) -> list[str]:
    """Puts ``section.key=value`` into the tables."""
    key, equals, text = sentence.partition("=")
    if not equals:
        return [f"--set needs section.key=value, got {sentence!r}"]
    return _put(tables, key.strip(), _value(text.strip()))


def _value(text: str) -> Any:
    """The value as TOML (``3``, ``0.1``, ``true``, ``["a"]``, ``{type = "constant", rate = 1}``), else the text."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if list(parsed) == ["value"] else text


def _put(tables: Table, dotted: str, value: Any) -> list[str]:
    *parents, key = dotted.split(".")
    if dotted in SECTIONS:
        return [f"--set needs section.key=value, got {dotted!r}, a whole section: set its keys one by one"]
    if not parents or not all((*parents, key)):
        owners = [f"{section}.{dotted}" for section, names in _known_keys().items() if dotted in names]
        return [f"--set needs section.key=value, got {dotted!r}; {nearest(dotted, owners or SECTIONS)}"]
    table = tables
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            return [f"--set {dotted}: {parent} is no table, but {table!r}"]
    table[key] = value
    return []


def _known_keys() -> dict[str, list[str]]:
    known = {"data": [*config_fields(ArrowDataset), "validation"], "model": ["type"], "optimizer": ["type"]}
    for section, kinds in {"model": MODELS, "optimizer": OPTIMIZERS}.items():
        known[section] += [name for cls in kinds.values() for name in config_fields(cls)]
    configs = {"train": TrainConfig, "scaling": ScalingConfig, "run": RunConfig}
    known |= {section: config_fields(cls) for section, cls in configs.items()}
    return known | {"run.failure_config": config_fields(FailureConfig)}


def _absolute(path: Any, directory: Path) -> Any:
    """Relative local paths, also in lists, from ``directory``; URIs and what is no path stay as they are."""
    if isinstance(path, list | tuple):
        return [_absolute(p, directory) for p in path]
    if not isinstance(path, str) or not path or "://" in path or "\0" in path:
        return path
    joined = os.path.join(directory, os.path.expanduser(path))
    short = os.path.normpath(joined)
    # Where a directory is a symbolic link, ".." does not lead back to where the link lies.
    return short if os.path.realpath(short) == os.path.realpath(joined) else joined
