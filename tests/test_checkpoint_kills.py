"""Invariant I8: a kill, or a full disk, at any moment of saving or pruning leaves a whole checkpoint, old or new."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import kill_sweep
import pytest
from kill_sweep import SCENARIOS, Scenario, generation, open_storage, prepare, save

from raysgd import checkpoint, failpoints
from raysgd.errors import CheckpointError, SaveError
from raysgd.storage import Storage

ROOT = Path(__file__).resolve().parent.parent

#: where the old checkpoint is still the last one, and where the new one is
BEFORE = ("checkpoint.begin", "checkpoint.rename", "storage.rename", "storage.create", "storage.write", "storage.put")
AFTER = ("checkpoint.replaced", "checkpoint.prune", "none")

WAYS = [("failpoints", "local"), ("failpoints", "remote"), ("calls", "local")]

#: How many failpoints a scenario passes. On a disk: five for each of three files, two for each rename, three for each
#: directory that goes, and checkpoint's own; elsewhere two for each file, and one for each that goes.
PASSED = {
    "local": dict(zip(SCENARIOS, (20, 20, 26, 23, 23, 8, 28, 3), strict=True)),
    "remote": dict(zip(SCENARIOS, (8, 8, 10, 10, 10, 6, 14, 1), strict=True)),
}


@pytest.fixture(autouse=True)
def off_again() -> Iterator[None]:
    yield
    failpoints.arm("")


def last(storage: Storage) -> str | None:
    """The digest of the last checkpoint, which can be loaded without a complaint; None where there is none at all."""
    if not checkpoint.steps(storage):
        with pytest.raises(CheckpointError, match=r"has no checkpoint$"):
            checkpoint.load(storage)
        return None
    found = checkpoint.load(storage)
    assert found.skipped == ()
    return found.digest()


def digest(place: tuple[int, int] | None) -> str | None:
    return None if place is None else generation(*place).digest()


def hidden(run: Path) -> list[str]:
    """What a killed process left over."""
    return sorted(str(path.relative_to(run)) for path in run.rglob(".*"))


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize(("way", "kind"), WAYS)
def test_killed_at_every_moment(tmp_path: Path, way: str, kind: str, name: str) -> None:
    scenario = SCENARIOS[name]
    prepare(kind, scenario, tmp_path / "base")
    command = [sys.executable, kill_sweep.__file__, way, name, kind, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    killed = [f"{point}@{count}" for point, count in json.loads(done.stdout)]
    seen = {check(scenario, kind, run, run.name in killed) for run in tmp_path.iterdir() if run.name != "base"}
    assert seen == {digest(scenario.old), digest(scenario.new)}
    if way == "failpoints":
        assert len(killed) == PASSED[kind][name]
    else:  # Python decides how many calls there are; each failpoint of a rename or a deletion is before one of them
        assert len(killed) > PASSED[kind][name] / 3


def check(scenario: Scenario, kind: str, run: Path, killed: bool) -> str | None:
    """The digest of the last checkpoint in the directory of one process: old or new, and the next one can be saved."""
    storage, point = open_storage(kind, run), run.name.partition("@")[0]
    old, new = digest(scenario.old), digest(scenario.new)
    found = last(storage)
    if not killed or point in AFTER:
        assert found == new, run.name
    elif point in BEFORE:
        assert found == old, run.name
    assert found in (old, new), run.name
    for step in checkpoint.steps(storage):
        assert checkpoint.load(storage, step).skipped == ()
    if found is not None and len(scenario.steps) > 1:
        assert checkpoint.load(storage, "best").step == 20
    save(storage, 60)
    assert last(storage) == digest((60, 60))
    assert hidden(run) == []
    published = {path.name for path in (run / checkpoint.DIRECTORY).iterdir()}
    assert {name.partition(".")[0] for name in published} == {f"step-{step:08d}" for step in checkpoint.steps(storage)}
    return found


# -- a full disk


@pytest.mark.parametrize("name", ["first", "new", "leftovers", "again", "only"])
@pytest.mark.parametrize("kind", ["local", "remote"])
def test_a_full_disk_at_every_moment(tmp_path: Path, kind: str, name: str) -> None:
    """The checkpoint before stays, the error names the file and the remedy, and nothing of the new one takes room."""
    scenario, told = SCENARIOS[name], 0
    base = prepare(kind, scenario, tmp_path / "base")
    whole = files(tmp_path / "base")
    for point in failpoints.NAMES:
        for count in range(1, 100):
            run = tmp_path / f"{point}@{count}"
            shutil.copytree(tmp_path / "base", run)
            storage = open_storage(kind, run)
            failpoints.arm(f"{point}@{count}:enospc")
            error = refusal(scenario, storage)
            failpoints.arm("")
            if error is None:
                assert last(storage) == digest(scenario.new)
                break
            if isinstance(error, SaveError):
                told += 1
                assert re.fullmatch(MESSAGE.format(run=re.escape(storage.uri)), str(error)), str(error)
                if point in (*BEFORE, "storage.fsync", "storage.replace"):
                    assert (last(storage), hidden(run)) == (digest(scenario.old), [])
                    assert files(run) <= whole
            assert last(storage) in (digest(scenario.old), digest(scenario.new))
            save(storage, 60)
            assert (last(storage), hidden(run)) == (digest((60, 60)), [])
        else:
            pytest.fail(f"{point} is reached without end")
    assert told == (18 if kind == "local" else 6)
    assert last(base) == digest(scenario.old)


MESSAGE = (
    r"{run}/checkpoints/[.\w-]+(/(params|state)\.safetensors|/manifest\.json|) could not be written: No space left on "
    r"device\. What was saved before stays: free some space there, or keep fewer checkpoints \(run\.num_to_keep\), "
    r"then the same command continues the run"
)


def refusal(scenario: Scenario, storage: Storage) -> SaveError | OSError | None:
    """What saving raises; an OSError of its own only before anything is written, or when all is published."""
    try:
        scenario.act(storage)
    except (SaveError, OSError) as error:
        return error
    return None


def files(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}


LIMITED = """
import resource, sys
from pathlib import Path
import kill_sweep
storage = kill_sweep.open_storage("local", Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
kill_sweep.save(storage, 30)
"""


def test_a_file_that_the_system_cuts_short(tmp_path: Path) -> None:
    """A limit of the size of files: the bytes that fit are written, then the system refuses."""
    storage = prepare("local", SCENARIOS["new"], tmp_path / "run")
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True, check=False)
    assert done.returncode == 1
    file = f"{tmp_path}/run/checkpoints/.writing-step-00000030/params.safetensors"
    assert f"SaveError: {file} could not be written: File too large. What was saved before stays" in done.stderr
    assert (last(storage), hidden(tmp_path / "run")) == (digest((20, 20)), [])


FULL = """
import shutil, subprocess, sys
from pathlib import Path
import kill_sweep
from raysgd.errors import SaveError
run = Path(sys.argv[1])
if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(run)]).returncode:
    sys.exit(77)
storage = kill_sweep.prepare("local", kill_sweep.SCENARIOS["new"], run / "run")
(run / "ballast").write_bytes(bytes(4096 * (shutil.disk_usage(run).free // 4096 - 1)))
try:
    kill_sweep.save(storage, 30)
except SaveError as error:
    print(error)
found = kill_sweep.checkpoint.load(storage)
print(found.step, found.skipped)
(run / "ballast").unlink()
kill_sweep.save(storage, 30)
print(kill_sweep.checkpoint.load(storage).step)
"""


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """A small disk in a name space of its own, with room for one more page."""
    unshare = shutil.which("unshare")
    inside = [] if unshare is None else [unshare, "--user", "--map-root-user", "--mount"]
    command = [*inside, sys.executable, "-c", FULL, str(tmp_path)]
    done = (
        None
        if unshare is None
        else subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True, check=False)
    )
    if done is None or done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("FAULTS 21 is not tested on a real full disk: no tmpfs can be mounted in a user name space here")
    assert done.returncode == 0, done.stderr
    error, after, again = done.stdout.splitlines()
    assert re.fullmatch(MESSAGE.format(run=re.escape(f"{tmp_path}/run")), error)
    assert (after, again) == ("20 ()", "30")
