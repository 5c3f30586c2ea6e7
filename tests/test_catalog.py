"""Catalogs: sorted, mapped, complete or refused; and names that follow from their numbers."""

from __future__ import annotations

import os
import pickle
import random
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from mlstor.errors import UsageError
from mlstor.storage.store import Page
from mlstor.storage.transfers import WHOLE
from mlstor.stream import catalog_file
from mlstor.stream.catalog import Catalog, Objects
from mlstor.stream.synthetic import Synthetic

KEYS = ["a", "b c", "ü/ñ.bin", "100%", "x+y", "d//e", "\udcff-not-utf-8", "z" * 300]


def pages_of(entries: list[tuple[str, int]], page: int) -> list[Page]:
    return [
        Page([key for key, _ in entries[at : at + page]], [size for _, size in entries[at : at + page]])
        for at in range(0, len(entries), page)
    ]


def packed_names(objects: Objects, indices: list[int]) -> list[str]:
    packed = objects.pack(np.array(indices, np.uint64))
    names = bytes(memoryview(packed.names).cast("B"))
    return [
        names[start : start + count].decode("utf-8", "surrogateescape")
        for start, count in zip(packed.key_start.tolist(), packed.key_nbytes.tolist(), strict=True)
    ]


@settings(max_examples=40)
@given(
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.integers(0, 2**50)),
    st.integers(1, 9),
    st.sampled_from([1, 200, 1 << 20]),
)
def test_a_catalog_holds_what_was_listed_sorted_whatever_the_pages_and_the_memory(
    tmp_path_factory: pytest.TempPathFactory, listed: dict[str, int], page: int, run_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("catalog") / "c"
    catalog = Catalog.build(pages_of(list(listed.items()), page), path, run_bytes=run_bytes)
    expected = sorted(listed.items(), key=lambda entry: entry[0].encode())
    assert [(catalog.name(i), int(catalog.sizes[i])) for i in range(len(catalog))] == expected
    everything = list(range(len(catalog)))
    assert packed_names(catalog, everything) == [name for name, _ in expected]
    assert catalog.total_bytes == sum(listed.values())
    catalog.verify()


def test_names_come_back_as_they_were(tmp_path: Path) -> None:
    catalog = Catalog.build(pages_of([(key, 1) for key in KEYS], 3), tmp_path / "c")
    order = sorted(KEYS, key=os.fsencode)
    assert [catalog.name(i) for i in range(len(KEYS))] == order
    assert packed_names(catalog, [5, 0, 5]) == [order[5], order[0], order[5]]


def test_the_digest_depends_on_names_and_sizes_and_not_on_the_order_of_the_listing(tmp_path: Path) -> None:
    entries = [(f"shard-{i}", i * 3) for i in range(500)]

    def digest(entries: list[tuple[str, int]], page: int, run_bytes: int = 1 << 20) -> str:
        return Catalog.build(pages_of(entries, page), tmp_path / "c", run_bytes=run_bytes).digest

    shuffled = random.Random(1).sample(entries, len(entries))
    first = digest(entries, 100)
    assert digest(shuffled, 7) == digest(shuffled, 7, run_bytes=900) == first
    assert digest([("shard-1", 4) if name == "shard-1" else (name, size) for name, size in entries], 100) != first
    assert digest([("other", size) if name == "shard-1" else (name, size) for name, size in entries], 100) != first
    assert digest(entries[1:], 100) != first
    # where one name ends and the next begins counts too
    assert digest([("ab", 1), ("c", 1)], 1) != digest([("a", 1), ("bc", 1)], 1)


@pytest.mark.parametrize("run_bytes", [1, 1 << 20])
def test_a_name_that_comes_twice_is_refused(tmp_path: Path, run_bytes: int) -> None:
    pages = [Page(["a", "b"], [1, 2]), Page(["c", "a"], [3, 4])]
    with pytest.raises(UsageError, match="'a' is listed twice"):
        Catalog.build(pages, tmp_path / "c", run_bytes=run_bytes)
    assert os.listdir(tmp_path) == []


def test_a_listing_that_breaks_off_leaves_the_former_catalog(tmp_path: Path) -> None:
    before = Catalog.build([Page(["a"], [1])], tmp_path / "c")

    def broken() -> object:
        yield Page(["b"], [2])
        raise ConnectionResetError("the server is gone")

    with pytest.raises(ConnectionResetError):
        Catalog.build(broken(), tmp_path / "c")  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == ["c"]
    assert Catalog.open(tmp_path / "c").digest == before.digest


def test_sizes_that_are_not_known_make_the_total_unknown(tmp_path: Path) -> None:
    catalog = Catalog.build([Page(["a", "b"], [5, WHOLE])], tmp_path / "c")
    assert catalog.total_bytes is None
    assert catalog.pack(np.array([1], np.uint64)).sizes.tolist() == [WHOLE]


def test_sizes_that_no_store_holds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="add up to"):
        Catalog.build([Page(["a", "b"], [2**63, 2**63])], tmp_path / "c")


