"""One listing for all ranks: made once, checked, handed to other hosts; and refusals that are said once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from threading import Barrier, Thread

import numpy as np
import pytest
from object_store import MemoryStore

from mlstor.errors import MlstorError, UsageError
from mlstor.storage.store import Page
from mlstor.stream import listing
from mlstor.stream.catalog import Catalog
from mlstor.world import Alone, World


class Together(World):
    """Ranks that are threads of this process, on as many hosts as it is told."""

    def __init__(self, rank: int, hosts: list[str], barrier: Barrier, said: list[bytes]) -> None:
        super().__init__(rank, [(host, "") for host in hosts])
        self._barrier, self._said = barrier, said

    def __exit__(self, *_: object) -> None:
        return None

    def barrier(self, phase: str) -> None:
        self._barrier.wait(60)

    def allgather(self, payload: bytes) -> list[bytes]:
        self._said[self.rank] = payload
        self._barrier.wait(60)
        found = list(self._said)
        self._barrier.wait(60)
        return found

    def gather(self, payload: bytes) -> list[bytes] | None:
        found = self.allgather(payload)
        return found if self.rank == 0 else None

    def bcast(self, payload: bytes) -> bytes:
        return self.allgather(payload)[0]

    def abort(self, error: BaseException) -> None:  # type: ignore[override]
        self._barrier.abort()
        raise error


def at_all_ranks(hosts: list[str], work: object) -> list[object]:
    """What `work(world)` returns or raises at each rank."""
    barrier, said = Barrier(len(hosts)), [b""] * len(hosts)
    found: list[object] = [None] * len(hosts)

    def run(rank: int) -> None:
        try:
            found[rank] = work(Together(rank, hosts, barrier, said))  # type: ignore[operator]
        except BaseException as error:
            found[rank] = error

    threads = [Thread(target=run, args=(rank,)) for rank in range(len(hosts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def objects(count: int = 50) -> dict[str, bytes]:
    return {f"dir-{i % 3}/object {i}": bytes(i) for i in range(count)}


def names(catalog: Catalog) -> list[str]:
    return [catalog.name(i) for i in range(len(catalog))]


def test_alone_the_listing_is_whole_and_its_file_is_gone(tmp_path: Path) -> None:
    store = MemoryStore(objects())
    found = listing.shared(store, Alone(), directory=str(tmp_path))
    assert names(found.catalog) == sorted(objects())
    assert (found.source, found.catalog.total_bytes) == ("listed", sum(range(50)))
    assert os.listdir(tmp_path) == []


def test_only_keys_with_the_prefix_are_listed(tmp_path: Path) -> None:
    found = listing.shared(MemoryStore(objects()), Alone(), prefix="dir-1/", directory=str(tmp_path))
    assert names(found.catalog) == sorted(key for key in objects() if key.startswith("dir-1/"))


@pytest.mark.parametrize("hosts", [["a", "a", "a"], ["a", "a", "b", "b"], ["a", "b", "c"], ["a", "b", "a", "b"]])
def test_one_rank_lists_and_all_have_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hosts: list[str]
) -> None:
    monkeypatch.setattr(listing, "_PIECE_BYTES", 1000)  # so that a catalog goes in several pieces
    monkeypatch.setattr(listing, "_same", lambda path, digest: None)  # hosts see none of another's files
    store = MemoryStore(objects())
    found = at_all_ranks(hosts, lambda world: listing.shared(store, world, directory=str(tmp_path)))
    assert all(isinstance(one, listing.Listing) for one in found), found
    assert store.listings == 1
    assert {one.catalog.digest for one in found} == {found[0].catalog.digest}  # type: ignore[attr-defined]
    assert all(names(one.catalog) == sorted(objects()) for one in found)  # type: ignore[attr-defined]
    assert os.listdir(tmp_path) == []


def test_per_node_each_host_lists_its_own_store_once(tmp_path: Path) -> None:
    stores = {"a": MemoryStore({"only a": b"1"}), "b": MemoryStore({"only b": b"22"})}
    found = at_all_ranks(
        ["a", "a", "b", "b"],
        lambda world: listing.shared(stores[world.hostname], world, per_node=True, directory=str(tmp_path)),
    )
    assert [names(one.catalog) for one in found] == [["only a"]] * 2 + [["only b"]] * 2  # type: ignore[attr-defined]
    assert [store.listings for store in stores.values()] == [1, 1]
    assert os.listdir(tmp_path) == []


def test_a_catalog_that_was_given_is_used_and_stays(tmp_path: Path) -> None:
    Catalog.build([Page(["dir-0/object 0"], [0])], tmp_path / "c")
    store = MemoryStore(objects())
    found = listing.shared(store, Alone(), catalog=str(tmp_path / "c"))
    assert (names(found.catalog), found.source, store.listings) == (["dir-0/object 0"], "catalog", 0)
    assert os.listdir(tmp_path) == ["c"]


def test_a_list_file_may_leave_sizes_to_be_asked_for(tmp_path: Path) -> None:
    (tmp_path / "names").write_text("dir-1/object 1\ndir-2/object 5\t5\n")
    store = MemoryStore(objects())
    found = listing.shared(store, Alone(), list_file=str(tmp_path / "names"), directory=str(tmp_path))
    assert found.catalog.total_bytes is None
    sized = listing.sized(store, found.catalog, str(tmp_path))
    assert (names(sized), sized.sizes.tolist()) == (["dir-1/object 1", "dir-2/object 5"], [1, 5])
    assert os.listdir(tmp_path) == ["names"]


def test_sizes_of_many_objects_come_in_their_order(tmp_path: Path) -> None:
    store = MemoryStore(objects(3000), seed=5)
    catalog = listing.shared(store, Alone(), directory=str(tmp_path)).catalog
    again = listing.with_sizes(store, catalog, tmp_path / "again")
    assert again.digest == catalog.digest
    transfers = store.transfers(in_flight=64)
    some = np.array([2999, 0, 17], np.uint64)
    assert listing.sizes_of(transfers, catalog, some).tolist() == catalog.sizes[some].tolist()


def refused(found: list[object], said: str) -> None:
    assert all(isinstance(one, UsageError) for one in found), found
    assert {str(one) for one in found} == {str(found[0])}
    assert said in str(found[0])


def test_an_empty_prefix_is_refused_on_all_ranks(tmp_path: Path) -> None:
    store = MemoryStore(objects())
    refused(
        at_all_ranks(["a", "b"], lambda world: listing.shared(store, world, prefix="no/", directory=str(tmp_path))),
        "has no objects whose key begins with 'no/'",
    )
    assert os.listdir(tmp_path) == []


def test_an_object_of_the_catalog_that_is_not_there_is_refused(tmp_path: Path) -> None:
    Catalog.build([Page(["dir-0/object 0", "gone"], [0, 1])], tmp_path / "c")
    store = MemoryStore(objects())
    refused(
        at_all_ranks(["a", "b"], lambda world: listing.shared(store, world, catalog=str(tmp_path / "c"))),
        "gone is in the catalog and not in",
    )


def test_an_object_of_another_size_is_refused() -> None:
    store = MemoryStore({"a": b"12345"})

    class Old(MemoryStore):
        def list(self, prefix: str = "") -> Iterator[Page]:
            yield Page(["a"], [4])

    old = Old(store.objects)
    with pytest.raises(UsageError, match="'a' has 5 bytes in memory://objects and 4 in the catalog"):
        listing.shared(old, Alone())


def test_a_missing_bucket_is_a_users_mistake_and_a_broken_one_is_not(tmp_path: Path) -> None:
    class Broken(MemoryStore):
        error = OSError(2, "no such bucket", "memory://objects")

        def list(self, prefix: str = "") -> Iterator[Page]:
            raise self.error

    broken = Broken({})
    refused(
        at_all_ranks(["a", "b"], lambda world: listing.shared(broken, world, directory=str(tmp_path))), "no such bucket"
    )
    Broken.error = OSError(5, "the disk is gone", "memory://objects")
    with pytest.raises(OSError, match="the disk is gone") as caught:
        listing.shared(broken, Alone(), directory=str(tmp_path))
    assert not isinstance(caught.value, MlstorError)
    assert os.listdir(tmp_path) == []
