"""What the tests on several machines share with those on one Ray cluster: tables, and how a run stands."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "ray"))
