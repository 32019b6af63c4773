"""Checkpoints: safetensors and a manifest with a SHA-256 per tensor, published whole or not at all.

    checkpoints/step-00000577/params.safetensors      the model's named arrays
                              state.safetensors       the optimizer's, as slot/array
                              manifest.json           written last: step, config, encoder, tensors, digest

A step that is saved again gets another directory, step-00000577.2, before the first one goes: at no moment is there
less than a whole checkpoint. Names that begin with a dot are of what was being written or deleted; they do not count.

Nothing is unpickled. A checkpoint counts only if its manifest is of our form and ends with the SHA-256 of what stands
before that, every tensor it names is there with the SHA-256, shape and type that it states, nothing else is, and every
value is finite.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from raysgd import failpoints
from raysgd.errors import CheckpointError, InputError, SaveError
from raysgd.learn.batch import Float32
from raysgd.learn.parameters import Array, Layout
from raysgd.protocol.generation import Generation
from raysgd.protocol.tally import Tally
from raysgd.storage import DELETING, Storage

FORMAT = 1
DIRECTORY = "checkpoints"
MANIFEST, PARAMS, STATE = "manifest.json", "params.safetensors", "state.safetensors"
#: Of a checkpoint's directory: the step, and how often it was saved if more than once.
_NAME = re.compile(r"step-([0-9]{8,})(?:\.([0-9]+))?")
#: Before the name of a directory that is being written, on a disk.
WRITING = ".writing-"
#: The end of a manifest: its last key is the SHA-256 of every byte before it.
_END = re.compile(rb',\n "sha256": "([0-9a-f]{64})"\n}\Z')


@dataclass(frozen=True)
class Checkpoint:
    """One verified checkpoint. ``path`` is where it lies; ``skipped`` names newer ones that were refused, and why."""

    path: str
    manifest: Mapping[str, Any]
    generation: Generation
    skipped: tuple[str, ...] = field(default=())
    #: by server, what is in its part, where it was copied while virtual workers stood apart
    tallies: tuple[Tally, ...] = field(default=())

    @property
    def step(self) -> int:
        return self.generation.step

    @property
    def params(self) -> Float32:
        """(n_params,) float32."""
        return self.generation.params

    @property
    def state(self) -> dict[str, Float32]:
        """Each slot of the optimizer, (n_params,) float32."""
        return self.generation.state

    def tallies_of(self, n_servers: int) -> tuple[Tally, ...] | None:
        """What is in the part of each of so many servers; None where the step says it all.

        Raises InputError where they were another number, and stood apart: then no part is another server's.
        """
        if not self.tallies or len(self.tallies) == n_servers:
            return self.tallies or None
        if len({tally.clocks for tally in self.tallies}) == 1:
            return self.tallies[:1] * n_servers
        raise InputError(
            f"scaling.num_servers must be {len(self.tallies)}, got {n_servers}: when the checkpoint of step "
            f"{self.step:,} was written its servers held different steps of the virtual workers. Continue with "
            f"{len(self.tallies)} to the next validation or checkpoint; from there the number is free"
        )

    def digest(self) -> str:
        """SHA-256 over the whole arrays and the step: independent of how many servers there were."""
        return str(self.manifest["digest"])  # made when it was saved, compared with the arrays when it was read


def name(step: int, edition: int = 1) -> str:
    """The directory of a step's checkpoint below the run's directory; ``edition``: the how manieth of this step."""
    return f"{DIRECTORY}/step-{step:08d}" + (f".{edition}" if edition > 1 else "")


def steps(storage: Storage) -> list[int]:
    """The steps that have a published checkpoint, ascending, whether it is whole or was damaged since."""
    return sorted({step for step, _ in _published(storage)})


def _published(storage: Storage) -> list[tuple[int, int]]:
    """(step, edition) of every checkpoint that was published, ascending.

    On a disk the directory's name says so; where nothing can be renamed at once, the manifest's being there.
    """
    entries = storage.list_dirs(DIRECTORY) if storage.is_local else storage.list_dirs(DIRECTORY, holding=MANIFEST)
    return sorted(place for place in map(_place, entries) if place is not None)


def _place(entry: str) -> tuple[int, int] | None:
    """The (step, edition) of which this is the directory, or None."""
    match = _NAME.fullmatch(entry)
    place = (int(match[1]), int(match[2] or 1)) if match else None
    return place if place and name(*place) == f"{DIRECTORY}/{entry}" else None


def save(storage: Storage, generation: Generation, layout: Layout, facts: Mapping[str, Any]) -> Checkpoint:
    """Write and publish a checkpoint, then delete older ones of its step. ``facts``: the manifest's other keys (JSON).

    Local directories are published by one rename; on object stores the manifest is put last, and without it
    nothing counts. What a killed process left half-written or half-deleted goes first.

    Raises SaveError where it cannot be written, with the file and the remedy; what was saved before stays.
    """
    files = {PARAMS: dict(layout.views(generation.params)), STATE: _state_tensors(generation, layout)}
    manifest = {
        "format": FORMAT,
        "step": generation.step,
        "digest": generation.digest(),
        "layout": [{"name": a.name, "shape": list(a.shape), "penalized": a.penalized} for a in layout.arrays],
        "slots": sorted(generation.state),
        "tensors": {file: {k: _seal(v) for k, v in tensors.items()} for file, tensors in files.items()},
        **facts,
    }
    text = sealed(manifest)
    _clean(storage)
    failpoints.reach("checkpoint.begin")
    older = [edition for step, edition in _published(storage) if step == generation.step]
    target = name(generation.step, max(older, default=0) + 1)
    place = target.replace("/", f"/{WRITING}") if storage.is_local else target
    where = place
    try:
        for file, tensors in files.items():
            where = f"{place}/{file}"
            storage.write_atomic(where, save_tensors(tensors))
        where = f"{place}/{MANIFEST}"
        storage.write_atomic(where, text)
        where = target
        if place != target:
            failpoints.reach("checkpoint.rename")
            storage.rename_dir(place, target)
    except OSError as error:
        with contextlib.suppress(OSError):  # the next save will do it
            _delete(storage, place)
        raise _not_saved(storage, where, error) from error
    failpoints.reach("checkpoint.replaced")
    for edition in older:
        _delete(storage, name(generation.step, edition))
    return Checkpoint(storage.child(target).uri, manifest, generation)


def load(storage: Storage, which: str | int = "last") -> Checkpoint:
    """The newest whole checkpoint (``"last"``), the one of least validation loss (``"best"``), or that of a step.

    "best" is "last" where no checkpoint has a validation loss. Damaged ones are passed over and listed in ``skipped``;
    a damaged one that was asked for by its step is an error.

    Raises CheckpointError where none can be used, InputError where ``which`` is none of the three.
    """
    if not isinstance(which, int) and which not in ("last", "best"):
        raise InputError(f"which must be 'best', 'last' or a step, got {which!r}")
    skipped: list[str] = []
    for step, edition in _candidates(storage, which, skipped):
        try:
            found = _read(storage, step, edition)
        except CheckpointError as error:
            skipped.append(str(error))
            continue
        return replace(found, skipped=tuple(skipped))
    if isinstance(which, int):
        raise CheckpointError("; ".join(skipped))
    if not skipped:
        raise CheckpointError(f"{storage.uri} has no checkpoint")
    raise CheckpointError(f"{storage.uri} has no checkpoint that can be used: " + "; ".join(skipped))


def prune(storage: Storage, keep: int | None) -> None:
    """Delete all but the ``keep`` newest checkpoints and the best one; None keeps all.

    What a later attempt saved is newer, also where its step is smaller: an attempt begins below the checkpoints that it
    found damaged, and those must not count for good ones.
    """
    if keep is None:
        return
    manifests = _manifests(storage, [])
    by_age = sorted(_published(storage), key=lambda place: (_attempt(manifests.get(place, {})), *place))
    best = _best_first(manifests)[:1]
    for place in by_age[:-keep]:
        if place not in best or _loss(manifests[place]) == math.inf:
            failpoints.reach("checkpoint.prune")
            _delete(storage, name(*place))


def forget(storage: Storage, after: int) -> None:
    """Delete the checkpoints of steps beyond ``after``."""
    for step, edition in _published(storage):
        if step > after:
            _delete(storage, name(step, edition))


def last_attempt(storage: Storage) -> int:
    """The greatest attempt that a checkpoint is of; 0 where there is none."""
    return max(map(_attempt, _manifests(storage, []).values()), default=0)


def sealed(manifest: Mapping[str, Any]) -> bytes:
    """The bytes of ``manifest.json``: JSON whose last key, ``sha256``, is that of the bytes before it.

    >>> sealed({"format": 1})[:30]
    b'{\\n "format": 1,\\n "sha256": "d6'
    """
    facts = {key: value for key, value in manifest.items() if key != "sha256"}
    body = json.dumps(facts, indent=1, allow_nan=False).encode().removesuffix(b"\n}")
    return body + f',\n "sha256": "{sha256(body).hexdigest()}"\n}}'.encode()


def tallies_told(version: int, tallies: Sequence[Tally]) -> dict[str, Any]:
    """The manifest's key ``tallies``. version: as the protocol counts, in rounds"""
    return {"version": version, "servers": [tally.since(version).as_dict() for tally in tallies]}


