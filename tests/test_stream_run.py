"""Streams as users run them, on a store in memory: what was done, in which order, what the record says of it."""

from __future__ import annotations

import errno
import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stream_support
from stream_support import BUCKETS, DELAYS, DONE, FAULTS, StreamBench, TracedPattern

from mlstor import _io
from mlstor.storage import store as stores
from mlstor.storage.transfers import COMPLETION_DTYPE, Kind, Op
from mlstor.stream.run import Runner
from mlstor.stream.slots import Slots
from mlstor.stream.tally import FOLD, Tally

URL = "mem://bucket"
MIB = 1 << 20


@pytest.fixture
def stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StreamBench]:
    monkeypatch.setitem(stores._SCHEMES, "mem", stream_support.__name__)
    monkeypatch.setattr(_io, "Pattern", TracedPattern)
    yield StreamBench(tmp_path, URL)
    for kept in (BUCKETS, FAULTS, DELAYS, DONE):
        kept.clear()


def did(op: Op) -> list[str]:
    return [key for done, key in DONE if done is op]


def test_each_epoch_reads_every_object_once_in_another_order(stream):
    stream.put(1000, lambda index: index + 1)
    record = stream("--epochs", 3).stream
    reads = did(Op.READ)
    epochs = [reads[at : at + 1000] for at in (0, 1000, 2000)]
    assert all(sorted(epoch) == sorted(stream.objects) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != sorted(epochs[2])
    phase = record.phases[0]
    assert (record.status, phase.name, phase.complete) == ("complete", "stream", True)
    figures = phase.ops["get"]
    assert (figures.count, figures.nbytes, figures.failed) == (3000, 3 * 500_500, 0)
    assert figures.total.count == figures.ttfb.count == 3000
    assert [(one.epoch, one.count, one.nbytes) for one in phase.epochs] == [(i, 1000, 500_500) for i in range(3)]
    assert [one.temperature for one in phase.epochs] == ["cold", "warm", "warm"]
    assert (figures.cold.count, figures.warm.count) == (1000, 2000)
    assert sum(one.count for one in figures.sizes) == 3000
    assert record.workload.catalog_count == 1000
    assert phase.cached.verdict == "no"


def test_the_same_seed_gives_the_same_order(stream):
    stream.put(300)
    orders = []
    for seed in (1, 1, 2):
        DONE.clear()
        stream("--seed", seed)
        orders.append(did(Op.READ))
    assert orders[0] == orders[1] != orders[2]


def test_what_was_written_is_read_back_and_verified(stream):
    written = stream("--put", "100%", "--size", "10KiB", "--ops", 50, "--run-id", "one", "--prefix-dirs", 7)
    assert len(stream.objects) == 50
    assert {len(key.split("/")) for key in stream.objects} == {3}
    assert len({key.split("/")[1] for key in stream.objects}) == 7
    figures = written.stream.phases[0].ops["put"]
    assert (figures.count, figures.nbytes) == (50, 50 * 10240)
    assert len(set(stream.objects.values())) == 50
    assert "mlstor stream --clean one mem://bucket" in written.out
    read = stream("--verify").stream
    found = read.phases[0].verification
    assert (found.verified_nbytes, found.damaged_blocks) == (50 * 10240, 0)
    assert read.workload.catalog_source == "synthetic"
    assert sorted(did(Op.READ)) == sorted(stream.objects)
    listed = stream("--epochs", 1).stream
    assert (listed.workload.catalog_source, listed.workload.catalog_count) == ("listing", 50)


def test_damage_is_found_named_and_ends_with_exit_code_3(stream):
    stream("--put", "100%", "--size", "64KiB", "--ops", 20, "--run-id", "one")
    victim, other = sorted(stream.objects)[4:6]
    data = bytearray(BUCKETS[URL][victim])
    data[8192:12288] = BUCKETS[URL][other][:4096]
    data[20000] ^= 1
    BUCKETS[URL][victim] = bytes(data)
    ran = stream.run("--verify")
    assert ran.code == 3
    assert victim in ran.sentence
    found = ran.stream.phases[0].verification
    assert found.damaged_blocks == 2
    assert [(one.file, one.kind) for one in found.damage] == [(victim, "other-file"), (victim, "corrupt")]
    assert found.damage[0].found_file == other
    assert found.damage[1].offset == 20000


def test_a_fill_is_written_first_and_read_then(stream):
    stream.put(5)
    record = stream("--fill", 100, "--size", "1KiB", "--verify", "--epochs", 2, "--cleanup").stream
    assert [phase.name for phase in record.phases] == ["fill", "stream"]
    assert record.phases[0].ops["put"].count == 100
    assert record.phases[1].ops["get"].count == 200
    assert record.phases[1].verification.verified_nbytes == 200 * 1024
    assert [one.temperature for one in record.phases[1].epochs] == ["warm", "warm"]
    assert sorted(BUCKETS[URL]) == [f"in/{i:05d}" for i in range(5)]


@pytest.mark.parametrize("ops", [1, 7, 255, 256, 257, 1000])
def test_operations_stop_exactly(stream, ops):
    stream.put(100)
    assert stream("--ops", ops).stream.phases[0].ops["get"].count == ops
    DONE.clear()
    stream("--put", 100, "--size", 10, "--ops", ops)
    assert len(did(Op.WRITE)) == ops


def test_bytes_end_with_the_object_that_reaches_them(stream):
    stream.put(100, lambda index: 1 + 37 * index)
    record = stream("--bytes", "300kB").stream
    sizes = [len(stream.objects[key]) for key in did(Op.READ)]
    assert sum(sizes) >= 300_000 > sum(sizes[:-1])
    assert record.phases[0].nbytes == sum(sizes)
    DONE.clear()
    stream("--put", 100, "--min-size", 1, "--max-size", "1KiB", "--bytes", "300kB", "--run-id", "w")
    written = [len(stream.objects[key]) for key in did(Op.WRITE)]
    assert sum(written) >= 300_000 > sum(written[:-1])


def test_bytes_of_a_mix_are_reads_and_writes_together(stream):
    stream.put(50, 100)
    record = stream("--put", 50, "--size", 300, "--bytes", "100kB").stream
    assert 100_000 <= record.phases[0].nbytes < 100_300


def test_a_duration_stops_begun_and_unbegun_alike(stream):
    stream.put(50)
    DELAYS[URL] = 0.01
    record = stream("--duration", "1s").stream
    phase = record.phases[0]
    assert phase.complete
    assert 0.8e9 < max(phase.ranks.end_ns) < 20e9
    assert phase.ops["get"].count + phase.ops["get"].cancelled >= phase.ops["get"].count > 10
    assert phase.ops["get"].cancelled > 0


def test_a_mix_has_its_shares_and_its_names_follow_one_another_mixed(stream):
    stream.put(100)
    options = ("--get", 40, "--put", 30, "--head", 20, "--delete", 10, "--size", 50, "--ops", 5000, "--run-id", "m")
    ops = stream(*options).stream.phases[0].ops
    counts = {name: figures.count for name, figures in ops.items()}
    for name, share in (("get", 2000), ("put", 1500), ("head", 1000), ("delete", 500)):
        assert abs(counts[name] - share) < 150, counts
    assert sum(counts.values()) == 5000
    assert all(figures.failed == 0 for figures in ops.values())
    written, deleted = did(Op.WRITE), did(Op.DELETE)
    assert set(deleted) <= set(written)
    assert len(set(deleted)) == len(deleted)
    assert sum(key.startswith("in/") for key in stream.objects) == 100
    assert len(stream.objects) == 100 + len(written) - len(deleted)
    switches = sum(one[0] != other[0] for one, other in itertools.pairwise(DONE))
    assert switches > 0.6 * 5000


def test_deletions_alone_remove_what_a_run_wrote_and_then_end(stream):
    stream.put(3)
    stream("--put", 100, "--ops", 40, "--size", 10, "--run-id", "w")
    record = stream("--delete", "100%", "--objects-of", "w", "--duration", "1h").stream
    assert record.phases[0].ops["delete"].count == 40
    assert len(stream.objects) == 3


@pytest.mark.parametrize(
    ("options", "check"),
    [
        (("--read-bytes", 100), lambda size, nbytes: nbytes == min(100, size)),
        (("--read-bytes", 100, "--read-offset", 20), lambda size, nbytes: nbytes == min(100, size - 20)),
        (("--read-bytes", 100, "--range", "random"), lambda size, nbytes: nbytes == min(100, size)),
    ],
)
def test_ranges_lie_within_their_objects(stream, options, check):
    stream.put(200, lambda index: 21 + index)
    phase = stream(*options).stream.phases[0]
    assert phase.ops["get-range"].nbytes == sum(
        next(nbytes for nbytes in range(101) if check(size, nbytes)) for size in range(21, 221)
    )
    assert phase.ops["get-range"].count == 200


def test_an_offset_beyond_an_object_is_refused_before_anything_is_read(stream):
    """A server answers such a read with 416, and a directory with nothing."""
    stream.put(200, lambda index: 21 + index)
    said = stream.refused("--read-bytes", 100, "--read-offset", 50)
    assert "--read-offset 50 lies at or beyond the end of 30 of the 200 objects" in said
    assert did(Op.READ) == []


def test_objects_that_a_run_deleted_from_are_not_taken_for_whole(stream):
    options = ("--fill", 20, "--size", 300, "--get", 50, "--put", 30, "--delete", 20)
    ops = stream(*options, "--ops", 200, "--run-id", "mixed").stream.phases[-1].ops
    left = 20 + ops["put"].count - ops["delete"].count
    for words in (("--verify",), ("--objects-of", "mixed"), ("--delete", "100%", "--ops", 9, "--objects-of", "mixed")):
        assert "objects of run mixed were deleted" in stream.refused(*words)
    assert f"{left} objects of run mixed removed" in stream("--clean", "mixed").out
    stream("--put", 100, "--size", 300, "--ops", 40, "--run-id", "older")
    stream("--put", 100, "--size", 300, "--ops", 40, "--run-id", "newer")
    stream("--delete", "100%", "--objects-of", "older", "--ops", 10)
    assert "objects of run older were deleted" in stream.refused("--objects-of", "older")
    assert stream("--objects-of", "last").stream.phases[0].ops["get"].count == 40
    assert "30 objects of run older removed" in stream("--clean", "older").out


def test_ranges_are_verified_by_their_place_in_the_object(stream):
    stream("--put", 100, "--ops", 30, "--size", "40KiB")
    for options in (("--range", "random", "--range-align", 512), ("--range", "records"), ("--read-offset", 8192)):
        found = stream("--verify", "--read-bytes", 8192, *options).stream.phases[0]
        assert found.verification.verified_nbytes == found.ops["get-range"].nbytes > 0
        assert found.verification.damaged_blocks == 0


def test_every_record_of_every_object_is_read_once_per_epoch(stream):
    stream.put(20, lambda index: 1000 + 10 * index)
    phase = stream("--read-bytes", 100, "--range", "records").stream.phases[0]
    assert phase.ops["get-range"].nbytes == sum(1000 + 10 * index for index in range(20))
    assert phase.ops["get-range"].count == sum(-(-(1000 + 10 * index) // 100) for index in range(20))
    counts = Counter(did(Op.READ))
    assert counts["in/00019"] == 12


def test_a_warm_up_is_a_phase_of_its_own_and_the_next_epoch_is_whole(stream):
    stream.put(100)
    record = stream("--warmup", "1epoch", "--epochs", 2).stream
    assert [(phase.name, phase.ops["get"].count) for phase in record.phases] == [("warm-up", 100), ("stream", 200)]
    assert [one.epoch for one in record.phases[1].epochs] == [1, 2]
    assert [one.temperature for one in record.phases[1].epochs] == ["warm", "warm"]
    DELAYS[URL] = 0.001
    timed = stream("--warmup", "250ms", "--epochs", 1).stream
    assert timed.phases[0].name == "warm-up"
    assert timed.phases[1].ops["get"].count == 100
    assert timed.phases[1].epochs[0].temperature == "unknown", "who knows what the warm-up has read"


def test_an_open_loop_counts_from_the_intended_start(stream):
    stream.put(100)
    DELAYS[URL] = 0.004  # one after the other: 250 per second at most
    phase = stream("--rate", 500, "--ops", 200).stream.phases[0]
    figures = phase.ops["get"]
    assert figures.from_intended.count == 200
    # The last one was meant to begin after 0.4 s and could not end before 0.8 s.
    assert figures.from_intended.max_ns > 0.35e9
    assert figures.total.sum_ns < 0.3e9 * figures.total.count
    DELAYS[URL] = 0
    paced = stream("--rate", 400, "--ops", 200).stream.phases[0]
    assert max(paced.ranks.end_ns) >= 199 / 400 * 1e9


def test_errors_are_counted_by_kind_and_told_by_the_exit_code(stream):
    stream.put(100)
    wrong = {"7": (Kind.HTTP, 503), "8": (Kind.RESET, 0)}
    FAULTS[URL] = lambda op, key: wrong.get(key[-1]) if op is Op.READ else None
    ran = stream.run("--epochs", 2)
    assert ran.code == 1
    figures = ran.stream.phases[0].ops["get"]
    assert (figures.count, figures.failed, figures.errors) == (160, 40, {"HTTP 503": 20, "reset": 20})
    assert "40 transfers failed" in ran.sentence
    phase = ran.stream.phases[0]
    assert len(phase.failures) + phase.failures_dropped == 40
    assert phase.failures[0].message == "as the test wants it"
    assert phase.failures[0].url.startswith("mem://bucket/in/")


def test_a_checksum_that_differs_is_damage(stream):
    stream.put(10)
    FAULTS[URL] = lambda op, key: (Kind.CHECKSUM, 200) if op is Op.READ and key.endswith("3") else None
    ran = stream.run("--verify", "checksum")
    assert ran.code == 3
    assert "checksum" in ran.sentence
    assert ran.stream.phases[0].ops["get"].compared == 9


def test_a_store_that_only_fails_is_given_up(stream):
    stream.put(10)
    FAULTS[URL] = lambda op, key: (Kind.HTTP, 500) if op is Op.READ else None
    ran = stream.run("--duration", "10min")
    assert ran.code == 1
    assert "one after the other" in ran.sentence
    assert ran.stream.status == "failed"
    assert ran.stream.phases[0].ops["get"].failed >= 1000


def test_objects_that_vanish_are_errors_and_not_the_end(stream):
    stream.put(100)
    listing = stream.directory / "names"
    listing.write_text("".join(f"{key}\n" for key in [*stream.objects, "in/99999"]))
    BUCKETS[URL]["in/99999"] = b""
    FAULTS[URL] = lambda op, key: (Kind.HTTP, 404) if op is Op.READ and key == "in/99999" else None
    ran = stream.run("--list-file", listing)
    assert ran.code == 1
    assert ran.stream.phases[0].ops["get"].errors == {"HTTP 404": 1}
    assert ran.stream.workload.catalog_nbytes is None


def test_the_servers_memory_gives_a_verdict_and_a_size(stream):
    stream.put(10, 1000)
    verdicts = {}
    for memory in (None, "3000B", "10000B"):
        options = ("--server-memory", memory) if memory else ()
        verdicts[memory] = stream(*options).stream.phases[0].server_cache.verdict
    assert verdicts == {None: "unknown", "3000B": "exceeded", "10000B": "possible"}
    record = stream("-o", "memory=4000", "--put", 100, "--size", 100, "--bytes", "3x-server-memory").stream
    assert record.phases[0].ops["put"].nbytes == 12_000
    assert record.workload.server_memory_source == "the cluster's own sysinfo"
    refused = stream.run("--put", 100, "--bytes", "3x-server-memory")
    assert refused.code == 2
    assert "give --server-memory" in refused.sentence


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "has no objects"),
        (("--verify",), "no run of mlstor has written"),
        (("--objects-of", "x"), "no run x of mlstor has written"),
        (("-o", "colour=red"), "not for this kind of store"),
        (("--list-file", "/no/such/list"), "/no/such/list"),
        (("--clean", "x"), "no run x of mlstor has written"),
        (("--per-node",), "about directories"),
        (("--head", "100%", "--bytes", "1MiB"), "has no objects"),
    ],
)
def test_what_can_not_be_done_is_one_sentence(stream, options, said):
    ran = stream.run(*options)
    assert ran.code == 2, ran.err
    assert said in ran.sentence


