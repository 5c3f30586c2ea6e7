"""Directories as stores: listing, single objects, transfers, and what a user gets wrong."""

from __future__ import annotations

import errno
import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
from files_support import make, run

from mlstor.errors import UsageError
from mlstor.settings import Settings
from mlstor.storage import posix, posix_list
from mlstor.storage.posix import PosixStore
from mlstor.storage.store import ObjectInfo, open_store
from mlstor.storage.transfers import Kind, Memory, Op


def listed(store: PosixStore, prefix: str = "") -> dict[str, int]:
    found = [pair for page in store.list(prefix) for pair in zip(page.keys, page.sizes, strict=True)]
    assert len(dict(found)) == len(found)
    return dict(found)


def tree(root: Path, keys: dict[str, int]) -> None:
    for key, size in keys.items():
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)


KEYS = {
    "a": 1,
    "train/0": 2,
    "train/1 %+ä": 3,
    "train/deep/er/x": 4,
    "train-2/0": 5,
    "trainer": 0,
    ".hidden/.y": 7,
    "val/0": 8,
}


def test_all_files_are_listed_with_their_sizes(tmp_path: Path) -> None:
    tree(tmp_path, KEYS)
    assert listed(posix.open(str(tmp_path))) == KEYS


@pytest.mark.parametrize(
    "prefix", ["t", "train", "train/", "train/d", "train/deep/er", "train/deep/er/x", "no", "a/b/"]
)
def test_a_prefix_is_of_the_key_and_not_of_a_directory(tmp_path: Path, prefix: str) -> None:
    tree(tmp_path, KEYS)
    expected = {key: size for key, size in KEYS.items() if key.startswith(prefix)}
    assert listed(posix.open(str(tmp_path)), prefix) == expected


def test_what_is_no_object_is_left_out(tmp_path: Path) -> None:
    tree(tmp_path, {"a": 1, ".mlstor-run": 2, ".mlstor-dir/x": 3, ".a.0123abcd.mlstor-tmp": 4, "b.mlstor-tmp": 5})
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "nowhere").symlink_to("missing")
    (tmp_path / "above").symlink_to("..")
    store = posix.open(str(tmp_path))
    assert listed(store) == {"a": 1, "link": 1, "b.mlstor-tmp": 5}
    for ask in (store.stat, store.read):
        with pytest.raises(OSError, match="no regular file"):
            ask("fifo")


def test_what_killed_writes_left_is_removed_below_a_directory_alone(tmp_path: Path) -> None:
    names = {
        "run/.a.0123abcd.mlstor-tmp": 4,
        "run/d/.b.0123abcd.mlstor-tmp": 4,
        ".c.0123abcd.mlstor-tmp": 4,
        "run/a": 1,
    }
    tree(tmp_path, names)
    assert posix.open(str(tmp_path)).remove_leftovers("run") == 2
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == [".c.0123abcd.mlstor-tmp", "run", "run/a"]
    assert posix.open(str(tmp_path)).remove_leftovers("none") == 0


def test_a_large_directory_is_listed_in_pages(tmp_path: Path) -> None:
    for i in range(3500):
        (tmp_path / f"{i:05}").touch()
    pages = list(posix.open(str(tmp_path)).list())
    assert max(len(page.keys) for page in pages) <= 1000
    assert sorted(key for page in pages for key in page.keys) == [f"{i:05}" for i in range(3500)]


def test_a_listing_that_nobody_goes_on_with_ends_its_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(posix_list, "_PAGE", 1)
    monkeypatch.setattr(posix_list, "_MOST_WAITING", 2)
    tree(tmp_path, {f"{i % 5}/{i}": 1 for i in range(200)})
    before = threading.active_count()
    pages = posix.open(str(tmp_path)).list()
    next(pages)
    assert threading.active_count() > before
    pages.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_a_directory_that_goes_away_is_an_error_only_if_it_is_the_store_s(tmp_path: Path) -> None:
    root = tmp_path / "root"
    tree(root, {"a/b": 1})
    store = posix.open(str(root))
    (root / "a" / "b").unlink()
    (root / "a").rmdir()
    root.rmdir()
    with pytest.raises(FileNotFoundError):
        list(store.list())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every directory")
def test_a_directory_that_may_not_be_read_is_an_error(tmp_path: Path) -> None:
    tree(tmp_path, {"a/b": 1})
    (tmp_path / "a").chmod(0)
    with pytest.raises(PermissionError):
        list(posix.open(str(tmp_path)).list())


