"""The parts of a workload, for ranks without MPI: who reads what, how totals are dealt, what the figures are."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from mlstor.errors import UsageError
from mlstor.results import percentiles
from mlstor.results.stream import size_class
from mlstor.storage.transfers import COMPLETION_DTYPE, Kind as Ended
from mlstor.stream import buckets, manifest
from mlstor.stream.mix import Kind
from mlstor.stream.reads import Reads, make_ranges
from mlstor.stream.sizes import parse_sizes
from mlstor.stream.slots import Slots
from mlstor.stream.sources import Writes
from mlstor.stream.synthetic import Synthetic
from mlstor.stream.tally import Tally


def objects(count: int, sizes=lambda indices: indices % np.uint64(7) + np.uint64(1)) -> Synthetic:
    return Synthetic("o/{index:08d}", count, sizes)


def reads(count: int, rank: int, size: int, epochs: int | None = 1, **how) -> Reads:
    how = {"seed": 3, "kind": "permutation", "uneven": "exact", "scope": "world", **how}
    ranges = how.pop("ranges", None) or make_ranges(objects(count), None, 0, None, None, 0, rank)
    return Reads(ranges, rank=rank, size=size, epochs=epochs, **how)


def taken(one: Reads, by: int = 7) -> list[tuple[int, int]]:
    found = []
    while len((picked := one.take(by)).index):
        found += zip(picked.epoch.tolist(), picked.index.tolist(), strict=True)
    return found


@settings(max_examples=40)
@given(count=st.integers(1, 200), size=st.integers(1, 9), epochs=st.integers(1, 3), by=st.integers(1, 300))
def test_all_ranks_together_read_everything_once_per_epoch(count, size, epochs, by):
    found = Counter(read for rank in range(size) for read in taken(reads(count, rank, size, epochs), by))
    assert found == Counter({(epoch, index): 1 for epoch in range(epochs) for index in range(count)})


@pytest.mark.parametrize(("uneven", "per_rank"), [("drop", 3), ("pad", 4), ("exact", None)])
def test_objects_that_can_not_be_dealt_evenly(uneven, per_rank):
    shares = [taken(reads(14, rank, 4, uneven=uneven)) for rank in range(4)]
    counts = [len(share) for share in shares]
    assert counts == ([4, 4, 3, 3] if per_rank is None else [per_rank] * 4)
    distinct = {index for share in shares for _, index in share}
    assert len(distinct) == (12 if uneven == "drop" else 14)


def test_each_client_makes_passes_of_its_own_in_an_order_of_its_own():
    orders = [[index for _, index in taken(reads(50, rank, 3, scope="client"))] for rank in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] != orders[2]


@settings(max_examples=40)
@given(count=st.integers(1, 100), size=st.integers(1, 7), total=st.integers(0, 400))
def test_a_total_is_dealt_in_the_order_of_the_world(count, size, total):
    parts = [reads(count, rank, size, None).count_of(total) for rank in range(size)]
    assert sum(parts) == total
    found = Counter()
    for rank, part in enumerate(parts):
        found.update(reads(count, rank, size, None).take(part).index.tolist())
    assert set(found.values()) <= {total // count, total // count + 1}


@settings(max_examples=40)
@given(
    count=st.integers(1, 60),
    size=st.integers(1, 5),
    nbytes=st.integers(1, 2000),
    kind=st.sampled_from(["permutation", "replacement"]),
)
def test_the_reads_for_a_total_of_bytes_are_the_fewest_that_reach_it(count, size, nbytes, kind):
    total = reads(count, 0, size, None, kind=kind).total_of(nbytes)
    sizes = objects(count).pack(np.arange(count, dtype=np.uint64)).sizes
    moved = 0
    for rank in range(size):
        one = reads(count, rank, size, None, kind=kind)
        moved += int(sizes[one.take(one.count_of(total)).index].sum())
    assert moved >= nbytes
    assert moved - 7 < nbytes, "one object less would not have been enough"


def test_bytes_that_never_come_are_refused():
    empty = make_ranges(objects(5, lambda indices: indices * np.uint64(0)), None, 0, None, None, 0, 0)
    for kind in ("permutation", "replacement"):
        with pytest.raises(UsageError, match="never ends"):
            reads(5, 0, 1, None, ranges=empty, kind=kind).total_of(10)


@settings(max_examples=40)
@given(nbytes=st.integers(1, 20), count=st.integers(1, 40))
def test_records_cover_every_byte_of_every_object_once(nbytes, count):
    made = objects(count)
    ranges = make_ranges(made, "records", 0, nbytes, None, 0, 0)
    picked = reads(count, 0, 1, ranges=ranges).take(10_000)
    covered = Counter()
    for index, offset, length in zip(
        picked.index.tolist(), picked.offset.tolist(), picked.nbytes.tolist(), strict=True
    ):
        covered.update((index, byte) for byte in range(offset, offset + length))
    sizes = made.pack(np.arange(count, dtype=np.uint64)).sizes.tolist()
    assert covered == Counter({(index, byte): 1 for index, size in enumerate(sizes) for byte in range(size)})


def test_random_ranges_are_aligned_inside_and_everywhere():
    made = objects(1, lambda indices: np.full(len(indices), 100, np.uint64))
    ranges = make_ranges(made, "random", 0, 10, 5, 1, 0)
    offsets = Counter(int(ranges.pick(np.zeros(1, np.uint64))[2][0]) for _ in range(2000))
    assert set(offsets) == set(range(0, 91, 5))
    assert min(offsets.values()) > 50


def test_a_manifest_counts_what_is_there_whatever_each_rank_has_done():
    assert manifest.written([(4, 4), (4, 4), (4, 4)]) == (12, 12)
    assert manifest.written([(4, 4), (3, 3), (3, 3)]) == (10, 10)
    assert manifest.written([(4, 4), (4, 1), (4, 4)]) == (12, 4), "object 1 of rank 1 has the number 4"
    assert manifest.written([(0, 0), (0, 0)]) == (0, 0)


def test_a_writer_knows_how_many_of_its_objects_are_whole():
    writes = Writes(objects(100), 1, 3)
    assert writes.peek(4).tolist() == [1, 4, 7, 10]
    writes.wrote(np.array([7, 1], np.uint64), keep=True)
    assert writes.whole == 1
    writes.wrote(np.array([4], np.uint64), keep=True)
    assert writes.whole == 3
    assert sorted(writes.take_deletable(5).tolist()) == [1, 4, 7]
    assert writes.deletable == 0


def test_sizes_of_a_manifest_are_the_readers_sizes():
    one = manifest.Manifest(run_id="r", run_key=1, seed=9, sizes=parse_sizes(None, 1, 5000), dirs=3, compressibility=0)
    few, many = one.objects(10), one.objects()
    indices = np.arange(10, dtype=np.uint64)
    assert few.pack(indices).sizes.tolist() == many.pack(indices).sizes.tolist()
    assert few.name(4) == "r/00001/000000000004"


# -- figures --


@given(st.lists(st.integers(0, 2**50), min_size=1, max_size=200))
def test_buckets_of_arrays_are_those_of_single_durations(values):
    assert buckets.of(np.array(values, np.uint64)).tolist() == [percentiles.index(value) for value in values]


@pytest.mark.parametrize("power", range(51))
def test_buckets_are_right_at_the_edges_of_powers_of_two(power):
    values = [max(0, 2**power + more) for more in (-1, 0, 1)]
    assert buckets.of(np.array(values, np.uint64)).tolist() == [percentiles.index(value) for value in values]


def completions(count: int, seed: int):
    draws = np.random.default_rng(seed)
    rows = np.zeros(count, COMPLETION_DTYPE)
    rows["start_ns"] = 10**9 + draws.integers(0, 10**9, count)
    rows["attempt_ns"] = rows["start_ns"]
    rows["first_byte_ns"] = rows["start_ns"] + draws.integers(1, 10**6, count).astype(np.uint64)
    rows["end_ns"] = rows["first_byte_ns"] + draws.integers(0, 10**8, count).astype(np.uint64)
    rows["result"] = draws.integers(0, 10**7, count)
    rows["attempts"] = 1 + (draws.random(count) < 0.1)
    rows["first_kind"][rows["attempts"] > 1] = Ended.RESET
    rows["endpoint"] = draws.integers(0, 3, count)
    bad = draws.random(count)
    rows["kind"] = np.where(bad < 0.05, Ended.HTTP, np.where(bad < 0.08, Ended.CANCELLED, Ended.OK))
    rows["status"] = np.where(rows["kind"] == Ended.HTTP, 503, 200)
    return rows


def test_figures_are_those_that_each_transfer_alone_would_add_up_to():
    count = 20_000
    rows, slots = completions(count, 1), Slots(count)
    slots.kind[:] = np.random.default_rng(2).integers(0, 2, count) * int(Kind.PUT)
    slots.epoch[:] = np.arange(count) // 9000
    slots.intended_ns[:] = rows["start_ns"] - 1000
    rows["tag"] = np.arange(count)
    tally = Tally(slots, 10**9, 0, lambda epoch: ("cold", "warm", "unknown")[epoch], verified=False)
    for at in range(0, count, 777):
        tally.add(rows[at : at + 777], list)
    found = tally.figures(["a", "b", "c"])
    for kind, name in ((Kind.GET, "get"), (Kind.PUT, "put")):
        mine = rows[slots.kind == kind]
        well = mine[mine["kind"] == Ended.OK]
        figures = found[name]
        assert figures.count == len(well)
        assert figures.nbytes == int(well["result"].sum())
        assert (figures.failed, figures.errors) == (n := int((mine["kind"] == Ended.HTTP).sum()), {"HTTP 503": n})
        assert figures.cancelled == int((mine["kind"] == Ended.CANCELLED).sum())
        assert figures.retried_by == {"reset": int((mine["attempts"] > 1).sum())}
        total = (well["end_ns"] - well["start_ns"]).tolist()
        assert figures.total == percentiles.of_values(total)
        assert figures.ttfb == percentiles.of_values((well["first_byte_ns"] - well["attempt_ns"]).tolist())
        assert figures.from_intended == percentiles.of_values([one + 1000 for one in total])
        assert figures.retried.count == int((well["attempts"] > 1).sum())
        by_class = Counter(map(size_class, well["result"].tolist()))
        assert sorted(by_class.values()) == sorted(one.count for one in figures.sizes)
        assert [one.name for one in figures.targets] == ["a", "b", "c"]
        assert sum(one.count for one in figures.targets) == len(well)
        assert sum(one.failed for one in figures.targets) == figures.failed
        epochs = slots.epoch[slots.kind == kind][mine["kind"] == Ended.OK]
        assert (figures.cold.count, figures.warm.count) == (int((epochs == 0).sum()), int((epochs == 1).sum()))
    assert [tally.epochs[epoch].count for epoch in range(3)] == [
        int((rows["kind"][slots.epoch == epoch] == Ended.OK).sum()) for epoch in range(3)
    ]
    ran = rows[rows["kind"] != Ended.CANCELLED]
    assert tally.last_ns == int(ran["end_ns"].max()) - 10**9
    assert tally.first_ns == int(ran["start_ns"].min()) - 10**9


def test_slots_are_never_given_twice():
    slots, draws = Slots(100), np.random.default_rng(0)
    held: list[int] = []
    for _ in range(500):
        held += slots.take(int(draws.integers(0, slots.free + 1))).tolist()
        assert len(set(held)) == len(held) == 100 - slots.free
        draws.shuffle(held)
        back, held = held[: len(held) // 2], held[len(held) // 2 :]
        slots.give_back(np.array(back, np.int64))
