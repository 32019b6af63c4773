"""The hash is the documented one, written down once more in plain Python, and its ids never change."""

from __future__ import annotations

import struct
from hashlib import blake2b

import numpy as np
import pytest

from raysgd.learn import hashing

M = 2**64
G = 0x9E3779B97F4A7C15


def mix(x: int) -> int:
    x ^= x >> 30
    x = x * 0xBF58476D1CE4E5B9 % M
    x ^= x >> 27
    x = x * 0x94D049BB133111EB % M
    return x ^ x >> 31


def seed_of(name: str) -> int:
    return int.from_bytes(blake2b(f"raysgd/1/{name}".encode(), digest_size=8).digest(), "little")


def plain(value: object, name: str) -> int:
    """The documentation's formula, a value at a time."""
    seed = seed_of(name)
    if value is None:
        return mix(seed ^ 0x6C6C756E)
    if isinstance(value, int):
        return mix(seed ^ mix((value + G) % M))
    data = str(value).encode()
    h = mix((seed + G * (len(data) + 1)) % M)
    data += b"\0" * (-len(data) % 8)
    for (word,) in struct.iter_unpack("<Q", data):
        h = (mix(h ^ word) + G) % M
    return h


def arrow_form(values: list[str]) -> tuple[np.ndarray, np.ndarray]:
    data = [v.encode() for v in values]
    return np.frombuffer(b"".join(data), np.uint8), np.cumsum([0, *map(len, data)])


STRINGS = ["", "a", "\0", "\0\0", "UA", "12345678", "123456789", "é" * 4, "x" * 16, "x" * 17, "日本語テキスト"]
INTEGERS = [0, 1, -1, 2**63 - 1, -(2**63), 12345]


@pytest.mark.parametrize("name", ["carrier", "c", "日付"])
def test_the_hash_is_the_documented_one(name: str) -> None:
    seed = hashing.column_seed(name)
    assert int(seed) == seed_of(name)
    assert hashing.hash_strings(*arrow_form(STRINGS), seed).tolist() == [plain(s, name) for s in STRINGS]
    assert hashing.hash_integers(np.array(INTEGERS), seed).tolist() == [plain(v, name) for v in INTEGERS]
    assert int(hashing.hash_missing(seed)) == plain(None, name)
    assert len({plain(v, name) for v in [None, *STRINGS, *INTEGERS]}) == 1 + len(STRINGS) + len(INTEGERS)


def test_vectors_that_never_change() -> None:
    """Written down on 2026-11-23: a model that was trained then must find its weights for ever."""
    seed = hashing.column_seed("carrier")
    hashes = hashing.hash_strings(*arrow_form(["", "UA", "Hawaiian"]), seed)
    assert hashing.ids(hashes, 22).tolist() == [0x22864E, 0x3C25EE, 0x2988BF]
    assert hashing.ids(hashing.hash_integers(np.array([-1]), seed), 26).tolist() == [0x3CD48E0]


def test_offsets_need_not_begin_at_zero() -> None:
    data, offsets = arrow_form(["zero", "one", "two", "three"])
    seed = hashing.column_seed("c")
    assert hashing.hash_strings(data, offsets[1:], seed).tolist() == [plain(s, "c") for s in ("one", "two", "three")]
    assert len(hashing.hash_strings(data, offsets[:1], seed)) == 0


@pytest.mark.parametrize("bits", [1, 8, 22, 30])
def test_ids_spread_evenly(bits: int) -> None:
    """Chi-squared of 2^14 consecutive integers over the ids' top 256 cells."""
    found = hashing.ids(hashing.hash_integers(np.arange(2**14), hashing.column_seed("x")), bits)
    assert found.dtype == np.int32
    assert found.min() >= 0
    assert found.max() < 2**bits
    cells = min(256, 2**bits)
    counts = np.bincount(found >> max(0, bits - 8), minlength=cells)
    expected = 2**14 / cells
    assert ((counts - expected) ** 2 / expected).sum() < cells + 5 * np.sqrt(2 * cells)


def test_uniform_numbers_are_uniform_and_pure() -> None:
    whole = hashing.uniform_at(np.arange(100_000), 3, "p")
    assert abs(float(whole.mean())) < 0.01
    assert abs(float(whole.std()) - 1 / np.sqrt(3)) < 0.01
    assert np.array_equal(hashing.uniform_at(np.array([77_777, 5]), 3, "p"), whole[[77_777, 5]])
    assert not np.array_equal(hashing.uniform_at(np.arange(9), 4, "p"), whole[:9])
