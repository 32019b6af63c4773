"""Checkpoints come back to the bit; whatever was done to one, it is refused and the one before used."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from raysgd import checkpoint
from raysgd.checkpoint import MANIFEST, PARAMS, STATE
from raysgd.errors import CheckpointError, InputError
from raysgd.learn.parameters import Array, Layout
from raysgd.protocol.generation import Generation
from raysgd.storage import Storage

LAYOUT = Layout((Array("weights", (3, 2)), Array("bias", (2,), penalized=False)))


def generation(step: int) -> Generation:
    rng = np.random.default_rng(step)
    params, momentum = rng.normal(size=(2, LAYOUT.n_params)).astype(np.float32)
    return Generation(step, params, {"momentum": momentum})


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """A run with checkpoints at steps 10 and 20; the later one is the better one."""
    storage = Storage.open(tmp_path / "run")
    for step in (10, 20):
        facts = {"metrics": {"valid_loss": 1.0 / step}, "plan": {"mean_weight": 0.1 + 0.2}}
        checkpoint.save(storage, generation(step), LAYOUT, facts)
    return storage


@pytest.fixture
def newest(storage: Storage) -> Path:
    """The directory of step 20."""
    return Path(storage.path(checkpoint.name(20)))


def refused(storage: Storage) -> bool:
    """Step 20 is an error, and step 10 stands in for it, loudly."""
    with pytest.raises(CheckpointError):
        checkpoint.load(storage, 20)
    for which in ("last", "best"):
        found = checkpoint.load(storage, which)
        (sentence,) = found.skipped
        if found.step != 10 or found.digest() != generation(10).digest() or "step-00000020" not in sentence:
            return False
    return True


def test_what_is_written_comes_back_to_the_bit(storage: Storage) -> None:
    for which, step in (("last", 20), ("best", 20), (10, 10)):
        found = checkpoint.load(storage, which)
        expected = generation(step)
        assert (found.step, found.skipped) == (step, ())
        assert found.params.tobytes() == expected.params.tobytes()
        assert found.state["momentum"].tobytes() == expected.state["momentum"].tobytes()
        assert found.digest() == found.manifest["digest"] == expected.digest()
        assert found.manifest["plan"]["mean_weight"] == 0.1 + 0.2
        assert checkpoint.layout_of(found.manifest) == LAYOUT


def test_the_best_is_that_of_least_validation_loss_and_the_newest_of_equals(storage: Storage) -> None:
    losses: list[tuple[int, Any]] = [(30, None), (40, 0.05), (50, float("1e400"))]
    for step, loss in losses:
        facts = {"metrics": {"valid_loss": None if loss == np.inf else loss}}
        checkpoint.save(storage, generation(step), LAYOUT, facts)
    assert checkpoint.load(storage, "best").step == 40
    assert checkpoint.load(storage, "last").step == 50


def test_an_optimizer_without_state(tmp_path: Path) -> None:
    storage = Storage.open(tmp_path)
    saved = checkpoint.save(storage, Generation(1, generation(1).params), LAYOUT, {})
    assert saved.state == {} == checkpoint.load(storage).state


def test_saving_again_replaces(storage: Storage) -> None:
    for edition in (2, 3):
        other = Generation(20, generation(edition).params, generation(edition).state)
        saved = checkpoint.save(storage, other, LAYOUT, {})
        for which in (20, "last"):
            found = checkpoint.load(storage, which)  # type: ignore[arg-type]
            assert (found.digest(), found.path, found.skipped) == (other.digest(), saved.path, ())
        assert sorted(p.name for p in Path(saved.path).iterdir()) == [MANIFEST, PARAMS, STATE]
        assert contents(storage) == ["step-00000010", f"step-00000020.{edition}"]
        assert checkpoint.steps(storage) == [10, 20]


def contents(storage: Storage) -> list[str]:
    return sorted(path.name for path in Path(storage.path(checkpoint.DIRECTORY)).iterdir())


def test_of_two_editions_the_later_counts_unless_it_is_damaged(storage: Storage, newest: Path) -> None:
    first = newest.with_name("first")
    newest.rename(first)
    shutil.copytree(first, newest)  # as if the next save had been killed before it deleted this one
    first.rename(newest.with_name("step-00000020.2"))
    assert checkpoint.load(storage, 20).path == f"{newest}.2"
    (newest.with_name("step-00000020.2") / PARAMS).write_bytes(b"")
    for which in (20, "last", "best"):
        found = checkpoint.load(storage, which)  # type: ignore[arg-type]
        assert found.path == str(newest)
        (sentence,) = found.skipped
        assert "step-00000020.2" in sentence
    checkpoint.save(storage, generation(20), LAYOUT, {})
    assert contents(storage) == ["step-00000010", "step-00000020.3"]


@pytest.mark.parametrize(
    "entry", ["step-20", "step-000000020", "step-00000020.1", "step-00000020.02", "step-00000020.", "step-٠٠٠٠٠٠٢٠"]
)
def test_only_names_that_save_gives_count(storage: Storage, newest: Path, entry: str) -> None:
    shutil.copytree(newest, newest.with_name(entry))
    assert checkpoint.load(storage, 20).path == str(newest)
    checkpoint.prune(storage, 1)
    assert contents(storage) == sorted(["step-00000020", entry])


def test_what_was_being_written_does_not_count(storage: Storage, newest: Path) -> None:
    shutil.copytree(newest, newest.with_name(".writing-step-00000030"))
    shutil.copytree(newest, newest.with_name("step-00000040.tmp"))
    assert checkpoint.steps(storage) == [10, 20]
    shutil.copytree(newest, newest.with_name("step-00000030"))  # of step 20, as its manifest says
    assert checkpoint.load(storage, "last").step == 20


def test_prune_does_not_take_what_an_earlier_attempt_left_damaged_for_the_newest(tmp_path: Path) -> None:
    """The second attempt found 30 and 40 damaged, so it began at 20 and has saved 30 again."""
    storage = Storage.open(tmp_path)
    for step, attempt in ((10, 1), (20, 1), (30, 1), (40, 1)):
        checkpoint.save(storage, generation(step), LAYOUT, {"attempt": attempt})
    for step in (30, 40):
        (Path(storage.path(checkpoint.name(step))) / PARAMS).write_bytes(b"")
    assert checkpoint.load(storage).step == 20
    checkpoint.save(storage, generation(30), LAYOUT, {"attempt": 2})
    checkpoint.prune(storage, 1)
    assert (checkpoint.load(storage).step, contents(storage)) == (30, ["step-00000030.2"])


@pytest.mark.parametrize("keep", [1, 2, None])
def test_prune_keeps_the_newest_and_the_best(storage: Storage, keep: int | None) -> None:
    for step, loss in ((30, 0.01), (40, 0.5), (50, 0.5)):
        checkpoint.save(storage, generation(step), LAYOUT, {"metrics": {"valid_loss": loss}})
    checkpoint.prune(storage, keep)
    assert checkpoint.steps(storage) == {1: [30, 50], 2: [30, 40, 50], None: [10, 20, 30, 40, 50]}[keep]


def test_there_may_be_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no checkpoint$"):
        checkpoint.load(Storage.open(tmp_path / "no"))
    with pytest.raises(InputError, match="which must be 'best', 'last' or a step, got 'newest'"):
        checkpoint.load(Storage.open(tmp_path), "newest")


# -- accidents


@pytest.mark.parametrize("file", [MANIFEST, PARAMS, STATE])
def test_truncated_at_every_byte(storage: Storage, newest: Path, file: str) -> None:
    whole = (newest / file).read_bytes()
    taken = []
    for length in range(len(whole)):
        (newest / file).write_bytes(whole[:length])
        if not refused(storage):
            taken.append(length)
    assert taken == []


@pytest.mark.parametrize("file", [MANIFEST, PARAMS, STATE])
def test_a_flip_of_any_byte(storage: Storage, newest: Path, file: str) -> None:
    whole = (newest / file).read_bytes()
    taken = []
    for at in range(len(whole)):
        (newest / file).write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        if not refused(storage):
            taken.append(at)
    assert taken == []


@pytest.mark.parametrize("file", [MANIFEST, PARAMS, STATE])
def test_a_file_is_missing_or_something_else(storage: Storage, newest: Path, file: str) -> None:
    whole = (newest / file).read_bytes()
    for content in (
        whole + b"\0",
        whole + whole,
        b"\0" * len(whole),
        (newest.parent / "step-00000010" / file).read_bytes(),
    ):
        (newest / file).write_bytes(content)
        assert refused(storage)
    (newest / file).unlink()
    assert refused(storage)
    (newest / file).mkdir()
    assert refused(storage)


def test_all_are_damaged(storage: Storage) -> None:
    for step in (10, 20):
        (Path(storage.path(checkpoint.name(step))) / PARAMS).write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"has no checkpoint that can be used: .*step-00000020.*; .*step-00000010"
    ):
        checkpoint.load(storage)


# -- malice: whoever writes the manifest can seal it too


Change = Callable[[dict[str, Any]], Any]


def set_to(*path: str | int, value: Any) -> Change:
    def change(manifest: dict[str, Any]) -> None:
        place: Any = manifest
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


def deleted(*path: str) -> Change:
    def change(manifest: dict[str, Any]) -> None:
        place = manifest
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]

    return change


def another_name(manifest: dict[str, Any]) -> None:
    manifest["tensors"][PARAMS]["other"] = manifest["tensors"][PARAMS].pop("bias")
    manifest["layout"][1]["name"] = "other"


@pytest.mark.parametrize(
    "change",
    [
        set_to("format", value=2),
        set_to("format", value=None),
        set_to("step", value=21),
        set_to("step", value="20"),
        set_to("digest", value="0" * 64),
        deleted("digest"),
        deleted("layout"),
        deleted("tensors"),
        deleted("tensors", STATE),
        deleted("tensors", PARAMS, "bias"),
        deleted("slots"),
        set_to("slots", value=[]),
        set_to("slots", value=["momentum", "accumulator"]),
        set_to("slots", value=["../momentum"]),
        set_to("slots", value=5),
        set_to("metrics", value=[]),
        set_to("layout", value=[]),
        set_to("layout", value=None),
        set_to("layout", value="weights"),
        set_to("layout", 0, "shape", value=[2, 3]),
        set_to("layout", 0, "shape", value=[6]),
        set_to("layout", 0, "shape", value=[2**40, 2**40]),
        set_to("layout", 0, "shape", value=[-3, -2]),
        set_to("layout", 0, "shape", value=["3", "2"]),
        set_to("layout", 0, "shape", value="32"),
        set_to("layout", 0, "shape", value=[3.0, 2.0, [1]]),
        set_to("layout", 0, "name", value="bias"),
        set_to("layout", 0, "name", value="../../weights"),
        set_to("layout", 0, "name", value=["weights"]),
        set_to("tensors", PARAMS, "bias", "sha256", value="0" * 64),
        set_to("tensors", PARAMS, "bias", "dtype", value="float64"),
        set_to("tensors", PARAMS, "bias", "shape", value=[1, 2]),
        set_to("tensors", PARAMS, "bias", value=None),
        set_to("tensors", PARAMS, "extra", value={}),
        set_to("tensors", value=[]),
        set_to("tensors", "../../x/params.safetensors", value={}),
        set_to("tensors", "/etc/passwd", value={"root": {"shape": [1], "dtype": "float32", "sha256": "0" * 64}}),
        another_name,
    ],
)
def test_a_manifest_that_lies(storage: Storage, newest: Path, change: Change) -> None:
    manifest = json.loads((newest / MANIFEST).read_bytes())
    change(manifest)
    (newest / MANIFEST).write_bytes(checkpoint.sealed(manifest))
    assert refused(storage)


def test_the_seal_itself_is_no_obstacle(storage: Storage, newest: Path) -> None:
    manifest = json.loads((newest / MANIFEST).read_bytes())
    assert checkpoint.sealed(manifest) == (newest / MANIFEST).read_bytes()
    (newest / MANIFEST).write_bytes(checkpoint.sealed(manifest | {"more": 1}))
    assert checkpoint.load(storage).manifest["more"] == 1


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), 10**400, "0.0", [], True])
def test_a_validation_loss_that_is_none_is_not_the_best(storage: Storage, newest: Path, loss: Any) -> None:
    manifest = json.loads((newest / MANIFEST).read_bytes())
    body = json.dumps(manifest | {"metrics": {"valid_loss": loss}}, indent=1).encode()
    (newest / MANIFEST).write_bytes(resealed(body))
    assert checkpoint.load(storage, "best").step == 10


def resealed(text: bytes) -> bytes:
    """A manifest's text, JSON or not, with a new seal at its end."""
    from hashlib import sha256

    head = text[: text.rindex(b',\n "sha256"')] if b',\n "sha256"' in text else text
    return head + f',\n "sha256": "{sha256(head).hexdigest()}"\n}}'.encode()


