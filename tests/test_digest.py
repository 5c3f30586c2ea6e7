"""CRCs of memory: values, going on, combining, many pieces in one call."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given, strategies as st

from mlstor._io import crc32, crc32_crc32c, crc32c, crc_combine, crc_pieces
from mlstor.storage import crc32c as reference


def test_crc32_is_that_of_zlib_above_and_below_the_size_that_gives_up_the_gil() -> None:
    data = np.random.default_rng(1).bytes(1_000_003)
    for nbytes in (0, 1, 16383, 16384, len(data)):
        assert crc32(data[:nbytes]) == zlib.crc32(data[:nbytes])
    assert crc32(data[7:], crc32(data[:7])) == zlib.crc32(data)


def test_crc32c_is_castagnolis() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value in every catalogue of CRCs
    assert crc32c(b"6789", crc32c(b"12345")) == 0xE3069283


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_the_digest_of_both_holds_both_and_goes_on(first: bytes, second: bytes) -> None:
    both = crc32_crc32c(second, crc32_crc32c(first))
    assert both == crc32c(first + second) << 32 | zlib.crc32(first + second)


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_combined_values_are_those_of_the_whole(first: bytes, second: bytes) -> None:
    whole = first + second
    assert crc_combine("crc32", crc32(first), crc32(second), len(second)) == zlib.crc32(whole)
    assert crc_combine("crc32c", crc32c(first), crc32c(second), len(second)) == crc32c(whole)
    assert crc32c(whole) == reference.combine(crc32c(first), crc32c(second), len(second))
    both = crc_combine("crc32+crc32c", crc32_crc32c(first), crc32_crc32c(second), len(second))
    assert both == crc32_crc32c(whole)


@pytest.mark.parametrize("kind", ["crc32", "crc32c", "crc32+crc32c"])
def test_pieces_have_the_values_of_single_calls(kind: str) -> None:
    one = {"crc32": crc32, "crc32c": crc32c, "crc32+crc32c": crc32_crc32c}[kind]
    data = np.frombuffer(np.random.default_rng(2).bytes(100_000), np.uint8)
    starts = np.array([0, 1, 5, 70_000, 99_999, 3], np.uint64)
    sizes = np.array([0, 1, 64_000, 30_000, 1, 99_997], np.uint64)
    out = np.empty(6, np.uint64 if kind == "crc32+crc32c" else np.uint32)
    crc_pieces(kind, starts + np.uint64(data.ctypes.data), sizes, out)
    assert out.tolist() == [one(data[a : a + n]) for a, n in zip(starts.tolist(), sizes.tolist(), strict=True)]


def test_wrong_kinds_values_and_sizes_are_refused_in_words() -> None:
    numbers, out = np.zeros(2, np.uint64), np.zeros(2, np.uint32)
    with pytest.raises(ValueError, match=r"not 'xxh64'"):
        crc_combine("xxh64", 0, 0, 0)
    with pytest.raises(ValueError, match="lies between 0 and 0xffffffff"):
        crc32(b"", 1 << 32)
    with pytest.raises(ValueError, match="lies between"):
        crc_combine("crc32c", -1, 0, 0)
    with pytest.raises(ValueError, match="8 of out, not with 16 and 16"):
        crc_pieces("crc32", numbers, numbers, np.zeros(2, np.uint64))
    with pytest.raises(ValueError, match="16 of out, not with 16 and 8"):
        crc_pieces("crc32+crc32c", numbers, numbers, out)
    with pytest.raises(ValueError, match="not with 8 and 8"):
        crc_pieces("crc32", numbers, numbers[:1], out)
