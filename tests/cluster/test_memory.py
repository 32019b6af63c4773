"""Ray's memory monitor kills actors of a run in mid-course: they are tried again, and the bytes are the same.

The run lives in a memory cgroup of its own, which Ray takes for the machine, and another process there eats its memory.
Root only, `make test-cluster`.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray_runs import Marked, one_process_digests, raysgd_command, spec_of, status_of, step_of, wait_for, write_table

from raysgd.audit import audit
from raysgd.storage import Storage

#: where Ray looks for the limit of the machine
MEMORY = Path("/sys/fs/cgroup/memory")

if sys.platform != "linux" or os.geteuid() != 0:
    pytest.skip("NOT RUN, killed for memory: needs Linux and root, for cgroups", allow_module_level=True)
if not os.access(MEMORY / "memory.limit_in_bytes", os.W_OK):
    pytest.skip("NOT RUN, killed for memory: needs the memory controller of cgroup v1", allow_module_level=True)

EPOCHS = 100
END = 20 * EPOCHS

SETTINGS: dict[str, Any] = {
    "train.epochs": EPOCHS,
    "optimizer.learning_rate.decay_rate": 0.99,
    "run.log_every": 20,
    "run.checkpoint_every": 200,
    "run.validate_every": 1000,
    "run.failure_config.max_failures": -1,
    "scaling.num_workers": 3,
}

LIMIT = 6 << 30

ENVIRONMENT = {
    "RAYSGD_FAILPOINTS": "worker.compute:sleep=0.005",
    "RAY_memory_usage_threshold": "0.5",
}

#: eats 64 MiB ten times a second
EATER = """
import time
eaten = []
while len(eaten) < 64:
    eaten.append(bytearray(b"x") * (64 << 20))
    time.sleep(0.1)
time.sleep(1000)
"""


@pytest.fixture
def cgroup() -> Iterator[Path]:
    made = MEMORY / f"rs{secrets.token_hex(3)}"
    made.mkdir()
    (made / "memory.limit_in_bytes").write_text(str(LIMIT))
    yield made

    def removed() -> bool:
        try:
            made.rmdir()
        except OSError:  # the kernel takes its time with those that have ended
            return False
        return True

    wait_for("an empty cgroup", removed, 20)


def test_killed_for_memory_in_mid_run(cgroup: Path, tmp_path: Path) -> None:
    place = write_table(tmp_path / "table")
    sets = [w for k, v in SETTINGS.items() for w in ("--set", f"{k}={v}")]
    train = raysgd_command("train", str(place / "run.toml"), "--name", "eaten", *sets)
    inside = f'echo $$ > {cgroup}/cgroup.procs; mount --bind {cgroup} {MEMORY}; exec "$@"'
    driver = Marked(["unshare", "--mount", "sh", "-c", inside, "sh", *train], place, ENVIRONMENT)
    run, eater = place / "runs" / "eaten", None

    def killed() -> bool:
        assert driver.process.poll() is None, driver.text
        return "ran out of memory" in driver.text

    try:
        wait_for("some steps", lambda: step_of(run) >= 300 or driver.process.poll() is not None, 120)
        eats = [sys.executable, "-c", EATER]
        eater = subprocess.Popen(["sh", "-c", f'echo $$ > {cgroup}/cgroup.procs; exec "$@"', "sh", *eats])
        wait_for(f"a kill\n{driver.text}", killed, 120)
        eater.kill()
        assert driver.wait(400) == 0, driver.text
        driver.gone()
    finally:
        if eater is not None:
            eater.kill()
            eater.wait()
        driver.end()
    spec = spec_of(place, train__epochs=EPOCHS, optimizer__learning_rate__decay_rate=0.99)
    status = status_of(run)
    assert (status["state"], status["attempt"]) == ("succeeded", 1)
    assert status["digest"] == one_process_digests(spec, [END])[END]
    found = audit(Storage.open(run))
    assert (found.problems, found.steps, found.rows) == ((), END, True)