@pytest.mark.parametrize(
    "text",
    [
        b'{"a": ' + b"[" * 100_000,
        b'{"a": 1' + b"0" * 5_000,
        b'{"a": "\xff"',
        b"[1",
        b"",
    ],
    ids=["deep", "long", "bytes", "list", "nothing"],
)
def test_a_manifest_that_is_no_json_of_ours(storage: Storage, newest: Path, text: bytes) -> None:
    (newest / MANIFEST).write_bytes(resealed(text))
    assert refused(storage)


def with_tensors(directory: Path, file: str, tensors: dict[str, Any]) -> None:
    (directory / file).write_bytes(save_tensors(tensors))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t | {"extra": np.zeros(1, np.float32)},
        lambda t: {"bias": t["bias"]},
        lambda t: {},  # noqa: ARG005
        lambda t: t | {"bias": t["bias"].astype(np.float64)},
        lambda t: t | {"bias": t["bias"].view(np.int32)},
        lambda t: t | {"bias": t["bias"].reshape(1, 2)},
        lambda t: t | {"bias": -t["bias"]},
        lambda t: t | {"bias": t["bias"][::-1].copy()},
        lambda t: t | {"weights": t["weights"].reshape(2, 3)},
        lambda t: {"bias": t["weights"], "weights": t["bias"]},
    ],
    ids=["extra", "missing", "none", "float64", "int32", "shape", "sign", "order", "transposed", "swapped"],
)
def test_other_tensors_than_were_sealed(storage: Storage, newest: Path, change: Callable[[Any], Any]) -> None:
    with_tensors(newest, PARAMS, change(load_tensors((newest / PARAMS).read_bytes())))
    assert refused(storage)


