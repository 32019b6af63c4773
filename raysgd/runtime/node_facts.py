"""What one node tells of itself. Sent to it by value, so that it also tells where this package is missing or another.

Nothing but the standard library is imported where the module is loaded.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import time
from hashlib import sha256
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

#: packages whose versions are compared
PACKAGES = ("ray", "numpy", "pyarrow")


def versions() -> dict[str, str]:
    """Of Python and the packages that a run is made of, as this process has them; what is missing is left out."""
    found = {"Python": ".".join(map(str, sys.version_info[:3]))}
    for package in PACKAGES:
        try:
            found[package] = str(import_module(package).__version__)
        except ImportError:
            continue
    spec = find_spec("raysgd")
    if spec is None or spec.origin is None:
        return found
    try:
        number = version("raysgd")
    except PackageNotFoundError:
        number = "not installed, but there"
    return found | {"raysgd": f"{number} ({source_hash(Path(spec.origin).parent)})"}


def source_hash(package: Path) -> str:
    """Eight digits that change with any line of a package."""
    hasher = sha256()
    for file in sorted(package.rglob("*.py"), key=lambda f: f.relative_to(package).as_posix()):
        hasher.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    return hasher.hexdigest()[:8]


def arithmetic() -> str:
    """A hash over products, sums and functions of made-up numbers: equal where processors compute the same bytes."""
    import numpy as np

    hasher = sha256()
    for n in (1, 7, 64):
        a = (np.arange(n * 64, dtype=np.float32).reshape(n, 64) * np.float32(0.618) % np.float32(4)) - np.float32(2)
        for value in (a @ a[0], a.T @ a, a.sum(axis=0), np.exp(a[0]), np.log1p(np.abs(a[0])), np.tanh(a[0])):
            hasher.update(value.tobytes())
    return hasher.hexdigest()[:16]


def blas_threads() -> int | None:
    """The threads that numpy's OpenBLAS uses; None where it is another, or cannot be found."""
    import numpy as np

    a = np.ones((64, 64), np.float32)
    a @ a  # loads it
    try:
        mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "blas" in line}
    except OSError:
        return None
    for path in sorted(mapped):
        for name in ("scipy_openblas_get_num_threads64_", "scipy_openblas_get_num_threads", "openblas_get_num_threads"):
            function = getattr(ctypes.CDLL(path), name, None) if os.path.exists(path) else None
            if function is not None:
                return int(function())
    return None


def cpu() -> str:
    """The processor's name, and the family and model numbers that tell apart what has one name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return os.uname().machine
    told = dict(map(_pair, lines))
    numbers = ", ".join(
        f"{word} {told[key]}" for key, word in (("cpu family", "family"), ("model", "model")) if key in told
    )
    return f"{told.get('model name', os.uname().machine)} ({numbers})" if numbers else os.uname().machine


def _pair(line: str) -> tuple[str, str]:
    key, _, value = line.partition(":")
    return key.strip(), value.strip()


def shared_memory() -> tuple[int, int] | None:
    """Bytes of /dev/shm in all, and free."""
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError:
        return None
    return usage.total, usage.free


def try_storage(path_or_uri: str, mine: str, others: str) -> tuple[str, bool]:
    """Write the file ``mine`` and read the file ``others`` there: what is wrong, and whether it could be read.

    Directories are not made: that of a shared storage is there, because another process made it.
    """
    from pyarrow.fs import FileSystem, LocalFileSystem

    try:
        if "://" in path_or_uri:
            files, base = FileSystem.from_uri(path_or_uri)
        else:
            files, base = LocalFileSystem(), path_or_uri
        if isinstance(files, LocalFileSystem) and not os.path.isdir(base):
            return "there is no such directory", False
        with files.open_output_stream(f"{base}/{mine}") as out:
            out.write(b"raysgd up-check\n")
    except (OSError, ValueError) as error:
        return str(error), False
    try:
        with files.open_input_stream(f"{base}/{others}") as found:
            return "", bool(found.read())
    except (OSError, ValueError):
        return "", False


class Look:
    """An actor on the node that is looked at."""

    def look(self, storage_path: str, mine: str, others: str) -> dict[str, Any]:
        """Everything but the clock, by the names of ``NodeFacts``."""
        from ray._private.authentication.authentication_utils import is_token_auth_enabled

        total, free = shared_memory() or (None, None)
        wrong, sees = try_storage(storage_path, mine, others)
        told = {"versions": versions(), "token": is_token_auth_enabled(), "shm_total": total, "shm_free": free}
        told |= {"blas_threads": blas_threads(), "cpu": cpu(), "arithmetic": arithmetic()}
        return told | {"storage": wrong, "sees_others": sees}

    def clock(self) -> float:
        return time.time()