def test_an_error_of_a_listing_reaches_its_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, {"a/b": 1, "c": 1})
    real = os.scandir

    def refusing(path: str) -> object:
        if path.endswith("/a"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return real(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(OSError, match="Input/output"):
        list(posix.open(str(tmp_path)).list())


@pytest.mark.parametrize("durable", [True, False])
def test_objects_are_written_read_looked_at_and_removed(tmp_path: Path, durable: bool) -> None:
    store = open_store(str(tmp_path), durable=durable)
    content = bytes(range(256)) * 5000
    store.write("deep/er/key ä", content)
    assert store.stat("deep/er/key ä") == ObjectInfo(len(content))
    assert store.read("deep/er/key ä") == content
    assert store.read("deep/er/key ä", offset=300, nbytes=1000) == content[300:1300]
    buffer = np.zeros(len(content) // 4, np.uint32)
    assert store.read("deep/er/key ä", buffer) == len(content)
    assert buffer.tobytes() == content
    store.write("deep/er/key ä", b"other")
    assert store.read("deep/er/key ä") == b"other"
    store.write("deep/x", b"")
    assert store.read("deep/x") == b""
    store.delete(["deep/er/key ä", "missing", "no/such/directory"])
    assert listed(store) == {"deep/x": 0}
    assert not (tmp_path / "deep" / "er").exists()
    store.delete(["deep/x"])
    assert os.listdir(tmp_path) == []
    store.close()


def test_errors_name_the_file(tmp_path: Path) -> None:
    tree(tmp_path, {"a": 5, "d/x": 1})
    store = posix.open(str(tmp_path))
    for call in (store.stat, store.read):
        with pytest.raises(FileNotFoundError) as caught:
            call("missing")
        assert caught.value.filename == str(tmp_path / "missing")
        with pytest.raises(IsADirectoryError):
            call("d")
    with pytest.raises(OSError, match="shorter") as short:
        store.read("a", offset=3, nbytes=3)
    assert short.value.errno == errno.ENODATA
    with pytest.raises(ValueError, match="do not fit"):
        store.read("a", bytearray(4))
    with pytest.raises(IsADirectoryError) as refused:
        store.delete(["a", "d"])
    assert refused.value.filename == str(tmp_path / "d")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("key", ["", "/a", "../a", "a/..", "a/../b", "a/", "a\0"])
def test_keys_do_not_leave_the_directory(tmp_path: Path, key: str) -> None:
    store = posix.open(str(tmp_path))
    for call in (store.stat, store.read):
        with pytest.raises(ValueError, match="is no key"):
            call(key)
    with pytest.raises(ValueError, match="is no key"):
        store.write(key, b"")
    with pytest.raises(ValueError, match="key"):
        store.delete([key])
    if key in ("/a", "../a", "a/../b"):
        with pytest.raises(ValueError, match="no prefix"):
            store.list(key)


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("/data/x", "/data/x"),
        ("/data//x/", "/data/x"),
        ("/data/100%20", "/data/100%20"),
        ("file:///data/x%20%25y", "/data/x %y"),
        ("file://localhost/data", "/data"),
    ],
)
def test_paths_and_file_urls(url: str, path: str) -> None:
    assert posix.path_of(url) == path


def test_mistakes_are_said_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for url, said in (
        ("file://elsewhere/data", "three slashes"),
        ("", "no directory"),
        ("file://", "no directory"),
        (str(tmp_path / "missing"), "does not exist"),
        (str(tmp_path / "file"), "not a directory"),
    ):
        with pytest.raises(UsageError, match=said):
            posix.open(url)
    assert posix.open(str(tmp_path / "new" / "er"), create=True).list
    assert (tmp_path / "new" / "er").is_dir()


def test_a_store_opens_again_where_it_is_unpickled(tmp_path: Path) -> None:
    url = tmp_path.as_uri()
    store = posix.open(url, durable=False, settings=Settings(workers=1, depth=2, block_bytes=65536))
    store.write("a", b"content")
    again = pickle.loads(pickle.dumps(store))
    assert (again.url, again.durable) == (url, False)
    assert again.read("a") == b"content"
    again.close()
    store.close()
    store.close()


def test_transfers_have_an_engine_of_their_own_and_are_described(tmp_path: Path) -> None:
    store = posix.open(str(tmp_path))
    assert store.describe()["reason"] == "nothing was read"
    keys, contents = make(tmp_path, [70_000] * 5)
    files = store.transfers(workers=1, in_flight=4)
    assert files.engine.settings.depth == 4
    buffer = bytearray(5 * 70_000)
    done = run(files, keys, buffer=buffer, memory=Memory.BUFFER, place=np.arange(5) * 70_000, room=70_000)
    assert (done["kind"] == Kind.OK).all()
    assert buffer == b"".join(contents)
    run(files, ["new"], Op.WRITE, b"abc", memory=Memory.BUFFER, nbytes=3)
    assert store.read("new") == b"abc"
    described = store.describe()
    assert described["scheme"] == "file"
    assert described["direct"] == files.direct
    assert described["reason"] == files.reason
    assert "durable" in described
    store.close()
    with pytest.raises(ValueError, match="closed"):
        files.cancel()
