"""What mlstor saves, torch loads, and the other way round: every kind of tensor, aliases, and torch's own settings."""

from __future__ import annotations

import io
import pathlib
import pickle
import shutil
import sys
import zipfile
from typing import Any

import pytest
from hypothesis import given, settings
from torch_support import KINDS, MIB, assert_same, bits, content, setting, states, torch, unzip_tests

from mlstor.blob.target import open_blob
from mlstor.torch import load, save
from mlstor.torch.archive import Archive, Target, address_of
from mlstor.torch.pickling import describe

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse (CSR|BSR) tensor support:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*quantize.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*(quantiz|ao\\.).*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]
ONCE = settings(max_examples=60)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("states") / "state.pt"


@ONCE
@given(state=states())
def test_torch_loads_what_was_saved(path: pathlib.Path, state: Any) -> None:
    save(state, path)
    assert_same(state, torch.load(path))
    assert_same(state, torch.load(path, mmap=True))


@ONCE
@given(state=states())
def test_load_reads_what_torch_saved(path: pathlib.Path, state: Any) -> None:
    torch.save(state, path)
    assert_same(torch.load(path), load(path))


@ONCE
@given(state=states())
def test_load_reads_what_save_wrote_and_the_pickle_is_torchs_own(path: pathlib.Path, state: Any) -> None:
    save(state, path)
    assert_same(state, load(path))
    stock = io.BytesIO()
    torch.save(state, stock)
    assert describe(state).pickle == zipfile.ZipFile(stock).read("archive/data.pkl")


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_each_kind_survives_both_ways(path: pathlib.Path, kind: str) -> None:
    state = {kind: KINDS[kind](5)}
    save(state, path)
    assert_same(state, torch.load(path))
    assert_same(state, load(path))
    torch.save(state, path)
    assert_same(state, load(path))


def test_the_zip_is_whole_and_large_records_lie_as_their_memory(path: pathlib.Path) -> None:
    state = {"a": bits(1, torch.int16, (MIB,)), "b": bits(2, torch.int8, (300,)), "c": bits(3, torch.uint8, (3 * MIB,))}
    save(state, path)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
    assert names == [
        f"state/{name}"
        for name in ("data.pkl", "byteorder", "data/0", "data/1", "data/2", "version", ".data/serialization_id")
    ]
    if shutil.which("unzip"):
        unzip_tests(path)
    places = load(path, map_location="meta")
    whole = path.read_bytes()
    for key in ("a", "c"):
        offset = places[key].untyped_storage()._checkpoint_offset
        assert offset % 4096 == state[key].data_ptr() % 4096
        assert whole[offset:].startswith(content(state[key].untyped_storage()))