def layout_of(manifest: Mapping[str, Any]) -> Layout:
    """The model's named arrays as the manifest lists them. Raises ValueError where two have one name."""
    layout = Layout(tuple(Array(a["name"], tuple(a["shape"]), a["penalized"]) for a in manifest["layout"]))
    if len(layout.ranges()) < len(layout.arrays):
        raise ValueError("two arrays have one name")
    return layout


def _clean(storage: Storage) -> None:
    """Delete what a killed process left: directories half-written or half-deleted, none of which counts."""
    if not storage.is_local:
        present = [place for place in map(_place, storage.list_dirs(DIRECTORY)) if place is not None]
        left = [name(*place) for place in sorted({*present} - {*_published(storage)})]
    else:
        entries = [e for e in storage.list_dirs(DIRECTORY) if e.startswith((WRITING, DELETING))]
        left = [DELETING + DIRECTORY, *(f"{DIRECTORY}/{entry}" for entry in entries)]
    for directory in left:
        storage.delete_dir(directory)


def _delete(storage: Storage, directory: str) -> None:
    """Delete a checkpoint: it counts whole, or not at all."""
    if not storage.is_local:
        storage.delete_file(f"{directory}/{MANIFEST}")
    storage.delete_dir(directory)


def _not_saved(storage: Storage, where: str, error: OSError) -> SaveError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "free some space there, or keep fewer checkpoints (run.num_to_keep)"
    else:
        remedy = "see to it that it can be written"
    return SaveError(
        f"{storage.uri}/{where} could not be written: {error.strerror or error}. What was saved before "
        f"stays: {remedy}, then the same command continues the run"
    )