def test_params_and_state_are_swapped(storage: Storage, newest: Path) -> None:
    (newest / PARAMS).rename(newest / "x")
    (newest / STATE).rename(newest / PARAMS)
    (newest / "x").rename(newest / STATE)
    assert refused(storage)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["params", "momentum"])
def test_values_that_are_not_finite(storage: Storage, newest: Path, where: str, value: float) -> None:
    bad = generation(20)
    (bad.params if where == "params" else bad.state["momentum"])[3] = value
    shutil.rmtree(newest)
    checkpoint.save(storage, bad, LAYOUT, {"metrics": {"valid_loss": 0.0}})  # sealed with all honours
    with pytest.raises(CheckpointError, match="holds NaN or infinite values"):
        checkpoint.load(storage, 20)
    assert refused(storage)


class Bomb:
    """Unpickling it leaves a trace."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("file", [MANIFEST, PARAMS, STATE])
def test_a_pickle_with_another_name_is_not_opened(storage: Storage, newest: Path, tmp_path: Path, file: str) -> None:
    trace = tmp_path / "trace"
    (newest / file).write_bytes(pickle.dumps(Bomb(trace)))
    assert refused(storage)
    assert not trace.exists()


@pytest.mark.parametrize(
    "header",
    [
        {"bias": {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**62]}},
        {"bias": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 8]}},
        {"bias": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}},
        {"bias": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}},
        {"bias": {"dtype": "O", "shape": [1], "data_offsets": [0, 8]}},
        {
            "bias": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "weights": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        },
        {"__metadata__": {"a": "b"}},
        [],
    ],
    ids=["beyond", "huge", "bf16", "f8", "objects", "overlap", "metadata", "list"],
)
def test_a_safetensors_file_that_lies(storage: Storage, newest: Path, header: Any) -> None:
    text = json.dumps(header).encode()
    (newest / PARAMS).write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
    assert refused(storage)
    (newest / PARAMS).write_bytes(struct.pack("<Q", 2**63) + text)
    assert refused(storage)
