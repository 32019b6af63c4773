"""Arguments that go through a shell unquoted, as ``ray submit`` and ``ray job submit`` send them, arrive unchanged."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import example, given, settings
from hypothesis import strategies as st

from raysgd import cli
from raysgd.encoding import decoded, encoded
from raysgd.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
HARD = [
    "a b",
    "$HOME",
    "`id`",
    "*",
    "~",
    "",
    "%",
    "%20",
    "it's",
    '"',
    "\\",
    "a;b|c&d>e",
    "(x)",
    "#no",
    "é\n",
    "!x",
    "{a,b}",
]


def sent(words: list[str]) -> list[str]:
    """Words as a shell makes them of the joined ones, twice: once for Ray, once for the ssh that it uses."""
    script = "import json, sys; print(json.dumps(sys.argv[1:]))"
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(script)} {' '.join(words)}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    found: list[str] = json.loads(done.stdout)
    return found


def test_unquoted_words_do_not_arrive() -> None:
    """What the encoding is for."""
    assert sent(["a b", "$HOME", '"x"']) != ["a b", "$HOME", '"x"']


def test_encoded_words_arrive() -> None:
    assert sent(encoded(HARD)) == encoded(HARD)
    assert decoded(sent(encoded(HARD))) == HARD
    # ray job submit quotes as Windows does: double quotes, in which a shell still expands.
    windows = subprocess.list2cmdline(encoded(HARD))
    assert decoded(shlex.split(windows)) == HARD


@settings(deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
@example(HARD)
def test_decoding_is_the_inverse(words: list[str]) -> None:
    assert decoded(encoded(words)) == words
    assert all(set(word) <= set(SHELL_SAFE) for word in encoded(words))


SHELL_SAFE = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-/=:,@+%"


def test_words_without_the_flag_stay() -> None:
    assert decoded(["train", "a%20b"]) == ["train", "a%20b"]
    with pytest.raises(InputError, match="no percent-encoded UTF-8"):
        decoded(["--percent-encoded", "%ff"])


def test_quote_prints_one_line_that_a_job_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``$(raysgd quote ...)`` through the joining shell into jobs/train.py: a column and a path with spaces."""
    place = tmp_path / "my $data"
    place.mkdir()
    pq.write_table(pa.table({"x": [0.5, 1.0] * 50, "arr delay": [True, False] * 50}), place / "t.parquet")
    text = '[data]\npath = "nowhere"\nlabel = "x"\n[model]\ntype = "logistic_regression"\n[train]\nbatch_size = 8\n'
    (tmp_path / "run.toml").write_text(text)
    storage = ["--storage-path", str(tmp_path / "runs of mine")]
    sets = ["--set", f'data.path="{place}/t.parquet"', "--set", "data.label=arr delay"]
    assert cli.main(["quote", str(tmp_path / "run.toml"), *sets, *storage, "--dry-run", "--json"]) == 0
    line = capsys.readouterr().out.rstrip("\n")
    assert "\n" not in line
    command = f"{shlex.quote(sys.executable)} {ROOT}/jobs/train.py {line}"
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["run"] == str(tmp_path / "runs of mine" / "run")
    assert found["training_rows"] == 100
    assert "label: arr delay" in found["columns"]


def test_quote_takes_options_as_words() -> None:
    runner = CliRunner()
    done = runner.invoke(cli.cli, ["quote", "--num-workers", "3", "-q", "x y"])
    assert done.output == "--percent-encoded --num-workers 3 -q x%20y\n"
