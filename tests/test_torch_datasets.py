"""ObjectDataset and TokenDataset: the bytes of each sample, in DataLoader workers of every kind, on files and S3."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import s3_support

pytest.importorskip("torch")
import torch
from servers.weed import Weed, weed
from torch.utils.data import DataLoader

import mlstor
from mlstor.errors import UsageError
from mlstor.stream.catalog import Catalog
from mlstor.torch.dataset import ObjectDataset, Sample
from mlstor.torch.token_dataset import TokenDataset

__all__ = ["weed"]
COUNT = 40


def content(number: int) -> bytes:
    return np.random.default_rng(number).bytes(number * 911 % 9000)


def names(count: int = COUNT) -> dict[str, bytes]:
    return {f"c{number % 3}/{number:04d}": content(number) for number in range(count)}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name, data in names().items():
        path = tmp_path / "objects" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "objects"


def as_text(sample: Sample) -> tuple[str, bytes, int]:
    return sample.key, bytes(sample.data), sample.index


def in_order() -> list[tuple[str, bytes, int]]:
    return [(key, data, index) for index, (key, data) in enumerate(sorted(names().items()))]


def test_samples_are_the_objects_by_their_number(directory: Path) -> None:
    dataset = ObjectDataset(directory, as_text)
    assert len(dataset) == COUNT
    assert [dataset[index] for index in range(COUNT)] == in_order()
    picked = [7, 3, 3, 39, 0]
    assert dataset.__getitems__(picked) == [in_order()[index] for index in picked]
    assert dataset.__getitems__([]) == []
    for wrong in (-1, COUNT):
        with pytest.raises(IndexError, match=f"sample {wrong} of {COUNT}"):
            dataset[wrong]


def test_without_a_transform_samples_are_in_memory_that_torch_takes_and_pass_to_another_process(
    directory: Path,
) -> None:
    sample = ObjectDataset(directory)[5]
    key, data, index = in_order()[5]
    assert torch.frombuffer(sample.data, dtype=torch.uint8).numpy().tobytes() == data
    there = pickle.loads(pickle.dumps(sample))
    assert (there.key, bytes(there.data), there.index) == (key, data, index)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("how", ["fork", "spawn", "forkserver"])
def test_workers_of_every_kind_read_although_the_parent_has_an_engine(
    directory: Path, tmp_path: Path, how: str
) -> None:
    (tmp_path / "tokens").write_bytes(np.arange(8192, dtype="<u2").tobytes())
    objects, tokens = ObjectDataset(directory, as_text), TokenDataset(tmp_path, prefix="tokens", record_nbytes=1024)
    mlstor.default_engine()
    assert objects[0] == in_order()[0]  # the parent's own reads have begun
    loader: DataLoader[Any] = DataLoader(
        torch.utils.data.ConcatDataset([_Items(objects), _Items(tokens)]),
        batch_size=8,
        num_workers=1,
        multiprocessing_context=how,
        collate_fn=list,
    )
    found = [sample for batch in loader for sample in batch]
    assert found[:COUNT] == in_order()
    assert [row[0] for row in found[COUNT:]] == list(range(0, 8192, 512))
    assert objects[1] == in_order()[1]  # and go on


class _Items(torch.utils.data.Dataset):  # type: ignore[misc]  # torch is untyped here, as it may not be installed
    """A dataset of which single samples are asked for; tensors as lists."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        sample = self.dataset[index]
        return sample.tolist() if isinstance(sample, torch.Tensor) else sample


def test_s3_objects_and_their_ranges_are_read_in_a_worker(weed: Weed) -> None:
    with s3_support.bucket(weed) as store:
        for name, data in names(12).items():
            store.write(f"train/{name}", data)
        tokens = np.random.default_rng(1).integers(0, 60000, 5000).astype("<u2")
        store.write("tokens/a", tokens[:3000].tobytes())
        store.write("tokens/b", tokens[3000:].tobytes())
        options = {"endpoint": weed.endpoint, "anonymous": True}
        dataset = ObjectDataset(f"{store.url}/train", as_text, options=options)
        loader: DataLoader[Any] = DataLoader(dataset, batch_size=5, num_workers=1, collate_fn=list)
        found = [sample for batch in loader for sample in batch]
        assert {key: data for key, data, _ in found} == names(12)
        records = TokenDataset(f"{store.url}/tokens", record_nbytes=2000, options=options)
        assert len(records) == 5
        rows = records.__getitems__([4, 0, 2])
        assert torch.equal(rows[0], torch.from_numpy(tokens[4000:].astype("int64")))
        assert torch.equal(rows[1], torch.from_numpy(tokens[:1000].astype("int64")))
        assert torch.equal(rows[2], torch.from_numpy(tokens[2000:3000].astype("int64")))


