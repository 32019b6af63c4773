"""Which column plays which role, and what of a column's type a role can take.

numeric      numbers, booleans, decimals; fixed-size lists of them (images): one coordinate per element
categorical  strings, integers, booleans, dictionaries of these: one code each
label        a number, or a value that names a class
weight       a number >= 0
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import pyarrow as pa
from pyarrow import types


@dataclass(frozen=True, slots=True)
class Columns:
    """The roles of a table's columns.

    numeric:     (name, width) of each numeric column; width is 1, or the length of a fixed-size list
    categorical: names
    label:       name, None where there is nothing to learn from (prediction)
    weight:      name, None where every row weighs 1

    >>> Columns((("x", 1), ("image", 64)), ("carrier",), "late").n_numeric
    65
    """

    numeric: tuple[tuple[str, int], ...]
    categorical: tuple[str, ...] = ()
    label: str | None = None
    weight: str | None = None

    @property
    def n_numeric(self) -> int:
        """Numeric coordinates of a row."""
        return sum(width for _, width in self.numeric)

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the columns that a model is fed."""
        return (*(name for name, _ in self.numeric), *self.categorical)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all columns that are read: features, label, weight."""
        return (*self.features, *(n for n in (self.label, self.weight) if n is not None))

    def to_json(self) -> dict[str, Any]:
        """The roles as JSON types."""
        return {
            "numeric": [[name, width] for name, width in self.numeric],
            "categorical": list(self.categorical),
            "label": self.label,
            "weight": self.weight,
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Columns:
        """The inverse of :meth:`to_json`."""
        numeric = tuple((str(name), int(width)) for name, width in state["numeric"])
        return cls(numeric, tuple(state["categorical"]), state["label"], state["weight"])


@dataclass(frozen=True, slots=True)
class Roles:
    """What the user asked for; None stands for a choice by type."""

    label: str | None = None
    numeric: tuple[str, ...] | None = None
    categorical: tuple[str, ...] | None = None
    weight: str | None = None

    def named(self) -> list[tuple[str, str]]:
        """(role, column) of every column that is named."""
        single = [(role, name) for role, name in (("label", self.label), ("weight", self.weight)) if name is not None]
        many = [("numeric", n) for n in self.numeric or ()] + [("categorical", n) for n in self.categorical or ()]
        return single + many


def is_number(kind: pa.DataType) -> bool:
    """Integers, floats, booleans, decimals."""
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_decimal(kind))


def numeric_width(kind: pa.DataType) -> int:
    """Coordinates that a column of this type gives: 0 where it is not numeric."""
    if types.is_fixed_size_list(kind):
        return int(kind.list_size) if is_number(kind.value_type) else 0
    return int(is_number(kind))


def value_type(kind: pa.DataType) -> pa.DataType:
    """The type of the values: a dictionary's own."""
    return kind.value_type if types.is_dictionary(kind) else kind


def is_string(kind: pa.DataType) -> bool:
    """Strings of any offset width."""
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def is_category(kind: pa.DataType) -> bool:
    """Types whose values can be categories."""
    values = value_type(kind)
    return bool(is_string(values) or types.is_integer(values) or types.is_boolean(values))


def remedy(kind: pa.DataType) -> str:
    """What to do about a column whose type no role takes."""
    if types.is_temporal(kind):
        return "write what matters of it as numbers (hour, weekday, days since a date)"
    if types.is_list(kind) or types.is_large_list(kind):
        return "write it as a fixed-size list of numbers, or as one column per element"
    if types.is_fixed_size_list(kind):
        return "only fixed-size lists of numbers can be used"
    if types.is_nested(kind):
        return "write its fields as columns"
    if types.is_null(kind):
        return "it holds only nulls: leave it out"
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return "write it as a string or as a fixed-size list of numbers"
    return "write it as a number, a string, or a fixed-size list of numbers"


def resolve(schema: pa.Schema, roles: Roles) -> tuple[Columns, list[str]]:
    """The columns of ``schema`` in their roles, and a sentence for everything that does not fit.

    Default: all columns that are not named, by type. Where one of ``numeric`` and ``categorical`` is given, only
    columns of the other kind are added to it; where both are given, exactly these are used.
    """
    problems = _name_problems(schema, roles)
    if problems:
        return Columns(()), problems
    taken = {name for _, name in roles.named()}
    rest = [field for field in schema if field.name not in taken]
    numeric, categorical = roles.numeric, roles.categorical
    if numeric is None and categorical is None:
        problems += [_unusable(f) for f in rest if not numeric_width(f.type) and not _is_text(f.type)]
    if numeric is None:
        numeric = tuple(f.name for f in rest if numeric_width(f.type))
    if categorical is None:
        categorical = tuple(f.name for f in rest if _is_text(f.type))
    problems += _type_problems(schema, Roles(roles.label, numeric, categorical, roles.weight))
    if not numeric and not categorical:
        problems.append("no column is left to learn from: name them with numeric=[...] and categorical=[...]")
    widths = tuple((name, max(1, numeric_width(schema.field(name).type))) for name in numeric)
    return Columns(widths, categorical, roles.label, roles.weight), problems


