"""Orders: every object once, random by every test that a constant stride fails, and the same again after a stop."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from dataclasses import replace
from math import factorial, sqrt
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from order_statistics import STATISTICS, U64, differences

from mlstor import _io
from mlstor.errors import UsageError
from mlstor.stream.order import MOST_OBJECTS, Order, Scope, Share, Uneven
from mlstor.stream.state import State

# conftest.py's autouse fixture is of function scope; it only sets the environment.
SETTINGS = settings(max_examples=100)
WORDS = st.integers(0, 2**64 - 1)
SMALL = st.integers(1, 700)
PRIME = 100_003
TOKENS = 7_812_500_000
"""Records of 4096 bytes in 32 TB."""


def whole(n: int, seed: int = 0, epoch: int = 0) -> list[int]:
    return [int(index) for index in Order(n, seed).indices(epoch, 0, 1, n)]


# -- a permutation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(1, 70))
def test_every_small_number_of_objects_is_permuted(n: int) -> None:
    for seed, epoch in ((0, 0), (1, 0), (0, 1), (2**64 - 1, 2**64 - 1)):
        assert sorted(whole(n, seed, epoch)) == list(range(n))


@SETTINGS
@given(n=st.one_of(SMALL, st.integers(1, 40_000)), seed=WORDS, epoch=WORDS)
def test_each_object_comes_once_per_epoch(n: int, seed: int, epoch: int) -> None:
    indices = Order(n, seed).indices(epoch, 0, 1, n)
    assert (np.bincount(indices.astype(np.int64), minlength=n) == 1).all()


@SETTINGS
@given(n=st.integers(1, MOST_OBJECTS), seed=WORDS, epoch=WORDS, data=st.data())
def test_positions_of_a_large_order_are_objects_and_differ(n: int, seed: int, epoch: int, data: st.DataObject) -> None:
    step = data.draw(st.integers(1, max(n // 50, 1)))
    start = data.draw(st.integers(0, n - 1))
    count = min(50, (n - 1 - start) // step + 1)
    indices = Order(n, seed).indices(epoch, start, step, count)
    assert indices.dtype == np.uint64
    assert int(indices.max()) < n
    assert len(set(indices.tolist())) == count


@pytest.mark.parametrize("n", [TOKENS, 2**62, 2**62 + 57, 2**63 - 1])
def test_huge_orders_need_neither_memory_nor_time(n: int) -> None:
    """A million positions from the middle of one: with an array of its permutation there would be no answer."""
    indices = Order(n, 3).indices(1, n // 2, 1, 1_000_000)
    assert len(np.unique(indices)) == 1_000_000
    assert 0.49 < float(indices.astype(float).mean()) / n < 0.51


def test_two_to_the_63_is_the_largest_of_the_core() -> None:
    out = np.zeros(100, np.uint64)
    _io.permute(out.data, 2**63, 1, 2, 2**63 - 100)
    assert len(np.unique(out)) == 100
    assert int(out.max()) < 2**63


def test_orders_of_version_1_do_not_change() -> None:
    """A saved position is worth nothing if a later version has other orders."""
    small = Order(10, 7).indices(3, 0, 1, 10).tolist()
    large = Order(TOKENS, 7).indices(3, 0, 1, 4).tolist()
    draws = Order(10, 7, "replacement").indices(3, 0, 1, 10).tolist()
    client = Order(10, 7, client=2).indices(3, 0, 1, 10).tolist()
    assert small == [8, 4, 7, 0, 6, 5, 9, 1, 2, 3]
    assert large == [2753562749, 5845973228, 7028328491, 5065977597]
    assert draws == [2, 1, 0, 0, 3, 7, 2, 2, 5, 5]
    assert client == [5, 8, 1, 2, 6, 4, 0, 9, 7, 3]


@SETTINGS
@given(
    n=SMALL, seed=WORDS, epoch=WORDS, start=st.integers(0, 2000), step=st.integers(0, 50), count=st.integers(0, 60),
    kind=st.sampled_from(["permutation", "sequential", "replacement"]),
)  # fmt: skip
def test_a_stride_takes_the_positions_it_says(
    n: int, seed: int, epoch: int, start: int, step: int, count: int, kind: Any
) -> None:
    order = Order(n, seed, kind)
    indices = order.indices(epoch, start, step, count)
    positions = range(start, start + step * count, step) if step else [start] * count
    assert indices.tolist() == [int(order.indices(epoch, position, 1, 1)[0]) for position in positions]
    if kind != "replacement":  # beyond the end it begins again
        assert indices.tolist() == [int(order.indices(epoch, position % n, 1, 1)[0]) for position in positions]


# -- how random it is -----------------------------------------------------------------------------------


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("epoch", range(3))
def test_a_whole_epoch_is_random(statistic: str, seed: int, epoch: int) -> None:
    walk = Order(PRIME, seed).indices(epoch, 0, 1, PRIME)
    assert abs(STATISTICS[statistic](walk, PRIME)) < 4


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("n", [PRIME, 2**20, 1_000_000, TOKENS, 2**62, 2**62 + 57])
@pytest.mark.parametrize(("start", "step"), [(0, 1), (5, 8), (40_000, 1)])
def test_what_one_rank_sees_is_random(statistic: str, n: int, start: int, step: int) -> None:
    walk = Order(n, 11).indices(5, start, step, min(60_000, (n - start) // step))
    assert abs(STATISTICS[statistic](walk, n)) < 4


@pytest.mark.parametrize("statistic", STATISTICS)
def test_draws_are_random(statistic: str) -> None:
    walk = Order(TOKENS, 5, "replacement").indices(2, 3, 7, 60_000)
    assert abs(STATISTICS[statistic](walk, TOKENS)) < 4


def constant_stride(n: int, stride: int, first: int) -> U64:
    """aisloader's order of more than 100,000 objects; n is a prime."""
    walk: U64 = (np.uint64(first) + np.arange(n, dtype=np.uint64) * np.uint64(stride)) % np.uint64(n)
    return walk


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("seed", range(8))
def test_a_constant_stride_is_found_out(statistic: str, seed: int) -> None:
    source = random.Random(seed)
    walk = constant_stride(PRIME, source.randrange(1, PRIME), source.randrange(PRIME))
    assert np.bincount(walk.astype(np.int64)).max() == 1  # each object once, as ours
    assert abs(STATISTICS[statistic](walk, PRIME)) > 8


