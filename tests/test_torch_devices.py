"""Loads to CUDA devices pass through pinned memory that is used again: the same way, taken by states of the host."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
from torch_support import MIB, assert_same, bits, content, torch

import mlstor
from mlstor.torch import devices, load, save


def state_of(seed: int) -> dict[str, Any]:
    whole = bits(seed, torch.int16, (2 * MIB,))
    return {
        "w": whole,
        "part": whole[5:900],
        "b": bits(seed, torch.float32, (30,)),
        "parameter": torch.nn.Parameter(bits(seed, torch.float32, (600, 700))),
        "empty": torch.empty(0),
        "step": seed,
    }


@pytest.fixture
def path(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """With the host taken for a device, and little room."""
    monkeypatch.setattr(devices, "passes", lambda device: True)
    monkeypatch.setattr(devices, "SCRATCH_BYTES", 2 * MIB)
    return tmp_path / "state.pt"


@pytest.mark.parametrize("where", [None, "cpu", torch.device("cpu"), {"cpu": "cpu"}, {"cuda:1": "cuda:0"}])
@pytest.mark.parametrize("write", [save, torch.save])
def test_what_goes_to_a_device_is_loaded_through_one_piece_of_memory(
    path: pathlib.Path, write: Any, where: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(state_of(1), path)
    monkeypatch.setattr("mlstor.torch.loading.allocate", lambda sizes: [pytest.fail("not by the arena") for _ in sizes])
    addresses = []
    lease = devices._arena.lease

    def watched(nbytes: int) -> Any:
        leased = lease(nbytes)
        addresses.append(leased.address)
        return leased

    monkeypatch.setattr(devices._arena, "lease", watched)
    first = load(path, where)
    second = load(path, where, weights_only=False)
    assert_same(state_of(1), first)
    assert_same(state_of(1), second)
    assert len(addresses) == 4  # the large record alone, then the others; twice
    assert len(set(addresses)) == 1
    assert not devices._arena.leased
    first["w"].untyped_storage().resize_(10)  # it is memory of its own


def test_a_function_s_places_are_torch_s_affair(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(state_of(1), path)
    monkeypatch.setattr(devices._arena, "lease", lambda nbytes: pytest.fail("by the arena"))
    assert_same(state_of(1), load(path, lambda storage, location: storage))


def test_damage_is_found_on_the_way(path: pathlib.Path) -> None:
    save(state_of(1), path)
    whole = bytearray(path.read_bytes())
    for key in ("w", "b"):
        at = whole.index(content(state_of(1)[key].untyped_storage())) + 3
        whole[at] ^= 8
        path.write_bytes(whole)
        whole[at] ^= 8
        for read in (lambda: load(path), lambda: load(path, "cpu", weights_only=False)):
            with pytest.raises(mlstor.CorruptionError, match=rf"tensor state\['{key}'\].*\(record data/\d"):
                read()
        assert not devices._arena.leased
    path.write_bytes(bytes(whole).replace(b"step", b"STEP"))
    with pytest.raises(mlstor.CorruptionError, match=r"record data\.pkl"):
        load(path)


def test_places_on_a_device_are_filled_through_it(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(state_of(1), path)
    into = state_of(2)
    monkeypatch.setattr("mlstor.torch.into._Copy.base", lambda copy: None)  # as of a tensor that is not on the host
    monkeypatch.setattr(devices, "allocate", lambda sizes: [pytest.fail("not by the arena") for _ in sizes])
    load(path, into=into)
    assert_same(state_of(1), into)


def test_the_memory_is_pinned_for_a_cuda_device(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices._arena, "pin", lambda: pinned.append(devices._arena.nbytes))
    save(state_of(1), path)
    assert_same(state_of(1), load(path))
    assert len(pinned) == 2
    assert min(pinned) > 4 * MIB