def matching(schema: pa.Schema, columns: Columns) -> list[str]:
    """A sentence for each of ``columns``, chosen in training, that ``schema`` lacks or has with another type."""
    names = tuple(name for name, _ in columns.numeric)
    roles = Roles(columns.label, names, columns.categorical, columns.weight)
    if problems := _name_problems(schema, roles):
        return problems
    problems = _type_problems(schema, roles)
    for name, width in columns.numeric:
        found = numeric_width(schema.field(name).type)
        if found and found != width:
            problems.append(f"column {name!r} must have {width} numbers a row as in training, got {found}")
    return problems


def other_kinds(schema: pa.Schema, training: pa.Schema, columns: Columns) -> list[str]:
    """A sentence for each categorical column and label that holds strings in one of the schemas only."""
    names = [n for n in (*columns.categorical, columns.label) if n is not None and n in training.names]
    kinds = [(n, value_type(schema.field(n).type), value_type(training.field(n).type)) for n in names]
    return [
        f"column {name!r} is {found}, {expected} in the training data; write both with one type"
        for name, found, expected in kinds
        if is_string(found) != is_string(expected)
    ]


def _is_text(kind: pa.DataType) -> bool:
    """Types that are categories without being asked for."""
    return is_category(kind) and (types.is_dictionary(kind) or is_string(kind))


def _name_problems(schema: pa.Schema, roles: Roles) -> list[str]:
    problems = []
    for role, name in roles.named():
        if name not in schema.names:
            problems.append(f"{role} column {name!r} does not exist{suggestion(name, schema.names)}")
    named = [name for _, name in roles.named()]
    for name in dict.fromkeys(named):
        if named.count(name) > 1:
            where = ", ".join(role for role, other in roles.named() if other == name)
            problems.append(f"column {name!r} can have one role, got {where}")
    return problems


def _type_problems(schema: pa.Schema, roles: Roles) -> list[str]:
    problems = []
    for role, name in roles.named():
        field = schema.field(name)
        if role == "numeric" and not numeric_width(field.type):
            problems.append(_unusable(field, "numeric"))
        if role == "categorical" and not is_category(field.type):
            problems.append(_unusable(field, "categorical"))
        if role == "label" and not (is_number(field.type) or is_category(field.type)):
            problems.append(_unusable(field, "label"))
        if role == "weight" and not is_number(field.type):
            problems.append(_unusable(field, "weight"))
    return problems


def _unusable(field: pa.Field, role: str = "") -> str:
    if role in ("numeric", "weight") and is_category(field.type):
        remedies = {"numeric": "name it in categorical=[...] or write it as numbers", "weight": "write it as numbers"}
        return f"{role} column {field.name!r} must hold numbers, got {field.type}: {remedies[role]}"
    if role == "categorical" and numeric_width(field.type) == 1:
        return f"categorical column {field.name!r} must hold strings, integers or booleans, got {field.type}: cast it"
    choose = "" if role else "; or choose columns with numeric=[...] and categorical=[...]"
    named = f"{role} column" if role else "column"
    return f"{named} {field.name!r} has type {field.type}, which cannot be used: {remedy(field.type)}{choose}"


def suggestion(name: str, names: Sequence[str]) -> str:
    """``; did you mean 'late'?`` with the nearest name, or the names that exist.

    >>> suggestion("laet", ["late", "hour"])
    "; did you mean 'late'?"
    """
    by_lower = {other.lower(): other for other in names}
    if near := get_close_matches(name.lower(), by_lower, n=1):
        return f"; did you mean {by_lower[near[0]]!r}?"
    shown = ", ".join(map(repr, list(names)[:20]))
    return f"; the columns are {shown}{', …' if len(names) > 20 else ''}"


def left_out(schema: pa.Schema, columns: Columns) -> list[str]:
    """``name (type)`` of every column that has no role."""
    used = set(columns.names)
    return [f"{f.name} ({f.type})" for f in schema if f.name not in used]


def listing(items: Iterable[str], limit: int = 20) -> str:
    """Items joined by commas, at most ``limit`` of them.

    >>> listing("abcd", 2)
    'a, b and 2 more'
    """
    items = list(items)
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
