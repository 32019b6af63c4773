"""The audit of a real run: whichever line of its ledger is damaged is told by its number, a line that a killed driver
left torn is told as that, and the next attempt goes on."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray_runs import Marked, raysgd_command, write_table

from raysgd import checkpoint, cli, failpoints, storage
from raysgd.audit import DAMAGED, NAME, Ledger, audit
from raysgd.storage import Storage

SETTINGS = [f"{setting}" for setting in ("train.epochs=1", "scaling.num_servers=2", "run.checkpoint_every=5")]


def arguments(place: Path, name: str) -> list[str]:
    sets = [word for setting in SETTINGS for word in ("--set", setting)]
    return ["train", str(place / "run.toml"), "--name", name, "-q", *sets]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("audit") / "runs")


@pytest.fixture(scope="module")
def appended() -> list[str]:
    """The names of the files to which the run of ``torn`` would append, in order."""
    return []


@pytest.fixture(scope="module")
def undisturbed(place: Path, appended: list[str], ray_cluster: None) -> Path:  # noqa: ARG001
    append = storage._append_local
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "_append_local", lambda path, *a: (appended.append(path.name), append(path, *a))[1])
        assert cli.main(arguments(place, "undisturbed")) == 0
    return place / "runs" / "undisturbed"


@pytest.fixture(scope="module")
def torn(place: Path, undisturbed: Path, appended: list[str]) -> Path:  # noqa: ARG001
    """A run whose driver was killed in the middle of its third entry into the ledger."""
    count = [i for i, name in enumerate(appended, start=1) if name == NAME][2]
    environment = {"RAYSGD_FAILPOINTS": f"storage.append@{count}:kill"}
    process = Marked(raysgd_command(*arguments(place, "torn")), place, environment)
    try:
        assert process.wait() == -signal.SIGKILL, process.text
        process.gone()
    finally:
        process.end()
    return place / "runs" / "torn"


def test_a_torn_line_is_told_and_the_next_attempt_goes_on(
    torn: Path, undisturbed: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = place / "runs" / "goes-on"
    shutil.copytree(torn, run)
    data = (run / NAME).read_bytes()
    assert not data.endswith(b"\n")
    number = data.count(b"\n") + 1
    found = audit(Storage.open(run))
    note = f"{NAME}, line {number}: its writing was interrupted; nothing that counts was in it"
    beyond = "steps 10 to 14 are in no checkpoint"  # of one server alone, maybe: the next attempt begins at 10
    assert found.problems == ()
    assert [told.split(", it")[0].split(": if")[0] for told in found.notes] == [note, beyond]
    assert cli.main(["audit", str(run)]) == 0
    assert f"note: {note}" in capsys.readouterr().out
    assert cli.main(arguments(place, "goes-on")) == 0
    found = audit(Storage.open(run))
    assert (found.problems, found.notes, found.attempts, found.steps, found.rows) == ((), (), 2, 20, True)
    assert not (run / DAMAGED).exists()
    assert (run / NAME).read_bytes().startswith(data[: data.rfind(b"\n") + 1])
    assert status(run)["digest"] == status(undisturbed)["digest"]


def status(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "status.json").read_text())
    return found


DAMAGE: dict[str, Callable[[list[bytes], int], list[bytes]]] = {
    "removed": lambda rows, i: [*rows[:i], *rows[i + 1 :]],
    "repeated": lambda rows, i: [*rows[: i + 1], *rows[i:]],
    "repeated at the end": lambda rows, i: [*rows, rows[i]],
    "reversed with all after it": lambda rows, i: [*rows[:i], *reversed(rows[i:])],
    "doubled with all after it": lambda rows, i: [*rows, *rows[i:]],
    "cut off with all after it": lambda rows, i: rows[:i],
    "torn, all after it cut off": lambda rows, i: [*rows[:i], rows[i][:-9]],
    "another number": lambda rows, i: [*rows[:i], rows[i].replace(b'"attempt":1', b'"attempt":2'), *rows[i + 1 :]],
    "garbage after the last": lambda rows, _: [*rows, b"garbage"],
}


@pytest.mark.parametrize("name", DAMAGE, ids=lambda name: name.replace(" ", "-"))
def test_each_damage_of_each_line_is_told(undisturbed: Path, tmp_path: Path, name: str) -> None:
    rows = (undisturbed / NAME).read_bytes().splitlines(keepends=True)
    assert len(rows) >= 6
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    assert audit(Storage.open(run)).problems == ()
    for i in range(len(rows)):
        damaged = DAMAGE[name](rows, i)
        if damaged == rows:
            continue
        (run / NAME).write_bytes(b"".join(damaged))
        shown = {"repeated": i + 2}.get(name, len(rows) + 1 if damaged[: len(rows)] == rows else i + 1)
        told = audit(Storage.open(run)).problems
        assert told, damaged
        assert told[0].startswith(f"{NAME}, line {shown}: "), told


def test_a_damaged_ledger_is_an_error_and_is_put_aside(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    data = (run / NAME).read_bytes() + b"garbage"
    (run / NAME).write_bytes(data)
    assert cli.main(["audit", str(run)]) == 1
    assert "what follows the last newline is no beginning of it: 'garbage'" in capsys.readouterr().err
    Ledger(Storage.open(run), 2, 20, 2).flush()
    assert (run / DAMAGED).read_bytes() == data
    told = audit(Storage.open(run)).problems
    assert told[0].startswith(f"{NAME}, line 2: missing, the checkpoint of step 5 knows of "), told


def test_a_full_disk_while_the_ledger_is_written_costs_a_checkpoint(
    undisturbed: Path,  # noqa: ARG001 - the fixture that counts
    place: Path,
    appended: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    count = [i for i, name in enumerate(appended, start=1) if name == NAME][1]
    failpoints.arm(f"storage.append@{count}:enospc")
    try:
        assert cli.main([word for word in arguments(place, "full") if word != "-q"]) == 0
    finally:
        failpoints.arm("")
    run = place / "runs" / "full"
    warning = f"warning: {run}/{NAME} could not be written: No space left on device; make room there"
    assert warning in " ".join(capsys.readouterr().out.split())
    assert 10 not in checkpoint.steps(Storage.open(run))
    found = audit(Storage.open(run))
    assert (found.problems, found.steps) == ((), 20)
