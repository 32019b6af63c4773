"""The hash of a category: the same id on every machine, in every version. No vocabulary is kept.

    mix(x):  x ^= x >> 30;  x *= 0xbf58476d1ce4e5b9;  x ^= x >> 27;  x *= 0x94d049bb133111eb;  x ^= x >> 31
    seed     the first 8 bytes, little-endian, of BLAKE2b-64("raysgd/1/" + the column's name in UTF-8)
    integer  h = mix(seed ^ mix(v + G)): v modulo 2^64; booleans are 0 and 1
    string   n UTF-8 bytes as little-endian 8-byte words w_0 .. w_{m-1}, m = ceil(n / 8), the last filled up with zeros:
             h = mix(seed + G * (n + 1));  h = mix(h ^ w_i) + G for each i in order
    missing  h = mix(seed ^ 0x6c6c756e)
    id       h modulo 2^hash_bits

All modulo 2^64, G = 0x9e3779b97f4a7c15. Two categories of one id share a weight: of n distinct ones about
n / 2^(hash_bits + 1) collide with another one. Categories of different columns share ids no more than by chance.

Source of mix and G: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014 (splitmix64).
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from raysgd.learn.batch import Int32, Int64

UInt64 = npt.NDArray[np.uint64]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_MISSING = np.uint64(0x6C6C756E)
#: masks[r] keeps the first r of the 8 bytes of a little-endian word
_MASKS = np.array([(1 << 8 * r) - 1 for r in range(9)], np.uint64)

#: Coordinates are int32, and a factorization machine has several of them for each id.
MAX_BITS = 30


def mix(x: UInt64) -> UInt64:
    """The finaliser of splitmix64, a bijection of 64-bit words in which every bit depends on all; in place.

    >>> [hex(int(h)) for h in mix(np.array([0, 1, 2**64 - 1], np.uint64))]
    ['0x0', '0x5692161d100b05e5', '0xb4d055fcf2cbbd7b']
    """
    x ^= x >> np.uint64(30)
    x *= _FIRST
    x ^= x >> np.uint64(27)
    x *= _SECOND
    x ^= x >> np.uint64(31)
    return x


def column_seed(name: str) -> np.uint64:
    """What sets a column's hashes apart from those of every other column.

    >>> hex(column_seed("carrier"))
    '0x8169f2a53a611bc6'
    """
    digest = blake2b(f"raysgd/1/{name}".encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def hash_integers(values: Int64, seed: np.uint64) -> UInt64:
    """(n,) uint64 of (n,) int64.

    >>> hex(hash_integers(np.array([-1]), column_seed("carrier"))[0])
    '0x3b3f620757cd48e0'
    """
    return mix(mix(values.astype(np.int64).view(np.uint64) + GOLDEN) ^ seed)


def hash_missing(seed: np.uint64) -> np.uint64:
    """The hash of a value that is missing: a category of its own.

    >>> hex(hash_missing(column_seed("carrier")))
    '0xb02efd98906e2e0f'
    """
    return np.uint64(mix(np.array([seed ^ _MISSING]))[0])


def hash_strings(data: npt.NDArray[np.uint8], offsets: Int64, seed: np.uint64) -> UInt64:
    """(n,) uint64 of n strings: string i is ``data[offsets[i] : offsets[i + 1]]`` in UTF-8, as Arrow keeps them.

    >>> data = np.frombuffer(b"UAHawaiian", np.uint8)
    >>> [hex(h) for h in hash_strings(data, np.array([0, 0, 2, 10]), column_seed("carrier"))]
    ['0xd7f2735391a2864e', '0x955badf1d53c25ee', '0x6a7a2069c02988bf']
    """
    begins, lengths = offsets[:-1], np.diff(offsets)
    hashes = mix(seed + GOLDEN * (lengths.astype(np.uint64) + np.uint64(1)))
    padded = np.concatenate([data, np.zeros(8, np.uint8)])
    rows = np.arange(len(lengths))
    for i in range(-(-int(lengths.max(initial=0)) // 8)):
        rows = rows[lengths[rows] > 8 * i]  # strings that have a word i
        at = begins[rows] + 8 * i
        words = padded[at[:, None] + np.arange(8)].view("<u8")[:, 0].astype(np.uint64)
        words &= _MASKS[np.minimum(lengths[rows] - 8 * i, 8)]
        hashes[rows] = mix(hashes[rows] ^ words) + GOLDEN
    return hashes


def ids(hashes: UInt64, bits: int) -> Int32:
    """(n,) int32 in [0, 2^bits): the low bits of the hashes."""
    return (hashes & np.uint64((1 << bits) - 1)).astype(np.int32)


def uniform_at(coordinates: Int64, seed: int, purpose: str) -> npt.NDArray[np.float32]:
    """(n,) float32 in [-1, 1), symmetric about zero: each a pure function of (seed, purpose, coordinate).

    Word c is ``mix(key + G * (c + 1))``, splitmix64's stream; its top 24 bits make the number, as those of
    :func:`raysgd.learn.random.uniform` do.

    >>> both = uniform_at(np.array([5, 7]), 0, "hashed")
    >>> bool(both[1] == uniform_at(np.array([7]), 0, "hashed")[0]), bool((abs(both) < 1).all())
    (True, True)
    """
    key = np.frombuffer(blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest(), "<u8").astype(np.uint64)
    words = mix(key + GOLDEN * (coordinates.astype(np.uint64) + np.uint64(1)))
    top = (words >> np.uint64(40)).astype(np.float32)
    return (top - np.float32(2**23) + np.float32(0.5)) * np.float32(2.0**-23)
