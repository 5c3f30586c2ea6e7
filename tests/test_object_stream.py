"""ObjectStream: every object once per epoch over all ranks, exact resume, bounded memory, and errors with their key."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import pickle
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from object_store import MemoryStore

import mlstor
from mlstor.errors import UsageError
from mlstor.storage.store import Page
from mlstor.storage.transfers import Kind
from mlstor.stream.catalog import Catalog
from mlstor.stream.objects import ObjectStream, StreamedObject
from mlstor.stream.slabs import Slabs
from mlstor.stream.synthetic import Synthetic


def content(number: int, nbytes: int) -> bytes:
    return np.random.default_rng(number).bytes(nbytes)


def store_of(count: int, largest: int = 9000, seed: int | None = None) -> MemoryStore:
    return MemoryStore({f"o/{i:05d}": content(i, i * 37 % largest) for i in range(count)}, seed=seed)


def catalog_of(store: MemoryStore, path: Path) -> Catalog:
    return Catalog.build(store.list(), path)


def keys(stream: ObjectStream, count: int | None = None) -> list[str]:
    return [obj.key for obj in islice(stream, count)]


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("in_flight_bytes", [1, 50_000, 1 << 30])
def test_every_object_comes_once_with_its_bytes(ordered: bool, in_flight_bytes: int) -> None:
    store = store_of(300, seed=3)
    with mlstor.ObjectStream(store, seed=7, ordered=ordered, in_flight_bytes=in_flight_bytes) as stream:
        found = {obj.key: (bytes(obj.data), obj.nbytes, obj.epoch) for obj in stream}
    assert found == {key: (data, len(data), 0) for key, data in store.objects.items()}


def test_epochs_have_orders_of_their_own_and_iterating_again_goes_on() -> None:
    store = store_of(100)
    with ObjectStream(store, seed=1, epochs=2) as stream:
        four = [keys(stream, 100) for _ in range(4)]  # a new iteration after the second
        assert [obj.epoch for obj in stream] == [4] * 100 + [5] * 100
    assert all(sorted(one) == sorted(store.objects) for one in four)
    assert len({tuple(one) for one in four}) == 4


def test_without_an_end_epochs_follow_one_another() -> None:
    with ObjectStream(store_of(3), epochs=None, in_flight_bytes=1 << 16) as stream:
        assert [obj.epoch for obj in islice(stream, 10)] == [0] * 3 + [1] * 3 + [2] * 3 + [3]


@settings(max_examples=60)
@given(
    n=st.integers(1, 40),
    before=st.integers(1, 5),
    after=st.integers(1, 5),
    steps=st.integers(0, 45),
    uneven=st.sampled_from(["exact", "pad"]),
    ordered=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
)
def test_a_state_goes_on_exactly_with_another_number_of_ranks(
    n: int, before: int, after: int, steps: int, uneven: Any, ordered: bool, seed: int
) -> None:
    store = store_of(n, largest=50)
    objects = Synthetic("o/{index:05d}", n, lambda numbers: numbers * np.uint64(37) % np.uint64(50))
    common: dict[str, Any] = {"seed": seed, "catalog": objects, "uneven": uneven, "ordered": ordered}
    first = [ObjectStream(store, rank=rank, world_size=before, **common) for rank in range(before)]
    seen = [key for stream in first for key in keys(stream, steps)]
    states = [pickle.loads(pickle.dumps(stream.state_dict())) for stream in first]
    rest = []
    for rank in range(after):
        stream = ObjectStream(store, rank=rank, world_size=after, **common)
        stream.load_state_dict(states)
        rest += [obj.key for obj in stream if obj.epoch == 0]
    counted = Counter(seen + rest)
    assert set(counted) == set(store.objects)
    if uneven == "exact":
        assert max(counted.values()) == 1


def test_a_state_of_mid_epoch_loads_into_the_same_sequence() -> None:
    store = store_of(97)
    whole = keys(ObjectStream(store, seed=5, epochs=3))
    for taken in (0, 1, 50, 96, 97, 98, 200, 290):
        stream = ObjectStream(store, seed=5, epochs=3)
        begun = keys(stream, taken)
        again = ObjectStream(store, seed=5, epochs=3)
        again.load_state_dict(stream.state_dict())
        assert begun + keys(again) == whole


def test_a_stream_pickles_to_where_it_is(tmp_path: Path) -> None:
    objects = tmp_path / "c"
    store = store_of(20)
    stream = ObjectStream(store, seed=5, catalog=catalog_of(store, objects))
    begun = keys(stream, 7)
    store.opened.clear()  # what is under way stays behind
    again = pickle.loads(pickle.dumps(stream))
    assert begun + keys(again) == keys(ObjectStream(store_of(20), seed=5))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": 6}, "seed"),
        ({"uneven": "pad"}, "uneven"),
        ({"order": "sequential"}, "order"),
        ({"catalog": Synthetic("o/{index:05d}", 19, 1)}, "n 20"),
        ({"catalog": Synthetic("p/{index:05d}", 20, 1)}, "names or sizes have changed"),
    ],
)
def test_a_state_of_something_else_is_refused(changed: dict[str, Any], said: str) -> None:
    store = store_of(20)
    common: dict[str, Any] = {"seed": 5, "catalog": Synthetic("o/{index:05d}", 20, 1)}
    state = ObjectStream(store, **common).state_dict()
    with pytest.raises(UsageError, match=said):
        ObjectStream(store, **{**common, **changed}).load_state_dict(state)


def test_out_of_order_the_state_is_where_nothing_before_is_missing() -> None:
    store = store_of(200, largest=50, seed=11)
    stream = ObjectStream(store, seed=2, ordered=False)
    seen = keys(stream, 90)
    order = keys(ObjectStream(store_of(200, largest=50), seed=2))
    position = stream.state_dict()["position"]
    assert set(order[:position]) <= set(seen)
    assert order[position] not in seen
    assert position < 90, "the store gave them in order, and this test tells nothing"


def test_a_consumer_that_stalls_stops_the_transfers() -> None:
    nbytes, limit = 4096, 40 * 4096
    store = MemoryStore({f"{i:04d}": bytes(nbytes) for i in range(1000)})
    with ObjectStream(store, in_flight_bytes=limit) as stream:
        next(stream)
        submitted = sum(store.opened[0].submitted_bytes)
        assert limit - limit // 8 <= submitted <= limit + nbytes
        keys(stream, 100)
        assert sum(store.opened[0].submitted_bytes) <= limit + 101 * nbytes


def test_an_object_larger_than_the_limit_is_read_alone() -> None:
    store = MemoryStore({f"{i}": bytes([i]) * 3_000_000 for i in range(5)})
    with ObjectStream(store, in_flight_bytes=1000) as stream:
        for count, obj in enumerate(stream, 1):
            assert bytes(obj.data) == store.objects[obj.key]
            assert len(store.opened[0].submitted_bytes) == count


def test_memory_comes_back_with_the_last_reference_and_not_before() -> None:
    store = MemoryStore({f"{i:04d}": bytes([i % 256]) * 2_000_000 for i in range(64)})
    addresses = set()
    with ObjectStream(store, in_flight_bytes=8_000_000) as stream:
        for obj in stream:
            addresses.add(np.frombuffer(obj.data, np.uint8).ctypes.data)
            del obj
    assert len(addresses) <= 8, "buffers were not used again"


@pytest.mark.parametrize("size", [100, 2_000_000])
def test_what_the_consumer_keeps_is_not_overwritten(size: int) -> None:
    store = MemoryStore({f"{i:04d}": content(i, size) for i in range(64)})
    kept = []
    with ObjectStream(store, in_flight_bytes=4 * size) as stream:
        for obj in stream:
            if int(obj.key) % 3 == 0:  # by a slice of a view: neither the object nor its memoryview stays
                kept.append((obj.key, np.frombuffer(obj.data, np.uint8)[10:]))
            del obj
    gc.collect()
    assert len(kept) == 22
    for key, view in kept:
        assert view.tobytes() == store.objects[key][10:]


def test_memory_is_lent_until_every_view_of_it_is_gone() -> None:
    slabs = Slabs()
    memory: Any = slabs.take(10_000, keep_bytes=1 << 20)
    part = memoryview(memory)[10:20]
    array = np.frombuffer(part, np.uint8)[2:5]
    del memory, part
    gc.collect()
    assert slabs.lent == 1
    array[:] = 7
    del array
    gc.collect()
    assert slabs.lent == 0
    again = slabs.take(10_000, keep_bytes=1 << 20)
    assert again[12:15].tolist() == [7, 7, 7]
    del again
    slabs.take(1 << 30, keep_bytes=0)
    assert slabs.free_bytes == 0


@pytest.mark.parametrize("ordered", [True, False])
def test_an_object_that_can_not_be_read_is_an_error_with_its_key_and_is_tried_again(ordered: bool) -> None:
    store = store_of(60)
    order = keys(ObjectStream(store_of(60), seed=4))
    bad = order[25]
    store.faults[bad] = {"kind": Kind.HTTP, "status": 503}
    with ObjectStream(store, seed=4, ordered=ordered) as stream:
        seen: list[str] = []
        with pytest.raises(OSError, match=r"HTTP 503.*told to") as caught:
            seen.extend(obj.key for obj in stream)
        assert (caught.value.errno, caught.value.filename) == (errno.EIO, bad)
        if ordered:
            assert seen == order[:25]
        with pytest.raises(OSError, match="503"):
            next(stream)
        store.faults.clear()
        assert set(seen) | set(keys(stream)) == set(order)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ({"kind": Kind.HTTP, "status": 404}, errno.ENOENT),
        ({"kind": Kind.HTTP, "status": 403}, errno.EACCES),
        ({"kind": Kind.RESET}, errno.ECONNRESET),
        ({"kind": Kind.STALLED}, errno.ETIMEDOUT),
        ({"kind": Kind.SHORT}, errno.ENODATA),
        ({"kind": Kind.CHECKSUM}, errno.EBADMSG),
        ({"kind": Kind.SYSTEM, "result": -errno.EMFILE}, errno.EMFILE),
    ],
)
def test_the_errno_tells_what_went_wrong(fault: dict[str, int], code: int) -> None:
    store = store_of(1)
    store.faults["o/00000"] = fault
    with pytest.raises(OSError) as caught:
        next(ObjectStream(store))
    assert (caught.value.errno, caught.value.filename) == (code, "o/00000")


def test_an_object_that_was_replaced_is_an_error(tmp_path: Path) -> None:
    store = store_of(5)
    catalog = catalog_of(store, tmp_path / "c")
    store.objects["o/00003"] = b"longer than it was"
    with pytest.raises(OSError, match="another length than the catalog says") as caught:
        keys(ObjectStream(store, catalog=catalog))
    assert caught.value.filename == "o/00003"


def test_an_interrupt_ends_what_is_under_way_and_leaves_an_exact_place() -> None:
    store = store_of(50)
    stream = ObjectStream(store, seed=4)
    seen = keys(stream, 10)
    stream = ObjectStream(store, seed=4, in_flight_bytes=20_000)
    assert keys(stream, 10) == seen
    transfers, reap = store.opened[-1], store.opened[-1].reap

    def interrupted(*_: Any) -> int:
        transfers.reap = reap  # type: ignore[method-assign]
        raise KeyboardInterrupt

    transfers.reap = interrupted  # type: ignore[assignment, method-assign]
    with pytest.raises(KeyboardInterrupt):
        seen.extend(obj.key for obj in stream)
    assert transfers.outstanding == 0
    assert seen + keys(stream) == keys(ObjectStream(store_of(50), seed=4))


def test_ranks_without_a_catalog_say_that_each_lists(tmp_path: Path) -> None:
    store = store_of(10)
    with pytest.warns(UserWarning, match="each of 2 ranks lists memory://objects for itself"):
        assert len(keys(ObjectStream(store, rank=1, world_size=2))) == 5
    catalog_of(store, tmp_path / "c")
    store.listings = 0
    assert len(keys(ObjectStream(store, rank=1, world_size=2, catalog=tmp_path / "c"))) == 5
    assert store.listings == 0


def test_sizes_that_a_list_file_does_not_give_are_asked_for(tmp_path: Path) -> None:
    store = store_of(4)
    (tmp_path / "names").write_text("o/00003\no/00002\n")
    catalog = Catalog.from_list_file(tmp_path / "names", tmp_path / "c")
    found = {obj.key: bytes(obj.data) for obj in ObjectStream(store, catalog=catalog)}
    assert found == {key: store.objects[key] for key in ("o/00003", "o/00002")}


def test_more_ranks_than_objects_leaves_some_with_none() -> None:
    catalog = Synthetic("o/{index:05d}", 2, lambda numbers: numbers * np.uint64(37))
    counts = [len(keys(ObjectStream(store_of(2), rank=r, world_size=4, catalog=catalog, epochs=3))) for r in range(4)]
    assert counts == [3, 3, 0, 0]
    assert keys(ObjectStream(store_of(2), rank=3, world_size=4, catalog=catalog, epochs=None)) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 2, "world_size": 2},
        {"rank": -1},
        {"uneven": "perhaps"},
        {"order": "sorted"},
        {"epochs": 0},
        {"in_flight_bytes": 0},
    ],
)
def test_what_can_not_be_meant_is_refused_at_once(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ObjectStream(store_of(2), **wrong)


def test_an_empty_store_is_refused() -> None:
    with pytest.raises(UsageError, match="has no objects"):
        next(ObjectStream(MemoryStore({})))


def test_closing_ends_the_transfers_and_leaves_a_store_that_was_given_open() -> None:
    store = store_of(50)
    stream = ObjectStream(store)
    obj = next(stream)
    stream.close()
    stream.close()
    assert (store.opened[0].closed, store.closed) == (True, False)
    assert bytes(obj.data) == store.objects[obj.key]
    with pytest.raises(ValueError, match="closed"):
        next(stream)


def in_child(stream: ObjectStream, pipe: Any) -> None:
    try:
        pipe.send([obj.key for obj in islice(stream, 3)])
    except Exception as error:
        pipe.send(repr(error))


def sent_by_child(stream: ObjectStream) -> Any:
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=in_child, args=(stream, there))
    child.start()
    try:
        assert here.poll(30)
        return here.recv()
    finally:
        child.join(60)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_may_begin_a_stream_and_not_go_on_with_its_parents() -> None:
    stream = ObjectStream(store_of(10), seed=3)
    first = sent_by_child(stream)
    assert first == keys(ObjectStream(store_of(10), seed=3), 3)
    assert keys(stream, 3) == first
    assert "RuntimeError" in sent_by_child(stream)
    assert keys(stream) == keys(ObjectStream(store_of(10), seed=3))[3:]


def test_objects_are_what_they_are_said_to_be() -> None:
    store = MemoryStore({"empty": b"", "two": b"ab"})
    found: Iterator[StreamedObject] = iter(ObjectStream(store, order="sequential"))
    empty, two = found
    assert (empty.key, empty.nbytes, bytes(empty.data), empty.index) == ("empty", 0, b"", 0)
    assert (two.key, two.nbytes, bytes(two.data), two.index) == ("two", 2, b"ab", 1)
    assert isinstance(two.data, memoryview)
    assert not two.data.readonly


def test_a_page_of_the_catalog_is_never_held_as_objects(tmp_path: Path) -> None:
    """A stream over many objects holds positions and names of a thousand of them at a time."""
    n = 200_000
    catalog = Catalog.build([Page([f"{i:06d}" for i in range(n)], [0] * n)], tmp_path / "c")
    store = MemoryStore({})
    store.objects = {f"{i:06d}": b"" for i in range(n)}
    with ObjectStream(store, catalog=catalog, in_flight_bytes=100 * 4096) as stream:
        next(stream)
        assert stream._prefetch is not None
        assert sum(len(group.indices) for group in stream._prefetch._groups) <= 101


def test_what_mlstor_put_beside_the_objects_is_no_object() -> None:
    store = MemoryStore({".mlstor-stream.json": b"{}", "run/.mlstor-stream.json": b"{}", "run/000": b"x"})
    with ObjectStream(store) as stream:
        assert keys(stream) == ["run/000"]


def test_out_of_order_one_slow_object_does_not_keep_the_memory_of_all_that_pass_it() -> None:
    store = MemoryStore({f"{i:03d}": bytes(1_000_000) for i in range(60)}, seed=1)
    with ObjectStream(store, ordered=False, in_flight_bytes=4_000_000) as stream:
        prefetch = stream._ready()
        store.opened[0]._random = SimpleNamespace(randrange=lambda count: count - 1)  # type: ignore[assignment]
        for _, obj in zip(range(50), stream, strict=False):
            del obj
            assert prefetch._slabs.lent <= 6
