"""Where a run is written: a directory on any pyarrow filesystem, local or an object store.

Names are relative to the directory and never leave it. What is read back is bytes or text: nothing is executed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path
from typing import Any

from pyarrow import ArrowInvalid
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from raysgd import failpoints
from raysgd.errors import InputError, RunError, SaveError

#: Stores without directories: nothing is created before a put.
_OBJECT_STORES = ("s3", "gcs", "abfs")

#: The file of a local directory that :meth:`Storage.lock` locks.
LOCK = ".lock"

#: Where a directory lies while it is deleted: beside itself, out of sight.
DELETING = ".deleting-"


@dataclass(frozen=True)
class Lock:
    """The file that was locked: its path, and which file it was."""

    path: str
    device: int
    inode: int

    def refuse_lost(self) -> None:
        """Raises RunError where another file has its path, or none: the directory was moved, deleted or replaced."""
        with suppress(OSError):
            found = os.stat(self.path)
            if (found.st_dev, found.st_ino) == (self.device, self.inode):
                return
        raise RunError(
            f"{os.path.dirname(self.path)} was moved or deleted while this process wrote there: nothing more is "
            "written; where it lies now, its last checkpoint can be continued"
        )


@dataclass(frozen=True)
class Storage:
    """A directory ``base`` on ``filesystem``; it need not exist before the first write.

    filesystem: any pyarrow.fs.FileSystem
    base: the directory's path on it
    uri: how a user would write it: an absolute local path, or a URI
    held: the lock under which it is written: while it is not ours any more, every write is refused

    >>> Storage.open("/runs").child("flights").uri
    '/runs/flights'
    """

    filesystem: Any
    base: str
    uri: str = ""
    held: Lock | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not self.uri:
            scheme = "" if self.is_local else f"{self.filesystem.type_name}://"
            object.__setattr__(self, "uri", scheme + self.base)

    @classmethod
    def open(cls, path_or_uri: str | os.PathLike[str]) -> Storage:
        """The directory at a local path (relative to the current directory) or a URI such as ``s3://bucket/runs``.

        Raises InputError where the URI names no filesystem that pyarrow knows.
        """
        text = os.fspath(path_or_uri)
        if "://" not in text:
            return cls(LocalFileSystem(), os.path.abspath(os.path.expanduser(text)))
        try:
            filesystem, base = FileSystem.from_uri(text)
        except (ArrowInvalid, OSError, ValueError) as error:
            raise InputError(f"{text} names no storage that can be opened: {error}") from None
        if not base.strip("/") and not isinstance(filesystem, LocalFileSystem):
            raise InputError(f"{text} names no bucket and no directory: write it as scheme://bucket/directory")
        return cls(filesystem, base.rstrip("/"), base if isinstance(filesystem, LocalFileSystem) else text)

    @property
    def is_local(self) -> bool:
        """Whether it is a directory of this machine (or of a mounted file system)."""
        return isinstance(self.filesystem, LocalFileSystem)

    def child(self, name: str) -> Storage:
        """The directory ``name`` in this one."""
        place, mark, query = self.uri.partition("?") if "://" in self.uri else (self.uri, "", "")
        return Storage(self.filesystem, self.path(name), f"{place.rstrip('/')}/{name}{mark}{query}", self.held)

    def path(self, name: str = "") -> str:
        """The path of ``name`` on the filesystem.

        Raises InputError where it would leave this directory: names can come from a stored file.

        >>> Storage.open("/runs").path("../secrets")
        Traceback (most recent call last):
            ...
        raysgd.errors.InputError: '../secrets' leaves the directory /runs; names must be relative, without '..'
        """
        if not name:
            return self.base
        parts = name.replace("\\", "/").split("/")
        if "\0" in name or ".." in parts or "" in parts or "." in parts or ":" in parts[0]:
            raise InputError(f"{name!r} leaves the directory {self.uri}; names must be relative, without '..'")
        return f"{self.base}/{name}"

    def read(self, name: str) -> bytes:
        """The whole file. Raises FileNotFoundError, and OSError where it is no file: a pipe would never end."""
        path = self.path(name)
        if self.is_local:
            with open(path, "rb", opener=_open_file) as file:
                return file.read()
        with self.filesystem.open_input_stream(path) as stream:
            return bytes(stream.read())

    def write_atomic(self, name: str, data: bytes) -> None:
        """Replaces the file: a reader, also after a crash, sees the old bytes or the new ones, never a mixture.

        Local: a temporary file, fsync, rename, fsync of the directory. Object stores: one put. What a killed write of
        this file left over goes.
        """
        self._refuse_lost()
        path = self.path(name)
        if self.is_local:
            _replace_local(Path(path), data)
            return
        if self.filesystem.type_name not in _OBJECT_STORES:
            self.filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        failpoints.reach("storage.put")
        with self.filesystem.open_output_stream(path) as stream:
            stream.write(data)
            failpoints.reach("storage.close")

    def append(self, name: str, text: str, sync: bool = False) -> None:
        """Adds text to the end of a file, which need not exist. Elsewhere than locally this rewrites the file.

        Local: whoever is killed meanwhile leaves a beginning of it; a full disk leaves the file as it was.
        sync: whether it is to survive a power cut
        """
        self._refuse_lost()
        if not self.is_local:
            old = self.read(name) if self.exists(name) else b""
            self.write_atomic(name, old + text.encode())
            return
        _append_local(Path(self.path(name)), text.encode(), sync)

    def exists(self, name: str = "") -> bool:
        """Whether there is a file or a directory of that name."""
        return bool(self.filesystem.get_file_info(self.path(name)).type != FileType.NotFound)

    def list_dirs(self, name: str = "", holding: str | None = None) -> list[str]:
        """The names of the directories in ``name``, sorted; [] where there is no such directory.

        holding: only those that have a file of this name; however many there are, it is one listing
        """
        if holding is None:
            return self._list(name, FileType.Directory)
        path = self.path(name)
        selector = FileSelector(path, recursive=True, allow_not_found=True)
        files = [i.path.split("/") for i in self.filesystem.get_file_info(selector) if i.type == FileType.File]
        return sorted(p[-2] for p in files if p[-1] == holding and p[-3:-2] == [path.rpartition("/")[2]])

    def list_files(self, name: str = "") -> list[str]:
        """The names of the files in ``name``, sorted; [] where there is no such directory."""
        return self._list(name, FileType.File)

    def _list(self, name: str, kind: Any) -> list[str]:
        selector = FileSelector(self.path(name), recursive=False, allow_not_found=True)
        found = self.filesystem.get_file_info(selector)
        return sorted(info.base_name for info in found if info.type == kind)

    def delete_dir(self, name: str) -> None:
        """Deletes a directory and all in it; nothing happens where there is none.

        Local: it is there whole or gone; a kill can leave parts of it under a name that begins with ``DELETING``.
        """
        self._refuse_lost()
        path = self.path(name)
        if self.is_local:
            _delete_local(Path(path))
        elif self.exists(name):
            failpoints.reach("storage.remove")
            self.filesystem.delete_dir(path)

    def refuse_unwritable(self) -> None:
        """Raises InputError where nothing can be written here: writes a small file and deletes it, and what directories
        that took."""
        try:
            if self.is_local:
                _probe_local(Path(self.base))
            else:
                self._probe()
        except (OSError, ValueError) as error:  # ValueError: what pyarrow raises for a path that its store cannot have
            why = getattr(error, "strerror", None) or error
            raise InputError(f"{self.uri} cannot be written: {why}; choose another storage path") from error

    def refuse_occupied(self, names: Sequence[str]) -> None:
        """Raises InputError where something else than a file has one of these names, as a directory or a pipe."""
        infos = self.filesystem.get_file_info([self.path(name) for name in names])
        kinds = {FileType.Directory: "a directory", FileType.Unknown: "no file"}
        found = [(name, kinds[info.type]) for name, info in zip(names, infos, strict=True) if info.type in kinds]
        if found:
            raise InputError(
                [f"{self.uri}/{name} is {kind}: move it away, or choose another --name" for name, kind in found]
            )

    def _probe(self) -> None:
        made = None
        if self.filesystem.type_name not in _OBJECT_STORES:
            made = self.base
            while made and not self._is_there(made.rpartition("/")[0]):
                made = made.rpartition("/")[0]
            made = None if self._is_there(self.base) else made
        path = self.path(f".probe-{secrets.token_hex(4)}")
        try:
            if self.filesystem.type_name not in _OBJECT_STORES:
                self.filesystem.create_dir(self.base, recursive=True)
            with self.filesystem.open_output_stream(path) as stream:
                stream.write(b"?")
            self.filesystem.delete_file(path)
        finally:
            if made is not None and self._is_there(made):
                self.filesystem.delete_dir(made)

    def _is_there(self, path: str) -> bool:
        return not path or bool(self.filesystem.get_file_info(path).type != FileType.NotFound)

    def _refuse_lost(self) -> None:
        if self.held is not None:
            self.held.refuse_lost()

    @contextmanager
    def saving(self, name: str) -> Iterator[None]:
        """Whatever the system says in the block, as of a full disk, becomes a SaveError with file and remedy."""
        try:
            yield
        except OSError as error:
            why = error.strerror or error
            raise SaveError(f"{self.uri}/{name} could not be written: {why}; make room there") from error

    @contextmanager
    def lock(self, doing: str = "training this run") -> Iterator[Storage]:
        """Keep other processes from writing this directory, for the duration of the block; ``doing`` is for people.

        A lock of the operating system, so it goes with the process; object stores have none, and nothing happens.
        What is given is this directory; once it was moved or deleted, its writes raise RunError.
        Raises InputError where another process holds it.
        """
        if not self.is_local:
            yield self
            return
        path = Path(self.path(LOCK))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a")
        except OSError as error:
            raise InputError(f"{self.uri} cannot be written: {error.strerror}; choose another storage path") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{self.uri} is in use: another process is {doing}") from None
            locked = os.fstat(file.fileno())
            yield replace(self, held=Lock(str(path), locked.st_dev, locked.st_ino))

    def delete_file(self, name: str) -> None:
        """Deletes a file; nothing happens where there is none."""
        self._refuse_lost()
        if self.exists(name):
            failpoints.reach("storage.remove")
            self.filesystem.delete_file(self.path(name))

    def rename_dir(self, old: str, new: str) -> None:
        """Gives a directory another name. ``new`` must not exist.

        Atomic and durable on a local directory only: an object store copies file by file, so what must appear
        at once there is published by writing one file last.
        """
        self._refuse_lost()
        source, target = self.path(old), self.path(new)
        if self.exists(new):
            raise FileExistsError(f"{self.uri}/{new} exists already")
        if not self.is_local:
            self.filesystem.move(source, target)
            return
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        failpoints.reach("storage.rename")
        os.rename(source, target)
        _sync_directory(Path(target).parent)


def _replace_local(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _delete_leftovers(path)
    failpoints.reach("storage.create")
    # The name is ours alone, so two writers never share a temporary file; a leading dot hides it from listings.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            failpoints.reach("storage.write")
            file.write(data)
            file.flush()
            failpoints.reach("storage.fsync")
            os.fsync(file.fileno())
        failpoints.reach("storage.replace")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(path.parent)


def _probe_local(directory: Path) -> None:
    made: list[Path] = []
    place = directory
    while not os.path.lexists(place):
        made.append(place)
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{place} is no directory", str(place))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _delete_leftovers(directory / "probe")
        probe = directory / f".probe.{os.getpid()}-{secrets.token_hex(4)}.tmp"
        try:
            probe.write_bytes(b"?")
        finally:
            probe.unlink(missing_ok=True)
    finally:
        for one in made:  # what others have written there meanwhile stays
            with suppress(OSError):
                one.rmdir()


def _append_local(path: Path, data: bytes, sync: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("ab", buffering=0) as file:
        size, middle = file.tell(), (data.rfind(b"\n", 0, -1) + len(data)) // 2
        try:
            _write_all(file, data[:middle])
            failpoints.reach("storage.append")
            _write_all(file, data[middle:])
            if sync:
                os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise
    if sync and new:
        _sync_directory(path.parent)


def _write_all(file: FileIO, data: bytes) -> None:
    """A full disk can take a part of what is written, and say so only at the next write."""
    while data:
        data = data[file.write(data) :]


def _delete_leftovers(path: Path) -> None:
    """Deletes the temporary files of this file whose writers were killed."""
    pattern = re.compile(re.escape(f".{path.name}.") + r"([0-9]+)-[0-9a-f]{8}\.tmp")
    for name in os.listdir(path.parent):
        match = pattern.fullmatch(name)
        if match and not _lives(int(match[1])):
            path.with_name(name).unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    """Whether a process of this number is there; on another host, where it cannot be seen, it counts as gone."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _open_file(path: str, flags: int) -> int:
    """Opens a regular file, or a link to one; whatever else has the name is refused before it is read."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "not a file", path)


def _delete_local(path: Path) -> None:
    hidden = path if path.name.startswith(DELETING) else path.with_name(DELETING + path.name)
    if os.path.lexists(hidden):  # a kill left it over
        shutil.rmtree(hidden)
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "no directory: delete it yourself", str(path))
    failpoints.reach("storage.delete")
    os.rename(path, hidden)
    _sync_directory(path.parent)
    failpoints.reach("storage.empty")
    shutil.rmtree(hidden)


def _sync_directory(path: Path) -> None:
    """Makes a rename in this directory survive a power cut."""
    failpoints.reach("storage.sync")
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
