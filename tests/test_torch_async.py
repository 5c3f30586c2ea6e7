"""`async_save`: what was there at the call is what is saved; nothing is lost silently."""

from __future__ import annotations

import errno
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from torch_support import torch

from mlstor.errors import UsageError
from mlstor.operations import is_leftover
from mlstor.torch import load
from mlstor.torch.arena import Arena, BusyError
from mlstor.torch.saving_async import async_save

MIB = 1 << 20


def state(value: float, nbytes: int = 3 * MIB) -> dict[str, Any]:
    return {"large": torch.full((nbytes // 4,), value), "small": torch.full((10,), value), "step": int(value)}


def assert_is(found: dict[str, Any], value: float) -> None:
    assert found["step"] == value
    assert (found["large"] == value).all()
    assert (found["small"] == value).all()


def test_what_changes_after_the_call_is_not_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    tensors = state(1)
    save = async_save(tensors, path, max_bandwidth="20MB/s")
    tensors["large"].fill_(2)
    tensors["small"].fill_(2)
    assert not save.done()
    published = save.result()
    assert_is(torch.load(path), 1)
    assert_is(load(path), 1)
    assert published.nbytes == save.staged_bytes == path.stat().st_size
    assert save.path == published.name == str(path)
    assert save.stall_s > 0


def test_a_second_save_waits_for_the_first(tmp_path: Path) -> None:
    arena = Arena()
    first = async_save(state(1), tmp_path / "a.pt", arena=arena, max_bandwidth="20MB/s")
    second = async_save(state(2), tmp_path / "b.pt", arena=arena)
    assert first.done()
    assert second.stall_s > first.stall_s
    second.result()
    assert_is(torch.load(tmp_path / "a.pt"), 1)
    assert_is(torch.load(tmp_path / "b.pt"), 2)


def test_a_second_save_is_refused_if_asked_and_says_what_runs(tmp_path: Path) -> None:
    arena = Arena()
    first = async_save(state(1), tmp_path / "first.pt", arena=arena, max_bandwidth="20MB/s")
    with pytest.raises(BusyError, match=r"first\.pt is still being written"):
        async_save(state(2), tmp_path / "b.pt", arena=arena, when_busy="raise")
    first.result()
    async_save(state(2), tmp_path / "b.pt", arena=arena, when_busy="raise").result()
    assert_is(torch.load(tmp_path / "first.pt"), 1)


def test_the_arena_is_free_when_the_result_is_there(tmp_path: Path) -> None:
    arena = Arena()
    address = 0
    for value in range(20):
        async_save(state(value, 1000), tmp_path / "a.pt", arena=arena, when_busy="raise").result()
        with arena.lease(1, wait=False) as lease:
            assert lease.address == address or not address
            address = lease.address
    assert_is(torch.load(tmp_path / "a.pt"), 19)


def test_an_error_is_raised_by_the_result(tmp_path: Path) -> None:
    save = async_save(state(1, 1000), tmp_path / "missing" / "a.pt")
    with pytest.raises(OSError) as caught:
        save.result()
    assert caught.value.errno == errno.ENOENT
    assert "missing" in str(caught.value.filename)
    async_save(state(1, 1000), tmp_path / "a.pt").result()  # without a warning: it was seen


def test_an_error_that_nobody_asked_for_is_warned_of_at_the_next_save(tmp_path: Path) -> None:
    arena = Arena()
    async_save(state(1, 1000), tmp_path / "missing" / "a.pt", arena=arena)
    arena.lease(1).release()  # waits until it is over
    with pytest.warns(RuntimeWarning, match=r"background save of .*a\.pt failed: .*No such file"):
        save = async_save(state(1, 1000), tmp_path / "a.pt")
    save.result()


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, tmpfs_mount: Any) -> None:
    mount = tmpfs_mount(8 * MIB)
    async_save(state(1), mount / "a.pt").result()
    error = async_save(state(2, 6 * MIB), mount / "a.pt").exception()
    assert isinstance(error, OSError)
    assert error.errno == errno.ENOSPC
    assert_is(load(mount / "a.pt"), 1)
    assert [entry.name for entry in mount.iterdir()] == ["a.pt"]


def test_a_cap_on_bandwidth_holds(tmp_path: Path) -> None:
    started = time.monotonic()
    async_save(state(1, 4 * MIB), tmp_path / "a.pt", max_bandwidth="16MiB/s").result()
    assert time.monotonic() - started > 0.1  # 0.25 s at the cap; a first block for each worker comes without a wait


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"when_busy": "later"}, "when_busy is 'wait' or 'raise', not 'later'"),
        ({"at_exit": "stay"}, "at_exit is 'wait' or 'warn', not 'stay'"),
        ({"max_bandwidth": "fast"}, "'fast' is not a size"),
        ({"arena": Arena(1000)}, "the arena holds at most 1.00 kB"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        async_save(state(1, 1000), tmp_path / "a.pt", **arguments)
    assert list(tmp_path.iterdir()) == []


ENDING = """
import sys, torch
from mlstor.torch.arena import Arena
from mlstor.torch.saving_async import async_save
torch.set_num_threads(1)
directory = sys.argv[1]
async_save({"w": torch.ones(1 << 18)}, directory + "/waits.pt", arena=Arena(), max_bandwidth="4MB/s")
async_save({"w": torch.ones(1 << 22)}, directory + "/gives-up.pt", arena=Arena(), max_bandwidth="4MB/s", at_exit="warn")
async_save({"w": torch.ones(10)}, directory + "/missing/fails.pt", arena=Arena(), at_exit="warn")
"""


def test_a_process_that_ends_waits_or_warns(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDING, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (torch.load(tmp_path / "waits.pt")["w"] == 1).all()
    assert re.search(r"ends before the background save of .*gives-up\.pt is done", done.stderr)
    assert re.search(r"background save of .*fails\.pt failed: .*No such file", done.stderr)
    assert "Traceback" not in done.stderr
    assert [entry.name for entry in tmp_path.iterdir() if is_leftover(entry.name)] == []
    assert not (tmp_path / "gives-up.pt").exists()


@pytest.mark.filterwarnings("ignore")  # of Lightning at import
def test_the_examples_of_the_documentation_run(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    text = (Path(__file__).parents[1] / "docs" / "async.md").read_text()
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert "CheckpointDirectory" in code
    exec(code.replace("/mnt/nvme", str(tmp_path)), {})
    assert (torch.load(tmp_path / "step3.pt")["model"]["weight"] != 0).any()
