"""Decisions of a workload: independent of one another, the same for the same seed, exact in their shares."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from mlstor.errors import UsageError
from mlstor.stream.draws import Purpose, generator, of_index
from mlstor.stream.mix import Kind, Mix
from mlstor.stream.sizes import Sizes, SizeSpec, parse_sizes

MIB = 1 << 20


def spec(text: str | None = None, low: int | None = None, high: int | None = None) -> SizeSpec:
    return parse_sizes(text, low, high)


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    return float(abs(np.corrcoef(one.astype(float), other.astype(float))[0, 1]))


def test_streams_of_other_purposes_ranks_and_seeds_do_not_correlate():
    keys = [(7, 0, Purpose.KIND), (7, 0, Purpose.OFFSET), (7, 1, Purpose.KIND), (8, 0, Purpose.KIND)]
    drawn = [generator(*key).random(20_000) for key in keys]
    for at, one in enumerate(drawn):
        assert all(correlation(one, other) < 0.03 for other in drawn[:at])
    assert (generator(*keys[0]).random(20_000) == drawn[0]).all()


def test_sizes_do_not_correlate_with_the_kind_of_operation():
    # Where both come of one hash, a write at every tenth operation sees only a tenth of the sizes.
    kinds = Mix({Kind.GET: 90, Kind.PUT: 10}, generator(1, 0, Purpose.KIND)).take(50_000, 0)
    sizes = Sizes(spec(None, 1000, 1999), 1)(np.arange(50_000, dtype=np.uint64))
    assert correlation(kinds == Kind.PUT, sizes) < 0.02
    assert len(np.unique(sizes[kinds == Kind.PUT])) > 950
    assert abs(float(sizes[kinds == Kind.PUT].mean()) - 1499.5) < 20


def test_indices_have_numbers_without_structure():
    bits = of_index(np.arange(100_000, dtype=np.uint64), 3, Purpose.SIZE)
    assert len(np.unique(bits)) == 100_000
    ones = np.unpackbits(bits.view(np.uint8)).reshape(-1, 64).mean(axis=0)
    assert (abs(ones - 0.5) < 0.01).all()
    assert correlation(bits[1:] >> np.uint64(11), bits[:-1] >> np.uint64(11)) < 0.02


@pytest.mark.parametrize(
    "percent",
    [{Kind.GET: 100.0}, {Kind.PUT: 30.0, Kind.GET: 70.0}, {Kind.PUT: 0.1, Kind.GET: 89.9, Kind.HEAD: 10.0}],
)
def test_a_mix_has_its_shares(percent):
    mix = Mix(percent, generator(5, 0, Purpose.KIND))
    kinds = np.concatenate([mix.take(count, 0) for count in (1, 7, 1000, 198_992)])
    for kind, share in percent.items():
        assert abs(100 * (kinds == kind).mean() - share) < 0.3


def test_deletions_wait_for_something_to_delete_and_are_not_lost():
    mix = Mix({Kind.PUT: 50.0, Kind.DELETE: 50.0}, generator(5, 0, Purpose.KIND))
    first = mix.take(1000, 0)
    assert (first == Kind.PUT).all()
    there = 1000
    kinds = []
    for _ in range(100):
        taken = mix.take(100, there)
        deletes = int((taken == Kind.DELETE).sum())
        assert deletes <= there
        there += len(taken) - 2 * deletes
        kinds.append(taken)
    assert abs((np.concatenate([first, *kinds]) == Kind.DELETE).mean() - 0.5) < 0.03


def test_a_mix_of_deletions_ends_with_what_there_is():
    mix = Mix({Kind.DELETE: 100.0}, generator(5, 0, Purpose.KIND))
    assert [len(mix.take(10, there)) for there in (10, 4, 0)] == [10, 4, 0]


SPECS = [
    spec("1MiB"),
    spec(None, 0, 0),
    spec(None, 1, 5 * MIB),
    spec("lognormal:64KiB:1.5"),
    spec("lognormal:64KiB:1.5", 4096, MIB),
    SizeSpec(kind="histogram", least_nbytes=1, most_nbytes=9, table=[(1, 3), (9, 1)]),
]


@pytest.mark.parametrize("one", SPECS, ids=str)
def test_sizes_follow_from_the_index_alone(one):
    sizes = Sizes(one, 11)
    indices = np.arange(5000, dtype=np.uint64)
    found = sizes(indices)
    shuffled = np.random.default_rng(0).permutation(indices)
    assert (sizes(shuffled) == found[shuffled]).all()
    assert found.min() >= one.least_nbytes
    assert found.max() <= one.most_nbytes
    if one.least_nbytes < one.most_nbytes:
        assert (Sizes(one, 12)(indices) != found).any()


@pytest.mark.parametrize("one", [made for made in SPECS if made.most_nbytes], ids=str)
@settings(max_examples=25)  # the first call makes the table of quantiles
@given(count=st.integers(1, 3000), less=st.integers(0, 100))
def test_the_count_for_a_total_is_the_least_that_reaches_it(one, count, less):
    sizes = Sizes(one, 2)
    total = sizes.total(count)
    wanted = max(1, total - less)
    found = sizes.count_of(wanted)
    assert sizes.total(found) >= wanted
    assert found == 0 or sizes.total(found - 1) < wanted


def test_a_log_normal_distribution_has_its_median_and_spread():
    found = Sizes(spec("lognormal:64KiB:0.5", 1, 1 << 40), 3)(np.arange(100_000, dtype=np.uint64)).astype(float)
    assert abs(np.median(found) / 65536 - 1) < 0.02
    assert abs(np.log(found).std() - 0.5) < 0.01


def test_a_histogram_has_its_weights(tmp_path):
    path = tmp_path / "sizes"
    path.write_text("# bytes weight\n4KiB 0.5\n1MiB, 1.5  # most of them\n\n7 2\n8 0\n")
    made = parse_sizes(f"@{path}", None, None)
    assert made.table == [(4096, 1), (MIB, 3), (7, 4)]
    found = Sizes(made, 1)(np.arange(80_000, dtype=np.uint64))
    shares = {int(size): (found == size).mean() for size in np.unique(found)}
    assert shares.keys() == {4096, MIB, 7}
    assert abs(shares[7] - 0.5) < 0.01
    assert abs(shares[4096] - 0.125) < 0.01


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("4KiB\n", "1 words"),
        ("4KiB x\n", "line 1"),
        ("many 1\n", "not a size"),
        ("", "holds no sizes"),
        ("1 -1\n", "weight"),
    ],
)
def test_a_histogram_that_is_none_is_refused(tmp_path, text, said):
    path = tmp_path / "sizes"
    path.write_text(text)
    with pytest.raises(UsageError, match=said):
        parse_sizes(f"@{path}", None, None)


@pytest.mark.parametrize(
    ("text", "low", "high", "said"),
    [
        (None, 2, 1, "exchange them"),
        ("1MiB", 1, None, "go with"),
        ("lognormal:1MiB", None, None, "median, sigma"),
        ("lognormal:0:1", None, None, "at least 1 byte"),
        ("lognormal:1:99", None, None, "from 0 to 10"),
        ("@/no/such/file", None, None, "can't be read"),
    ],
)
def test_sizes_that_can_not_be_meant_are_refused(text, low, high, said):
    with pytest.raises(UsageError, match=said):
        parse_sizes(text, low, high)
