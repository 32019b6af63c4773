"""A prepared data set appears whole or not at all, whoever does the work; no Ray.

    .NAME.preparing/  pieces/  files/ ──rename──▶ NAME/  part-00000.parquet ...  _prepared.json      on a disk
    NAME/  _PREPARING  _pieces/  part-... ──▶ _prepared.json, and _PREPARING goes                    elsewhere

``raysgd.data.files`` refuses a directory with ``_PREPARING`` in it. The same settings on the same files again find
``_prepared.json`` and do nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from raysgd.data.calls import Calls, here
from raysgd.data.files import UNFINISHED
from raysgd.data.prepare import Shuffle, gather, scatter, settle, warnings
from raysgd.data.source import Preparation, Source, open_source, scan
from raysgd.errors import InputError, RunError
from raysgd.storage import Storage

MANIFEST = "_prepared.json"

#: Called with (what is being done, how much of it is done, how much there is).
OnProgress: TypeAlias = Callable[[str, int, int], None]


@dataclass(frozen=True)
class _Place:
    """Where a data set is built: work, files: directories of ``storage``; name: that of the finished one."""

    storage: Storage
    name: str

    @property
    def work(self) -> str:
        return f".{self.name}.preparing" if self.storage.is_local else f"{self.name}/_pieces"

    @property
    def files(self) -> str:
        return f"{self.work}/files" if self.storage.is_local else self.name

    @property
    def pieces(self) -> str:
        return f"{self.work}/pieces" if self.storage.is_local else self.work

    def begin(self) -> None:
        """Empty directories to write into; what a killed attempt left goes."""
        if self.storage.is_local:
            for name in (self.pieces, self.files):
                self.storage.delete_dir(name)
        else:
            self.storage.delete_dir(self.name)
            self.storage.write_atomic(f"{self.name}/{UNFINISHED}", b"")
        for name in (self.pieces, self.files):
            self.storage.filesystem.create_dir(self.storage.path(name), recursive=True)

    def publish(self, manifest: bytes) -> None:
        """Make the finished data set appear."""
        self.storage.write_atomic(f"{self.files}/{MANIFEST}", manifest)
        if not self.storage.is_local:
            self.storage.delete_dir(self.work)
            self.storage.delete_file(f"{self.name}/{UNFINISHED}")
            return
        self.storage.delete_dir(self.name)
        self.storage.rename_dir(self.files, self.name)
        self.storage.delete_dir(self.work)


def prepare(
    job: Preparation,
    out: str,
    calls: Calls = here,
    *,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
    filesystem: Any = None,
) -> dict[str, Any]:
    """Shuffle ``job.path`` into Parquet files in the directory ``out``, and return what ``_prepared.json`` says.

    out: a directory or a URI, which every process that ``calls`` uses must see; it appears when it is complete
    overwrite: replace a data set that is there

    Raises InputError where the input cannot be used (with file, line and column), or ``out`` holds something else.
    """
    place = _place(out, filesystem)
    _refuse_inside(job, place)
    source = open_source(job)
    settings = _settings(job, source)
    told = on_progress or (lambda _what, _done, _all: None)
    if (there := prepared(place.storage, place.name)) is not None and there["settings"] == settings:
        return {**there, "out": place.storage.child(place.name).uri, "new": False}
    if not overwrite:
        _refuse_other(place)
    place.storage.refuse_unwritable()
    with place.storage.child(place.work).lock("preparing this data set"):  # object stores have none
        place.begin()
        facts = _run(job, source, place, calls, told)
        manifest = {**facts, "settings": settings}
        place.publish((json.dumps(manifest, indent=1) + "\n").encode())
    return {**manifest, "out": place.storage.child(place.name).uri, "new": True}


def _run(job: Preparation, source: Source, place: _Place, calls: Calls, told: OnProgress) -> dict[str, Any]:
    pieces = range(len(source.pieces))
    scans = []
    for found in calls(scan, source, pieces):
        scans.append(found)
        told("looking at pieces", len(scans), len(pieces))
    layout = settle(job, source, scans)
    storage = place.storage
    at = storage.path(place.pieces), storage.path(place.files)
    shuffle = Shuffle(source, layout, job.seed, storage.filesystem, *at)
    done = 0
    for rows in calls(scatter, shuffle, pieces):
        done += rows
        told("sending rows to files", done, layout.n_rows)
    files, done = {}, 0
    for name, rows, size in calls(gather, shuffle, range(layout.n_files)):
        files[name] = {"rows": rows, "bytes": size}
        done += rows
        told("writing files", done, layout.n_rows)
    if done != layout.n_rows:
        raise RunError(f"{done:,} rows were written of {layout.n_rows:,}: somebody else wrote there, too; start again")
    columns = {f.name: str(f.type) for f in layout.schema}
    facts = {"rows": done, "row_group_rows": layout.group_rows, "columns": columns, "files": files}
    return facts | ({"warnings": found} if (found := warnings(layout, scans)) else {})


def prepared(storage: Storage, name: str) -> dict[str, Any] | None:
    """What ``_prepared.json`` says of a whole data set, None where there is none."""
    if storage.exists(f"{name}/{UNFINISHED}"):
        return None
    try:
        found = json.loads(storage.read(f"{name}/{MANIFEST}"))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and {"settings", "files", "rows"} <= set(found) else None


def _place(out: str, filesystem: Any) -> _Place:
    storage = Storage.open(out) if filesystem is None else Storage(filesystem, out.rstrip("/"))
    parent, _, name = storage.base.rpartition("/")
    if not name or not parent:
        raise InputError(f"{out} must name a directory in another one, which prepare can create")
    uri = storage.uri.rstrip("/").rpartition("/")[0]
    return _Place(Storage(storage.filesystem, parent, uri), name)


def _refuse_inside(job: Preparation, place: _Place) -> None:
    """The output may not be where the input is searched: the next time it would be read, too."""
    target = place.storage.child(place.name)
    for path in [job.path] if isinstance(job.path, str) else job.path:
        if job.filesystem is None:
            given = Storage.open(str(path))
            if f"{target.base}/".startswith(f"{given.base}/") or f"{given.base}/".startswith(f"{target.base}/"):
                raise InputError(f"{target.uri} must lie outside of {given.uri}: one would be read as the other")


def _refuse_other(place: _Place) -> None:
    storage = place.storage
    path = storage.path(place.name)
    if not storage.exists(place.name):
        return
    if storage.exists(f"{place.name}/{UNFINISHED}"):
        return
    if storage.list_files(place.name) or storage.list_dirs(place.name):
        remedy = "choose another directory, or --overwrite"
        raise InputError(f"{path} exists and was not prepared from these files with these settings: {remedy}")


def _settings(job: Preparation, source: Source) -> dict[str, Any]:
    names = ("seed", "row_group_rows", "file_rows", "delimiter", "newlines_in_values", "missing_text", "piece_bytes")
    return {**{n: getattr(job, n) for n in names}, "types": dict(job.types), "input": source.described}
