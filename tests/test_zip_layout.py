"""Zips of torch's kind: laid out as asked, read by everybody, and no damage that is not found."""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import struct
import subprocess
import zipfile
import zlib

import pytest
from hypothesis import example, given, settings, strategies as st
from zip_support import contents, make_zip

from mlstor.errors import CorruptionError, UsageError
from mlstor.formats.zip_directory import (
    data_offsets,
    expected_offset,
    header_nbytes,
    kind_of,
    local_offset,
    read_directory,
)
from mlstor.formats.zip_layout import Record, directory, header, lay_out, serialization_id

CASES = st.lists(st.tuples(st.binary(max_size=6000), st.integers(-1, 4095)), min_size=1, max_size=6)


@given(cases=CASES, start=st.sampled_from([0, 17, 4096, 70_000]), stem=st.sampled_from(["archive", "ümläut", "a b"]))
@example(cases=[(b"", -1), (b"", 0), (b"x", 64)], start=0, stem="archive")
@settings(max_examples=60)
def test_every_record_lies_where_it_was_asked_for(cases, start, stem):
    records = [(f"data/{number}", data, residue) for number, (data, residue) in enumerate(cases)]
    raw, layout = make_zip(stem, records, start)
    for placed, (_, data, residue) in zip(layout.placed, records, strict=True):
        assert placed.offset % 64 == 0 if residue < 0 else placed.offset % 4096 == residue
        assert raw[placed.offset : placed.offset + placed.nbytes] == data
    archive = raw[start:]
    assert contents(archive) == {name: data for name, data, _ in records}
    with zipfile.ZipFile(io.BytesIO(archive)) as other:
        assert other.testzip() is None
        assert {info.filename: other.read(info) for info in other.infolist()} == {
            f"{stem}/{name}": data for name, data, _ in records
        }
    found = read_directory(lambda at, nbytes: archive[at : at + nbytes], len(archive), "f")
    assert [expected_offset(entry) + start for entry in found.entries.values()] == [one.offset for one in layout.placed]
    assert found.directory_offset + start == layout.directory_offset


