"""The public names: complete, documented, and nothing loaded before it is used."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import raysgd


def test_all_names_what_the_source_offers() -> None:
    """What type checkers see, where names come from and ``__all__`` are one list."""
    tree = ast.parse(Path(raysgd.__file__).read_text())
    (typed,) = (node for node in tree.body if isinstance(node, ast.If))
    offered = {alias.name for node in ast.walk(typed) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert offered == set(raysgd.__all__) == set(raysgd._HOME_OF)
    assert len(raysgd.__all__) == len(set(raysgd.__all__))


@pytest.mark.parametrize("name", raysgd.__all__)
def test_every_name_is_there_with_a_docstring(name: str) -> None:
    value = getattr(raysgd, name)
    assert value.__name__ == name
    text = inspect.getdoc(value)
    assert text is not None
    assert not text.startswith(f"{name}("), "the docstring that a dataclass makes for itself"
    assert name in dir(raysgd)


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Trianer'"):
        _ = raysgd.Trianer