def _candidates(storage: Storage, which: str | int, skipped: list[str]) -> list[tuple[int, int]]:
    """(step, edition) in the order in which they should be tried."""
    if which == "best":
        return _best_first(_manifests(storage, skipped))
    newest_first = _published(storage)[::-1]
    if which == "last":
        return newest_first
    return [place for place in newest_first if place[0] == which] or [(int(which), 1)]


def _manifests(storage: Storage, skipped: list[str]) -> dict[tuple[int, int], dict[str, Any]]:
    """The manifests that can be read, by (step, edition), the newest first; sentences about the others."""
    found = {}
    for place in _published(storage)[::-1]:
        try:
            found[place] = _manifest(storage, *place)
        except CheckpointError as error:
            skipped.append(str(error))
    return found


def _best_first(manifests: Mapping[tuple[int, int], Mapping[str, Any]]) -> list[tuple[int, int]]:
    return sorted(manifests, key=lambda place: _loss(manifests[place]))  # stable: the newest of equals


def _loss(manifest: Mapping[str, Any]) -> float:
    """The validation loss, infinite where there is none."""
    loss = manifest.get("metrics", {}).get("valid_loss")
    return loss if isinstance(loss, int | float) and loss < math.inf else math.inf  # NaN is not


def _attempt(manifest: Mapping[str, Any]) -> int:
    attempt = manifest.get("attempt")
    return attempt if isinstance(attempt, int) else 0


