"""Pieces of ``mlstor aisloader`` by themselves: names, shards, table, percentages, parts."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile

import numpy as np
import pytest
from hypothesis import given, strategies as st

from mlstor import _io
from mlstor.aisloader import lists, names
from mlstor.aisloader.compose import part_bytes
from mlstor.aisloader.report import go_duration, iec
from mlstor.aisloader.shards import Shards, xxh32
from mlstor.errors import UsageError
from mlstor.stream.sizes import Sizes, SizeSpec

SIZES = Sizes(SizeSpec(kind="uniform", least_nbytes=1000, most_nbytes=2000), 7)


def named(loader: names.Loader, count: int, **options: object) -> list[str]:
    found = names.Names(loader, SIZES, 7, **options)  # type: ignore[arg-type]
    packed = found.pack(np.arange(count, dtype=np.uint64))
    text = bytes(packed.names).decode()
    starts, lengths = packed.key_start.tolist(), packed.key_nbytes.tolist()
    return [text[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def test_a_loader_of_a_fleet_has_its_id_in_the_low_bits() -> None:
    assert named(names.loader("11", 20, 0, True), 18)[:3] == ["b", "10b", "20b"]
    assert named(names.loader("11", 20, 0, True), 18)[-1] == "110b"
    assert named(names.loader("0", 1, 0, True), 17)[-1] == "10"


def test_without_a_fleet_names_are_a_counter_or_drawn() -> None:
    assert named(names.loader("5", 0, 0, False), 17) == [f"{i:x}" for i in range(17)]
    drawn = named(names.loader("0", 0, 0, True), 1000)
    assert len(set(drawn)) == 1000
    assert {len(name) for name in drawn} == {32}


def test_directories_are_dealt_by_a_counter_from_one_on() -> None:
    loader = names.loader("0", 0, 0, False)
    assert named(loader, 4, subdir="a/b", dirs=3) == ["a/b/00001/0", "a/b/00002/1", "a/b/00000/2", "a/b/00001/3"]


@given(loaders=st.integers(1, 300), count=st.integers(1, 40))
def test_loaders_of_a_fleet_never_give_one_name_twice(loaders: int, count: int) -> None:
    ids = {0, loaders // 2, loaders - 1}
    every = [name for i in ids for name in named(names.loader(str(i), loaders, 0, True), count)]
    assert len(set(every)) == len(every)


def test_shards_have_their_extension_and_others_none() -> None:
    made = names.Names(names.loader("0", 0, 0, False), SIZES, 7, shard_percent=30, extension=".tar")
    index = np.arange(4000, dtype=np.uint64)
    shards = made.is_shard(index)
    assert 0.25 < shards.mean() < 0.35
    assert [made.name(i).endswith(".tar") for i in range(200)] == shards[:200].tolist()


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (b"", 0xEF46DB3751D8E999),
        (b"a", 0xD24EC4F1A98C6E5B),
        (b"abc", 0x44BC2CF5AD770999),
        (b"Nobody inspects the spammish repetition", 0xFBCEA83C8A378BF1),
    ],
)
def test_xxh64_has_the_published_values(data: bytes, wanted: int) -> None:
    assert names.xxh64(data) == wanted


def shard(format: str, **fields: object) -> Shards:
    return Shards(format, **{"count": 0, "least_bytes": 100, "most_bytes": 5000, "prefix": "", "seed": 3, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize("nbytes", [1, 3000, 100_000])
def test_a_tar_holds_what_fits_and_is_no_larger(nbytes: int) -> None:
    made = shard(".tar", prefix="a/b/").make(9, nbytes, _io.Pattern(1))
    with tarfile.open(fileobj=io.BytesIO(made)) as archive:
        members = archive.getmembers()
        assert [member.name for member in members] == [f"a/b/obj-{i:06d}.txt" for i in range(len(members))]
        assert [member.size for member in members] == shard(".tar").sizes(9, nbytes)
        files = [archive.extractfile(member) for member in members]
        assert all(file is not None and len(file.read()) == one.size for file, one in zip(files, members, strict=True))
    if nbytes > 10_000:
        assert nbytes - 6000 < len(made) <= nbytes
        assert len(gzip.compress(made, 1)) > len(made) * 0.7  # but for headers it does not shrink


def test_other_formats_hold_the_same_files() -> None:
    sizes = shard(".tar", count=5).sizes(2, 50_000)
    assert len(sizes) == 5
    for format in (".tgz", ".tar.gz"):
        with tarfile.open(
            fileobj=io.BytesIO(shard(format, count=5).make(2, 50_000, _io.Pattern(1))), mode="r:gz"
        ) as archive:
            assert [member.size for member in archive] == sizes
    with zipfile.ZipFile(io.BytesIO(shard(".zip", count=5).make(2, 50_000, _io.Pattern(1)))) as zipped:
        assert [member.file_size for member in zipped.infolist()] == sizes
        assert zipped.testzip() is None


def test_an_lz4_frame_has_the_published_header_checksum() -> None:
    assert xxh32(b"") == 0x02CC5D05  # doc/xxhash_spec.md
    made = shard(".tar.lz4", count=2).make(2, 50_000, _io.Pattern(1))
    assert made[:4] == b"\x04\x22\x4d\x18"
    assert made[-4:] == bytes(4)


def test_a_prefix_too_long_for_a_header_is_refused() -> None:
    with pytest.raises(UsageError, match="prefix is too long"):
        shard(".tar", prefix="x" * 300).make(0, 50_000, _io.Pattern(1))


@given(nbytes=st.integers(1, 1 << 40), parts=st.integers(1, 9999))
def test_parts_are_aligned_and_not_more_than_asked(nbytes: int, parts: int) -> None:
    each = int(part_bytes(np.array([nbytes], np.uint64), parts)[0])
    assert each % 4096 == 0
    assert -(-nbytes // each) <= parts


@pytest.mark.parametrize(
    ("ns", "text"),
    [(0, "0s"), (999, "999ns"), (755_308, "755.308µs"), (104_770_123, "104.770ms"), (62_000_000, "62ms"),
     (1_500_000_000, "1.5s"), (62_500_000_000, "1m2.5s"), (3_600_000_000_000, "1h0m0s")],
)  # fmt: skip
def test_durations_are_shown_as_go_does(ns: int, text: str) -> None:
    assert go_duration(ns) == text


def test_sizes_are_shown_as_aisloader_does() -> None:
    assert [iec(n, 1) for n in (0, 17, 1024, 20_656_947, 3 << 30)] == ["-", "17B", "1.0KiB", "19.7MiB", "3.0GiB"]


def test_names_in_archives_are_parted_behind_the_first_extension() -> None:
    inside, archive = lists.IN_ARCHIVE, lists.IS_ARCHIVE
    page = lists.members(
        [("d/x.tar", 9, archive), ("d/x.tar/a b.zip/c", 3, inside), ("plain.tar.txt", 5, 0), ("y.tar.gz/k", 1, inside)]
    )
    assert page.keys == ["d/x.tar\0archpath=a%20b.zip%2Fc", "plain.tar.txt", "y.tar.gz\0archpath=k"]
    assert page.sizes == [3, 5, 1]
