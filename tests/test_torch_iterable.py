"""ObjectIterableDataset: each object once over ranks and workers, epochs, exact restarts under torchdata's loader."""

from __future__ import annotations

import gc
import os
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("torchdata")

from torch.utils.data import DataLoader
from torchdata import stateful_dataloader as loaders

from mlstor.errors import UsageError
from mlstor.torch.dataset import Sample
from mlstor.torch.iterable import ObjectIterableDataset

COUNT = 61

pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torchdata 0.11 on torch 2.13
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for number in range(COUNT):
        (tmp_path / f"{number:03d}").write_bytes(number.to_bytes(2, "little") * (1 + number * 37))
    return tmp_path


def number_of(sample: Sample) -> int:
    """The number in an object's bytes, all of which say the same."""
    values = set(memoryview(bytes(sample.data)).cast("H"))
    assert len(values) == 1
    (found,) = values
    assert found == int(sample.key) == sample.index
    return found


def dataset_of(directory: Path, **options: Any) -> ObjectIterableDataset:
    return ObjectIterableDataset(directory, number_of, seed=3, **{"rank": 0, "world_size": 1, **options})


def drawn(loader: Any, count: int | None = None) -> list[int]:
    return [number for batch in islice(loader, count) for number in batch.tolist()]


@pytest.mark.parametrize(("workers", "world"), [(0, 1), (0, 3), (2, 1), (2, 2)])
def test_each_object_comes_once_over_ranks_and_workers(directory: Path, workers: int, world: int) -> None:
    orders = []
    for epoch in (0, 5):
        found: list[int] = []
        for rank in range(world):
            dataset = dataset_of(directory, rank=rank, world_size=world)
            dataset.set_epoch(epoch)
            found += drawn(DataLoader(dataset, 4, num_workers=workers))
        assert sorted(found) == list(range(COUNT))
        orders.append(found)
    assert orders[0] != orders[1]


def test_a_worker_without_a_share_ends_at_once(tmp_path: Path) -> None:
    (tmp_path / "000").write_bytes(b"\0\0")
    assert drawn(DataLoader(dataset_of(tmp_path), 4, num_workers=2)) == [0]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_restart_goes_on_exactly(directory: Path, workers: int) -> None:
    def loader() -> Any:
        return loaders.StatefulDataLoader(dataset_of(directory), 3, num_workers=workers)

    whole = drawn(loader())
    first = loader()
    before = drawn(first, 7)
    state = first.state_dict()
    del first
    second = loader()
    second.load_state_dict(state)
    assert before + drawn(second) == whole
    assert drawn(second) == whole  # without set_epoch: the same epoch


def test_a_restart_after_any_batch_goes_on_exactly(directory: Path) -> None:
    """Shares of 31 and 30 in batches of 3: workers end with a short batch and with a full one."""
    first = loaders.StatefulDataLoader(dataset_of(directory), 3, num_workers=2)
    whole: list[int] = []
    states = []
    for batch in first:
        whole += batch.tolist()
        states.append((len(whole), first.state_dict()))
    for done, state in states[-4:]:
        second = loaders.StatefulDataLoader(dataset_of(directory), 3, num_workers=2)
        second.load_state_dict(state)
        assert drawn(second) == whole[done:]


def test_an_iteration_stays_at_its_end_and_one_that_is_left_holds_nothing_open(directory: Path) -> None:
    dataset = dataset_of(directory)
    ended = iter(dataset)
    assert len(list(ended)) == COUNT
    assert next(ended, None) is None
    gc.collect()
    gc.disable()  # reference counts alone end what is left early
    try:
        open_before = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
        for _ in range(3):
            left = iter(dataset)
            next(left)
            del left
        assert (len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))) == open_before
    finally:
        gc.enable()


def test_persistent_workers_take_the_epoch_that_is_set(directory: Path) -> None:
    dataset = dataset_of(directory)
    loader = DataLoader(dataset, 4, num_workers=2, persistent_workers=True)
    orders = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        orders.append(drawn(loader))
    alone = dataset_of(directory)
    alone.set_epoch(1)
    assert orders[1] == drawn(DataLoader(alone, 4, num_workers=2)) != orders[0]


def test_a_state_of_another_share_is_refused_in_words(directory: Path) -> None:
    state = iter(dataset_of(directory, rank=1, world_size=2)).state_dict()
    running = iter(dataset_of(directory, rank=1, world_size=3))
    with pytest.raises(UsageError, match="share 1 of 2"):
        running.load_state_dict(state)
    with pytest.raises(UsageError, match="epochs count"):
        dataset_of(directory).set_epoch(-1)
    with pytest.raises(UsageError, match="in_flight"):
        dataset_of(directory, in_flight=0)
