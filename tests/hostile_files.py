"""Opens hostile files under an audit hook and says what each attempt came to.

    python tests/hostile_files.py PLACE

Everything is made below PLACE first. Each action is then tried on what is harmless, so that whatever the package
imports lazily is imported, and only then is the hook armed: from there on running new code, importing, unpickling,
starting a process, connecting, and opening a file outside of ``PLACE/cases`` is stopped and noted. Prints
{case: {"outcome", "stopped"}}.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

import raysgd
from raysgd import checkpoint, cli, config
from raysgd.checkpoint import MANIFEST, PARAMS, STATE
from raysgd.data.dataset import ArrowDataset, open_dataset
from raysgd.data.moments import shard_statistics
from raysgd.plan import open_tables, plan_from_manifest, plan_from_statistics
from raysgd.resume import beginning
from raysgd.storage import Storage

CONFIG = """
[data]
path = "train.parquet"
validation = "train.parquet"
label = "late"
[model]
type = "logistic_regression"
[train]
batch_size = 64
epochs = 3
"""

FORBIDDEN = re.compile(
    r"exec|compile|import|code\.__new__|function\.__new__|pickle\.find_class|marshal\..*|shelve\..*|ctypes\..*|"
    r"os\.(system|exec|fork|forkpty|posix_spawn|spawn|startfile|putenv|kill)|subprocess\..*|pty\..*|socket\..*|"
    r"urllib\..*|http\..*|ftplib\..*|smtplib\..*|sys\.(addaudithook|setprofile|settrace)|builtins\.(input|breakpoint)"
)


class Bomb:
    """Unpickling it runs a command, which leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.trace}",)


class Unpickling(pa.ExtensionType):  # type: ignore[misc]
    """What a library would have to register for a file to run something: Ray Data's types did this once."""

    def __init__(self) -> None:
        super().__init__(pa.float64(), "raysgd.tests.unpickling")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, _storage: pa.DataType, serialized: bytes) -> Unpickling:
        pickle.loads(serialized)
        return cls()


# -- the hook


class Watch:
    """What was tried since :meth:`begin`; nothing of it is let happen. Cannot be taken off again."""

    def __init__(self, place: Path) -> None:
        self.place = str(place)
        self.stopped: list[str] | None = None
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.stopped is None:
            return
        if FORBIDDEN.fullmatch(event) or (event == "open" and self.outside(arguments[0], arguments[2])):
            self.stopped.append(f"{event} {arguments!r:.200}")
            raise PermissionError(f"the audit hook stops {event}")

    def outside(self, path: Any, flags: Any) -> bool:
        """Whether a file is opened that is not of the case: to write, or to read what a name in it leads to."""
        if not isinstance(path, str | bytes):
            return False
        real = os.path.realpath(os.fsdecode(path))
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        return not real.startswith(self.place) and bool(writes or not real.endswith(".py"))

    def attempt(self, action: Callable[[], str]) -> dict[str, Any]:
        self.stopped = []
        try:
            with warnings.catch_warnings(record=True):
                outcome = action()
        except raysgd.RaysgdError as error:
            outcome = f"refused: {error}"
        except Exception as error:  # noqa: BLE001 - what else a hostile file can bring about is what is asked
            outcome = f"{type(error).__name__}: {error}"
        found, self.stopped = self.stopped, None
        return {"outcome": outcome, "stopped": found}


# -- harmless things


def table() -> pa.Table:
    rng = np.random.default_rng(0)
    delay = rng.normal(size=200)
    carrier = np.array(["AA", "DL"])[rng.integers(0, 2, 200)]
    return pa.table({"delay": delay, "carrier": carrier, "late": delay > 0})


def make_run(place: Path) -> Path:
    """A directory with data, a config and a run that has one checkpoint, of step 5."""
    place.mkdir(parents=True)
    pq.write_table(table(), place / "train.parquet", row_group_size=100)
    (place / "run.toml").write_text(CONFIG)
    spec = config.load(place / "run.toml")
    tables = open_tables(spec)
    plan, _ = plan_from_statistics(spec, tables, [shard_statistics(tables.train, s.index) for s in tables.train.shards])
    first = plan.initial()
    first.step = 5
    checkpoint.save(Storage.open(place / "run"), first, plan.learner.layout, {**plan.facts(), "attempt": 1})
    (place / "run" / "config.toml").write_text(config.dumps(spec))
    (place / "run" / "status.json").write_text('{"state": "running"}')
    (place / "run" / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 0.5, "learning_rate": 0.1}\n')
    return place


# -- what is done with the files of a case


def load_run(place: Path) -> str:
    model = raysgd.load(place / "run")
    return f"predicts {len(model.predict(table()))}"