def test_questions_alone_never_reach_bytes(stream):
    stream.put(3)
    ran = stream.run("--head", "100%", "--bytes", "1MiB")
    assert ran.code == 2
    assert "never ends" in ran.sentence


def test_a_run_id_is_not_written_to_twice(stream):
    stream("--put", 100, "--ops", 5, "--size", 10, "--run-id", "one")
    before = dict(stream.objects)
    ran = stream.run("--put", 100, "--ops", 5, "--size", 20, "--run-id", "one")
    assert ran.code == 2
    assert "choose another --run-id" in ran.sentence
    assert stream.objects == before


def test_cleaning_removes_what_a_run_wrote_and_nothing_else(stream):
    stream.put(4)
    stream("--put", 100, "--ops", 30, "--size", 10, "--run-id", "one", "--prefix-dirs", 3)
    stream("--put", 100, "--ops", 20, "--size", 10, "--run-id", "two")
    BUCKETS[URL]["one/of another"] = b"x"
    ran = stream("--clean", "one")
    assert "30 objects of run one removed" in ran.out
    left = list(BUCKETS[URL])
    assert sum(key.startswith("two/") for key in left) == 21
    assert [key for key in left if key.startswith("one/")] == ["one/of another"]
    assert "run_key" in BUCKETS[URL][".mlstor-stream.json"].decode()
    stream("--put", 100, "--ops", 3, "--size", 10, "--run-id", "three")
    stream("--clean", "three")
    assert stream("--verify").stream.workload.catalog_count == 20, "run two is the last one again"
    stream("--clean", "two")
    assert sorted(BUCKETS[URL]) == [*(f"in/{i:05d}" for i in range(4)), "one/of another"]


