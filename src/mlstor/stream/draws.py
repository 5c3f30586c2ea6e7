"""Randomness of a workload: one independent stream for each decision, and numbers that belong to an object's index."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]

# Weyl step and mixer of splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
_STEP = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_MASK = 2**64 - 1


class Purpose(IntEnum):
    """What is decided. Each has a stream of its own, so that no decision can correlate with another."""

    KIND = 0
    SIZE = 1
    OFFSET = 2
    HEAD = 3
    DELETE = 4
    UPDATE = 5
    PARTS = 6
    PARALLEL = 7
    SHARD = 8
    MEMBER = 9
    NAME = 10


def generator(seed: int, rank: int, purpose: Purpose) -> np.random.Generator:
    """A Philox stream with the key (seed, purpose, rank): streams of other keys are independent of it.

    Parameters
    ----------
    seed
        64 bits, of the run.
    rank
        32 bits, of the process.
    """
    bits = np.random.Philox(key=np.array([seed & _MASK, (purpose << 32) | (rank & 0xFFFFFFFF)], dtype=np.uint64))
    return np.random.Generator(bits)


def of_index(indices: U64, seed: int, purpose: Purpose) -> U64:
    """64 random bits for each index, the same whichever rank asks and in whatever order: splitmix64 at that place."""
    key = np.uint64(_mix_one((seed + (purpose + 1) * _STEP) & _MASK))
    with np.errstate(over="ignore"):
        state: Any = key + (indices.astype(np.uint64, copy=False) + np.uint64(1)) * np.uint64(_STEP)
        for shift, factor in _MIX:
            state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
        mixed: U64 = state ^ (state >> np.uint64(31))
    return mixed


def _mix_one(value: int) -> int:
    for shift, factor in _MIX:
        value = (value ^ (value >> shift)) * factor & _MASK
    return value ^ (value >> 31)


def of_text(text: str) -> int:
    """64 bits that belong to a name, the same on every host and in every process."""
    import hashlib

    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