def continue_run(place: Path) -> str:
    spec = config.load(place / "run.toml")
    tables = open_tables(spec)
    found = beginning(Storage.open(place / "run"), spec, tables, fresh=False)
    assert found.checkpoint is not None
    plan = plan_from_manifest(spec, tables, found.checkpoint.manifest)
    return f"continues at {found.step} of {plan.total_steps}"


def commands(place: Path) -> str:
    """Every command that reads a run, in this process; their exit codes."""
    run, out = str(place / "run"), str(place / "out.csv")
    data = str(place / "train.parquet")
    lines = [["inspect", run], ["digest", run], ["evaluate", run], ["predict", run, "--data", data, "-o", out]]
    codes = []
    for line in lines:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as told:
            codes.append(cli.main([*line, "--json"]))
        assert "Traceback" not in told.getvalue(), told.getvalue()
    return f"codes {codes}"


def load_config(place: Path) -> str:
    spec = config.load(place / "run.toml")
    config.dumps(spec)
    return f"reads {spec.data.label}"


def open_data(place: Path) -> str:
    """Everything that is done with a table: opened, read, its statistics taken, predicted and scored."""
    model = raysgd.load(place / "run")
    (path,) = place.glob("hostile.*")
    try:
        dataset = open_dataset(ArrowDataset(str(path), label="late"))
        for shard in dataset.shards:
            dataset.read(shard.index)
            shard_statistics(dataset, shard.index)
    except raysgd.InputError as error:
        first = f"refused: {error}"
    else:
        first = f"reads {dataset.n_rows}"
    scored = model.evaluate(str(path))["rows"]
    counts = model.predict_file(str(path), str(place / "out.parquet"), ["carrier"])
    return f"{first}, scores {scored}, predicts {counts['rows']}"


# -- hostile things: each changes the harmless directory


def in_checkpoint(file: str, content: Callable[[Path], bytes]) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        (place / "run" / checkpoint.name(5) / file).write_bytes(content(place))

    return change


def in_manifest(change: Callable[[dict[str, Any], Path], object]) -> Callable[[Path], None]:
    """A manifest that is sealed again after it was changed: whoever writes it can do that."""

    def apply(place: Path) -> None:
        path = place / "run" / checkpoint.name(5) / MANIFEST
        manifest = json.loads(path.read_bytes())
        change(manifest, place)
        path.write_bytes(checkpoint.sealed(manifest))

    return apply


def pickled(protocol: int) -> Callable[[Path], bytes]:
    return lambda place: pickle.dumps(Bomb(place / "trace"), protocol)


def reducing(place: Path) -> dict[str, Any]:
    """How several serializers write an object whose making runs a command."""
    command = f"touch {place / 'trace'}"
    return {
        "__reduce__": ["os.system", [command]],
        "__class__": "os.system",
        "py/object": "os.system",
        "py/reduce": [{"py/function": "os.system"}, {"py/tuple": [command]}],
        "!!python/object/apply:os.system": [command],
        "_target_": "os.system",
        "command": command,
        "$ref": f"file://{place / 'secret'}",
    }


def words(place: Path) -> list[str]:
    command = f"__import__('os').system('touch {place / 'trace'}')"
    return [command, "{" + command + "}", "${" + command + "}", "os.system", "../../secret", "{0.__class__}", "%(x)s"]


def everywhere(value: Any, word: str) -> Any:
    """Every string in a manifest replaced, the seals and names of tensors apart."""
    if isinstance(value, dict):
        return {key: v if key in ("tensors", "layout", "digest") else everywhere(v, word) for key, v in value.items()}
    if isinstance(value, list):
        return [everywhere(v, word) for v in value]
    return word if isinstance(value, str) else value


def out_of_the_directory(manifest: dict[str, Any], place: Path) -> None:
    """Tensors of a file elsewhere, sealed well."""
    manifest["tensors"] = {f"../../../{place.name}/outside/{k}": v for k, v in manifest["tensors"].items()}


def renamed_arrays(name: str) -> Callable[[dict[str, Any], Path], None]:
    def change(manifest: dict[str, Any], _: Path) -> None:
        for array in manifest["layout"]:
            old, array["name"] = array["name"], f"{name}{array['name']}"
            seals = manifest["tensors"][PARAMS]
            seals[array["name"]] = seals.pop(old)

    return change


def other_code(place: Path) -> None:
    """Modules with the names of those that are imported lie in the run's directory."""
    for directory in (place / "run", place / "run" / checkpoint.name(5)):
        for module in ("raysgd", "numpy", "safetensors", "json", "sitecustomize", "__init__", "conftest"):
            (directory / f"{module}.py").write_text(f"open({str(place / 'trace')!r}, 'w')")