def test_the_payload_has_the_compressibility_that_was_asked_for(stream):
    import zlib

    stream("--put", 100, "--ops", 3, "--size", "1MiB", "--compressibility", 60)
    for data in stream.objects.values():
        assert 0.35 < len(zlib.compress(data, 1)) / len(data) < 0.45


def test_nothing_is_handed_over_that_there_is_no_room_for(stream, monkeypatch):
    made = []
    real = stream_support.MemoryStore.transfers
    monkeypatch.setattr(
        stream_support.MemoryStore,
        "transfers",
        lambda self, **how: made.append(real(self, **how)) or made[-1],
    )
    stream.put(5000)
    stream("--epochs", 1, "--workers", 2, "--in-flight", 4)
    assert made[-1].most == 8 + 256
    assert all(one.closed for one in made)


def test_random_draws_with_replacement_repeat_themselves(stream):
    stream.put(500)
    stream("--order", "replacement", "--epochs", 1)
    assert len(did(Op.READ)) == 500
    assert abs(len(set(did(Op.READ))) / 500 - (1 - np.exp(-1))) < 0.08


def test_what_a_phase_behind_the_fill_wrote_is_removed_too_if_that_was_stopped(stream, monkeypatch):
    phase = Runner._phase

    def stopped(self: Runner, number: int, *others: Any) -> None:
        phase(self, number, *others)
        if number == 1:
            raise OSError(errno.EIO, "stopped by the test")

    with monkeypatch.context() as patched:
        patched.setattr(Runner, "_phase", stopped)
        words = ("--fill", 10, "--put", 50, "--get", 50, "--ops", 100, "--size", 10, "--run-id", "one")
        assert stream.run(*words).code != 0
    assert sum(key.startswith("one/") for key in BUCKETS[URL]) > 30
    stream("--clean", "one")
    assert not BUCKETS[URL]


