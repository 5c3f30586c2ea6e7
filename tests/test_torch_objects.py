"""The same calls with URLs, on a real S3 server: published whole or not at all, verified, loaded in place."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
from s3_support import bucket, listed
from servers.weed import Weed, weed  # noqa: F401
from torch_support import MIB, assert_same, bits, content, torch

import mlstor
from mlstor.blob.target import open_blob
from mlstor.torch import CheckpointDirectory, ObjectDataset, load, load_safetensors, save, save_safetensors


def state_of(seed: int) -> dict[str, Any]:
    """An object of several parts, and small and empty tensors in it."""
    large = {str(index): bits(seed + index, torch.int16, (5 * MIB + index,)) for index in range(3)}
    return {**large, "small": bits(seed, torch.float32, (9, 4)).t(), "empty": torch.empty(0), "step": seed}


@pytest.fixture(scope="module")
def store(weed: Weed) -> Iterator[Any]:  # noqa: F811
    with bucket(weed) as opened:
        yield opened


def stored(store: Any, key: str) -> bytes:
    blob = open_blob(key, store=store)
    return blob.read(0, blob.stat().nbytes)


def test_an_object_is_saved_loaded_and_read_by_torch(store: Any) -> None:
    save(state_of(1), "run/step1.pt", store=store)
    assert listed(store, "run/").keys() == {"run/step1.pt"}
    assert_same(state_of(1), load("run/step1.pt", store=store))
    assert_same(state_of(1), torch.load(io.BytesIO(stored(store, "run/step1.pt"))))
    into = state_of(2)
    assert load("run/step1.pt", store=store, into=into) is into
    assert_same(state_of(1), into)


def test_an_object_of_torchs_own_is_verified(store: Any, tmp_path: pathlib.Path) -> None:
    torch.save(state_of(3), tmp_path / "stock.pt")
    whole = bytearray((tmp_path / "stock.pt").read_bytes())
    store.write("stock.pt", bytes(whole))
    assert_same(state_of(3), load("stock.pt", store=store))
    whole[whole.index(content(state_of(3)["1"].untyped_storage())) + 5 * MIB] ^= 4
    store.write("stock.pt", bytes(whole))
    with pytest.raises(mlstor.CorruptionError, match=r"stock\.pt: tensor state\['1'\]"):
        load("stock.pt", store=store)
    with pytest.raises(mlstor.CorruptionError, match="undefined"):
        load("stock.pt", store=store, into=state_of(4))


def test_a_url_is_enough(weed: Weed, store: Any) -> None:  # noqa: F811
    options = {"endpoint": weed.endpoint, "anonymous": True}
    url = f"{store.url.rstrip('/')}/deep/er/model.pt"
    save(state_of(5)["small"], url, options=options)
    assert torch.equal(load(url, options=options), state_of(5)["small"])
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        load(f"{store.url.rstrip('/')}/none.pt", options=options)


def test_safetensors_in_a_bucket_are_loaded_verified_and_read_by_the_package(store: Any) -> None:
    package = pytest.importorskip("safetensors.torch")
    state = {"w": bits(1, torch.bfloat16, (10 * MIB,)), "b": bits(2, torch.float32, (9, 4))}
    save_safetensors(state, "run/model.safetensors", {"format": "pt"}, store=store)
    whole = bytearray(stored(store, "run/model.safetensors"))
    for found in (load_safetensors("run/model.safetensors", store=store), package.load(bytes(whole))):
        assert_same(dict(sorted(state.items())), dict(sorted(found.items())))
    into = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    load_safetensors("run/model.safetensors", store=store, into=into)
    assert_same(state, into)
    whole[-5] ^= 1
    store.write("run/model.safetensors", bytes(whole))
    with pytest.raises(mlstor.CorruptionError, match=r"model\.safetensors: tensor '.*' \(bytes \d+ to"):
        load_safetensors("run/model.safetensors", store=store)


def test_a_bucket_that_is_not_there_is_said(weed: Weed) -> None:  # noqa: F811
    url, options = "s3://no-such-bucket/x.pt", {"endpoint": weed.endpoint, "anonymous": True}
    for call in (
        lambda: save(state_of(1)["small"], url, options=options),
        lambda: load(url, options=options),
        lambda: load_safetensors("s3://no-such-bucket/x.safetensors", options=options),
        lambda: ObjectDataset("s3://no-such-bucket/x", options=options),
        lambda: CheckpointDirectory("s3://no-such-bucket/x", options=options).latest(),
    ):
        with pytest.raises(OSError, match=r"no-such-bucket"):
            call()


def test_the_old_format_comes_from_an_object_too(store: Any, tmp_path: pathlib.Path) -> None:
    torch.save(state_of(6), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    store.write("old.pt", (tmp_path / "old.pt").read_bytes())
    with pytest.warns(mlstor.torch.UnverifiedWarning, match="before 1.6"):
        assert_same(state_of(6), load("old.pt", store=store))
