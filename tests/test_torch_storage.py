"""`save` and `load` on storage that fails: what was there stays, nothing else is left, and it is said what failed."""

from __future__ import annotations

import errno
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from engine_support import finish, python
from fuse_faults import Faulty, faulty
from torch_support import MIB, assert_same, bits, torch

from mlstor import Engine
from mlstor.torch import load, load_safetensors, save, save_safetensors


def state_of(seed: int) -> dict[str, Any]:
    """A record that is written from where it lies, one that is packed, and a value."""
    return {"w": bits(seed, torch.int16, (2 * MIB,)), "b": bits(seed, torch.float32, (30,)), "step": seed}


def check_old_file(path: pathlib.Path, attempt: Callable[[], object], code: int) -> None:
    with pytest.raises(OSError) as caught:
        attempt()
    assert caught.value.errno == code
    assert str(path) in str(caught.value)
    assert os.listdir(path.parent) == [path.name]
    assert_same(state_of(1), load(path))


def test_a_full_disk_leaves_the_old_file(tmpfs_mount: Callable[[int], pathlib.Path]) -> None:
    path = tmpfs_mount(7 * MIB) / "state.pt"
    save(state_of(1), path)
    check_old_file(path, lambda: save(state_of(2), path), errno.ENOSPC)


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    with faulty(tmp_path_factory.mktemp("fuse")) as made:
        yield made


@pytest.mark.parametrize(("call", "nth"), [("create", 1), ("write", 1), ("write", 2), ("fsync", 1), ("rename", 1)])
def test_a_device_that_fails_leaves_the_old_file(failing: Faulty, call: str, nth: int) -> None:
    path = failing.root / "state.pt"
    save(state_of(1), path)
    failing.fail(call, errno.EIO, nth)
    try:
        check_old_file(path, lambda: save(state_of(2), path), errno.EIO)
    finally:
        failing.heal()
    save(state_of(2), path)
    assert_same(state_of(2), load(path))


def test_a_range_that_can_not_be_read_is_an_error_and_no_damage(failing: Faulty) -> None:
    path = failing.root / "state.pt"
    save(state_of(1), path)
    failing.fail("read", errno.EIO, first=MIB, last=MIB + 10)
    try:
        for read in (lambda: load(path), lambda: load(path, into=state_of(3))):
            with pytest.raises(OSError, match=r"state\.pt") as caught:
                read()
            assert caught.value.errno == errno.EIO
    finally:
        failing.heal()
    assert_same(state_of(1), load(path))


def test_who_may_not_write_or_read_is_told_so(tmp_path: pathlib.Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("to become another user needs root")
    code = """
        import os, sys
        import torch
        from mlstor.torch import load, save
        os.chdir(sys.argv[1])
        # What is imported at the first use may lie where only root may read.
        save({"w": torch.ones(3)}, "state.pt")
        load("state.pt")
        os.chmod("state.pt", 0o600)
        os.setuid(65534)
        for call in (lambda: save({"w": torch.zeros(3)}, "state.pt"), lambda: load("state.pt")):
            try:
                call()
            except PermissionError as error:
                print(error)
    """
    tmp_path.chmod(0o755)
    said = finish(python(code, tmp_path)).splitlines()
    assert len(said) == 2
    assert all("state.pt" in line for line in said)
    assert os.listdir(tmp_path) == ["state.pt"]
    assert load(tmp_path / "state.pt")["w"].all()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(("write", "read"), [(save, load), (save_safetensors, load_safetensors)])
def test_two_processes_saving_to_one_path_leave_one_of_both_whole(
    tmp_path: pathlib.Path, write: Callable[..., None], read: Callable[..., Any]
) -> None:
    path = tmp_path / ("state.safetensors" if write is save_safetensors else "state.pt")
    states = {value: {"b": torch.full((9,), value), "w": torch.full((MIB // 2,), float(value))} for value in (1, 2)}
    write(states[1], path)
    alive = {fork_saver(write, states[value], path) for value in states}
    while alive:
        for child in list(alive):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                assert os.waitstatus_to_exitcode(status) == 0
                alive.remove(child)
        try:
            found = read(path)
        except OSError as error:
            if error.errno != errno.ESTALE:  # replaced while it was read, which is said
                raise
        else:
            assert_same(states[int(found["b"][0])], found)
    assert os.listdir(tmp_path) == [path.name]


def fork_saver(write: Callable[..., None], state: Any, path: pathlib.Path) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with Engine(workers=1, depth=2) as engine:
                for _ in range(20):
                    write(state, path, engine=engine)
            status = 0
        finally:
            os._exit(status)
    return child