def test_unzip_finds_nothing_wrong(tmp_path):
    if shutil.which("unzip") is None:
        pytest.skip("unzip is not installed")
    raw, _ = make_zip("model", [("data.pkl", b"p" * 300, -1), ("data/0", random.Random(1).randbytes(70_000), 64)])
    (tmp_path / "model.pt").write_bytes(raw)
    done = subprocess.run(["unzip", "-tq", tmp_path / "model.pt"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_more_records_than_sixteen_bits_count():
    records = [("data.pkl", b"p", -1), *((f"data/{number}", b"%d" % number, -1) for number in range(66_000))]
    raw, _ = make_zip("archive", records)
    assert contents(raw) == {name: data for name, data, _ in records}
    with zipfile.ZipFile(io.BytesIO(raw)) as other:
        assert len(other.namelist()) == len(records)
        assert other.read("archive/data/65999") == b"65999"


def test_records_and_offsets_beyond_32_bits(tmp_path):
    """4.5 GB of a hole; the record behind it starts beyond 4 GiB."""
    layout = lay_out("big", [Record("data/0", 4_500_000_000, 64), Record("data/1", 5, 64), Record("version", 2)])
    crcs = [0x1234, zlib.crc32(b"after"), zlib.crc32(b"3\n")]
    path = tmp_path / "big.pt"
    with path.open("wb") as file:
        for placed, crc, data in zip(layout.placed, crcs, (b"", b"after", b"3\n"), strict=True):
            file.seek(placed.header_offset)
            file.write(header("big", placed, crc) + data)
        file.seek(layout.directory_offset)
        file.write(directory("big", layout, crcs))
    assert path.stat().st_size == layout.nbytes
    with path.open("rb") as file:

        def read(at, nbytes):
            file.seek(at)
            return file.read(nbytes)

        found = read_directory(read, layout.nbytes, "big.pt")
        offsets = data_offsets(found, lambda wanted: [read(*one) for one in wanted], "big.pt")
    assert list(offsets.values()) == [placed.offset for placed in layout.placed]
    assert [entry.nbytes for entry in found.entries.values()] == [4_500_000_000, 5, 2]
    with zipfile.ZipFile(path) as other:
        assert other.read("big/data/1") == b"after"
        assert [info.file_size for info in other.infolist()] == [4_500_000_000, 5, 2]
    os.unlink(path)


def test_what_python_writes_is_read_with_its_holes_and_descriptors():
    class Unseekable(io.BytesIO):
        def seekable(self):
            return False

        def seek(self, *_):
            raise io.UnsupportedOperation("seek")

        def tell(self):
            raise io.UnsupportedOperation("tell")

    for file in (io.BytesIO(), Unseekable()):
        with zipfile.ZipFile(file, "w") as other:
            other.writestr("x/data.pkl", b"one")
            other.writestr("x/data/0", b"two" * 100)
        assert contents(file.getvalue()) == {"data.pkl": b"one", "data/0": b"two" * 100}


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_a_compressed_zip_is_refused_in_words(compression):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as other:
        other.writestr("x/data.pkl", b"one" * 100)
    with pytest.raises(UsageError, match="compressed"):
        contents(file.getvalue())


def test_the_same_state_has_the_same_serialization_id():
    one = serialization_id(["data.pkl", "data/0"], [1, 2])
    assert one == serialization_id(["data.pkl", "data/0"], [1, 2])
    assert len(one) == 40
    assert one.isdigit()
    assert one[:20] == serialization_id(["data.pkl", "data/0"], [1, 3])[:20]
    assert (
        len({one, serialization_id(["data.pkl", "data/1"], [1, 2]), serialization_id(["data.pkl", "data/0"], [2, 1])})
        == 3
    )


@pytest.mark.parametrize(
    ("first", "kind"),
    [
        (b"PK\3\4" + bytes(508), "zip"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "legacy"),
        (bytes(257) + b"ustar\x0000" + bytes(247), "tar"),
        (b"PK\5\6" + bytes(18), "unknown"),
        (b"\x80\x02}q\x00.", "unknown"),
        (b"", "unknown"),
    ],
)
def test_kinds_of_files_by_their_first_bytes(first, kind):
    assert kind_of(first) == kind


# -- damage --

#: Fields whose flips nobody needs to notice: every record is read as it was written.
HARMLESS_LOCAL = {"version", "flags", "time and date", "padding", "local lengths of an empty record"}
HARMLESS_DIRECTORY = {"made by", "version", "flags", "time and date", "comment and attributes"}
HARMLESS_END = {"disks", "version of the zip64 end record", "end64 size"}


def small_zip() -> tuple[bytes, object]:
    draw = random.Random(5)
    return make_zip(
        "m",
        [
            ("data.pkl", draw.randbytes(60), -1),
            ("data/0", draw.randbytes(100), 320),
            ("data/1", b"", -1),
            ("version", b"3\n", -1),
        ],
    )


def regions(raw: bytes, layout) -> list[tuple[str, int, int]]:
    """(what it is, start, end) of every byte."""
    found = []

    def add(start: int, *fields: tuple[str, int]) -> int:
        for name, nbytes in fields:
            found.append((name, start, start + nbytes))
            start += nbytes
        return start

    for placed in layout.placed:
        name_nbytes = len(f"m/{placed.name}")
        lengths = "local lengths" if placed.nbytes else "local lengths of an empty record"
        end = add(
            placed.header_offset,
            *(("local signature", 4), ("version", 2), ("flags", 2), ("local method", 2), ("time and date", 4)),
            *(("local crc", 4), ("local sizes", 8), (lengths, 4), ("local name", name_nbytes)),
        )
        add(end, ("padding", placed.offset - end), (f"content of {placed.name}", placed.nbytes))
    at = layout.directory_offset
    for placed in layout.placed:
        at = add(
            at,
            *(("signature", 4), ("made by", 2), ("version", 2), ("flags", 2), ("method", 2), ("time and date", 4)),
            *(("crc", 4), ("sizes", 8), ("lengths", 4), ("comment length", 2), ("disk", 2)),
            *(("comment and attributes", 6), ("offset", 4), ("name", len(f"m/{placed.name}"))),
        )
    at = add(at, ("end64 signature", 4), ("end64 size", 8), ("version of the zip64 end record", 4), ("disks", 8))
    at = add(at, ("end64 numbers", 32), ("locator signature", 4), ("disks", 4), ("locator offset", 8), ("disks", 4))
    assert add(at, ("end", 22)) == len(raw)
    assert sum(end - start for _, start, end in found) == len(raw)
    return found


def test_a_flipped_bit_is_found_or_changes_nothing():
    raw, layout = small_zip()
    before = contents(raw)
    unnoticed = set()
    for what, start, end in regions(raw, layout):
        for at in range(start, end):
            for bit in range(8):
                damaged = bytearray(raw)
                damaged[at] ^= 1 << bit
                try:
                    after = contents(bytes(damaged))
                except (CorruptionError, UsageError):
                    continue
                assert after == before, f"{what}, byte {at}, bit {bit}"
                unnoticed.add(what)
    assert unnoticed <= HARMLESS_LOCAL | HARMLESS_DIRECTORY | HARMLESS_END


@given(data=st.data())
@settings(max_examples=200)
def test_whatever_is_overwritten_is_found_or_changes_nothing(data):
    raw, _ = small_zip()
    before = contents(raw)
    start = data.draw(st.integers(0, len(raw) - 1))
    written = data.draw(st.one_of(st.binary(min_size=1, max_size=200), st.integers(1, 900).map(bytes)))
    damaged = (raw[:start] + written + raw[start + len(written) :])[: len(raw)]
    with contextlib.suppress(CorruptionError, UsageError):
        assert contents(damaged) == before


@given(cut=st.integers(0, 2000))
@settings(max_examples=60)
def test_a_file_cut_short_is_found(cut):
    raw, _ = small_zip()
    with pytest.raises(CorruptionError):
        contents(raw[: cut % len(raw)])


def test_records_of_one_name_are_damage():
    raw, _ = make_zip("m", [("data/0", b"a", -1), ("data/0", b"b", -1)])
    with pytest.raises(CorruptionError, match="more than once"):
        contents(raw)


def test_a_record_may_not_reach_into_the_next():
    raw, layout = small_zip()
    found = read_directory(lambda at, nbytes: raw[at : at + nbytes], len(raw), "f")
    entry = found.entries["data/0"]
    head = bytearray(raw[entry.header_offset :][: header_nbytes(entry, "m")])
    assert local_offset(entry, "m", head, "f") == layout.placed[1].offset
    head[28:30] = struct.pack("<H", 65_535)
    with pytest.raises(CorruptionError, match="into the next record"):
        local_offset(entry, "m", head, "f")
