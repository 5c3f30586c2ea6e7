"""Figures in aisloader's JSON shape: the fields, types and units that its readers expect."""

from __future__ import annotations

import json

from hypothesis import given, strategies as st
from record_factory import START_UNIX_NS
from stream_factory import COUNT, NBYTES, op, phase, record, times

from mlstor.results import aisloader
from mlstor.results.stream_merge import add_ops


def test_the_element_of_a_run_has_aisloaders_fields_and_types() -> None:
    ops = {"get": op(times(), failed=2), "put-parts": op(times(), 10**6), "head": op(times())}
    (element,) = json.loads(aisloader.encode(aisloader.of_record(record(1, phases=[phase(1, ops=ops)]))))
    assert list(element) == ["get", "put", "get_batch"]
    assert element["get"] == {
        "start_time": "2026-09-21T14:13:20.123456789Z",
        "count": str(COUNT),
        "bytes": str(COUNT * NBYTES),
        "errors": 2,
        "latency": sum(times()) // COUNT,
        "duration": 2 * 10**9,
        "min_latency": min(times()),
        "max_latency": max(times()),
        "throughput": str(COUNT * NBYTES // 2),
    }
    assert element["put"]["bytes"] == str(COUNT * 10**6)
    assert element["get_batch"]["count"] == "0"
    assert element["get_batch"]["latency"] == 0


def test_a_warm_up_is_left_out_and_phases_are_added() -> None:
    phases = [phase(1, name="warm-up"), phase(1, name="fill", ops={"put": op(times())}), phase(1)]
    (element,) = aisloader.of_record(record(1, phases=phases))
    assert (element["get"].count, element["put"].count) == (COUNT, COUNT)
    assert element["get"].duration_ns == 4 * 10**9
    assert aisloader.of_record(record(1, phases=[]))[0]["get"].count == 0


def test_several_elements_are_one_array() -> None:
    one = aisloader.interval({"get": op([5])}, START_UNIX_NS, 10**9)
    assert len(json.loads(aisloader.encode([one, one]))) == 2


durations = st.lists(st.integers(min_value=1, max_value=2**33), min_size=1, max_size=50)


@given(durations, durations)
def test_an_interval_is_what_was_added_since_it_began(former: list[int], new: list[int]) -> None:
    before = {"get": op(former, failed=1)}
    now = {"get": add_ops([before["get"], op(new, failed=2)])}
    made = aisloader.interval(now, START_UNIX_NS, 10**9, before)["get"]
    assert (made.count, made.nbytes, made.failed, made.sum_ns) == (len(new), len(new) * NBYTES, 2, sum(new))
    assert min(new) * 63 // 64 <= made.min_ns <= min(new)
    assert max(new) <= made.max_ns <= max(new) * 65 // 64 + 1


def test_an_interval_in_which_nothing_ended_is_empty() -> None:
    same = {"get": op([5, 6])}
    made = aisloader.interval(same, START_UNIX_NS, 10**9, same)["get"]
    assert (made.count, made.min_ns, made.max_ns, made.stats()["throughput"]) == (0, 0, 0, "0")
