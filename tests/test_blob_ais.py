"""Blobs in AIStore: the same as elsewhere, by its own parts and checksums."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from ais_support import bucket
from blob_support import LARGE, Case, Row, check_round_trip, noise_array, one_piece
from servers.aistore import Cluster, aistore  # noqa: F401

from mlstor.blob import download, upload
from mlstor.blob.target import open_blob, open_directory
from mlstor.blob.types import Blob
from mlstor.storage.ais import AisStore

MIB = 1 << 20


@pytest.fixture(scope="module")
def store(aistore: Cluster) -> Iterator[AisStore]:  # noqa: F811
    with bucket(aistore, prefix="run 1") as made:
        yield made


@pytest.fixture
def blob(store: AisStore) -> Blob:
    return open_blob("a/blob.pt", store=store)


def test_pieces_come_back_with_their_digests(blob: Blob) -> None:
    rows = [Row(0, 1, 300_001, 0), Row(70_000, 0, 5000, 1), Row(64, 1, 1_200_001, 0), Row(1, 0, 100, -1)]
    check_round_trip(blob, Case(rows, [3, 0, 1, 2], 5000, 1, "crc32"), frozenset({1}))
    check_round_trip(blob, Case([], [], 0, 0, "crc32c"))


def test_large_blobs_go_in_parts_and_come_in_ranges(blob: Blob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "PART_BYTES", 5 * MIB)
    monkeypatch.setattr(download, "RANGE_BYTES", MIB)
    check_round_trip(blob, LARGE, frozenset({3}))


def test_an_object_of_other_content_has_another_etag(blob: Blob) -> None:
    data = noise_array(2000)
    first = blob.publish(1000, one_piece(data[:1000]), keep=data)
    blob.publish(1000, one_piece(data[1000:]), keep=data)
    assert first.etag
    room = np.zeros(1000, "u1")
    with pytest.raises(OSError, match="changed"):
        blob.fetch(one_piece(room), etag=first.etag)


def test_names_of_a_directory(store: AisStore) -> None:
    directory = open_directory("", store=store)
    data = noise_array(1)
    directory.blob("below/b").publish(1, one_piece(data), keep=data)
    directory.blob("b").publish(1, one_piece(data), keep=data)
    assert directory.names() == ["b"]
    directory.remove(["b", "below/b", "never there"])
    assert directory.names() == []