def texts_of_the_run(content: Callable[[Path], bytes]) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        for file in ("config.toml", "status.json", "metrics.jsonl"):
            (place / "run" / file).write_bytes(content(place))

    return change


def toml(text: Callable[[Path], str]) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        (place / "run.toml").write_text(text(place))

    return change


def with_words(place: Path) -> str:
    *first, last = words(place)
    texts = {
        key: json.dumps(word) for key, word in zip(("label", "validation", "nulls", "weight"), first, strict=False)
    }
    lines = [f"{key} = {text}" for key, text in texts.items()]
    return "\n".join(
        [
            "[data]",
            'path = "train.parquet"',
            *lines,
            f"numeric = {json.dumps([last])}",
            CONFIG[CONFIG.index("[model]") :],
        ]
    )


def extended(place: Path, name: bytes, metadata: bytes) -> pa.Table:
    """The harmless table with a column that says it is of an extension type."""
    harmless = table()
    field = pa.field(
        "delay", pa.float64(), metadata={b"ARROW:extension:name": name, b"ARROW:extension:metadata": metadata}
    )
    schema_metadata = {b"pandas": json.dumps(reducing(place)).encode(), b"ARROW:extension:name": name}
    return harmless.cast(pa.schema([field, *list(harmless.schema)[1:]], metadata=schema_metadata))


def as_parquet(place: Path, name: bytes, metadata: bytes) -> None:
    pq.write_table(extended(place, name, metadata), place / "hostile.parquet", row_group_size=100)


def as_ipc(place: Path, name: bytes, metadata: bytes) -> None:
    content = extended(place, name, metadata)
    with pa.ipc.new_file(place / "hostile.arrow", content.schema) as writer:
        writer.write_table(content)


def as_pickle(place: Path, *_: bytes) -> None:
    (place / "hostile.parquet").write_bytes(pickled(4)(place))


def as_disguised_pickle(place: Path, *_: bytes) -> None:
    content = pickled(4)(place)
    (place / "hostile.parquet").write_bytes(b"PAR1" + content + len(content).to_bytes(4, "little") + b"PAR1")


def deep(n: int, opening: str, closing: str, inner: str = "1") -> str:
    return opening * n + inner + closing * n


#: case: what is changed, and what is then done
RUNS: dict[str, Callable[[Path], None]] = {
    f"{file} is a pickle of protocol {protocol}": in_checkpoint(file, pickled(protocol))
    for file in (MANIFEST, PARAMS, STATE)
    for protocol in (0, 2, 5)
}
RUNS |= {
    "manifest of reducing objects": in_manifest(lambda m, p: m.update({k: reducing(p) for k in list(m)})),
    "the model is a reducing object": in_manifest(lambda m, p: m.update(model=reducing(p))),
    "the model is of a type that runs": in_manifest(lambda m, p: m["model"].update(type=words(p)[0], **reducing(p))),
    "the encoder is a reducing object": in_manifest(lambda m, p: m.update(encoder=reducing(p))),
    "the encoder's parts are reducing objects": in_manifest(
        lambda m, p: m.update(encoder=dict.fromkeys(m["encoder"], reducing(p)))
    ),
    "the manifest is nested absurdly": in_checkpoint(MANIFEST, lambda _: deep(200_000, '{"a":[', "]}").encode()),
    "tensors lie elsewhere": in_manifest(out_of_the_directory),
    "slots lead elsewhere": in_manifest(lambda m, p: m.update(slots=["../../secret", str(p / "secret")])),
    "arrays are named to lead elsewhere": in_manifest(renamed_arrays("../../")),
    "arrays have absolute names": in_manifest(renamed_arrays("/etc/passwd/")),
    "code lies beside the checkpoint": other_code,
    "all texts of the run are pickles": texts_of_the_run(pickled(0)),
    "all texts of the run are reducing objects": texts_of_the_run(lambda p: json.dumps(reducing(p)).encode()),
    "all texts of the run are nested absurdly": texts_of_the_run(lambda _: f"a = {deep(100_000, '[', ']')}".encode()),
}
for number in range(7):
    RUNS[f"every text is word {number}"] = in_manifest(
        lambda m, p, n=number: m.update(everywhere(dict(m), words(p)[n]))  # type: ignore[misc]
    )
