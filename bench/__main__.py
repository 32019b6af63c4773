"""``python -m bench [PART ...] [--rounds N] [--quick]``: measure, print tables, say what was skipped."""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from bench.measure import Asked
from bench.processes import ENVIRONMENT

#: what runs unless parts are named
PARTS = ("step", "logistic", "mlp", "hashed", "hashed_step", "start", "scale", "memory", "safety", "staleness")
#: what runs only when it is named
LONG = ("soak", "recovery", "elastic", "cost", "cost_scale", "network")


def part(name: str) -> Callable[[Asked], str]:
    run: Callable[[Asked], str] = import_module(f"bench.{name}").run
    return run


def versions() -> str:
    found = []
    for name in ("numpy", "pyarrow", "ray", "torch", "scikit-learn", "mpi4py", "vowpalwabbit"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def shown(name: str, asked: Asked) -> bool:
    """Print a part's tables; whether it could be measured. One that fails does not keep the others from running."""
    began = time.monotonic()
    try:
        text = part(name)(asked)
    except Exception:  # noqa: BLE001 - whatever it is, it is shown, and the bench ends with 1
        traceback.print_exc()
        text = "failed: see above"
    print(f"## {name}\n\n{text}\n\n({time.monotonic() - began:.0f} s)\n", flush=True)
    return text != "failed: see above"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    known = (*PARTS, *LONG)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(known)}; default: all but {', '.join(LONG)}"
    )
    parser.add_argument("--rounds", type=int, help="runs of each contestant, in alternation (default: 3; quick: 1)")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it work? No figure counts")
    parser.add_argument("--seconds", type=float, default=600.0, help="how long the soak lasts (default: 600)")
    options = parser.parse_args()
    if unknown := [name for name in options.parts if name not in known]:
        parser.error(f"PART must be of {', '.join(known)}, got {', '.join(unknown)}")
    asked = Asked(options.rounds or (1 if options.quick else 3), options.quick, options.seconds)
    load = os.getloadavg()[0]
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f}, Python {platform.python_version()}")
    print(f"{versions()}\nmedian (minimum to maximum) over {asked.rounds} rounds; ratios are formed round by round\n")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # children and directories then go with the bench
    # Ray leaves its session directories behind: here they go with the bench.
    with tempfile.TemporaryDirectory(prefix="rb", ignore_cleanup_errors=True) as directory:
        ENVIRONMENT["RAY_TMPDIR"] = directory
        measured = [shown(name, asked) for name in options.parts or PARTS]
    return 0 if all(measured) else 1


if __name__ == "__main__":
    sys.exit(main())