def test_an_index_beyond_the_end_is_refused(tmp_path: Path) -> None:
    catalog = Catalog.build([Page(["a", "b"], [1, 2])], tmp_path / "c")
    for objects in (catalog, Synthetic("o{index:01d}", 2, 1)):
        with pytest.raises(IndexError):
            objects.pack(np.array([0, 2], np.uint64))
        with pytest.raises(IndexError):
            objects.name(2)


def cut(data: bytes) -> bytes:
    return data[:-1]


def other_count(data: bytes) -> bytes:
    return data[:16] + (7).to_bytes(8, "little") + data[24:]


def other_version(data: bytes) -> bytes:
    fields = data[:8] + (9).to_bytes(4, "little") + data[12:56]
    return fields + catalog_file._check(fields) + data[64:]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, "has .* bytes where a catalog of 2 objects has"),
        (other_count, "damaged header"),
        (other_version, "version 9"),
        (lambda data: data[:40], "damaged header"),
        (lambda _: b"name one\nname two\n", "not a catalog"),
        (lambda _: b"", "not a catalog"),
    ],
)
def test_what_is_no_whole_catalog_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes], said: str) -> None:
    path = tmp_path / "c"
    Catalog.build([Page(["a", "b"], [1, 2])], path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UsageError, match=said):
        Catalog.open(path)


def test_verify_finds_a_changed_byte(tmp_path: Path) -> None:
    path = tmp_path / "c"
    whole = Catalog.build([Page(["alpha", "beta"], [1, 2])], path)
    whole.verify()
    for place in (catalog_file.HEADER_BYTES, catalog_file.HEADER_BYTES + 24, len(path.read_bytes()) - 1):
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        (tmp_path / "d").write_bytes(data)
        with pytest.raises(UsageError, match="not what was written"):
            Catalog.open(tmp_path / "d").verify()


def test_a_list_file_gives_names_and_perhaps_sizes(tmp_path: Path) -> None:
    listing = tmp_path / "names"
    listing.write_text("b c\t17\n\nü.bin\r\na\x0bb\t0\n", newline="")
    catalog = Catalog.from_list_file(listing, tmp_path / "c")
    assert [catalog.name(i) for i in range(3)] == ["a\x0bb", "b c", "ü.bin"]
    assert catalog.sizes.tolist() == [0, 17, WHOLE]


@pytest.mark.parametrize("text", ["a\t-1\n", "a\tmany\n", f"a\t{2**64}\n", "a\t1\t2\n"])
def test_a_list_file_with_a_size_that_is_none_is_refused_with_its_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "names").write_text("fine\t1\n" + text)
    with pytest.raises(UsageError, match="line 2"):
        Catalog.from_list_file(tmp_path / "names", tmp_path / "c")


def test_an_empty_list_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "names").write_text("\n\n")
    with pytest.raises(UsageError, match="holds no names"):
        Catalog.from_list_file(tmp_path / "names", tmp_path / "c")


def test_a_catalog_pickles_to_its_path_and_refuses_another_one_there(tmp_path: Path) -> None:
    catalog = Catalog.build([Page(["a", "b"], [1, 2])], tmp_path / "c")
    data = pickle.dumps(catalog)
    assert len(data) < 500
    assert pickle.loads(data).name(1) == "b"
    Catalog.build([Page(["a"], [1])], tmp_path / "c")
    with pytest.raises(UsageError, match="replaced"):
        pickle.loads(data)


def test_a_catalog_goes_on_when_its_file_is_removed(tmp_path: Path) -> None:
    catalog = Catalog.build([Page(["a", "b"], [1, 2])], tmp_path / "c")
    (tmp_path / "c").unlink()
    assert packed_names(catalog, [1, 0]) == ["b", "a"]


