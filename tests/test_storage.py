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

from raysgd.errors import InputError
from raysgd.storage import Storage


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


def test_a_directory_that_cannot_be_made_is_no_place_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match=r"cannot be written: .*; choose another"),
        Storage.open(tmp_path / "file/run").lock(),
    ):
        pass