def test_damage_that_was_found_before_a_run_failed_is_in_its_record(stream):
    stream("--put", 100, "--ops", 20, "--size", 5000)
    spoilt = next(key for key in BUCKETS[URL] if not key.endswith(".json"))
    BUCKETS[URL][spoilt] = bytes(5000)
    before = len(DONE)
    FAULTS[URL] = lambda op, key: (Kind.HTTP, 500) if op is Op.READ and len(DONE) > before + 40 else None
    ran = stream.run("--verify", "--duration", "60s")
    assert ran.code not in (0, 3)
    record = stream.newest
    assert record.status == "failed"
    found = record.phases[0].verification
    assert found.verified_nbytes >= 20 * 5000
    assert found.damaged_blocks >= 2
    assert {one.file for one in found.damage} == {spoilt}


def test_more_may_end_at_once_than_is_counted_at_once():
    rows = np.zeros(3 * FOLD, COMPLETION_DTYPE)
    rows["tag"], rows["end_ns"] = np.arange(len(rows)), 1000
    tally = Tally(Slots(len(rows)), 0, 0, lambda epoch: "unknown", verified=False)
    tally.add(rows, list)
    assert tally.figures([])["get"].count == len(rows)


def test_operations_of_an_open_loop_that_found_no_room_are_told(stream):
    stream.put(100)
    DELAYS[URL] = 0.01
    words = ("--rate", 4000, "--duration", "300ms", "--workers", 1, "--in-flight", 1)
    figures = stream(*words).stream.phases[0].ops["get"]
    assert figures.count < 100
    assert figures.count + figures.cancelled == pytest.approx(0.298 * 4000, abs=1)  # the first one after 2 ms
    DELAYS[URL] = 0
    idle = ("--rate", 100, "--duration", "300ms")  # a machine that stands still at the end makes the last one late
    assert any(stream(*idle).stream.phases[0].ops["get"].cancelled == 0 for _ in range(5))


