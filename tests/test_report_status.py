"""status.json: each state with its exit code, replaced whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raysgd.report import status
from raysgd.report.status import State, Status
from raysgd.storage import Storage


@pytest.mark.parametrize(
    ("state", "code"), [("running", None), ("succeeded", 0), ("stopped", 0), ("failed", 1), ("interrupted", 130)]
)
def test_each_state_has_its_exit_code(state: State, code: int | None) -> None:
    assert Status(state).exit_code == code
    assert Status("running").moved(state, step=3).exit_code == code
    assert Status("failed", exit_code=2).exit_code == 2


def test_times_are_kept_from_the_first_write(tmp_path: Path) -> None:
    storage = Storage.open(tmp_path)
    begun = status.write(storage, Status("running", total_steps=10), now=lambda: 0.0)
    ended = status.write(storage, begun.moved("succeeded", step=10, digest="5f0c"), now=lambda: 60.0)
    assert (ended.started, ended.updated) == ("1970-01-01T00:00:00.000Z", "1970-01-01T00:01:00.000Z")
    assert status.read(storage) == ended
    assert json.loads(storage.read("status.json")) == {
        "state": "succeeded",
        "step": 10,
        "total_steps": 10,
        "attempt": 1,
        "exit_code": 0,
        "message": "",
        "started": "1970-01-01T00:00:00.000Z",
        "updated": "1970-01-01T00:01:00.000Z",
        "digest": "5f0c",
        "details": {},
    }


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"state": "odd"}', b"\xff", b"null"])
def test_what_cannot_be_read_is_none(tmp_path: Path, content: bytes) -> None:
    storage = Storage.open(tmp_path)
    assert status.read(storage) is None
    storage.write_atomic("status.json", content)
    assert status.read(storage) is None


def test_fields_of_a_newer_raysgd_are_passed_over(tmp_path: Path) -> None:
    storage = Storage.open(tmp_path)
    storage.write_atomic("status.json", b'{"state": "running", "step": 3, "mood": "good"}')
    assert status.read(storage) == Status("running", step=3)
