"""Extents that meet inside blocks, digests computed on the way, late extents, and verification of patterns."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import google_crc32c
import pytest
import xxhash
from engine_support import BLOCK, DIRECTS, leftovers, noise
from hypothesis import given, settings, strategies as st

from mlstor._io import Engine, Pattern
from mlstor.operations import Extent, Late, ReadFile, Step, WriteFile

ORACLES: dict[str, Callable[[bytes], int]] = {
    "crc32": zlib.crc32,
    "crc32c": google_crc32c.value,
    "crc32+crc32c": lambda data: google_crc32c.value(data) << 32 | zlib.crc32(data),
    "xxh64": xxhash.xxh64_intdigest,
}
QUICK = Step.RENAME


@pytest.mark.parametrize("direct", DIRECTS)
@pytest.mark.parametrize("kind", ORACLES)
def test_digests_of_writes_and_reads(engine: Engine, tmp_path: Path, kind: str, direct: str) -> None:
    for nbytes in (0, 1, BLOCK, 5 * BLOCK + 333):
        content = noise(nbytes)
        path = tmp_path / f"{nbytes}"
        (wrote,) = engine.submit([WriteFile(path, [Extent(0, nbytes, content, kind)], QUICK, direct=direct)])
        assert wrote.wait().digests == {0: ORACLES[kind](content)}
        for into in (bytearray(nbytes), None):
            (read,) = engine.submit([ReadFile(path, [Extent(0, nbytes, into, kind)], direct=direct)])
            assert read.wait().digests == {0: ORACLES[kind](content)}


def test_the_digest_of_a_pattern_is_that_of_its_bytes(engine: Engine, tmp_path: Path) -> None:
    pattern, nbytes = Pattern(4, 2, 7, 30), 3 * BLOCK + 1001
    content = bytearray(nbytes)
    pattern.fill(content)
    for kind, oracle in ORACLES.items():
        (wrote,) = engine.submit([WriteFile(tmp_path / kind, [Extent(0, nbytes, pattern, kind)], QUICK)])
        (read,) = engine.submit([ReadFile(tmp_path / kind, [Extent(0, nbytes, pattern, kind)])]) if wrote.wait() else ()
        assert wrote.result().digests == read.wait().digests == {0: oracle(bytes(content))}
        assert read.result().damaged_blocks == 0


@settings(max_examples=30)
@given(data=st.data())
def test_groups_are_digested_in_list_order(by_backend: dict[str, Engine], tmp_path: Path, data: st.DataObject) -> None:
    """Groups, order in the file and order in the list are independent; only xxh64 wants file order."""
    engine = by_backend[data.draw(st.sampled_from(sorted(by_backend)))]
    direct = data.draw(st.sampled_from(DIRECTS))
    kinds = data.draw(st.lists(st.sampled_from(sorted(ORACLES)), min_size=1, max_size=4))
    position, extents = 0, []
    for i in range(data.draw(st.integers(1, 30))):
        nbytes = data.draw(st.one_of(st.integers(0, 50), st.integers(0, 20_000)))
        group = data.draw(st.integers(0, len(kinds) - 1))
        position += data.draw(st.sampled_from([0, 0, 3, 4000]))
        extents.append(Extent(position, nbytes, noise(nbytes, i), kinds[group], 10 * group))
        position += nbytes
    if "xxh64" not in kinds:
        extents = data.draw(st.permutations(extents))
    want = {
        10 * g: ORACLES[kind](b"".join(e.data for e in extents if e.group == 10 * g))
        for g, kind in enumerate(kinds)
        if any(e.group == 10 * g for e in extents)
    }
    (wrote,) = engine.submit([WriteFile(tmp_path / "file", extents, QUICK, None, 4096, direct)])
    assert wrote.wait().digests == want
    back = [e._replace(data=bytearray(e.nbytes)) for e in extents]
    (read,) = engine.submit([ReadFile(tmp_path / "file", back, Step(0), 8192, direct)])
    assert read.wait().digests == want
    assert all(b.data == e.data for b, e in zip(back, extents, strict=True))


@pytest.mark.parametrize("direct", DIRECTS)
def test_thousands_of_extents_that_meet_inside_blocks(engine: Engine, tmp_path: Path, direct: str) -> None:
    """Each alignment block has one owner, whatever meets in it; every tensor may be a group of its own."""
    extents, position = [], 0
    for i in range(5000):
        nbytes = 1 + i * 13 % 211
        extents.append(Extent(position, nbytes, noise(nbytes, i), "crc32", i))
        position += nbytes
    (wrote,) = engine.submit([WriteFile(tmp_path / "file", extents, QUICK, None, 4096, direct)])
    result = wrote.wait()
    assert (tmp_path / "file").read_bytes() == b"".join(e.data for e in extents)
    assert result.digests == {i: zlib.crc32(e.data) for i, e in enumerate(extents)}
    assert result.nbytes == position


Crcs = Callable[[Mapping[int, int]], bytes]


def header_and_body(body: list[bytes], pad: int, trailer: bool) -> tuple[list[Extent], Crcs]:
    """An archive in the manner of zip: a header that holds the CRCs of what follows, and perhaps a trailer."""
    layout = struct.Struct(f"<{len(body)}I")

    def crcs(digests: Mapping[int, int]) -> bytes:
        return layout.pack(*(digests[i] for i in range(len(body))))

    extents = [Extent(pad, layout.size, Late(crcs))]
    position = pad + layout.size
    for i, part in enumerate(body):
        extents.append(Extent(position, len(part), part, "crc32", i))
        position += len(part)
    if trailer:
        extents.append(Extent(position, layout.size, Late(crcs)))
    return extents, crcs


@pytest.mark.parametrize("direct", DIRECTS)
@pytest.mark.parametrize("serial", [False, True])
@pytest.mark.parametrize("nbytes", [1, 100, 4096, 3 * BLOCK, 3 * BLOCK + 77])
def test_late_bytes_hold_the_digests_of_the_others(
    engine: Engine, tmp_path: Path, nbytes: int, serial: bool, direct: str
) -> None:
    """Late bytes share blocks with others and lie in the tail; the parts' bytes are known before."""
    body = [noise(nbytes, 1), noise(50, 2), noise(nbytes // 2, 3)]
    for pad, trailer in ((0, False), (0, True), (4090, True)):
        extents, crcs = header_and_body(body, pad, trailer)
        (request,) = engine.submit([WriteFile(tmp_path / "file", extents, QUICK, None, 4096, direct, serial)])
        digests = request.wait().digests
        assert digests == {i: zlib.crc32(part) for i, part in enumerate(body)}
        late = crcs(digests)
        assert (tmp_path / "file").read_bytes() == bytes(pad) + late + b"".join(body) + late * trailer


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        (b"123", ValueError, "late extent of 4 bytes was given 3"),
        (4, TypeError, "bytes-like"),
        (None, TypeError, "bytes-like"),
    ],
)
def test_a_late_callback_that_answers_wrongly(
    engine: Engine, tmp_path: Path, answer: object, error: type[Exception], text: str
) -> None:
    late = Late(lambda digests: answer)  # type: ignore[arg-type,return-value]
    with pytest.raises(error, match=text):
        engine.write_file(tmp_path / "file", [Extent(0, 4, late), Extent(4, 4, b"body")])
    assert os.listdir(tmp_path) == []