def test_a_server_that_refuses_until_the_time_is_over_is_no_success(stream, monkeypatch):
    stream.put(100)
    carry_out = stream_support.MemoryTransfers._carry_out

    def refused(self: Any, done: Any, *asked: Any) -> None:
        carry_out(self, done, *asked)
        if asked[0]["op"] == Op.READ:  # as the core gives back what waits for its next attempt
            done["kind"], done["first_kind"], done["first_status"] = Kind.CANCELLED, Kind.HTTP, 503

    monkeypatch.setattr(stream_support.MemoryTransfers, "_carry_out", refused)
    ran = stream.run("--ops", 8)
    assert ran.code == 1
    assert "nothing ended well" in ran.sentence
    assert "HTTP 503" in ran.sentence
    assert ran.stream.phases[0].ops["get"].retried_by == {"HTTP 503": 8}


def test_what_still_waited_for_another_attempt_at_the_end_is_told(stream, monkeypatch):
    stream.put(100)
    carry_out = stream_support.MemoryTransfers._carry_out

    def refused(self: Any, done: Any, *asked: Any) -> None:
        carry_out(self, done, *asked)
        key = asked[1][int(asked[0]["key_start"]) :][: int(asked[0]["key_nbytes"])]
        if asked[0]["op"] == Op.READ and key.endswith(b"7"):
            done["kind"], done["first_kind"], done["first_status"] = Kind.CANCELLED, Kind.HTTP, 503

    monkeypatch.setattr(stream_support.MemoryTransfers, "_carry_out", refused)
    ran = stream.run("--epochs", 1)
    assert ran.code == 0
    assert ran.sentence == (
        "mlstor: 10 transfers had failed and waited to be tried again when the time was over (HTTP 503)"
    )


def test_a_cluster_that_does_not_tell_its_memory_is_read_all_the_same(stream, monkeypatch):
    def refused(self: Any) -> int:
        raise PermissionError(errno.EACCES, "only for administrators", URL)

    stream.put(10)
    monkeypatch.setattr(stream_support.MemoryStore, "memory_bytes", refused)
    record = stream().stream
    assert record.phases[0].server_cache.verdict == "unknown"
    assert "only for administrators" in record.workload.server_memory_source
