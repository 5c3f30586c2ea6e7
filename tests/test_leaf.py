"""Pattern, digests and histogram of the C core against independent oracles.

Exact edge cases are in tests/c/test_leaf.c, which also runs under the sanitizers.
"""

from __future__ import annotations

import ctypes as ct
import functools
import itertools
import random
import shutil
import subprocess
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from leaf_library import Damage, HistogramStruct, PatternStruct, Xxh64Struct, compile_library, load

TESTS_C = Path(__file__).parent / "c"
BLOCK_BYTES = 4096
STAMP_BYTES = 40
CRC32, CRC32C = 1, 2
ZEROED, OTHER_RUN, OTHER_CHECKPOINT, OTHER_FILE, OTHER_OFFSET, CORRUPT, NO_STAMP = range(1, 8)
U64 = (1 << 64) - 1

# conftest.py's autouse fixture is of function scope; it only sets the environment.
SETTINGS = settings(max_examples=60)


@pytest.fixture(scope="module")
def leaf(tmp_path_factory: pytest.TempPathFactory) -> ct.CDLL:
    return load(compile_library(tmp_path_factory.mktemp("leaf"), isal=False))


@pytest.fixture(scope="module", params=["own", "isa-l"])
def digests(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ct.CDLL:
    """The library with its own CRCs, and the one built on ISA-L."""
    return load(compile_library(tmp_path_factory.mktemp("digests"), isal=request.param == "isa-l"))


def new_pattern(
    leaf: ct.CDLL, run_id: int = 1, checkpoint: int = 2, file_id: int = 3, compressibility: int = 0
) -> PatternStruct:
    pattern = PatternStruct()
    assert leaf.mls_pattern_init(ct.byref(pattern), run_id, checkpoint, file_id, compressibility) == 0
    return pattern


def fill(leaf: ct.CDLL, pattern: PatternStruct, offset: int, nbytes: int, shift: int = 0) -> bytes:
    buffer = ct.create_string_buffer(nbytes + shift)
    leaf.mls_pattern_fill(ct.byref(pattern), ct.addressof(buffer) + shift, offset, nbytes)
    return buffer.raw[shift:]


def check(leaf: ct.CDLL, pattern: PatternStruct, data: bytes, offset: int, limit: int = 16) -> tuple[int, list[Damage]]:
    found, described = (Damage * max(limit, 1))(), ct.c_size_t()
    damaged = leaf.mls_pattern_check(ct.byref(pattern), data, offset, len(data), found, limit, ct.byref(described))
    return damaged, list(found[: described.value])


# -- the C program itself -------------------------------------------------------------------------------


@pytest.mark.parametrize("sanitize", ["", "address,undefined", "thread"])
def test_c_tests_hold(tmp_path: Path, sanitize: str) -> None:
    if shutil.which("make") is None or shutil.which("cc") is None:
        pytest.skip("needs make and cc")
    if sanitize:
        probe = subprocess.run(
            ["cc", f"-fsanitize={sanitize}", "-x", "c", "-", "-o", str(tmp_path / "probe")],
            check=False, input=b"int main(void) { return 0; }", capture_output=True, timeout=60,
        )  # fmt: skip
        if probe.returncode != 0:
            pytest.skip(f"cc cannot link -fsanitize={sanitize}")
    command = ["make", "-C", str(TESTS_C), "leaf", f"BUILD={tmp_path}"]
    if sanitize:
        command.append(f"SANITIZE={sanitize}")
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "leaf: ok" in done.stdout


# -- pattern --------------------------------------------------------------------------------------------


@SETTINGS
@given(
    offset=st.integers(0, 5 * BLOCK_BYTES),
    nbytes=st.integers(0, 3 * BLOCK_BYTES),
    shift=st.integers(0, 65),
    compressibility=st.integers(0, 100),
)
def test_fill_anywhere_equals_the_slice_of_the_whole(
    leaf: ct.CDLL, offset: int, nbytes: int, shift: int, compressibility: int
) -> None:
    pattern = new_pattern(leaf, compressibility=compressibility)
    whole = fill(leaf, pattern, 0, 8 * BLOCK_BYTES)
    part = fill(leaf, pattern, offset, nbytes, shift)
    assert part == whole[offset : offset + nbytes]
    assert check(leaf, pattern, part, offset) == (0, [])


@SETTINGS
@given(
    offset=st.one_of(st.integers(0, 3 * BLOCK_BYTES), st.integers(1 << 40, (1 << 40) + BLOCK_BYTES)),
    nbytes=st.integers(1, 4 * BLOCK_BYTES),
    compressibility=st.sampled_from([0, 37, 100]),
    data=st.data(),
)
def test_a_changed_byte_is_found_at_its_exact_offset(
    leaf: ct.CDLL, offset: int, nbytes: int, compressibility: int, data: st.DataObject
) -> None:
    pattern = new_pattern(leaf, compressibility=compressibility)
    at = data.draw(st.integers(0, nbytes - 1))
    damaged = bytearray(fill(leaf, pattern, offset, nbytes))
    damaged[at] ^= data.draw(st.integers(1, 255))
    count, found = check(leaf, pattern, bytes(damaged), offset)
    assert count == len(found) == 1
    assert (found[0].offset, found[0].nbytes) == (offset + at, 1)
    block_start = (offset + at) // BLOCK_BYTES * BLOCK_BYTES
    stamp_seen = block_start >= offset and offset + nbytes >= block_start + STAMP_BYTES
    if stamp_seen and offset + at < block_start + STAMP_BYTES:
        assert found[0].kind == NO_STAMP
    else:
        assert found[0].kind in (CORRUPT, ZEROED)
        if found[0].kind == ZEROED:  # the part of the block that was looked at came out as zeros
            assert not any(damaged[max(0, block_start - offset) : block_start + BLOCK_BYTES - offset])


@SETTINGS
@given(st.lists(st.tuples(*[st.integers(0, 3)] * 4), min_size=2, max_size=2, unique=True))
def test_another_patterns_block_is_named_by_the_first_field_that_differs(
    leaf: ct.CDLL, pair: list[tuple[int, int, int, int]]
) -> None:
    (run, checkpoint, file, block), other = pair
    there = fill(leaf, new_pattern(leaf, *other[:3]), other[3] * BLOCK_BYTES, BLOCK_BYTES)
    count, found = check(leaf, new_pattern(leaf, run, checkpoint, file), there, block * BLOCK_BYTES)
    differs = [a != b for a, b in zip(pair[0], other, strict=True)].index(True)
    assert count == 1
    assert found[0].kind == (OTHER_RUN, OTHER_CHECKPOINT, OTHER_FILE, OTHER_OFFSET)[differs]
    assert (found[0].offset, found[0].nbytes) == (block * BLOCK_BYTES, BLOCK_BYTES)
    assert (found[0].found_run_id, found[0].found_checkpoint, found[0].found_file_id) == other[:3]
    assert found[0].found_offset == other[3] * BLOCK_BYTES


def test_a_zeroed_block_is_named_and_its_neighbours_are_not(leaf: ct.CDLL) -> None:
    pattern = new_pattern(leaf)
    data = bytearray(fill(leaf, pattern, 0, 5 * BLOCK_BYTES))
    data[2 * BLOCK_BYTES : 3 * BLOCK_BYTES] = bytes(BLOCK_BYTES)
    count, found = check(leaf, pattern, bytes(data), 0)
    assert count == 1
    assert found[0].kind == ZEROED
    assert found[0].offset == 2 * BLOCK_BYTES


def test_more_damage_than_asked_for_is_counted(leaf: ct.CDLL) -> None:
    count, found = check(leaf, new_pattern(leaf), bytes(10 * BLOCK_BYTES), 0, limit=3)
    assert count == 10
    assert [d.offset for d in found] == [0, BLOCK_BYTES, 2 * BLOCK_BYTES]


def test_contents_do_not_compress_and_blocks_are_never_alike(leaf: ct.CDLL) -> None:
    data = fill(leaf, new_pattern(leaf), 0, 1 << 20) + fill(leaf, new_pattern(leaf, file_id=4), 0, 1 << 20)
    assert len(zlib.compress(data, 9)) > 0.985 * len(data)  # the stamps are about 1 % of the bytes
    # without stamps: not even runs of 64 bytes repeat
    lines = [
        data[at : at + 64]
        for block in range(0, len(data), BLOCK_BYTES)
        for at in range(block + 64, block + BLOCK_BYTES, 64)
    ]
    assert len(set(lines)) == len(lines)


@pytest.mark.parametrize("compressibility", [10, 50, 75, 100])
def test_compressibility_is_the_share_of_zeros_ending_a_block(leaf: ct.CDLL, compressibility: int) -> None:
    data = fill(leaf, new_pattern(leaf, compressibility=compressibility), 0, 256 * BLOCK_BYTES)
    live = max(BLOCK_BYTES - BLOCK_BYTES * compressibility // 100, STAMP_BYTES)
    for block in range(0, len(data), BLOCK_BYTES):
        assert not any(data[block + live : block + BLOCK_BYTES])
    ratio = len(zlib.compress(data, 6)) / len(data)
    assert ratio == pytest.approx(live / BLOCK_BYTES, abs=0.03)


def test_the_pattern_of_version_1_does_not_change(leaf: ct.CDLL) -> None:
    """Files written by one build are read by another: the bytes are a format."""
    data = fill(leaf, new_pattern(leaf, 0x0123456789ABCDEF, 42, 7, 25), 1 << 33, 2 * BLOCK_BYTES)
    assert zlib.crc32(data) == 0x7706C52


# -- digests --------------------------------------------------------------------------------------------


@functools.cache
def oracle_bytes() -> bytes:
    return random.Random(5).randbytes(70_000)


@SETTINGS
@given(start=st.integers(0, 64), nbytes=st.integers(0, 60_000))
def test_crcs_agree_with_zlib_and_google_crc32c(digests: ct.CDLL, start: int, nbytes: int) -> None:
    google_crc32c = pytest.importorskip("google_crc32c")
    data = oracle_bytes()[start : start + nbytes]
    assert digests.mls_crc32(0, data, len(data)) == zlib.crc32(data)
    assert digests.mls_crc32c(0, data, len(data)) == google_crc32c.value(data)


@SETTINGS
@given(cuts=st.lists(st.integers(0, 70_000), max_size=6), order=st.randoms(use_true_random=False))
def test_crc_of_pieces_combines_in_any_order(digests: ct.CDLL, cuts: list[int], order: random.Random) -> None:
    data = oracle_bytes()
    edges = [0, *sorted(cuts), len(data)]
    pieces = list(itertools.pairwise(edges))
    order.shuffle(pieces)
    for algorithm, crc in ((CRC32, digests.mls_crc32), (CRC32C, digests.mls_crc32c)):
        combined = 0
        for begin, end in pieces:
            part = crc(0, data[begin:end], end - begin)
            combined ^= digests.mls_crc_shift(algorithm, part, len(data) - end)
        assert combined == crc(0, data, len(data))


@SETTINGS
@given(cuts=st.lists(st.integers(0, 2_000), max_size=8), nbytes=st.integers(0, 2_000), seed=st.integers(0, U64))
def test_xxh64_in_pieces_agrees_with_xxhash(leaf: ct.CDLL, cuts: list[int], nbytes: int, seed: int) -> None:
    xxhash = pytest.importorskip("xxhash")
    data = oracle_bytes()[:nbytes]
    state = Xxh64Struct()
    leaf.mls_xxh64_reset(ct.byref(state), seed)
    edges = [0, *sorted(min(c, nbytes) for c in cuts), nbytes]
    for begin, end in itertools.pairwise(edges):
        leaf.mls_xxh64_update(ct.byref(state), data[begin:end], end - begin)
    assert leaf.mls_xxh64_digest(ct.byref(state)) == xxhash.xxh64_intdigest(data, seed)


# -- histogram ------------------------------------------------------------------------------------------


def bucket(ns: int) -> int:
    """The formula that the Python side uses."""
    if ns < 64:
        return ns
    shift = ns.bit_length() - 1 - 6
    return min((shift << 6) + (ns >> shift), 1855)


DURATIONS = st.one_of(st.integers(0, 1 << 36), st.integers(0, U64), st.integers(0, 63).map(lambda i: 1 << i))


@SETTINGS
@given(DURATIONS)
def test_bucket_holds_its_value(leaf: ct.CDLL, ns: int) -> None:
    index = leaf.mls_histogram_index(ns)
    assert index == bucket(ns)
    assert leaf.mls_histogram_lower(index) <= ns <= leaf.mls_histogram_upper(index)


@SETTINGS
@given(st.lists(st.integers(0, 1 << 40), max_size=40), st.lists(st.integers(0, 1 << 40), max_size=40))
def test_merged_histograms_equal_one_of_all(leaf: ct.CDLL, some: list[int], others: list[int]) -> None:
    def of(values: list[int]) -> HistogramStruct:
        histogram = HistogramStruct()
        leaf.mls_histogram_reset(ct.byref(histogram))
        for ns in values:
            leaf.mls_histogram_add(ct.byref(histogram), ns)
        return histogram

    merged, whole = of(some), of(some + others)
    leaf.mls_histogram_merge(ct.byref(merged), ct.byref(of(others)))
    assert bytes(merged) == bytes(whole)
    assert whole.total == len(some + others)
    assert whole.sum_ns == sum(some + others)
    assert whole.min_ns == min(some + others, default=U64)
    assert whole.max_ns == max(some + others, default=0)
