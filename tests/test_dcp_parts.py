"""Pieces of DCP's writer and reader: byte ranges of parts, reads that overlap, handing over, staging."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

torch = pytest.importorskip("torch")

import torch.distributed.checkpoint as dcp  # noqa: E402
from dcp_support import a_state, assert_same, load, quietly  # noqa: E402

from mlstor.blob.target import open_blob  # noqa: E402
from mlstor.errors import CorruptionError  # noqa: E402
from mlstor.formats.dcp_sidecar import Item, Sums, pack, parse, seal, unseal  # noqa: E402
from mlstor.torch import StorageWriter  # noqa: E402
from mlstor.torch.dcp_fetch import Want, fetch, fetch_digests, fetch_verified  # noqa: E402
from mlstor.torch.dcp_handover import Handover  # noqa: E402
from mlstor.torch.dcp_ranges import Box, part_of, slabs, straight  # noqa: E402
from mlstor.torch.dcp_share import SHM, Share, Slot  # noqa: E402
from mlstor.torch.dcp_stage import Stager  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    shape = draw(st.lists(st.integers(1, 7), max_size=4))
    offsets = [draw(st.integers(0, size - 1)) for size in shape]
    lengths = [draw(st.integers(1, size - offset)) for size, offset in zip(shape, offsets, strict=True)]
    return Box(tuple(shape), tuple(offsets), tuple(lengths), 4)


@given(boxes(), st.booleans(), st.integers(4, 200))
@settings(max_examples=300)
def test_a_part_is_the_same_by_bytes_as_by_narrowing(box: Box, transposed: bool, most_bytes: int) -> None:
    stored = torch.arange(int(np.prod(box.shape)), dtype=torch.int32).reshape(box.shape)
    memory = stored.flatten().view(torch.uint8)
    wanted = stored[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.lengths, strict=True))]
    target = torch.full(box.lengths, -1, dtype=torch.int32)
    if transposed and len(box.lengths) > 1:
        target = torch.full(box.lengths[::-1], -1, dtype=torch.int32).permute(*reversed(range(len(box.lengths))))
    runs = straight(box, target)
    if runs is not None:
        base = memory.data_ptr()
        for start, nbytes, address in runs:
            source = np.frombuffer((np.ctypeslib.ctypes.c_char * nbytes).from_address(base + start), np.uint8)
            np.frombuffer((np.ctypeslib.ctypes.c_char * nbytes).from_address(address), np.uint8)[:] = source
        assert torch.equal(target, wanted)
        target.fill_(-1)
    for slab, part in slabs(box, target, most_bytes):
        start, end = slab.span()
        assert end - start <= max(most_bytes, 4)
        part.copy_(part_of(slab, memory[start:end].clone(), torch.int32))
    assert torch.equal(target, wanted)


@pytest.fixture
def data_file(tmp_path: Path) -> tuple[Any, bytes, Sums]:
    import google_crc32c

    content = np.random.default_rng(3).bytes(700_001)
    (tmp_path / "data").write_bytes(content)
    chunk = 4096
    values = [google_crc32c.value(content[at : at + chunk]) for at in range(0, len(content), chunk)]
    return open_blob(tmp_path / "data"), content, Sums("0" * 32, len(content), chunk, (), np.array(values, "<u4"))


@given(data=st.data())
@settings(max_examples=40)
def test_wants_are_filled_whatever_they_overlap(data_file: tuple[Any, bytes, Sums], data: st.DataObject) -> None:
    import zlib

    blob, content, sums = data_file
    places = data.draw(st.lists(st.tuples(st.integers(0, 700_000), st.integers(0, 9000)), max_size=30))
    buffers = [bytearray(max(1, min(n, len(content) - at))) for at, n in places]
    wants = [
        Want(at, min(n, len(content) - at), np.frombuffer(buffer, np.uint8).ctypes.data, "t")
        for (at, n), buffer in zip(places, buffers, strict=True)
    ]
    fetch_verified(blob, wants, sums, buffers)
    for want, buffer in zip(wants, buffers, strict=True):
        assert buffer[: want.nbytes] == content[want.offset : want.offset + want.nbytes]
        buffer[:] = bytes(len(buffer))
    fetch(blob, wants, buffers)
    crcs = fetch_digests(blob, wants, buffers)
    for want, buffer, crc in zip(wants, buffers, crcs, strict=True):
        assert buffer[: want.nbytes] == content[want.offset : want.offset + want.nbytes]
        assert crc == zlib.crc32(content[want.offset : want.offset + want.nbytes])


def test_sums_and_metadata_are_read_back_and_damage_to_them_is_found() -> None:
    sums = Sums(
        "a" * 32, 2_500_000, 1 << 20, (Item(0, 700, 64, 100), Item(700, 2_499_300, 0, 0)), np.arange(3, dtype="<u4")
    )
    content = pack(sums)
    found = parse(content, "f")
    assert (found.file_id, found.nbytes, found.items, found.values.tolist()) == (
        "a" * 32,
        2_500_000,
        sums.items,
        [0, 1, 2],
    )
    assert found.chunks(1_048_575, 2) == range(2)
    assert found.span(2) == (2_097_152, 2_500_000)
    sealed = seal(b"pickled", {"f": "b"})
    assert unseal(sealed, "m") == (b"pickled", {"f": "b"})
    assert unseal(b"pickled", "m") == (b"pickled", None)
    for at in range(len(content)):
        with pytest.raises(CorruptionError):
            parse(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :], "f")
    for at in range(len(sealed) - 8):
        with pytest.raises(CorruptionError):
            unseal(sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1 :], "m")


def in_threads(shares: dict[int, Share], work: Callable[[int, Share], None]) -> None:
    """Each rank in a thread of this process; an error in one is raised here."""
    errors: list[BaseException] = []

    def run(rank: int, share: Share) -> None:
        try:
            work(rank, share)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=item) for item in shares.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a rank hangs"
    if errors:
        raise errors[0]


PLACES = {0: {0: 0}, 1: {0: 1}}


def three_shares(nbytes: int) -> dict[int, Share]:
    """Ranks 0 and 1 give, all others take; item 0 is given by 0, item 1 by 1."""
    slots = {0: [Slot(nbytes, torch.float32, (1, 2))], 1: [Slot(nbytes, torch.float32, (0, 2))]}
    token, pids = uuid.uuid4().hex, dict.fromkeys(range(3), os.getpid())
    return {rank: Share(token, rank, pids, slots) for rank in range(3)}


def test_what_is_given_arrives_in_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlstor.torch.dcp_handover.SEGMENT_BYTES", 10_000)
    shares = three_shares(400_000)
    data = [torch.randn(100_000), torch.randn(100_000)]
    tensors = {
        rank: {item: torch.zeros(100_000, dtype=torch.float64 if rank == 2 else None) for item in (0, 1)}
        for rank in range(3)
    }

    def work(rank: int, share: Share) -> None:
        with Handover(share, PLACES, tensors[rank]) as handover:
            if rank < 2:
                tensors[rank][rank].copy_(data[rank])
            assert handover.run() == []

    in_threads(shares, work)
    for rank in range(3):
        for item in (0, 1):
            assert torch.equal(tensors[rank][item].float(), data[item])
    assert not os.path.exists(f"{SHM}/mlstor-{shares[0].token}")


def test_a_giver_that_fails_is_not_waited_for() -> None:
    shares = three_shares(400_000)
    tensors = {rank: {item: torch.zeros(100_000) for item in (0, 1)} for rank in range(3)}
    missed: dict[int, list[int]] = {}

    def work(rank: int, share: Share) -> None:
        if rank == 0:
            with pytest.raises(OSError, match="disk"), Handover(share, PLACES, tensors[rank]):
                raise OSError("disk")
            return
        with Handover(share, PLACES, tensors[rank]) as handover:
            tensors[rank][1].fill_(rank)
            missed[rank] = handover.run()

    in_threads(shares, work)
    assert missed == {1: [0], 2: [0]}
    assert torch.equal(tensors[2][1], torch.ones(100_000))
    assert not os.path.exists(f"{SHM}/mlstor-{shares[0].token}")


def test_a_taker_that_fails_while_it_takes_is_not_waited_for() -> None:
    shares = three_shares(400_000)
    tensors = {rank: {item: torch.zeros(100_000) for item in (0, 1)} for rank in range(3)}
    tensors[2][0] = torch.zeros(7, 7, dtype=torch.float64)  # no place for what comes
    missed: dict[int, list[int]] = {}

    def work(rank: int, share: Share) -> None:
        if rank == 2:
            with pytest.raises(RuntimeError), Handover(share, PLACES, tensors[rank]) as handover:
                handover.run()
            return
        with Handover(share, PLACES, tensors[rank]) as handover:
            tensors[rank][rank].fill_(rank + 1)
            missed[rank] = handover.run()

    in_threads(shares, work)
    assert missed == {0: [], 1: []}
    assert torch.equal(tensors[0][1], torch.full((100_000,), 2.0))
    assert not os.path.exists(f"{SHM}/mlstor-{shares[0].token}")


def test_a_giver_that_begins_when_the_others_have_ended_is_not_held_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlstor.torch.dcp_handover._BEGIN_S", 0.5)
    shares = three_shares(400_000)
    tensors = {rank: {item: torch.zeros(100_000) for item in (0, 1)} for rank in range(3)}
    missed: dict[int, list[int]] = {}
    ended, late = [threading.Event() for _ in range(2)], threading.Event()

    def work(rank: int, share: Share) -> None:
        if rank == 0:
            assert all(event.wait(60) for event in ended)
        places = PLACES if rank < 2 else {}
        with Handover(share, places, tensors[rank]) as handover:
            missed[rank] = handover.run()
            if rank == 2:  # it is still here, and so is the directory
                ended[1].set()
                assert late.wait(60)
        if rank == 1:
            ended[0].set()
        if rank == 0:
            late.set()

    shares[0].slots[0] = [Slot(400_000, torch.float32, (1,))]
    shares[0].slots[1] = [Slot(400_000, torch.float32, (0,))]
    in_threads(shares, work)
    assert missed == {0: [1], 1: [0], 2: []}
    assert not os.path.exists(f"{SHM}/mlstor-{shares[0].token}")


def test_what_is_conjugated_or_strided_is_given_and_taken_by_its_values() -> None:
    shares = three_shares(8 * 40_000)
    for share in shares.values():
        share.slots.update(
            {0: [Slot(8 * 40_000, torch.complex64, (1, 2))], 1: [Slot(8 * 40_000, torch.complex64, (0,))]}
        )
    values = [torch.randn(200, 200, dtype=torch.complex64) for _ in range(2)]

    def blanks() -> dict[int, torch.Tensor]:
        return {item: torch.zeros(200, 200, dtype=torch.complex64) for item in (0, 1)}

    tensors = {rank: blanks() for rank in range(2)}
    with torch.inference_mode():
        tensors[2] = blanks()
    tensors[0][0], tensors[1][1] = tensors[0][0].conj(), tensors[1][1].t()
    tensors[1][0], tensors[0][1] = tensors[1][0].conj(), tensors[0][1].t()

    def work(rank: int, share: Share) -> None:
        with Handover(share, PLACES if rank < 2 else {0: {0: 0}}, tensors[rank]) as handover:
            if rank < 2:
                tensors[rank][rank].copy_(values[rank])
            assert handover.run() == []

    in_threads(shares, work)
    assert all(torch.equal(tensors[rank][0].resolve_conj(), values[0]) for rank in range(3))
    assert all(torch.equal(tensors[rank][1], values[1]) for rank in range(2))


def test_what_a_killed_load_left_in_shared_memory_is_removed_and_of_living_ones_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlstor.torch.dcp_handover.SHM", str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    namespace = os.stat("/proc/self/ns/pid").st_ino
    left, lives, elsewhere = (tmp_path / f"mlstor-{number}" for number in range(3))
    for directory, said in (
        (left, f"{namespace} {process.pid}"),
        (lives, f"{namespace} {os.getpid()}"),
        (elsewhere, f"1 {process.pid}"),
    ):
        directory.mkdir()
        (directory / "0.here").write_text(said)
        (directory / "0.bytes").write_bytes(bytes(100))
    with Handover(Share(uuid.uuid4().hex, 0, {0: os.getpid()}), {}, {}) as handover:
        assert handover.run() == []
    assert sorted(tmp_path.iterdir()) == [lives, elsewhere]


def test_a_state_without_tensors_is_waited_for_too() -> None:
    stager = Stager()
    kept = [stager.stage({"step": 3})]
    threading.Timer(0.2, kept.clear).start()
    stager.close()
    stager.stage({"step": 4})
    assert not kept
    assert stager.stall_s > 0.1


def test_staged_tensors_share_memory_as_the_originals_do_and_nothing_else() -> None:
    state = a_state()
    base = torch.arange(100.0)
    state["views"] = [base[10:40], base[30:60].view(5, 6), base]
    state["list"] = [1, [2]]
    staged = Stager().stage(state)
    wanted = {key: value for key, value in state.items() if key not in ("views", "list")}
    copies = [tensor.clone() for tensor in state["views"]]
    base.fill_(-1)
    state["list"][1].append(3)
    for found, copy in zip(staged["views"], copies, strict=True):
        assert torch.equal(found, copy)
    assert staged["views"][0].untyped_storage().data_ptr() == staged["views"][2].untyped_storage().data_ptr()
    assert staged["views"][1].data_ptr() - staged["views"][0].data_ptr() == 20 * 4
    assert staged["list"] == [1, [2]]
    assert_same({key: staged[key] for key in wanted}, wanted)
    assert staged["transposed"].stride() == state["transposed"].stride()


def test_memory_is_used_again_once_the_copy_is_not_read_any_more() -> None:
    stager = Stager()
    staged = stager.stage({"w": torch.ones(300_000)})
    address = staged["w"].data_ptr()
    kept = [staged]
    del staged
    threading.Timer(0.2, kept.clear).start()
    stager.touch()
    again = stager.stage({"w": torch.zeros(300_000)})
    assert stager.stall_s > 0.1
    assert again["w"].data_ptr() == address
    assert not kept


def test_a_copy_that_only_a_failed_upload_holds_is_not_waited_for(tmp_path: Path) -> None:
    writer = StorageWriter(tmp_path / "file" / "ck")
    (tmp_path / "file").touch()
    future = quietly(dcp.async_save, {"w": torch.ones(1000)}, storage_writer=writer)
    with pytest.raises(BaseException, match="file"):
        quietly(future.result)
    start = time.monotonic()
    good = quietly(dcp.async_save, {"w": torch.ones(1000)}, checkpoint_id=tmp_path / "good", storage_writer=writer)
    assert time.monotonic() - start < 30
    quietly(good.result)
    assert_same(load({"w": torch.ones(1000)}, tmp_path / "good")[0], {"w": torch.ones(1000)})
    assert future.exception() is not None
    gc.collect()
