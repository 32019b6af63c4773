"""Skips what takes a network of its own, where none can be made."""

from __future__ import annotations

import pytest

from bench.namespaces import Network, lacking

__all__ = ["Network", "needs_network"]


def needs_network() -> None:
    """Skip the module, loudly and by name, where no network can be made."""
    if reason := lacking():
        pytest.skip(f"NOT RUN, a network that is cut: {reason}", allow_module_level=True)
