"""Several runs over one table on a cluster that is there: ``python drive.py ADDRESS DIRECTORY CASES``.

CASES is a JSON list of {"name", "settings", "calls", "spares"}; a line of JSON with what each came to is printed.
"calls": whether actor calls are forced on all workers;  "spares": whether servers have one, true by default
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ray
from ray_runs import spec_of

from raysgd.errors import InputError
from raysgd.report.progress import Silent
from raysgd.runtime import crew
from raysgd.runtime.trainer import Trainer


class Lines(Silent):
    """Keeps what is said, and prints it."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)
        print(text, flush=True)


def drive(place: Path, case: dict[str, Any]) -> dict[str, Any]:
    same_node, spare_after_s, lines = crew.same_node, crew.SPARE_AFTER_S, Lines()
    if not case.get("spares", True):
        crew.SPARE_AFTER_S = 1e9
    if case.get("calls"):
        crew.same_node = lambda *_: None
    try:
        spec = spec_of(place, run__name=case["name"], **case["settings"])
        result = Trainer.from_spec(spec, report=lines).fit()
    except InputError as error:
        return {"case": case, "error": str(error)}
    finally:
        crew.same_node, crew.SPARE_AFTER_S = same_node, spare_after_s
    return {"case": case, "digest": result.digest, "step": result.step, "said": lines.said}


if __name__ == "__main__":
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="error")
    for given in json.loads(sys.argv[3]):
        print(json.dumps(drive(Path(sys.argv[2]), given)), flush=True)
    ray.shutdown()
