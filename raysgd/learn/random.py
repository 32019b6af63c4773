"""Randomness as a pure function of named counters: no generator is ever carried along.

Everything random in raysgd comes from :func:`words`. The stream is numpy's Philox-4x64, whose raw output
numpy promises to keep; its 128-bit key is a BLAKE2b digest of (seed, purpose, indices), so streams of
different purposes, epochs or windows never overlap in practice. ``Generator.permutation`` is not used: numpy
does not promise that it stays the same between versions.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from raysgd.learn.batch import Float32


def words(count: int, seed: int, purpose: str, *indices: int) -> npt.NDArray[np.uint64]:
    """``count`` uniform 64-bit words of the stream named by (seed, purpose, indices).

    >>> bool((words(3, 0, "rows", 1) == words(5, 0, "rows", 1)[:3]).all())
    True
    """
    name = "/".join([str(seed), purpose, *map(str, indices)])
    digest = blake2b(name.encode(), digest_size=16).digest()
    key = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    return np.random.Philox(key=key).random_raw(count)


def permutation(count: int, seed: int, purpose: str, *indices: int) -> npt.NDArray[np.intp]:
    """A uniform permutation of ``range(count)``: the stable argsort of ``count`` words.

    >>> sorted(permutation(5, 0, "shards", 2).tolist())
    [0, 1, 2, 3, 4]
    """
    return stable_argsort(words(count, seed, purpose, *indices))


def stable_argsort(keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.intp]:
    """As ``np.argsort(keys, kind="stable")`` of (n,) random words, in a fifth of the time where there are many.

    Each word's lowest bits make room for its position: numpy sorts numbers far faster than it sorts positions by them.
    What is left of a word suffices, unless some differ below only.
    """
    if len(keys) >= 1024:
        bits = (len(keys) - 1).bit_length()
        low = np.uint64((1 << bits) - 1)
        packed = keys & ~low
        packed |= np.arange(len(keys), dtype=np.uint64)
        packed.sort()
        packed &= low
        order = packed.view(np.intp)  # positions are far below 2^63
        found = keys.take(order)
        if bool((found[1:] >= found[:-1]).all()):
            return order
    return np.argsort(keys, kind="stable")


def uniform(count: int, seed: int, purpose: str, *indices: int) -> Float32:
    """``count`` float32 in [-1, 1), symmetric about zero, exact multiples of 2^-23 plus 2^-24 (no libm)."""
    top = (words(count, seed, purpose, *indices) >> np.uint64(40)).astype(np.float32)  # 24 bits: exact
    return (top - np.float32(2**23) + np.float32(0.5)) * np.float32(2.0**-23)
