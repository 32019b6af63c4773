"""Checkpoints: safetensors and a manifest with a SHA-256 per tensor, published whole or not at all.

    checkpoints/step-00000577/params.safetensors      the model's named arrays
                              state.safetensors       the optimizer's, as slot/array
                              manifest.json           written last: step, config, encoder, tensors, digest

Nothing is unpickled. A checkpoint counts only if its manifest is of our form and ends with the SHA-256 of what stands
before that, every tensor it names is there with the SHA-256, shape and type that it states, nothing else is, and every
value is finite.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from raysgd.errors import CheckpointError, InputError
from raysgd.learn.batch import Float32
from raysgd.learn.parameters import Array, Layout
from raysgd.protocol.generation import Generation
from raysgd.storage import Storage

FORMAT = 1
DIRECTORY = "checkpoints"
MANIFEST, PARAMS, STATE = "manifest.json", "params.safetensors", "state.safetensors"
_NAME = re.compile(r"step-(\d{8,})")
#: The end of a manifest: its last key is the SHA-256 of every byte before it.
_END = re.compile(rb',\n "sha256": "([0-9a-f]{64})"\n}\Z')


@dataclass(frozen=True)
class Checkpoint:
    """One verified checkpoint. ``path`` is where it lies; ``skipped`` names newer ones that were refused, and why."""

    path: str
    manifest: Mapping[str, Any]
    generation: Generation
    skipped: tuple[str, ...] = field(default=())

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

    def digest(self) -> str:
        """SHA-256 over the whole arrays and the step: independent of how many servers there were."""
        return str(self.manifest["digest"])  # made when it was saved, compared with the arrays when it was read


def name(step: int) -> str:
    """The directory of a step's checkpoint below the run's directory."""
    return f"{DIRECTORY}/step-{step:08d}"


def steps(storage: Storage) -> list[int]:
    """The steps that have a checkpoint directory, ascending, whether it is whole or not."""
    matches = (_NAME.fullmatch(entry) for entry in storage.list_dirs(DIRECTORY))
    return sorted(int(m[1]) for m in matches if m)


def save(storage: Storage, generation: Generation, layout: Layout, facts: Mapping[str, Any]) -> Checkpoint:
    """Write and publish a checkpoint; ``facts`` are the manifest's further keys (JSON). An older one of this step goes.

    Local directories are published by one rename; on object stores the manifest is put last, and without it
    nothing counts.
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
    target = name(generation.step)
    place = f"{DIRECTORY}/.writing-step-{generation.step:08d}" if storage.is_local else target
    storage.delete_dir(place)
    for file, tensors in files.items():
        storage.write_atomic(f"{place}/{file}", save_tensors(tensors))
    storage.write_atomic(f"{place}/{MANIFEST}", text)
    if place != target:
        storage.delete_dir(target)
        storage.rename_dir(place, target)
    return Checkpoint(storage.child(target).uri, manifest, generation)


def load(storage: Storage, which: str | int = "last") -> Checkpoint:
    """The newest whole checkpoint (``"last"``), the one of least validation loss (``"best"``), or that of a step.

    "best" is "last" where no checkpoint has a validation loss. Damaged ones are passed over and listed in ``skipped``;
    a damaged one that was asked for by its step is an error.

    Raises CheckpointError where none can be used, InputError where ``which`` is none of the three.
    """
    if isinstance(which, int):
        return _read(storage, which)
    if which not in ("last", "best"):
        raise InputError(f"which must be 'best', 'last' or a step, got {which!r}")
    skipped: list[str] = []
    for step in _candidates(storage, which, skipped):
        try:
            found = _read(storage, step)
        except CheckpointError as error:
            skipped.append(str(error))
            continue
        return Checkpoint(found.path, found.manifest, found.generation, tuple(skipped))
    if not skipped:
        raise CheckpointError(f"{storage.uri} has no checkpoint")
    raise CheckpointError(f"{storage.uri} has no checkpoint that can be used: " + "; ".join(skipped))


def prune(storage: Storage, keep: int | None) -> None:
    """Delete all but the ``keep`` newest checkpoints and the best one; None keeps all."""
    if keep is None:
        return
    present = steps(storage)
    best = next(iter(_candidates(storage, "best", [])), None)
    for step in present[:-keep]:
        if step != best:
            storage.delete_dir(name(step))


def sealed(manifest: Mapping[str, Any]) -> bytes:
    """The bytes of ``manifest.json``: JSON whose last key, ``sha256``, is that of the bytes before it.

    >>> sealed({"format": 1})[:30]
    b'{\\n "format": 1,\\n "sha256": "d6'
    """
    facts = {key: value for key, value in manifest.items() if key != "sha256"}
    body = json.dumps(facts, indent=1, allow_nan=False).encode().removesuffix(b"\n}")
    return body + f',\n "sha256": "{sha256(body).hexdigest()}"\n}}'.encode()


def layout_of(manifest: Mapping[str, Any]) -> Layout:
    """The model's named arrays as the manifest lists them. Raises ValueError where two have one name."""
    layout = Layout(tuple(Array(a["name"], tuple(a["shape"]), a["penalized"]) for a in manifest["layout"]))
    if len(layout.ranges()) < len(layout.arrays):
        raise ValueError("two arrays have one name")
    return layout


def _candidates(storage: Storage, which: str, skipped: list[str]) -> Iterator[int]:
    """Steps in the order in which they should be tried."""
    newest_first = steps(storage)[::-1]
    if which == "last":
        return iter(newest_first)
    losses: dict[int, float] = {}
    for step in newest_first:
        try:
            loss = _manifest(storage, step).get("metrics", {}).get("valid_loss")
        except CheckpointError as error:
            skipped.append(str(error))
            continue
        losses[step] = loss if isinstance(loss, int | float) and loss < math.inf else math.inf  # NaN is not
    return iter(sorted(losses, key=lambda step: losses[step]))  # stable: the newest of equals


def _read(storage: Storage, step: int) -> Checkpoint:
    where = storage.child(name(step))
    manifest = _manifest(storage, step)
    try:
        layout = layout_of(manifest)
        slots = [str(slot) for slot in manifest["slots"]]
        tensors = manifest["tensors"]
        params = _tensors(where, PARAMS, tensors[PARAMS], {a.name: a.shape for a in layout.arrays})
        shapes = {f"{slot}/{a.name}": a.shape for slot in slots for a in layout.arrays}
        state = _tensors(where, STATE, tensors[STATE], shapes)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{where.uri}/{MANIFEST} is not of this form: {error!r}") from error
    flat = _flat(layout, params.__getitem__)
    generation = Generation(step, flat, {s: _flat(layout, lambda n, s=s: state[f"{s}/{n}"]) for s in slots})  # type: ignore[misc]
    if not generation.finite():
        raise CheckpointError(f"{where.uri} holds NaN or infinite values")
    if (digest := generation.digest()) != manifest.get("digest"):
        raise CheckpointError(f"{where.uri}: the digest is {digest}, {MANIFEST} says {manifest.get('digest')}")
    return Checkpoint(where.uri, manifest, generation)


def _manifest(storage: Storage, step: int) -> dict[str, Any]:
    path = f"{name(step)}/{MANIFEST}"
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
