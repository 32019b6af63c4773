"""What to do with a run directory that may already hold a run: begin, continue, or refuse. No Ray."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan
from typing import Any

from raysgd import checkpoint as checkpoints
from raysgd.audit import DAMAGED as DAMAGED_LEDGER
from raysgd.audit import NAME as LEDGER
from raysgd.checkpoint import Checkpoint
from raysgd.errors import InputError
from raysgd.plan import Tables
from raysgd.report import metrics_log, status
from raysgd.spec import RunSpec, differences
from raysgd.storage import Storage

#: what --fresh deletes: the files that raysgd writes, and nothing else that may lie there
OWN_FILES = (LEDGER, DAMAGED_LEDGER, metrics_log.NAME, status.NAME, "config.toml", "loss.png")


@dataclass(frozen=True)
class Beginning:
    """Where an attempt begins. ``checkpoint``: what it continues from, None for step 0; ``notes``: for the user."""

    attempt: int
    checkpoint: Checkpoint | None
    notes: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        return 0 if self.checkpoint is None else self.checkpoint.step

    @property
    def scores(self) -> dict[int, dict[str, float]]:
        """Validation metrics by step, as an attempt keeps them: of the checkpoint, if it was validated."""
        metrics = {} if self.checkpoint is None else self.checkpoint.manifest.get("metrics", {})
        scores = {k.removeprefix("valid_"): nan if v is None else float(v) for k, v in metrics.items()}
        return {self.step: scores} if scores else {}


def beginning(storage: Storage, spec: RunSpec, tables: Tables, fresh: bool) -> Beginning:
    """Read the run directory and decide; nothing that is written stays.

    Raises InputError where the directory cannot be used, and with every difference where it holds a run of another
    data, model, optimizer or train section; CheckpointError where it has checkpoints and none can be used.
    """
    storage.refuse_unwritable()
    try:
        before, present = status.read(storage), checkpoints.steps(storage)
    except (OSError, ValueError) as error:  # ValueError: what pyarrow raises for a path that its store cannot have
        raise InputError(f"{storage.uri} cannot be read: {error}; choose another storage path") from error
    attempt = 1 if fresh or before is None else before.attempt + 1
    if fresh or not present:
        return Beginning(attempt, None)
    found = checkpoints.load(storage, "last")
    changed = _changes(found.manifest, spec, tables)
    if changed:
        raise InputError(
            [
                *changed,
                f"{storage.uri} holds another run: choose another --name, or --fresh to delete it and start over",
            ]
        )
    found.tallies_of(spec.scaling.num_servers)
    notes = [f"warning: a damaged checkpoint was passed over: {sentence}" for sentence in found.skipped]
    stored = found.manifest.get("fingerprints", {}).get("validation")
    if stored != tables.fingerprints["validation"]:
        notes.append("warning: the validation data is not that of the run so far: its losses cannot be compared")
    return Beginning(attempt, found, tuple(notes))


def clear(storage: Storage) -> None:
    """Delete what raysgd wrote there before."""
    storage.delete_dir(checkpoints.DIRECTORY)
    for name in OWN_FILES:
        storage.delete_file(name)


def forget_diverging(storage: Storage) -> None:
    """Delete the checkpoints after the best one by validation loss: training diverged, and they were on the way there.

    Where none was validated the newest stays.
    """
    if checkpoints.steps(storage):
        checkpoints.forget(storage, after=checkpoints.load(storage, "best").step)


def _changes(manifest: Any, spec: RunSpec, tables: Tables) -> list[str]:
    found = differences(manifest.get("config", {}), spec.determining())
    if manifest.get("fingerprints", {}).get("train") != tables.fingerprints["train"]:
        found.append("the training data is not that of the run: files, sizes, rows or schema differ")
    return found
