"""EpochSampler: every sample once per epoch, over ranks, restarts and torchdata's loader, with and without workers."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
from hypothesis import given, strategies as st

pytest.importorskip("torch")
pytest.importorskip("torchdata")

from torch.utils.data import DataLoader, Dataset
from torchdata import stateful_dataloader as loaders

from mlstor.errors import UsageError
from mlstor.torch.sampler import EpochSampler

N = 101

pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torchdata 0.11 on torch 2.13
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # more workers than cores
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


class Numbers(Dataset[int]):
    """Samples that are their own numbers."""

    def __init__(self, count: int = N) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index

    def __getitems__(self, indices: list[int]) -> list[int]:
        return list(indices)


def samplers(world: int, **options: Any) -> list[EpochSampler]:
    return [EpochSampler(N, seed=7, rank=rank, world_size=world, **options) for rank in range(world)]


@given(world=st.integers(1, 7), uneven=st.sampled_from(["exact", "drop", "pad"]), shuffle=st.booleans())
def test_each_sample_comes_once_per_epoch_over_all_ranks(world: int, uneven: Any, shuffle: bool) -> None:
    ranks = samplers(world, uneven=uneven, shuffle=shuffle)
    orders = []
    for epoch in range(2):
        assert [one.epoch for one in ranks] == [epoch] * world
        lengths = [len(one) for one in ranks]
        found = [list(one) for one in ranks]
        assert lengths == [len(one) for one in found]
        seen = Counter(index for one in found for index in one)
        if uneven == "exact":
            assert seen == Counter(range(N))
        elif uneven == "drop":
            assert set(seen.values()) == {1}
            assert len(seen) == N - N % world
        else:
            assert set(seen) == set(range(N))
            assert sum(seen.values()) == N + -N % world
        orders.append(found)
    assert (orders[0] == orders[1]) is not shuffle


@given(
    worlds=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    steps=st.lists(st.integers(0, 9), min_size=5, max_size=5),
    batch=st.integers(1, 5),
)
def test_a_chain_of_restarts_with_other_worlds_neither_loses_nor_repeats(
    worlds: list[int], steps: list[int], batch: int
) -> None:
    """Each world trains some steps of `batch` and is killed; the last one ends the epoch."""
    seen: list[int] = []
    saved: str | None = None
    for number, (world, stop) in enumerate(zip(worlds, steps, strict=False)):
        ranks = samplers(world)
        if saved is not None:
            for one in ranks:
                one.load_state_dict(json.loads(saved))
        last = number == len(worlds) - 1
        running = [iter(one) for one in ranks]
        for _ in range(N if last else stop):
            drawn = [list(islice(one, batch)) for one in running]
            seen += [index for indices in drawn for index in indices]
            if not drawn[-1]:
                break
        states = [one.state_dict() for one in ranks]
        saved = json.dumps(states if len({json.dumps(one) for one in states}) > 1 else states[number % world])
        if len(seen) >= N:
            break
    assert sorted(seen) == list(range(N))
    assert len(seen) == N


def loader_of(workers: int, batch_size: int = 4, **options: Any) -> Any:
    return loaders.StatefulDataLoader(
        Numbers(), batch_size, sampler=EpochSampler(N, seed=7, rank=0, world_size=1), num_workers=workers, **options
    )


def batches(loader: Any, count: int | None = None) -> Iterator[list[int]]:
    return (batch.tolist() for batch in islice(loader, count))


@pytest.mark.parametrize(
    ("workers", "options"),
    [
        (0, {}),
        (0, {"snapshot_every_n_steps": 3}),
        (1, {"snapshot_every_n_steps": 3}),
        (2, {"persistent_workers": True}),
        (4, {"prefetch_factor": 4}),
        (2, {"drop_last": True}),
    ],
)
def test_a_stateful_loader_goes_on_behind_the_last_batch_that_training_got(
    workers: int, options: dict[str, Any]
) -> None:
    whole = list(batches(loader_of(workers, **options)))
    flat = [index for batch in whole for index in batch]
    assert len(set(flat)) == len(flat) == (N - N % 4 if options.get("drop_last") else N)
    first = loader_of(workers, **options)
    before = list(batches(first, 10))
    state = first.state_dict()
    del first
    second = loader_of(workers, **options)
    second.load_state_dict(state)
    assert before + list(batches(second)) == whole
    following = list(batches(second))  # the next epoch is another order, and whole
    assert len(following) == len(whole)
    assert following != whole
    assert len({index for batch in following for index in batch}) == len(flat)
    third = loader_of(workers, **options)  # saved at the end of an epoch: the next begins, and none is empty
    third.load_state_dict(second.state_dict())
    assert len(list(batches(third))) == len(whole)


@pytest.mark.parametrize(("workers", "cuts"), [(0, range(7)), (1, [6])])
@pytest.mark.parametrize("count", [21, 24])  # in batches of 4: the last one is short, or full
@pytest.mark.parametrize("says_epoch", [True, False])
def test_a_loop_over_epochs_goes_on_in_its_epoch_after_any_batch_the_last_one_too(
    workers: int, cuts: Any, count: int, says_epoch: bool
) -> None:
    def started(state: Any = None) -> tuple[EpochSampler, Any]:
        sampler = EpochSampler(count, seed=7, rank=0, world_size=1)
        loader = loaders.StatefulDataLoader(Numbers(count), 4, sampler=sampler, num_workers=workers)
        if state is not None:
            loader.load_state_dict(state)
        return sampler, loader

    for cut in cuts:
        _, first = started()
        running = batches(first)
        seen = [index for _ in range(cut) for index in next(running)]
        sampler, second = started(first.state_dict())  # while the loop still runs
        del running, first
        epochs = []
        for epoch in range(2):  # the one that was left, and the next
            if says_epoch:
                sampler.set_epoch(epoch)
            epochs.append([index for batch in batches(second) for index in batch])
        assert sorted(seen + epochs[0]) == sorted(epochs[1]) == list(range(count))
        assert epochs[1] == list(_at_epoch(count, 1))


def _at_epoch(count: int, epoch: int) -> EpochSampler:
    sampler = EpochSampler(count, seed=7, rank=0, world_size=1)
    sampler.set_epoch(epoch)
    return sampler


def test_a_state_of_one_world_goes_on_in_another_under_the_loader() -> None:
    loaders_of_2 = [loaders.StatefulDataLoader(Numbers(), 5, sampler=sampler, num_workers=0) for sampler in samplers(2)]
    seen = [index for loader in loaders_of_2 for batch in batches(loader, 3) for index in batch]
    state = loaders_of_2[1].state_dict()
    for sampler in samplers(3):
        loader = loaders.StatefulDataLoader(Numbers(), 5, sampler=sampler, num_workers=0)
        loader.load_state_dict(state)
        seen += [index for batch in batches(loader) for index in batch]
    assert sorted(seen) == list(range(N))


def test_iterating_changes_nothing_before_the_end() -> None:
    sampler = EpochSampler(N, seed=1, rank=0, world_size=1)
    first = list(islice(sampler, 10))
    assert sampler.epoch == 0
    assert list(islice(sampler, 10)) == first  # left early: from the beginning again
    ending = iter(sampler)
    assert len(list(ending)) == N
    assert [next(ending, None) for _ in range(3)] == [None] * 3  # loaders ask again
    assert sampler.epoch == 1
    sampler.set_epoch(0)
    assert list(islice(sampler, 10)) == first


def test_a_plain_loader_with_workers_is_warned_of_and_one_without_is_exact() -> None:
    sampler = EpochSampler(N, seed=7, rank=0, world_size=1)
    alone = iter(DataLoader(Numbers(), 4, sampler=sampler))
    seen = [index for _ in range(5) for index in next(alone).tolist()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = sampler.state_dict()
    again = EpochSampler(N, seed=7, rank=0, world_size=1)
    again.load_state_dict(state)
    assert sorted(seen + list(again)) == list(range(N))
    sampler = EpochSampler(N, rank=0, world_size=1)
    ahead = iter(DataLoader(Numbers(), 4, sampler=sampler, num_workers=1))
    next(ahead)
    with pytest.warns(UserWarning, match="StatefulDataLoader"):
        sampler.state_dict()


def test_what_does_not_fit_is_refused_in_words() -> None:
    state = EpochSampler(N, seed=7, rank=0, world_size=1).state_dict()
    with pytest.raises(UsageError, match="seed 7"):
        EpochSampler(N, seed=8, rank=0, world_size=1).load_state_dict(state)
    with pytest.raises(UsageError, match="n 101"):
        EpochSampler(N + 1, seed=7, rank=0, world_size=1).load_state_dict(state)
    with pytest.raises(UsageError, match="no state"):
        EpochSampler(N, rank=0, world_size=1).load_state_dict({"epoch": 1})
    with pytest.raises(UsageError, match="nothing to sample"):
        EpochSampler(0)
    for data in (5.0, iter([1])):
        with pytest.raises(UsageError, match="a dataset with a length"):
            EpochSampler(data)  # type: ignore[arg-type]
    for state_of_none in (5, [], "x"):
        with pytest.raises(UsageError, match="is no state"):
            EpochSampler(N, rank=0, world_size=1).load_state_dict(state_of_none)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="rank 2"):
        EpochSampler(N, rank=2, world_size=2)
    with pytest.raises(UsageError, match="both"):
        EpochSampler(N, rank=2)


def test_numbers_that_are_none_are_refused_in_words() -> None:
    for seed in (-1, 1 << 64, "a", 1.5, None):
        with pytest.raises(UsageError, match="64 bits"):
            EpochSampler(5, seed=seed)  # type: ignore[arg-type]
    for epoch in (-1, "a", 0.5):
        with pytest.raises(UsageError, match="count from 0"):
            EpochSampler(5).set_epoch(epoch)  # type: ignore[arg-type]


def test_torchrun_s_variables_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert len(EpochSampler(10)) == 3  # of 10: 3, 3, 2, 2
    assert list(EpochSampler(10, shuffle=False)) == [1, 5, 9]
