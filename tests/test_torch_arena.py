"""The arena: one state at a time, the same memory again, and a file's bytes where the file has them."""

from __future__ import annotations

import ctypes
import os
import random
import threading
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
from engine_support import finish, python
from torch_support import torch

from mlstor.blob.target import open_blob
from mlstor.errors import UsageError
from mlstor.torch import arena as arenas
from mlstor.torch.arena import Arena, BusyError, copy_memory
from mlstor.torch.pickling import describe
from mlstor.torch.staging import stage


def written(state: Any, arena: Arena, path: Path) -> bytes:
    staged = stage(describe(state), path.stem, arena)
    try:
        staged.publish(open_blob(path))
    finally:
        staged.lease.release()
    return path.read_bytes()


def state(scale: float = 1.0) -> dict[str, Any]:
    weight = torch.arange(600_000, dtype=torch.float32) * scale
    return {
        "weight": weight,
        "view": weight[1000:2000],
        "half": torch.arange(999).to(torch.bfloat16),
        "empty": torch.empty(0),
        "step": 7,
    }


def assert_same(found: Any, wanted: Any) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value


def test_the_file_of_a_staged_state_is_one_that_torch_and_zip_read(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    written(state(), Arena(), path)
    found = torch.load(path)
    assert_same(found, state())
    assert found["view"].untyped_storage()._cdata == found["weight"].untyped_storage()._cdata
    assert_same(torch.load(path, mmap=True), state())
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_a_large_record_lies_where_a_fresh_tensor_takes_it_without_a_copy() -> None:
    layout = stage(describe(state()), "a", Arena()).layout
    large = next(record for record in layout.placed if record.nbytes > 1 << 20)
    # A process of its own: in this one glibc may hold a freed piece that is large enough.
    fresh = int(finish(python("import torch; print(torch.empty(16 << 20).data_ptr())")))
    assert large.offset % 4096 == fresh % 4096 == 64


def test_nothing_of_the_state_before_is_left_in_the_next_file(tmp_path: Path) -> None:
    arena = Arena()
    lease = arena.lease(4 << 20)
    lease.view[:] = b"\xa5" * len(lease.view)
    lease.release()
    assert written(state(), arena, tmp_path / "a.pt") == written(state(), Arena(), tmp_path / "a.pt")


def test_the_memory_is_reused_and_replaced_only_by_more() -> None:
    arena = Arena()
    with arena.lease(3 << 20) as first:
        address = first.address
    for nbytes in (1, 2 << 20, 3 << 20):
        with arena.lease(nbytes) as lease:
            assert lease.address == address
            assert len(lease.view) == lease.nbytes == nbytes
    assert address % 4096 == 0
    with arena.lease(arena.nbytes + 1) as lease:
        assert arena.nbytes >= lease.nbytes
    arena.clear()
    assert arena.nbytes == 0


def test_a_leased_arena_is_given_to_nobody_else() -> None:
    arena = Arena()
    lease = arena.lease(10)
    lease.view[:] = b"0123456789"
    with pytest.raises(BusyError):
        arena.lease(10, wait=False)
    with pytest.raises(BusyError):
        arena.clear()
    got = threading.Event()

    def take() -> None:
        with arena.lease(10) as second:
            second.view[:] = b"9876543210"
            got.set()

    waiting = threading.Thread(target=take)
    waiting.start()
    assert not got.wait(0.05)
    assert bytes(lease.view) == b"0123456789"
    lease.release()
    lease.release()
    waiting.join()
    assert got.is_set()
    assert not arena.leased


def test_a_bounded_arena_refuses_what_it_could_not_hold() -> None:
    arena = Arena("1MiB")
    with pytest.raises(UsageError, match=r"the arena holds at most 1\.05 MB"):
        arena.lease((1 << 20) + 1)
    with arena.lease(1 << 20):
        assert arena.nbytes == 1 << 20


def test_a_failed_staging_gives_the_arena_back(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = Arena()

    def fail(moves: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(arenas, "copy_memory", fail)
    with pytest.raises(KeyboardInterrupt):
        stage(describe(state()), "a", arena)
    assert not arena.leased


def test_storages_of_a_device_come_by_torchs_own_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = written(state(), Arena(), tmp_path / "a.pt")
    monkeypatch.setattr(arenas, "is_host", lambda storage: False)
    monkeypatch.setattr(arenas, "copy_memory", lambda moves: [].index(bool(moves)) if moves else None)
    assert written(state(), Arena(), tmp_path / "a.pt") == wanted


class Cuda:
    """What torch.cuda.cudart() gives, as far as it is used; says `code`."""

    def __init__(self, code: int) -> None:
        self.code = code
        self.pinned: dict[int, int] = {}

    def __call__(self) -> Cuda:
        return self

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        if not self.code:
            self.pinned[address] = nbytes
        return self.code

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0


def test_memory_is_pinned_once_and_unpinned_before_it_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(0)
    monkeypatch.setattr(torch.cuda, "cudart", cuda)
    arena = Arena()
    with arena.lease(1 << 20) as lease:
        arena.pin()
        arena.pin()
        assert cuda.pinned == {lease.address: arena.nbytes}
    with arena.lease(8 << 20):
        assert cuda.pinned == {}
        arena.pin()
        assert list(cuda.pinned.values()) == [arena.nbytes]
    arena.clear()
    assert cuda.pinned == {}


def test_memory_that_cannot_be_pinned_is_used_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", Cuda(2))
    arena = Arena()
    with arena.lease(1), pytest.warns(RuntimeWarning, match=r"could not pin the staging memory \(error 2\)"):
        arena.pin()
    arena.clear()


def test_threads_copy_every_byte_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arenas, "_ALONE_BELOW_BYTES", 1000)
    monkeypatch.setattr(arenas, "_CHUNK_BYTES", 700)
    rng = random.Random(5)
    sizes = [rng.choice((0, 1, 699, 700, 701, 5000)) for _ in range(60)]
    source = ctypes.create_string_buffer(rng.randbytes(sum(sizes)), sum(sizes) + 1)
    target = ctypes.create_string_buffer(sum(sizes) + 1)
    moves, start = [], 0
    for nbytes in sizes:
        moves.append((ctypes.addressof(target) + start, ctypes.addressof(source) + start, nbytes))
        start += nbytes
    rng.shuffle(moves)
    threads = threading.active_count()
    copy_memory(moves)
    assert target.raw == source.raw
    assert threading.active_count() == threads


def test_a_child_after_a_fork_has_an_empty_and_free_arena() -> None:
    arena = Arena()
    lease = arena.lease(1 << 20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on forks beside threads, which engines are
        child = os.fork()
    if child == 0:
        code = 1
        try:
            fine = arena.nbytes == 0 and not arena.leased
            with arena.lease(100, wait=False) as mine:
                mine.view[:] = b"x" * 100
            code = 0 if fine else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert arena.leased
    lease.release()