def _read(storage: Storage, step: int, edition: int) -> Checkpoint:
    where = storage.child(name(step, edition))
    manifest = _manifest(storage, step, edition)
    try:
        layout = layout_of(manifest)
        slots = [str(slot) for slot in manifest["slots"]]
        tensors = manifest["tensors"]
        if {*tensors} != {PARAMS, STATE}:
            raise ValueError(f"tensors are of {sorted(tensors)}, not of {PARAMS} and {STATE}")
        params = _tensors(where, PARAMS, tensors[PARAMS], {a.name: a.shape for a in layout.arrays})
        shapes = {f"{slot}/{a.name}": a.shape for slot in slots for a in layout.arrays}
        state = _tensors(where, STATE, tensors[STATE], shapes)
        tallies = _tallies(manifest.get("tallies"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{where.uri}/{MANIFEST} is not of this form: {error!r}") from error
    flat = _flat(layout, params.__getitem__)
    generation = Generation(step, flat, {s: _flat(layout, lambda n, s=s: state[f"{s}/{n}"]) for s in slots})  # type: ignore[misc]
    if not generation.finite():
        raise CheckpointError(f"{where.uri} holds NaN or infinite values")
    if (digest := generation.digest()) != manifest.get("digest"):
        raise CheckpointError(f"{where.uri}: the digest is {digest}, {MANIFEST} says {manifest.get('digest')}")
    return Checkpoint(where.uri, manifest, generation, tallies=tallies)


def _tallies(found: Mapping[str, Any] | None) -> tuple[Tally, ...]:
    """Raises ValueError, KeyError or TypeError where they are none."""
    return () if found is None else tuple(Tally.from_dict(entry, int(found["version"])) for entry in found["servers"])


def _manifest(storage: Storage, step: int, edition: int) -> dict[str, Any]:
    path = f"{name(step, edition)}/{MANIFEST}"
    try:
        text = storage.read(path)
        manifest = json.loads(text)
    except FileNotFoundError as error:
        raise CheckpointError(f"{storage.uri}/{path} is missing: the checkpoint is incomplete") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{storage.uri}/{path} is damaged: {error}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("metrics", {}), dict):
        raise CheckpointError(f"{storage.uri}/{path} is damaged: not a JSON object of this form")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{storage.uri}/{path}: format {manifest.get('format')!r}; this raysgd reads format {FORMAT}"
        )
    end = _END.search(text)
    if end is None or sha256(text[: end.start()]).hexdigest() != end[1].decode():
        raise CheckpointError(f"{storage.uri}/{path} is damaged: the SHA-256 at its end is not that of the rest")
    if manifest.get("step") != step:
        raise CheckpointError(f"{storage.uri}/{path} is of step {manifest.get('step')!r}, its directory of step {step}")
    return manifest


def _tensors(
    where: Storage, file: str, sealed: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Float32]:
    """The tensors of one file, each checked against its seal and its expected shape."""
    try:
        tensors: dict[str, Float32] = load_tensors(where.read(file))
    except FileNotFoundError as error:
        raise CheckpointError(f"{where.uri}/{file} is missing") from error
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{where.uri}/{file} is damaged: {error}") from error
    for kind, names in (("the file", set(tensors)), (MANIFEST, set(sealed))):
        if names != set(shapes):
            odd = ", ".join(sorted(names ^ set(shapes)))
            raise CheckpointError(f"{where.uri}/{file}: {kind} has missing or extra tensors: {odd}")
    for key, tensor in tensors.items():
        if tensor.shape != shapes[key] or tensor.dtype != np.float32 or _seal(tensor) != sealed[key]:
            raise CheckpointError(f"{where.uri}/{file}: tensor {key!r} is not what {MANIFEST} sealed")
    return tensors


def _seal(tensor: Float32) -> dict[str, Any]:
    data = np.ascontiguousarray(tensor, dtype="<f4")
    return {"shape": list(tensor.shape), "dtype": "float32", "sha256": sha256(data.data).hexdigest()}


def _state_tensors(generation: Generation, layout: Layout) -> dict[str, Float32]:
    return {
        f"{slot}/{name}": view
        for slot, flat in sorted(generation.state.items())
        for name, view in layout.views(flat).items()
    }


def _flat(layout: Layout, tensor: Callable[[str], Float32]) -> Float32:
    flat = np.empty(layout.n_params, np.float32)
    for array, view in layout.views(flat).items():
        view[...] = tensor(array)
    return flat
