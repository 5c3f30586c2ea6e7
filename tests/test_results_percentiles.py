"""The histogram's buckets and the percentiles read from them."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from mlstor.results import percentiles as p
from mlstor.results.merge_parts import add_histograms

LAST_NS = p.lower(p.NBUCKETS - 1)
durations = st.integers(min_value=0, max_value=2**40)
measured = st.integers(min_value=0, max_value=LAST_NS - 1)


def test_every_buckets_bounds_fall_into_it() -> None:
    for bucket in range(p.NBUCKETS):
        assert p.index(p.lower(bucket)) == bucket == p.index(p.upper(bucket))


def test_buckets_leave_no_gap_and_end_where_documented() -> None:
    assert p.lower(0) == 0
    assert p.NBUCKETS == 1856
    assert LAST_NS == 2**34 - 2**27
    assert [p.index(v) for v in (63, 64, 127, 128, 129, 130)] == [63, 64, 127, 128, 128, 129]


@given(durations, durations)
def test_longer_durations_never_get_a_lower_bucket(a: int, b: int) -> None:
    low, high = sorted((a, b))
    assert p.index(low) <= p.index(high)


@given(measured)
def test_a_bucket_is_narrower_than_a_64th_of_its_values(value: int) -> None:
    bucket = p.index(value)
    assert p.lower(bucket) <= value <= p.upper(bucket)
    assert (p.upper(bucket) - p.lower(bucket)) * 64 <= value


def test_durations_beyond_the_last_bucket_are_counted_in_it_and_shown_by_the_largest() -> None:
    histogram = p.of_values([1000, 60 * 10**9])
    assert histogram.buckets[-1] == (p.NBUCKETS - 1, 1)
    assert p.percentile(histogram, 99) == 60 * 10**9


@given(st.lists(measured, min_size=1, max_size=60), st.sampled_from([0, 1, 50, 90, 99, 99.9, 100]))
def test_a_percentile_is_the_nearest_rank_value_to_within_a_64th(values: list[int], percent: float) -> None:
    ordered = sorted(values)
    at = max(1, -(-int(percent * 10) * len(values) // 1000))
    exact = ordered[at - 1]
    shown = p.percentile(p.of_values(values), percent)
    assert shown is not None
    assert exact <= shown <= exact + exact / 64
    assert ordered[0] <= shown <= ordered[-1]


@given(st.lists(st.lists(durations, max_size=20), max_size=6))
def test_the_sum_of_histograms_is_the_histogram_of_all_values(groups: list[list[int]]) -> None:
    merged = add_histograms(p.of_values(group) for group in groups)
    assert merged == p.of_values([value for group in groups for value in group])


@given(st.lists(durations, max_size=9), st.lists(durations, max_size=9), st.lists(durations, max_size=9))
def test_adding_histograms_is_associative(a: list[int], b: list[int], c: list[int]) -> None:
    ha, hb, hc = map(p.of_values, (a, b, c))
    assert add_histograms([add_histograms([ha, hb]), hc]) == add_histograms([ha, add_histograms([hb, hc])])


def test_full_count_arrays_become_sparse() -> None:
    counts = [0] * p.NBUCKETS
    counts[p.index(5_000)] = 3
    histogram = p.from_counts(counts, sum_ns=15_000, min_ns=5_000, max_ns=5_000)
    assert histogram == p.of_values([5_000] * 3)
    with pytest.raises(ValueError, match="1857 buckets"):
        p.from_counts([0] * 1857, sum_ns=0, min_ns=0, max_ns=0)


def test_no_operations_have_no_percentile_and_bad_requests_are_refused() -> None:
    assert p.percentile(p.of_values([]), 50) is None
    with pytest.raises(ValueError, match="not a percentage"):
        p.percentile(p.of_values([1]), 101)
    lying = p.of_values([1])
    lying.count = 2
    with pytest.raises(ValueError, match="buckets hold 1"):
        p.percentile(lying, 100)
