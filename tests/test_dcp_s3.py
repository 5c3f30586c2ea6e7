"""Distributed checkpoints in an object store."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch.distributed.checkpoint as dcp  # noqa: E402
from dcp_support import a_state, assert_same, blank, load, quietly, save  # noqa: E402
from s3_support import bucket, listed  # noqa: E402
from servers.weed import Weed, weed  # noqa: E402, F401 - a fixture

from mlstor.torch import StorageReader, StorageWriter  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


def test_a_checkpoint_in_a_bucket_is_replaced_loaded_and_damage_found(weed: Weed) -> None:  # noqa: F811
    with bucket(weed) as store:
        url = f"{store.url}/run/step1"
        options: dict[str, Any] = {"endpoint": weed.endpoint, "anonymous": True}
        old, new = a_state(1), a_state(2)
        new["larger"] = torch.randn(6_000_000)
        save(old, url, options=options)
        with pytest.warns(UserWarning, match="there is a checkpoint already"):
            save(new, url, options=options)
        names = {name: nbytes for name, nbytes in listed(store).items() if "/step1/" in name}
        assert sorted(names) == [
            "run/step1/.metadata",
            "run/step1/__0_1.distcp",
            "run/step1/__0_1.distcp.sums",
        ]
        loaded, reader = load(new, url, options=options)
        assert_same(loaded, new)
        assert reader.unverified_bytes == 0
        future = quietly(
            dcp.async_save,
            old,
            checkpoint_id=f"{store.url}/run/step2",
            storage_writer=StorageWriter(url, options=options),
        )
        future.result()
        into = blank(old)
        quietly(dcp.load, into, storage_reader=StorageReader(f"{store.url}/run/step2", options=options))
        assert_same(into, old)
        content = bytearray(store.read("run/step1/__0_1.distcp"))
        content[20_000_000] ^= 4
        store.write("run/step1/__0_1.distcp", bytes(content))
        with pytest.raises(BaseException, match=r"of larger.*differs"):
            load(new, url, options=options)
