"""Opening a hostile checkpoint, run, config or data file executes nothing and leads nowhere: seen by an audit hook.

hostile_files.py does it, in a process whose hook stops and notes whatever runs, imports, unpickles, connects or opens
files elsewhere.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import hostile_files
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parent.parent

#: what touches no checkpoint, so that the run can still be loaded
BESIDE = ("code lies beside", "all texts of the run")

#: continuing a run makes the model of the config, and compares the config that is in the manifest
NOT_READ = ("the model is a reducing object: continue", "the model is of a type that runs: continue")

#: what each control must be stopped at
STOPPED_AT = {
    "unpickle": "pickle.find_class",
    "exec": "exec",
    "eval": "compile",
    "compile": "compile",
    "import": "import",
    "registered type": "pickle.find_class",
    "system": "os.system",
    "process": "subprocess.Popen",
    "connect": "socket.connect",
    "write": "open",
    "read": "open",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def found(place: Path) -> dict[str, dict[str, Any]]:
    """What each attempt came to: {"outcome": ..., "stopped": [what the hook stopped]}."""
    command = [sys.executable, hostile_files.__file__, str(place)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("case", hostile_files.CASES)
def test_a_hostile_file_executes_nothing(found: dict[str, dict[str, Any]], place: Path, case: str) -> None:
    outcome = found[case]["outcome"]
    assert found[case]["stopped"] == []
    assert list(place.rglob("trace")) == []
    if case.endswith(": commands"):
        codes = json.loads(outcome.removeprefix("codes "))
        assert set(codes) <= {0, 2}
        assert codes[0] == 0, "inspect shows any run"
        assert 2 in codes or case.startswith("code lies beside")
    elif case.startswith(BESIDE) or case in NOT_READ:
        assert outcome in ("predicts 200", "continues at 5 of 12")
    elif case in hostile_files.DATA and "pickle" not in case.partition(" with ")[0]:
        assert outcome == "reads 200, scores 200, predicts 200"
    else:
        assert outcome.startswith("refused: "), outcome


def test_what_is_harmless_passes(found: dict[str, dict[str, Any]]) -> None:
    harmless = [entry["outcome"] for name, entry in found.items() if name.startswith("harmless")]
    whole = ["predicts 200", "continues at 5 of 12", "codes [0, 0, 0, 0]", "reads late"]
    assert harmless == [*whole, "reads 200, scores 200, predicts 200"]


@pytest.mark.parametrize("name", hostile_files.CONTROLS)
def test_the_hook_stops_what_it_is_there_for(found: dict[str, dict[str, Any]], name: str) -> None:
    entry = found[f"control: {name}"]
    assert entry["stopped"][0].split()[0] == STOPPED_AT[name]
    assert "the audit hook stops" in entry["outcome"]


@pytest.mark.parametrize("name", hostile_files.TYPES.values(), ids=bytes.decode)
def test_the_data_files_hold_what_they_should(tmp_path: Path, name: bytes) -> None:
    """The type and the pickle are in the files, for whoever would believe them."""
    for write in (hostile_files.as_parquet, hostile_files.as_ipc):
        write(tmp_path, name, hostile_files.pickled(4)(tmp_path))
    for schema in (
        pq.ParquetFile(tmp_path / "hostile.parquet").schema_arrow,
        pa.ipc.open_file(tmp_path / "hostile.arrow").schema,
    ):
        metadata = schema.field("delay").metadata
        assert metadata[b"ARROW:extension:name"] == name
        assert metadata[b"ARROW:extension:metadata"].startswith(b"\x80\x04")
    assert not (tmp_path / "trace").exists()