def test_token_records_are_those_of_all_files_without_their_tails(tmp_path: Path) -> None:
    parts = [
        np.random.default_rng(n).integers(0, 65536, size).astype("<u2") for n, size in enumerate((5000, 100, 2048))
    ]
    for number, part in enumerate(parts):
        (tmp_path / f"part{number}").write_bytes(part.tobytes())
    dataset = TokenDataset(tmp_path)  # 4096 bytes, 2048 tokens
    expected = [parts[0][:2048], parts[0][2048:4096], parts[2]]
    assert len(dataset) == 3
    rows = dataset.__getitems__([2, 0, 1, 0])
    assert [row.dtype for row in rows] == [torch.int64] * 4
    for row, number in zip(rows, (2, 0, 1, 0), strict=True):
        assert np.array_equal(row.numpy(), expected[number])
    first = dataset[0]
    dataset[1]  # a record stays what it was when the next is read
    assert np.array_equal(first.numpy(), expected[0])
    raw = TokenDataset(tmp_path, lambda row: row[:2], raw=True)[2]
    assert raw.dtype == torch.uint16
    assert raw.tolist() == parts[2][:2].tolist()
    other = TokenDataset(tmp_path, record_nbytes=40, dtype="int32")[0]
    assert np.array_equal(other.numpy(), parts[0].view("<i4")[:10])


def test_errors_say_what_and_of_which_object(directory: Path, tmp_path: Path) -> None:
    dataset = ObjectDataset(directory, as_text)
    victim = directory / dataset.objects.name(4)
    victim.unlink()
    with pytest.raises(FileNotFoundError) as raised:
        dataset.__getitems__([1, 4, 2])
    assert raised.value.errno == errno.ENOENT
    assert "0012" in str(raised.value.filename)
    victim.write_bytes(b"longer than it was, or shorter" * 999)
    with pytest.raises(OSError, match="another length"):
        dataset[4]
    assert dataset[5] == in_order()[5]  # what failed leaves nothing behind
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UsageError, match="no objects"):
        ObjectDataset(empty)
    for wrong in ("a", 1.5, slice(1, 3), True):
        with pytest.raises(TypeError, match="whole numbers"):
            dataset[wrong]  # type: ignore[index]
    assert dataset[torch.tensor(5)] == dataset[np.int32(5)] == in_order()[5]  # type: ignore[index]
    with pytest.raises(UsageError, match="not int"):
        ObjectDataset(5)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="the option endpont is not for this kind of store"):
        ObjectDataset("s3://bucket/train", options={"endpont": "http://127.0.0.1:9"})
    with pytest.raises(UsageError, match="does not exist"):
        ObjectDataset(tmp_path / "absent")
    with pytest.raises(UsageError, match="holds a record"):
        TokenDataset(directory, record_nbytes=1 << 20)
    with pytest.raises(UsageError, match="dtype"):
        TokenDataset(directory, dtype="float32")


def broken(sample: Sample) -> int:
    raise ValueError("cannot decode")


@pytest.mark.skipif(not hasattr(ValueError, "add_note"), reason="Python 3.11 has notes")
def test_a_transform_s_error_names_the_object(directory: Path) -> None:
    with pytest.raises(ValueError, match="cannot decode") as raised:
        ObjectDataset(directory, broken)[3]
    assert raised.value.__notes__ == [f"in the transform of {in_order()[3][0]!r}"]


def test_a_worker_s_storage_error_keeps_its_text(directory: Path) -> None:
    dataset = ObjectDataset(directory, as_text)
    (directory / dataset.objects.name(0)).unlink()
    with pytest.raises(FileNotFoundError, match=r"\[Errno 2\].*0000"):
        list(DataLoader(dataset, num_workers=1, collate_fn=list))


def test_the_listing_is_made_once_and_goes_with_its_dataset(directory: Path) -> None:
    dataset = ObjectDataset(directory, as_text)
    assert isinstance(dataset.objects, Catalog)
    path = dataset.objects.path
    (directory / "later").write_bytes(b"x")
    copy = pickle.loads(pickle.dumps(dataset))  # as spawn does it: the same catalog, no listing of its own
    assert len(copy) == COUNT
    assert copy[9] == in_order()[9]
    del copy
    assert os.path.exists(path)
    del dataset
    assert not os.path.exists(path)
