"""A run's directory on several filesystems: atomic writes, and names that never leave it."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest

from raysgd import failpoints
from raysgd.errors import InputError, RunError
from raysgd.storage import DELETING, Storage


@pytest.fixture(params=["local", "uri", "remote"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A local directory, the same by URI, and one that is only known to be a filesystem."""
    if request.param == "local":
        return Storage.open(tmp_path / "run")
    if request.param == "uri":
        return Storage.open((tmp_path / "run").as_uri())
    (tmp_path / "bucket").mkdir()
    return Storage(pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()), "bucket/run")


def test_bytes_come_back(storage: Storage) -> None:
    assert not storage.exists("a.bin")
    storage.write_atomic("a.bin", b"\0one")
    storage.write_atomic("deep/er/b.bin", b"")
    storage.write_atomic("a.bin", b"two")
    assert storage.read("a.bin") == b"two"
    assert storage.read("deep/er/b.bin") == b""
    assert storage.exists("deep/er")
    with pytest.raises(FileNotFoundError):
        storage.read("missing")


def test_text_is_appended(storage: Storage) -> None:
    storage.append("log/lines", "öne\n")
    storage.append("log/lines", "two\n")
    assert storage.read("log/lines").decode() == "öne\ntwo\n"


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    storage = Storage.open(tmp_path)
    storage.append("lines", "one\ntwo\n", sync=True)
    failpoints.arm("storage.append:enospc")
    try:
        with pytest.raises(OSError, match="failpoint"):
            storage.append("lines", "three\nfour\n")
    finally:
        failpoints.arm("")
    storage.append("lines", "five\n")
    assert storage.read("lines") == b"one\ntwo\nfive\n"


def test_a_probe_leaves_nothing(storage: Storage, tmp_path: Path) -> None:
    deep = storage.child("a").child("b")
    before = sorted(tmp_path.rglob("*"))
    deep.refuse_unwritable()
    assert sorted(tmp_path.rglob("*")) == before
    storage.write_atomic("a/kept", b"x")
    before = sorted(tmp_path.rglob("*"))
    deep.refuse_unwritable()
    storage.refuse_unwritable()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("remote", [False, True])
def test_what_cannot_be_written_is_refused(tmp_path: Path, remote: bool) -> None:
    """Root may do everything, but not this: below a file, below /proc, under a name that is too long."""
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file" / "run", Path("/proc/run"), tmp_path / ("n" * 300)):
        storage = Storage.open(place)
        if remote:
            storage = Storage(pafs.SubTreeFileSystem("/", pafs.LocalFileSystem()), str(place)[1:])
        with pytest.raises(InputError, match=r"cannot be written: .*; choose another storage path"):
            storage.refuse_unwritable()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_listings_are_sorted_and_empty_where_nothing_is(storage: Storage) -> None:
    assert (storage.list_dirs(), storage.list_files(), storage.list_files("nowhere")) == ([], [], [])
    for name in ("b.txt", "a.txt", "z/1", "y/2"):
        storage.write_atomic(name, b"x")
    assert storage.list_files() == ["a.txt", "b.txt"]
    assert storage.list_dirs() == ["y", "z"]
    assert storage.list_files("z") == ["1"]


def test_directories_are_renamed_and_deleted(storage: Storage) -> None:
    storage.write_atomic("old/deep/a", b"1")
    storage.rename_dir("old", "new")
    assert storage.read("new/deep/a") == b"1"
    assert storage.list_dirs() == ["new"]
    storage.write_atomic("other/b", b"2")
    with pytest.raises(FileExistsError):
        storage.rename_dir("other", "new")
    storage.delete_dir("new")
    storage.delete_dir("never there")
    storage.delete_file("other/b")
    storage.delete_file("never there")
    assert storage.list_dirs() == ["other"]
    assert storage.list_files("other") == []


def test_a_child_is_a_directory_of_its_own(storage: Storage) -> None:
    child = storage.child("checkpoints").child("step-1")
    child.write_atomic("a", b"1")
    assert storage.read("checkpoints/step-1/a") == b"1"
    assert child.uri == f"{storage.uri}/checkpoints/step-1"


def test_it_pickles(storage: Storage) -> None:
    storage.write_atomic("a", b"1")
    assert pickle.loads(pickle.dumps(storage)).read("a") == b"1"