@pytest.mark.parametrize("statistic", STATISTICS)
def test_a_sequential_walk_is_found_out(statistic: str) -> None:
    walk = Order(PRIME, kind="sequential").indices(0, 0, 1, PRIME)
    assert abs(STATISTICS[statistic](walk, PRIME)) > 8


@pytest.mark.parametrize("n", [2, 3, 4, 5])
@pytest.mark.parametrize("vary", ["seed", "epoch"])
def test_small_orders_are_all_equally_likely(n: int, vary: str) -> None:
    trials = 300 * factorial(n)
    pairs = [(at, 9) if vary == "seed" else (9, at) for at in range(trials)]
    counts = Counter(tuple(whole(n, seed, epoch)) for seed, epoch in pairs)
    freedom = factorial(n) - 1
    chi_square = sum((counts[order] - 300) ** 2 / 300 for order in itertools.permutations(range(n)))
    assert len(counts) == factorial(n)
    assert abs(chi_square - freedom) / sqrt(2 * freedom) < 4


@pytest.mark.parametrize("n", [16, 33])
def test_in_small_orders_any_two_objects_may_follow_each_other(n: int) -> None:
    trials = 30 * n * n
    pairs = Counter(tuple(Order(n, 4).indices(epoch, n // 2, 1, 2).tolist()) for epoch in range(trials))
    expected = trials / (n * (n - 1))
    chi_square = sum((pairs[pair] - expected) ** 2 / expected for pair in itertools.permutations(range(n), 2))
    freedom = n * (n - 1) - 1
    assert abs(chi_square - freedom) / sqrt(2 * freedom) < 4


@pytest.mark.parametrize(
    "other", [{"epoch": 1}, {"seed": 1}, {"seed": 2**63}, {"epoch": 2**32}, {"seed": 8, "epoch": 7}, {"client": 0}]
)
def test_orders_of_other_epochs_seeds_and_clients_have_nothing_in_common(other: dict[str, int]) -> None:
    here = Order(PRIME, 7).indices(8, 0, 1, PRIME)
    key = {"seed": 7, "epoch": 8, **other}
    there = Order(PRIME, key["seed"], client=key.get("client")).indices(key["epoch"], 0, 1, PRIME)
    assert (here == there).sum() < 8  # Poisson with mean 1
    both = np.corrcoef(here.astype(float), there.astype(float))[0, 1] * sqrt(PRIME)
    assert abs(both) < 4
    gaps = (there + np.uint64(PRIME) - here) % np.uint64(PRIME)
    counts = np.bincount((gaps * np.uint64(64) // np.uint64(PRIME)).astype(np.int64), minlength=64)
    assert abs(((counts - PRIME / 64) ** 2 / (PRIME / 64)).sum() - 63) / sqrt(126) < 4


def test_clients_have_orders_of_their_own() -> None:
    orders = [tuple(Order(50, 3, client=client).indices(0, 0, 1, 50).tolist()) for client in (None, 0, 1, 2)]
    assert len(set(orders)) == 4
    assert abs(differences(Order(PRIME, 3, client=1).indices(0, 0, 1, PRIME), PRIME)) < 4


# -- a share of the world -------------------------------------------------------------------------------


def visited(n: int, world: int, uneven: Uneven, base: int = 0, seed: int = 5) -> list[list[int]]:
    """What each rank visits of the rest of an epoch."""
    order = Order(n, seed)
    shares = [Share(n, rank, world, uneven).positions(base) for rank in range(world)]
    return [order.indices(2, some.start, some.step, len(some)).tolist() for some in shares]


@SETTINGS
@given(n=SMALL, world=st.integers(1, 40))
def test_exact_visits_every_object_once(n: int, world: int) -> None:
    ranks = visited(n, world, "exact")
    assert sorted(itertools.chain(*ranks)) == list(range(n))
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1


@SETTINGS
@given(n=SMALL, world=st.integers(1, 40), uneven=st.sampled_from(["drop", "pad"]))
def test_drop_and_pad_give_all_ranks_equally_many(n: int, world: int, uneven: Any) -> None:
    if uneven == "drop" and n < world:
        with pytest.raises(UsageError, match=f"leaves none of {n} objects for {world} ranks"):
            Share(n, 0, world, "drop")
        return
    ranks = visited(n, world, uneven)
    counts = Counter(itertools.chain(*ranks))
    assert {len(rank) for rank in ranks} == {n // world if uneven == "drop" else -(-n // world)}
    if uneven == "drop":
        assert max(counts.values()) == 1
    else:
        assert set(counts) == set(range(n))
        assert max(counts.values()) - min(counts.values()) <= 1
    order = whole(n, 5, 2)  # those that are left out or repeated are the last and the first of the order
    assert counts == Counter(order[at % n] for at in range(sum(map(len, ranks))))


def test_ranks_take_turns() -> None:
    order = Order(20, 1).indices(2, 0, 1, 20).tolist()
    assert [Share(20, rank, 3).positions() for rank in range(3)] == [range(0, 20, 3), range(1, 20, 3), range(2, 20, 3)]
    assert visited(20, 3, "exact", seed=1) == [order[rank::3] for rank in range(3)]


@SETTINGS
@given(n=SMALL, world=st.integers(1, 12), uneven=st.sampled_from(["exact", "drop", "pad"]))
def test_each_client_visits_every_object(n: int, world: int, uneven: Any) -> None:
    for rank in range(world):
        share = Share(n, rank, world, uneven, "client")
        assert share.client == rank
        assert share.positions() == range(n)
        assert share.positions(n // 2) == range(n // 2, n)
        assert share.position_after(n // 2, 0) == n // 2
        assert share.position_after(0, n) == n


# -- stopping and going on ------------------------------------------------------------------------------


def state_of(share: Share, base: int, done: int, epoch: int = 2, **fields: Any) -> State:
    position = share.position_after(base, done)
    state = State(
        seed=5, epoch=epoch, position=position, n=share.n, catalog="abc", uneven=share.uneven, scope=share.scope,
        client=share.client,
    )  # fmt: skip
    return replace(state, **fields)


@SETTINGS
@given(n=SMALL, worlds=st.lists(st.integers(1, 20), min_size=2, max_size=5), data=st.data())
def test_an_epoch_goes_on_exactly_with_any_number_of_ranks(n: int, worlds: list[int], data: st.DataObject) -> None:
    """Stopped and started again several times, each time with another world, each object comes once all the same."""
    base, seen = 0, []
    for world in worlds:
        shares = [Share(n, rank, world) for rank in range(world)]
        steps = data.draw(st.integers(0, len(shares[0].positions(base))))
        states = []
        for share in shares:
            positions = share.positions(base)[:steps]
            seen += Order(n, 5).indices(2, positions.start, positions.step, len(positions)).tolist()
            states.append(state_of(share, base, len(positions)))
        base = State.agree([State.from_dict(json.loads(json.dumps(state.as_dict()))) for state in states]).position
    assert len(seen) == base
    seen += itertools.chain(*visited(n, worlds[0], "exact", base))
    assert sorted(seen) == list(range(n))


@SETTINGS
@given(n=SMALL, world=st.integers(1, 20), ahead=st.integers(0, 20), data=st.data())
def test_first_ranks_may_be_one_object_ahead(n: int, world: int, ahead: int, data: st.DataObject) -> None:
    shares = [Share(n, rank, world) for rank in range(world)]
    steps = data.draw(st.integers(0, len(shares[-1].positions())))
    seen, states = [], []
    for rank, share in enumerate(shares):
        positions = share.positions()[: steps + (rank < ahead)]
        seen += Order(n, 5).indices(2, positions.start, positions.step, len(positions)).tolist()
        states.append(state_of(share, 0, len(positions)))
    agreed = State.agree(states)
    assert agreed.position == len(seen)
    assert sorted(seen + list(itertools.chain(*visited(n, 3, "exact", agreed.position)))) == list(range(n))


@pytest.mark.parametrize("uneven", ["exact", "drop", "pad"])
def test_a_finished_epoch_is_finished_for_another_world_too(uneven: Uneven) -> None:
    shares = [Share(103, rank, 10, uneven) for rank in range(10)]
    agreed = State.agree([state_of(share, 0, len(share.positions())) for share in shares])
    assert agreed.position == 103
    assert [len(Share(103, rank, 2, uneven).positions(agreed.position)) for rank in range(2)] == [0, 0]


@SETTINGS
@given(n=SMALL, world=st.integers(1, 20), uneven=st.sampled_from(["drop", "pad"]), data=st.data())
def test_drop_and_pad_go_on_with_equally_many(n: int, world: int, uneven: Any, data: st.DataObject) -> None:
    base = data.draw(st.integers(0, n))
    shares = [Share(n, rank, world, uneven) for rank in range(world)] if uneven == "pad" or n >= world else []
    positions = [share.positions(base) for share in shares]
    assert len({len(some) for some in positions}) <= 1
    together = sorted(itertools.chain(*positions))
    assert together == list(range(base, base + len(together)))
    if uneven == "drop" and shares:
        assert n - world < base + len(together) <= n
    elif shares:
        assert n <= base + len(together) < n + world


def test_the_end_of_an_epoch_agrees_with_the_beginning_of_the_next() -> None:
    shares = [Share(8, rank, 2) for rank in range(2)]
    agreed = State.agree([state_of(shares[0], 0, 1, epoch=3), state_of(shares[1], 0, 4, epoch=2)])
    assert (agreed.epoch, agreed.position) == (3, 1)


def test_ranks_without_objects_do_not_keep_the_others_from_agreeing() -> None:
    shares = [Share(3, rank, 5) for rank in range(5)]
    states = [state_of(share, 0, len(share.positions()), epoch=7) for share in shares[:3]]
    agreed = State.agree([*states, *(state_of(share, 0, 0, epoch=0) for share in shares[3:])])
    assert (agreed.epoch, agreed.position) == (7, 3)


@pytest.mark.parametrize(
    "places", [[(1, 4), (1, 8)], [(1, 8), (1, 4)], [(0, 20), (2, 0)], [(1, 2), (2, 0)], [(1, 3), (1, 4)]]
)
def test_ranks_that_stopped_elsewhere_disagree(places: list[tuple[int, int]]) -> None:
    states = [state_of(Share(20, rank, 2), 0, 0, epoch=e, position=p) for rank, (e, p) in enumerate(places)]
    (epoch, position), (_, _) = sorted(places)
    with pytest.raises(UsageError, match=rf"disagree: rank \d is in epoch {epoch} at position {position}, .*one epoch"):
        State.agree(states)


def test_ranks_with_other_seeds_disagree() -> None:
    states = [state_of(Share(20, rank, 3), 0, 0, seed=5 + rank // 2) for rank in range(3)]
    with pytest.raises(UsageError, match="seed is 5 at rank 0, 6 at rank 2"):
        State.agree(states)


def test_clients_are_not_asked_to_agree() -> None:
    with pytest.raises(ValueError, match="state of its own"):
        State.agree([state_of(Share(20, rank, 2, "exact", "client"), 0, 0) for rank in range(2)])
    with pytest.raises(ValueError, match="no state"):
        State.agree([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 21}, "n 20, this stream 21; list the same objects"),
        ({"catalog": "abd"}, "catalog 'abc', this stream 'abd'; names or sizes have changed"),
        ({"seed": 6}, "seed 5, this stream 6; give seed=5"),
        ({"order": "sequential"}, "order 'permutation', this stream 'sequential'; give order='permutation'"),
        ({"uneven": "pad"}, "uneven 'exact', this stream 'pad'"),
        ({"scope": "client", "client": 0}, "scope 'world', this stream 'client'"),
    ],
)
def test_a_state_of_another_stream_is_refused(change: dict[str, Any], message: str) -> None:
    saved = state_of(Share(20, 0, 2), 0, 3)
    saved.check(replace(saved, epoch=9, position=1))
    with pytest.raises(UsageError, match=message):
        saved.check(replace(saved, **change))


def test_a_client_takes_its_own_state_only() -> None:
    saved, other = (state_of(Share(20, rank, 2, "exact", "client"), 0, 3) for rank in range(2))
    with pytest.raises(UsageError, match="each rank loads the state that it saved"):
        saved.check(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2, this mlstor has 1"),
        ({"position": 21}, "position is 21, which can't be"),
        ({"position": -1}, "position is -1"),
        ({"epoch": True}, "epoch is True"),
        ({"n": 0}, "n is 0"),
        ({"n": "20"}, "n is '20'"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"order": "random"}, "order is 'random'"),
        ({"uneven": None}, "uneven is None"),
        ({"client": 1}, "client is 1"),
        ({"catalog": 7}, "catalog is 7"),
    ],
)
def test_a_damaged_state_is_refused(change: dict[str, Any], message: str) -> None:
    saved = state_of(Share(20, 0, 2), 0, 3).as_dict()
    assert State.from_dict(saved).as_dict() == saved
    with pytest.raises(UsageError, match=message):
        State.from_dict({**saved, **change})


@pytest.mark.parametrize("saved", [{}, {"epoch": 1}, [1, 2], None])
def test_what_is_no_state_is_refused(saved: Any) -> None:
    with pytest.raises(UsageError, match="no state of an object stream"):
        State.from_dict(saved)


# -- refusals -------------------------------------------------------------------------------------------


def test_unknown_words_are_refused_with_the_known_ones() -> None:
    word: Any = "shuffle"
    with pytest.raises(
        UsageError, match="order 'shuffle' is unknown; choose from permutation, sequential, replacement"
    ):
        Order(10, kind=word)
    with pytest.raises(UsageError, match="uneven 'shuffle' is unknown; choose from exact, drop, pad"):
        Share(10, 0, 1, word)
    with pytest.raises(UsageError, match="epoch scope 'shuffle' is unknown; choose from world, client"):
        Share(10, 0, 1, "exact", word)


@pytest.mark.parametrize("scope", ["world", "client"])
@pytest.mark.parametrize(("rank", "world"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_outside_its_world_is_refused(rank: int, world: int, scope: Scope) -> None:
    with pytest.raises(UsageError, match=f"rank {rank} is not of a world of {world}"):
        Share(10, rank, world, "exact", scope)


@pytest.mark.parametrize("n", [0, -1, 2**63])
def test_numbers_of_objects_out_of_range_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match="number of objects is 1 to"):
        Order(n)
    with pytest.raises(ValueError, match="number of objects is 1 to"):
        Share(n)


@pytest.mark.parametrize("kind", ["permutation", "sequential", "replacement"])
@pytest.mark.parametrize("numbers", [(-1, 0, 1, 1), (0, -1, 1, 1), (0, 0, -1, 2), (0, 0, 1, -1), (0, 2**63, 2**63, 2)])
def test_positions_out_of_range_are_refused(kind: Any, numbers: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match=" is 0 to "):
        Order(10, kind=kind).indices(*numbers)


@pytest.mark.parametrize(("base", "done"), [(-1, 0), (11, 0), (0, 6), (0, -1)])
def test_a_share_knows_its_end(base: int, done: int) -> None:
    with pytest.raises(ValueError, match="is 0 to"):
        Share(10, 0, 2).position_after(base, done)


@pytest.mark.parametrize("fill", [_io.permute, _io.draw])
def test_the_core_checks_its_buffer_and_numbers(fill: Any) -> None:
    for n in (0, 2**63 + 1):
        with pytest.raises(ValueError, match=r"n is 1 to 2\^63"):
            fill(np.zeros(1, np.uint64), n, 0)
    with pytest.raises(ValueError, match="64-bit numbers"):
        fill(bytearray(12), 10, 0)
    with pytest.raises(ValueError, match="64-bit numbers"):
        fill(np.zeros(3, np.uint64).data.cast("B")[4:20], 10, 0)
    with pytest.raises(ValueError, match=r"beyond 2\^64"):
        fill(np.zeros(3, np.uint64), 10, 0, 0, 2**63, 2**62)
    with pytest.raises(BufferError):
        fill(bytes(8), 10, 0)
    fill(np.zeros(0, np.uint64), 10, 0)