CONFIGS: dict[str, Callable[[Path], None]] = {
    "a config of words that run": toml(with_words),
    "a config with keys that run": toml(lambda p: CONFIG + "\n".join(f"{json.dumps(w)} = 1" for w in words(p))),
    "a config of a type that runs": toml(lambda p: CONFIG.replace("logistic_regression", words(p)[0].replace('"', ""))),
    "a config that is a pickle": lambda p: (p / "run.toml").write_bytes(pickled(0)(p)) and None,  # type: ignore[func-returns-value]
    "a config of nested lists": toml(lambda _: CONFIG + "a = " + deep(100_000, "[", "]")),
    "a config of nested tables": toml(lambda _: CONFIG + "a = " + deep(100_000, "{a=", "}")),
    "a config of dotted keys": toml(lambda _: "a" + ".a" * 5_000 + " = 1\n" + CONFIG),
    "a config of deep sections": toml(lambda _: CONFIG + "[a" + ".a" * 5_000 + "]\n"),
    "a config with a deep rate": toml(
        lambda _: CONFIG + "[optimizer]\nlearning_rate = " + deep(400, '{type="warm_up",over=1,schedule=', "}")
    ),
}
TYPES = {
    "a type of Python": b"arrow.py_extension_type",
    "a tensor of Ray": b"ray.data.arrow_tensor_v2",
    "an object of Ray": b"ray.data.arrow_pickled_object",
    "an unknown type": b"os.system",
    "a type of pandas": b"pandas.interval",
}
DATA: dict[str, Callable[[Path], None]] = {
    f"{kind.__name__.removeprefix('as_')} with {label}": (
        lambda p, kind=kind, name=name: kind(p, name, pickled(4)(p))  # type: ignore[misc]
    )
    for kind in (as_parquet, as_ipc)
    for label, name in TYPES.items()
}
DATA |= {"data that is a pickle": as_pickle, "data that is a pickle in disguise": as_disguised_pickle}
CASES = {
    **{f"{name}: load": (change, load_run) for name, change in RUNS.items()},
    **{f"{name}: continue": (change, continue_run) for name, change in RUNS.items()},
    **{f"{name}: commands": (change, commands) for name, change in RUNS.items()},
    **{name: (change, load_config) for name, change in CONFIGS.items()},
    **{name: (change, open_data) for name, change in DATA.items()},
}

SOCKET = socket.socket()
CODE = compile("1", "control", "exec")


def registered_type(place: Path) -> str:
    """The same file, where somebody has registered a type that unpickles what a file says."""
    as_ipc(place, b"raysgd.tests.unpickling", pickled(4)(place))
    pa.register_extension_type(Unpickling())
    try:
        return str(pa.ipc.open_file(place / "hostile.arrow").schema)
    finally:
        pa.unregister_extension_type("raysgd.tests.unpickling")


#: what the hook must stop
CONTROLS: dict[str, Callable[[Path], object]] = {
    "unpickle": lambda p: pickle.loads(pickle.dumps(Bomb(p / "trace"))),
    "exec": lambda _: exec(CODE),
    "eval": lambda _: eval("1"),
    "compile": lambda _: compile("1", "x", "eval"),
    "import": lambda _: __import__("antigravity"),
    "registered type": registered_type,
    "system": lambda p: os.system(f"touch {p / 'trace'}"),
    "process": lambda p: subprocess.run(["touch", str(p / "trace")], check=False),
    "connect": lambda _: SOCKET.connect(("127.0.0.1", 9)),
    "write": lambda p: (p.parent / "elsewhere").write_text("x"),
    "read": lambda p: (p.parent / "secret").read_text(),
}


def main(place: Path) -> None:
    (place / "secret").write_text("secret")
    harmless = make_run(place / "harmless")
    damaged = shutil.copytree(harmless, place / "damaged")
    directories = {}
    for number, (name, (change, _)) in enumerate(CASES.items()):
        directories[name] = place / "cases" / str(number)
        shutil.copytree(harmless, directories[name])
        change(directories[name])
    as_parquet(harmless, b"harmless", b"")
    as_parquet(damaged, b"harmless", b"")
    in_checkpoint(PARAMS, lambda _: b"")(damaged)
    (damaged / "run.toml").write_text("a = ")
    watch = Watch(place / "cases")
    found = {}
    for action in (load_run, continue_run, commands, load_config, open_data):
        found[f"harmless: {action.__name__}"] = {"outcome": action(harmless), "stopped": []}
        with contextlib.suppress(raysgd.RaysgdError):
            action(damaged)
    for name, (_, action) in CASES.items():
        found[name] = watch.attempt(lambda a=action, d=directories[name]: a(d))  # type: ignore[misc]
    for name, control in CONTROLS.items():
        found[f"control: {name}"] = watch.attempt(lambda c=control: str(c(harmless)))  # type: ignore[misc]
    SOCKET.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