@pytest.mark.parametrize(
    "name", ["..", "../a", "a/../../b", "/etc/passwd", "a//b", "./a", "a/.", "c:/a", "a\\..\\b", "a\0"]
)
def test_no_name_leaves_the_directory(storage: Storage, name: str) -> None:
    for use in (storage.read, storage.child, storage.exists, storage.list_files, storage.delete_dir):
        with pytest.raises(InputError, match="leaves the directory"):
            use(name)
    with pytest.raises(InputError, match="leaves the directory"):
        storage.write_atomic(name, b"")


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_bytes_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    storage = Storage.open(tmp_path)
    storage.write_atomic("a", b"old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, moment, full)
    with pytest.raises(OSError, match="No space"):
        storage.write_atomic("a", b"new")
    assert storage.read("a") == b"old"
    assert storage.list_files() == ["a"]


def test_what_a_killed_write_left_goes_at_the_next_write_of_that_file(tmp_path: Path) -> None:
    """Not what a living process is writing, and nothing with another name."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    dead, living = f".a.{done.pid}-0123abcd.tmp", f".a.{os.getpid()}-0123abcd.tmp"
    others = [f".b.{done.pid}-0123abcd.tmp", f"a.{done.pid}-0123abcd.tmp", ".a.tmp", f".a.{'9' * 40}-0123ABCD.tmp"]
    for name in (dead, living, *others):
        (tmp_path / name).touch()
    storage = Storage.open(tmp_path)
    storage.write_atomic("a", b"new")
    assert storage.read("a") == b"new"
    assert sorted(os.listdir(tmp_path)) == sorted(["a", living, *others])


def test_a_directory_goes_whole_before_its_files_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage.open(tmp_path)
    storage.write_atomic("old/a", b"1")
    monkeypatch.setattr(failpoints, "reach", lambda name: seen.append((name, storage.list_dirs())))
    seen: list[tuple[str, list[str]]] = []
    storage.delete_dir("old")
    hidden = f"{DELETING}old"
    assert seen == [("storage.delete", ["old"]), ("storage.sync", [hidden]), ("storage.empty", [hidden])]
    assert os.listdir(tmp_path) == []


def test_what_a_killed_deletion_left_goes_at_the_next_one(tmp_path: Path) -> None:
    storage = Storage.open(tmp_path)
    for name in (f"{DELETING}old/a", "old/b", f"{DELETING}gone/c"):
        storage.write_atomic(name, b"")
    for name in ("old", "gone"):
        storage.delete_dir(name)
    assert os.listdir(tmp_path) == []
    storage.write_atomic(f"{DELETING}old/a", b"")
    storage.delete_dir(f"{DELETING}old")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["link", "file"])
def test_only_a_directory_is_deleted_as_one(tmp_path: Path, kind: str) -> None:
    storage = Storage.open(tmp_path / "run")
    storage.write_atomic("far/a", b"1")
    if kind == "link":
        (tmp_path / "run" / "x").symlink_to("far")
    else:
        storage.write_atomic("x", b"")
    with pytest.raises(NotADirectoryError, match="no directory: delete it yourself"):
        storage.delete_dir("x")
    assert sorted(os.listdir(tmp_path / "run")) == ["far", "x"]
    assert storage.read("far/a") == b"1"


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    """A pipe would be waited for, a device read without end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_text("1")
    (tmp_path / "link").symlink_to("file")
    storage = Storage.open(tmp_path)
    for name in ("pipe", "zeros", "directory"):
        with pytest.raises(OSError, match="not a file"):
            storage.read(name)
    assert storage.read("link") == b"1"


def test_directories_that_hold_a_file(storage: Storage) -> None:
    assert storage.list_dirs("top", holding="m") == []
    for name in ("top/a/m", "top/b/n", "top/c/m/m", "top/d/e/m", "top/m", "m"):
        storage.write_atomic(name, b"")
    assert storage.list_dirs("top", holding="m") == ["a"]
    assert storage.list_dirs(holding="m") == ["top"]


def test_a_write_is_in_the_file_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data is synced, then renamed, then the directory is synced: the order that survives a power cut."""
    calls: list[str] = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, o=original, n=name: (calls.append(n), o(*a))[1])
    Storage.open(tmp_path).write_atomic("a", b"new")
    assert calls == ["fsync", "replace", "fsync"]


def test_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Storage.open("runs").uri == str(tmp_path / "runs")
    assert Storage.open("runs").is_local
    assert Storage.open((tmp_path / "runs").as_uri()).uri == str(tmp_path / "runs")
    remote = Storage(pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()), "b", "s3://b?region=x")
    assert not remote.is_local
    assert remote.child("c").uri == "s3://b/c?region=x"
    with pytest.raises(InputError, match="gopher://a names no storage"):
        Storage.open("gopher://a")


LOCKED = """
import sys
from raysgd.errors import InputError
from raysgd.storage import Storage
try:
    with Storage.open(sys.argv[1]).lock():
        print("locked")
except InputError as error:
    print(error)
"""


def test_a_second_process_does_not_get_the_lock(tmp_path: Path) -> None:
    def other() -> str:
        command = [sys.executable, "-c", LOCKED, str(tmp_path / "run")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    storage = Storage.open(tmp_path / "run")
    with storage.lock():
        assert "is in use: another process is training this run" in other()
    assert other() == "locked\n"


@pytest.mark.parametrize("replaced", [True, False])
def test_who_lost_its_directory_writes_nothing_more(tmp_path: Path, replaced: bool) -> None:
    """It was given another name, and somebody else may have made a new one under the old: both would write."""
    place = Storage.open(tmp_path / "run")
    with place.lock() as storage:
        storage.child("deep").write_atomic("file", b"x")
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        if replaced:
            with place.lock() as other:
                other.append("lines", "theirs\n")
        before = sorted(tmp_path.rglob("*"))
        for write in (
            lambda: storage.write_atomic("file", b"y"),
            lambda: storage.append("lines", "mine\n"),
            lambda: storage.child("deep").write_atomic("file", b"y"),
            lambda: storage.rename_dir("deep", "deeper"),
            lambda: storage.delete_dir("deep"),
            lambda: storage.delete_file("lines"),
        ):
            with pytest.raises(RunError, match=rf"{tmp_path}/run was moved or deleted while this process wrote there"):
                write()
        assert sorted(tmp_path.rglob("*")) == before
        assert not replaced or place.read("lines") == b"theirs\n"


def test_a_directory_that_cannot_be_made_is_no_place_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match=r"cannot be written: .*; choose another"),
        Storage.open(tmp_path / "file/run").lock(),
    ):
        pass