def test_building_in_runs_keeps_memory_bounded(tmp_path: Path) -> None:
    def listed(count: int) -> Page:
        return Page([f"{count:03d}/{i:030d}" for i in range(1000)], [1] * 1000)

    tracemalloc.start()
    try:
        catalog = Catalog.build((listed(count) for count in range(200)), tmp_path / "c", run_bytes=1_000_000)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(catalog) == 200_000
    assert most < 10_000_000  # all of them at once take 130 bytes each in Python: 26 MB


def heap_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel tells no RssAnon")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_catalog_of_a_hundred_million_objects_takes_no_heap_per_object(tmp_path: Path) -> None:
    n = 100_000_000
    path = tmp_path / "large"
    width = 9
    header = catalog_file.Header(n, n * width, n, bytes(16))
    try:
        with path.open("wb") as file:
            fields = catalog_file._FIELDS.pack(catalog_file.MAGIC, catalog_file.VERSION, 0, n, n * width, n, bytes(16))
            file.write(fields + catalog_file._check(fields))
            file.truncate(header.names_at + n * width)
        # Real columns at the ends and holes (zeros) between them: what opens and what is looked up is the same.
        starts = np.memmap(path, "<u8", "r+", header.starts_at, (n + 1,))
        for part in (slice(0, 1000), slice(n - 1000, n + 1)):
            starts[part] = np.arange(n + 1)[part].astype(np.uint64) * width
        starts.flush()
        names = np.memmap(path, np.uint8, "r+", header.names_at, (n * width,))
        names[-width:] = np.frombuffer(b"last-name", np.uint8)
        names.flush()
        del starts, names

        before = heap_bytes()
        catalog = Catalog.open(path)
        assert len(catalog) == n
        assert catalog.name(n - 1) == "last-name"
        assert packed_names(catalog, [n - 1]) == ["last-name"]
        assert heap_bytes() - before < n // 10
    finally:
        path.unlink()


@pytest.mark.parametrize(
    ("template", "dirs", "expected"),
    [
        ("shard-{index:06d}.bin", 1, ["shard-000000.bin", "shard-000009.bin", "shard-000255.bin"]),
        ("{dir:02x}/{index:04x}", 256, ["00/0000", "09/0009", "ff/00ff"]),
        ("p/{dir:03d}/{index:03d}-{index:02x}", 10, ["p/000/000-00", "p/009/009-09", "p/005/255-ff"]),
        ("ü{index:03d}", 1, ["ü000", "ü009", "ü255"]),
    ],
)
def test_synthetic_names_follow_from_their_numbers(template: str, dirs: int, expected: list[str]) -> None:
    objects = Synthetic(template, 256, 4096, dirs=dirs)
    assert packed_names(objects, [0, 9, 255]) == expected
    assert [objects.name(index) for index in (0, 9, 255)] == expected
    assert objects.total_bytes == 256 * 4096
    assert len(set(packed_names(objects, list(range(256))))) == 256


def test_synthetic_names_take_no_memory_for_trillions_of_objects() -> None:
    objects = Synthetic("{index:016x}", 2**40, 1)
    assert objects.name(2**40 - 1) == "000000ffffffffff"
    assert len(objects) == objects.total_bytes == 2**40


def test_synthetic_sizes_are_a_function_of_the_number() -> None:
    objects = Synthetic("{index:03d}", 100, lambda numbers: numbers * np.uint64(2), sizes_name="twice")
    assert objects.pack(np.array([7, 50], np.uint64)).sizes.tolist() == [14, 100]
    assert objects.total_bytes == 99 * 100
    assert objects.digest != Synthetic("{index:03d}", 100, lambda numbers: numbers, sizes_name="once").digest
    assert objects.digest == Synthetic("{index:03d}", 100, lambda numbers: numbers * 2, sizes_name="twice").digest


@pytest.mark.parametrize("template", ["object", "{dir:04x}/a", "{index:02d}", "{index:12}", "{dir:01x}/{index:04d}"])
def test_a_template_that_gives_two_objects_one_name_is_refused(template: str) -> None:
    with pytest.raises(UsageError):
        Synthetic(template, 101, 1, dirs=17)
