"""A real run's checkpoint, damaged in every way that a disk can: refused, and the one before used, loudly."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import raysgd
from raysgd import checkpoint, config
from raysgd.checkpoint import MANIFEST, PARAMS, STATE
from raysgd.data.moments import shard_statistics
from raysgd.errors import CheckpointError
from raysgd.plan import open_tables, plan_from_statistics
from raysgd.protocol.generation import Generation
from raysgd.storage import Storage

CONFIG = """
[data]
path = "train.parquet"
label = "late"
[model]
type = "logistic_regression"
[optimizer]
momentum = 0.9
[train]
batch_size = 64
"""


@dataclass(frozen=True)
class Run:
    """A run with checkpoints of the steps 5 and 6; ``whole``: the files of the newer one as they were written."""

    storage: Storage
    newest: Path
    whole: dict[str, bytes]
    digests: dict[int, str]

    def damage(self, file: str, content: bytes) -> None:
        (self.newest / file).write_bytes(content)

    def refused(self) -> bool:
        """Whether step 6 is an error and step 5 stands in for it, and says why."""
        try:
            checkpoint.load(self.storage, 6)
        except CheckpointError:
            found = checkpoint.load(self.storage, "last")
            told = len(found.skipped) == 1 and str(self.newest) in found.skipped[0]
            return told and (found.step, found.digest()) == (5, self.digests[5])
        return False


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    rng = np.random.default_rng(0)
    columns = {"delay": rng.normal(size=200), "carrier": np.array(["AA", "DL"])[rng.integers(0, 2, 200)]}
    pq.write_table(pa.table({**columns, "late": columns["delay"] > 0}), tmp_path / "train.parquet", row_group_size=100)
    spec = config.loads(CONFIG, tmp_path)
    tables = open_tables(spec)
    plan, _ = plan_from_statistics(spec, tables, [shard_statistics(tables.train, s.index) for s in tables.train.shards])
    storage = Storage.open(tmp_path / "run")
    digests = {}
    for step in (5, 6):
        params, momentum = rng.normal(size=(2, plan.learner.layout.n_params)).astype(np.float32)
        facts = {**plan.facts(), "attempt": 1, "epoch": 0.1, "metrics": {"valid_loss": 0.5}, "curve": None}
        generation = Generation(step, params, {"momentum": momentum})
        digests[step] = checkpoint.save(storage, generation, plan.learner.layout, facts).digest()
    newest = Path(storage.path(checkpoint.name(6)))
    whole = {file: (newest / file).read_bytes() for file in (MANIFEST, PARAMS, STATE)}
    yield Run(storage, newest, whole, digests)
    # What is refused below is refused for its damage: the same checkpoint, mended, is the last one.
    shutil.rmtree(newest)
    newest.mkdir()
    for file, content in whole.items():
        (newest / file).write_bytes(content)
    found = checkpoint.load(storage)
    assert (found.step, found.digest(), found.skipped) == (6, digests[6], ())


@pytest.mark.parametrize("file", [MANIFEST, PARAMS, STATE])
def test_every_truncation_is_refused(run: Run, file: str) -> None:
    whole, taken = run.whole[file], []
    for length in range(len(whole)):
        run.damage(file, whole[:length])
        if not run.refused():
            taken.append(length)
    assert taken == []


@pytest.mark.parametrize("file", [MANIFEST, PARAMS, STATE])
def test_every_bit_flip_is_refused(run: Run, file: str) -> None:
    whole, taken = run.whole[file], []
    for at in range(len(whole)):
        for bit in range(8):
            run.damage(file, whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            if not run.refused():
                taken.append((at, bit))
    assert taken == []


def test_every_mixture_of_two_checkpoints_is_refused(run: Run) -> None:
    """Of two steps, and of two editions of one step, whose shapes and names are the same."""
    files = (MANIFEST, PARAMS, STATE)
    before = Path(run.storage.path(checkpoint.name(5)))
    older = {file: (before / file).read_bytes() for file in files}
    found = checkpoint.load(run.storage, 6)
    again = Generation(6, found.params + 1, {"momentum": found.state["momentum"] + 1})
    facts = {key: found.manifest[key] for key in ("config", "encoder", "model", "plan", "attempt")}
    shutil.copytree(run.newest, run.newest.with_name("aside"))
    saved = checkpoint.save(run.storage, again, checkpoint.layout_of(found.manifest), facts)
    edition = {file: (Path(saved.path) / file).read_bytes() for file in files}
    shutil.rmtree(saved.path)
    run.newest.with_name("aside").rename(run.newest)
    for other in (older, edition):
        for which in range(1, 7):
            for bit, file in enumerate(files):
                run.damage(file, (other if which >> bit & 1 else run.whole)[file])
            assert run.refused(), which


def test_a_name_that_is_no_file_is_refused_and_not_waited_for(run: Run) -> None:
    for file in (MANIFEST, PARAMS, STATE):
        for make in (
            os.mkfifo,
            os.mkdir,
            lambda path: os.symlink("/dev/zero", path),
            lambda path: os.symlink(path, path),
        ):
            (run.newest / file).unlink()
            make(run.newest / file)
            assert run.refused()
            (run.newest / file).rmdir() if (run.newest / file).is_dir() else (run.newest / file).unlink()
            run.damage(file, run.whole[file])


def test_load_says_what_was_passed_over(run: Run) -> None:
    run.damage(STATE, run.whole[STATE][:-1])
    for which in ("last", "best"):
        with pytest.warns(UserWarning, match="a damaged checkpoint was passed over: .*step-00000006/state.safetensors"):
            assert raysgd.load(run.storage.uri, which).step == 5
    with pytest.raises(CheckpointError, match=r"step-00000006/state\.safetensors"):
        raysgd.load(run.storage.uri, 6)