def test_torch_finds_the_right_offsets_in_every_way_it_has(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    state = {"a": bits(1, torch.int16, (MIB,)), "b": bits(2, torch.int8, (300,)), "c": bits(3, torch.float32, (MIB,))}
    save(state, path)
    with FakeTensorMode():
        fake = torch.load(path)
    with FakeTensorMode():
        passed_on = load(path)
    whole = path.read_bytes()
    for key, tensor in state.items():
        offset = fake[key].untyped_storage()._checkpoint_offset
        assert whole[offset:].startswith(content(tensor.untyped_storage()))
        assert passed_on[key].untyped_storage()._checkpoint_offset == offset
    with setting("load.calculate_storage_offsets", True):
        assert_same(state, torch.load(path, mmap=True))
    monkeypatch.setenv("TORCH_SERIALIZATION_DEBUG", "1")
    assert_same(state, torch.load(path))


@pytest.mark.parametrize("alignment", [64, 4096])
def test_load_reads_torchs_files_of_any_alignment(path: pathlib.Path, alignment: int) -> None:
    state = {"large": bits(1, torch.int16, (MIB,)), "small": bits(2, torch.int8, (300,)), "empty": torch.empty(0)}
    with setting("save.storage_alignment", alignment):
        torch.save(state, path)
    assert_same(state, load(path))


def test_a_training_state_survives(path: pathlib.Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.BatchNorm1d(30), torch.nn.Linear(30, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(4, 40)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optim": optimizer.state_dict(), "rng": torch.get_rng_state(), "step": 3}
    save(state, path)
    for loaded in (torch.load(path), load(path)):
        assert_same(state, loaded)
        assert loaded["model"]._metadata == state["model"]._metadata
        optimizer.load_state_dict(loaded["optim"])


def test_a_module_survives_where_code_is_allowed(path: pathlib.Path) -> None:
    model = torch.nn.Linear(3, 2)
    save(model, path)
    assert torch.equal(load(path, weights_only=False).weight, model.weight)
    with pytest.raises(pickle.UnpicklingError, match="weights_only=False"):
        load(path)


def test_seventy_thousand_tensors_survive(path: pathlib.Path) -> None:
    # More records than a zip without its 64-bit extension can count.
    # With code allowed: the unpickler is Python's own, in C.
    whole = torch.arange(70_000)
    save([one.clone() for one in whole.split(1)], path)
    with zipfile.ZipFile(path) as archive:
        assert len(archive.infolist()) == 70_004
    assert torch.equal(torch.cat(torch.load(path, weights_only=False)), whole)
    blob = open_blob(path)
    read = Archive(blob, blob.stat(), verify=True)
    memory = {name: bytearray(entry.nbytes) for name, entry in read.directory.entries.items()}
    assert not read.fetch([Target(name, address_of(data)) for name, data in memory.items()], memory)
    assert [int.from_bytes(memory[f"data/{index}"], "little") for index in range(70_000)] == list(range(70_000))


def test_a_state_frees_its_memory_once_saved(path: pathlib.Path) -> None:
    import gc
    import weakref

    tensor = bits(1, torch.int16, (MIB,))
    storage = tensor.untyped_storage()
    gone = weakref.ref(storage)
    gc.disable()
    try:
        save({"a": tensor}, path)
        del tensor, storage
        assert gone() is None
    finally:
        gc.enable()


def test_the_same_memory_as_two_types_is_refused_and_named(path: pathlib.Path) -> None:
    from mlstor import UsageError

    tensor = torch.zeros(8)
    with pytest.raises(UsageError, match="different types"):
        save([tensor, tensor.view(torch.int32)], path)


class Marked(torch.Tensor):  # type: ignore[misc]
    """A subclass with memory and an attribute of its own."""


def test_subclasses_survive_both_ways(path: pathlib.Path) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    marked = bits(1, torch.float32, (5, 4)).as_subclass(Marked)
    marked.note = "of a kind"
    state = {"marked": marked, "wrapper": TwoTensor(bits(2, torch.float32, (3,)), bits(3, torch.float32, (3,)))}
    for write, read in ((save, torch.load), (torch.save, load), (save, load)):
        write(state, path)
        with pytest.raises(pickle.UnpicklingError):
            read(path)
        with torch.serialization.safe_globals([Marked, TwoTensor]):
            found = [read(path), read(path, weights_only=False)]
        for loaded in found:
            assert type(loaded["marked"]) is Marked
            assert loaded["marked"].note == "of a kind"
            assert torch.equal(loaded["marked"].as_subclass(torch.Tensor), marked.as_subclass(torch.Tensor))
            assert type(loaded["wrapper"]) is TwoTensor
            assert torch.equal(loaded["wrapper"].a, state["wrapper"].a)
            assert torch.equal(loaded["wrapper"].b, state["wrapper"].b)


def test_a_big_endian_host_is_refused_clearly(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlstor import UsageError
    from mlstor.torch import async_save, load_safetensors, save_safetensors

    path.unlink(missing_ok=True)
    monkeypatch.setattr(sys, "byteorder", "big")
    state = {"a": torch.ones(3)}
    with pytest.raises(UsageError, match=r"little-endian files only: use torch\.save"):
        save(state, path)
    with pytest.raises(UsageError, match="little-endian"):
        async_save(state, path)
    for call in (lambda: save_safetensors(state, path), lambda: load_safetensors(path)):
        with pytest.raises(UsageError, match="use the safetensors package"):
            call()
    assert not path.exists()


@pytest.mark.parametrize("name", ["model.best.pt", "plain", "müller.pt"])
def test_the_folder_in_the_zip_is_named_as_torchs(tmp_path: pathlib.Path, name: str) -> None:
    save(torch.ones(2), tmp_path / name)
    ours = zipfile.ZipFile(tmp_path / name).namelist()[0]
    torch.save(torch.ones(2), tmp_path / name)
    assert zipfile.ZipFile(tmp_path / name).namelist()[0] == ours


def test_a_name_that_torch_can_not_save_to_is_no_trouble(tmp_path: pathlib.Path) -> None:
    save(torch.ones(2), tmp_path / ".hidden")
    assert torch.equal(torch.load(tmp_path / ".hidden"), torch.ones(2))


def test_the_way_of_other_devices_states_writes_the_same_files(path: pathlib.Path) -> None:
    # Through the arena, as a state with CUDA storages goes.
    from mlstor.torch.saving import _save_staged

    state = {"large": bits(1, torch.int16, (MIB,)), "small": bits(2, torch.int8, (300,)), "empty": torch.empty(0)}
    for _ in range(2):
        _save_staged(describe(state), open_blob(path), "state", 0)
        assert_same(state, load(path))
        assert_same(state, torch.load(path))
