"""`CheckpointDirectory`: what is found again is whole, and what is removed is superfluous."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuse_faults import faulty
from s3_support import bucket, listed
from servers.weed import Weed, signed_weed  # noqa: F401 - a fixture
from torch_support import torch

from mlstor.errors import CorruptionError, UsageError
from mlstor.torch.checkpoint_directory import CheckpointDirectory


def state(step: int, elements: int = 1000) -> dict[str, Any]:
    return {"w": torch.full((elements,), float(step)), "step": step}


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def both(*steps: int) -> list[str]:
    return sorted(f"step-{step:08d}.{kind}" for step in steps for kind in ("pt", "json"))


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("background", [False, True])
def test_the_newest_are_kept_and_the_latest_is_found(tmp_path: Path, background: bool) -> None:
    path = tmp_path / "new" / "run"
    directory = CheckpointDirectory(path, keep=2)
    assert directory.latest() is None
    for step in (1, 5, 10, 200):
        if background:
            directory.save_async(step, state(step)).result()
        else:
            assert directory.save(step, state(step)) == str(path / f"step-{step:08d}.pt")
    assert names(path) == both(10, 200)
    assert directory.steps() == [10, 200]
    latest = CheckpointDirectory(path).latest()
    assert latest is not None
    assert (latest.step, latest.nbytes) == (200, (path / "step-00000200.pt").stat().st_size)
    assert torch.equal(latest.load()["w"], state(200)["w"])
    assert torch.load(latest.path)["step"] == 200
    assert CheckpointDirectory(path).checkpoint(10).load()["step"] == 10


def test_background_saves_that_were_not_waited_for_are_pruned_too(tmp_path: Path) -> None:
    directory = CheckpointDirectory(tmp_path, keep=2)
    saves = [directory.save_async(step, state(step)) for step in range(6)]
    saves[-1].result()
    assert names(tmp_path) == both(4, 5)


def test_keep_zero_keeps_all(tmp_path: Path) -> None:
    directory = CheckpointDirectory(tmp_path, keep=0)
    for step in range(5):
        directory.save(step, state(step))
    assert directory.steps() == [0, 1, 2, 3, 4]


def test_data_without_a_marker_are_not_there_and_go_with_the_next_save(tmp_path: Path) -> None:
    directory = CheckpointDirectory(tmp_path)
    directory.save(1, state(1))
    directory.save(2, state(2))
    (tmp_path / "step-00000002.json").unlink()  # killed between data and marker
    (tmp_path / ".step-00000002.json.0123abcd.mlstor-tmp").touch()
    (tmp_path / ".step-00000003.pt.0123abcd.mlstor-tmp").touch()
    (tmp_path / ".other.pt.0123abcd.mlstor-tmp").touch()
    (tmp_path / "notes.txt").touch()
    assert directory.steps() == [1]
    latest = directory.latest()
    assert latest is not None
    assert latest.step == 1
    directory.save(3, state(3))
    assert names(tmp_path) == sorted([*both(1, 3), ".other.pt.0123abcd.mlstor-tmp", "notes.txt"])


def test_prefixes_don_t_see_each_other(tmp_path: Path) -> None:
    ranks = [CheckpointDirectory(tmp_path, keep=1, prefix=f"rank{rank}") for rank in (1, 11)]
    for step in (1, 2):
        for number, rank in enumerate(ranks):
            rank.save(step, state(step * 10 + number))
    assert [rank.steps() for rank in ranks] == [[2], [2]]
    assert [rank.checkpoint(2).load()["step"] for rank in ranks] == [20, 21]


DAMAGE = {
    "data are gone": (lambda path: (path / "step-00000002.pt").unlink(), "No such file"),
    "data are cut": (lambda path: os.truncate(path / "step-00000002.pt", 100), "it has 100 bytes, and was saved with"),
    "the zip's directory is damaged": (
        lambda path: flip(path / "step-00000002.pt", -60),
        "the directory at its end is not what was written",
    ),
    "the marker is cut": (lambda path: os.truncate(path / "step-00000002.json", 30), "the marker is damaged"),
    "the marker is empty": (lambda path: os.truncate(path / "step-00000002.json", 0), "a marker of 0 bytes is none"),
    "the marker is another's": (
        lambda path: (path / "step-00000002.json").write_bytes((path / "step-00000001.json").read_bytes()),
        "the marker is damaged",
    ),
    "the marker is no object": (lambda path: (path / "step-00000002.json").write_text("[1]"), "the marker is damaged"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_one_is_passed_over_with_the_reason(tmp_path: Path, kind: str) -> None:
    damage, reason = DAMAGE[kind]
    directory = CheckpointDirectory(tmp_path)
    directory.save(1, state(1))
    directory.save(2, state(2))
    damage(tmp_path)
    with pytest.warns(RuntimeWarning, match=f"checkpoint 2 is passed over: .*{reason}"):
        latest = directory.latest()
    assert latest is not None
    assert latest.load()["step"] == 1
    with pytest.raises((CorruptionError, OSError)):
        directory.checkpoint(2)
    # The training goes on from 1 and comes to 2 again: that one is good.
    directory.save(2, state(20))
    latest = directory.latest()
    assert latest is not None
    assert (latest.step, latest.load()["step"]) == (2, 20)


def test_a_storage_that_fails_is_no_reason_to_take_an_older_one(tmp_path: Path) -> None:
    with faulty(tmp_path) as mount:
        directory = CheckpointDirectory(mount.root / "run", keep=1)
        directory.save(1, state(1))
        mount.fail("read", errno.EIO)
        with pytest.raises(OSError) as caught:
            directory.latest()
        assert caught.value.errno == errno.EIO
        mount.heal()
        # Wherever a save fails, the checkpoint before stays.
        for background in (False, True):
            for call in ("create", "write", "fsync", "rename", "fsyncdir"):
                for nth in (1, 2):  # of the data, of the marker
                    mount.fail(call, errno.EIO, nth)
                    with pytest.raises(OSError) as caught:
                        directory.save_async(2, state(2)).result() if background else directory.save(2, state(2))
                    assert caught.value.errno == errno.EIO
                    mount.heal()
                    latest = directory.latest()
                    assert latest is not None
                    assert (latest.step, latest.load()["step"]) in ((1, 1), (2, 2))
                    if latest.step == 2:  # the directory's sync failed: the marker is there, but was not promised
                        assert call == "fsyncdir"
                        directory.remove(2)
        directory.save(2, state(2))
        assert names(mount.backing / "run") == both(2)


def test_old_checkpoints_that_cannot_be_removed_are_no_failure_of_the_save(tmp_path: Path) -> None:
    with faulty(tmp_path) as mount:
        directory = CheckpointDirectory(mount.root, keep=1)
        directory.save(1, state(1))
        mount.fail("unlink", errno.EIO)
        with pytest.warns(RuntimeWarning, match="checkpoint 2 is saved, but older ones could not be removed"):
            directory.save(2, state(2))
        mount.heal()
        directory.save(3, state(3))
        assert names(mount.backing) == both(3)


def test_a_flipped_byte_of_the_data_is_found_by_verify_and_by_load(tmp_path: Path) -> None:
    directory = CheckpointDirectory(tmp_path)
    directory.save(1, state(1))
    directory.save(2, state(2, 1 << 20))
    flip(tmp_path / "step-00000002.pt", 2 << 20)
    latest = directory.latest()
    assert latest is not None
    assert latest.step == 2
    with pytest.raises(CorruptionError, match=r"state\['w'\]"):
        latest.load()
    with pytest.warns(RuntimeWarning, match=r"checkpoint 2 is passed over: .*step-00000002\.pt"):
        latest = directory.latest(verify=True)
    assert latest is not None
    assert latest.step == 1


def test_saving_a_step_again_replaces_it_without_a_moment_without_it(tmp_path: Path) -> None:
    directory = CheckpointDirectory(tmp_path, keep=1)
    directory.save(7, state(7))
    first = json.loads((tmp_path / "step-00000007.json").read_text())["data"]
    path = directory.save(7, state(70))
    assert os.path.basename(path) != first
    assert names(tmp_path) == sorted([os.path.basename(path), "step-00000007.json"])
    assert directory.checkpoint(7).load()["step"] == 70
    directory.save(8, state(8))
    assert names(tmp_path) == both(8)


def test_data_committed_since_the_names_were_listed_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A background save commits while the next one, in another thread, looks for what may go.
    directory = CheckpointDirectory(tmp_path)
    directory.save(1, state(1))
    stale = [name for name in directory._directory.names() if not name.endswith(".json")]
    fresh = directory._directory.names
    answers = [stale]
    monkeypatch.setattr(directory._directory, "names", lambda: answers.pop() if answers else fresh())
    directory.save(2, state(2))
    assert names(tmp_path) == both(1, 2)


def test_what_is_pruned_under_a_reader_leads_it_to_the_newer_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, reader = CheckpointDirectory(tmp_path, keep=1), CheckpointDirectory(tmp_path)
    writer.save(1, state(1))
    listed_first = reader._directory.names()
    writer.save(2, state(2))
    fresh, answers = reader._directory.names, [listed_first]
    monkeypatch.setattr(reader._directory, "names", lambda: answers.pop() if answers else fresh())
    latest = reader.latest()
    assert latest is not None
    assert latest.step == 2
    # The same step again: its first data go once the marker names the second.
    read_marker, old = reader._read_marker, [reader._read_marker(2)]
    writer.save(2, state(20))
    monkeypatch.setattr(reader, "_read_marker", lambda step: old.pop() if old else read_marker(step))
    assert reader.checkpoint(2).load()["step"] == 20


def test_a_step_below_the_latest_is_saved_with_a_warning(tmp_path: Path) -> None:
    directory = CheckpointDirectory(tmp_path, keep=2)
    for step in (100, 200, 300):
        directory.save(step, state(step))
    with pytest.warns(RuntimeWarning, match=r"checkpoint 150 is saved while 300 is in .*remove\(300\)"):
        directory.save(150, state(150))
    assert directory.steps() == [150, 200, 300]
    directory.remove(300)
    directory.remove(300)
    assert names(tmp_path) == both(150, 200)


def test_a_failed_save_leaves_what_was_there(tmpfs_mount: Any) -> None:
    mount = tmpfs_mount(4 << 20)
    directory = CheckpointDirectory(mount, keep=1)
    directory.save(1, state(1))
    with pytest.raises(OSError) as caught:
        directory.save(2, state(2, 2 << 20))
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError):
        directory.save_async(2, state(2, 2 << 20)).result()
    assert names(mount) == both(1)
    directory.save(2, state(2))
    assert names(mount) == both(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": -1}, "keep=-1"),
        ({"keep": "3"}, "keep=3"),
        ({"prefix": "a/b"}, "prefix='a/b'"),
        ({"prefix": None}, "prefix=None"),
        ({"prefix": ""}, "prefix=''"),
    ],
)
def test_mistakes_are_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CheckpointDirectory(tmp_path, **arguments)
    for step in (-1, "1", 1.5):
        for save in (CheckpointDirectory(tmp_path).save, CheckpointDirectory(tmp_path).save_async):
            with pytest.raises(UsageError, match=f"step={step!r}"):
                save(step, {})  # type: ignore[operator]
    assert names(tmp_path) == []


def test_a_step_may_be_another_library_s_integer(tmp_path: Path) -> None:
    directory = CheckpointDirectory(tmp_path)
    directory.save(np.int64(1), state(1))  # type: ignore[arg-type]
    directory.save_async(torch.tensor(2), state(2)).result()
    assert directory.steps() == [1, 2]
    assert names(tmp_path) == both(1, 2)


def test_on_an_object_store_it_is_the_same(signed_weed: Weed) -> None:  # noqa: F811
    with bucket(signed_weed, prefix="run 1") as store:
        directory = CheckpointDirectory(store.url, keep=2, store=store)
        assert directory.latest() is None
        for step in (1, 2, 3):
            directory.save(step, state(step))
        directory.save_async(4, state(4, 6 << 20)).result()  # in parts
        assert sorted(listed(store)) == both(3, 4)
        latest = directory.latest()
        assert latest is not None
        assert latest.path == f"{store.url}/step-00000004.pt"
        assert torch.equal(latest.load()["w"], state(4, 6 << 20)["w"])
        store.delete(["step-00000004.pt"])
        with pytest.warns(RuntimeWarning, match="checkpoint 4 is passed over"):
            latest = directory.latest()
        assert latest is not None
        assert latest.load()["step"] == 3