def test_a_late_callback_that_fails(engine: Engine, tmp_path: Path) -> None:
    def fail(digests: Mapping[int, int]) -> bytes:
        raise ZeroDivisionError("in the callback")

    (tmp_path / "file").write_bytes(b"former")
    with pytest.raises(ZeroDivisionError, match="in the callback"):
        engine.write_file(tmp_path / "file", [Extent(0, 4, Late(fail)), Extent(4, BLOCK, noise(BLOCK))])
    assert (tmp_path / "file").read_bytes() == b"former"
    assert not leftovers(tmp_path)


# ---- verification ----

RUN = Pattern(run_id=100, checkpoint=5, file_id=1)
NBYTES = 6 * BLOCK + 1234


def damage(engine: Engine, path: Path, direct: str, pattern: Pattern = RUN) -> list[tuple[str, int]]:
    result = engine.read_file(path, pattern, direct=direct)
    assert result.damaged_blocks >= len(result.damage)
    return sorted((d.kind, d.offset) for d in result.damage)


def write_pattern(engine: Engine, path: Path, pattern: Pattern = RUN) -> None:
    engine.write_file(path, [Extent(0, NBYTES, pattern)], QUICK)


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


@pytest.mark.parametrize("direct", DIRECTS)
def test_flipped_byte_zeroed_block_and_misplaced_block(engine: Engine, tmp_path: Path, direct: str) -> None:
    path = tmp_path / "file"
    write_pattern(engine, path)
    assert damage(engine, path, direct) == []
    content = path.read_bytes()
    flipped = 3 * BLOCK + 4096 + 1000
    overwrite(path, flipped, bytes([content[flipped] ^ 1]))
    overwrite(path, 8192, bytes(4096))
    overwrite(path, 5 * BLOCK, content[4096:8192])
    assert damage(engine, path, direct) == [
        ("corrupt", flipped),
        ("other-offset", 5 * BLOCK),
        ("zeroed", 8192),
    ]
    found = {d.kind: d for d in engine.read_file(path, RUN, direct=direct).damage}
    assert found["corrupt"].nbytes == 1
    assert found["zeroed"].nbytes == 4096
    assert found["other-offset"].found_offset == 4096


def test_two_files_swapped(engine: Engine, tmp_path: Path) -> None:
    other = Pattern(run_id=100, checkpoint=5, file_id=2)
    write_pattern(engine, tmp_path / "1")
    write_pattern(engine, tmp_path / "2", other)
    (tmp_path / "1").rename(tmp_path / "0")
    (tmp_path / "2").rename(tmp_path / "1")
    result = engine.read_file(tmp_path / "1", RUN)
    assert result.damaged_blocks == -(-NBYTES // 4096)
    assert len(result.damage) == 16
    assert {(d.kind, d.file_id) for d in result.damage} == {("other-file", 2)}


def test_a_stale_checkpoint(engine: Engine, tmp_path: Path) -> None:
    write_pattern(engine, tmp_path / "run", Pattern(99, 5, 1))
    write_pattern(engine, tmp_path / "checkpoint", Pattern(100, 4, 1))
    assert {(d.kind, d.run_id) for d in engine.read_file(tmp_path / "run", RUN).damage} == {("other-run", 99)}
    older = engine.read_file(tmp_path / "checkpoint", RUN).damage
    assert {(d.kind, d.checkpoint) for d in older} == {("other-checkpoint", 4)}


def test_a_pattern_in_python() -> None:
    buffer = bytearray(10_000)
    RUN.fill(buffer, 100)
    assert RUN.check(buffer, 100) == []
    buffer[5000] ^= 255
    (found,) = RUN.check(buffer, 100)
    assert (found.kind, found.offset, found.nbytes) == ("corrupt", 5100, 1)
    assert RUN.check(buffer, 100, limit=0) == []
    with pytest.raises(ValueError, match="percentage"):
        Pattern(1, compressibility=101)
    with pytest.raises(BufferError):
        RUN.fill(b"read-only")
