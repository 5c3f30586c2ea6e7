"""`load`: its arguments, what it passes on to torch, what it can't verify, and what it refuses."""

from __future__ import annotations

import io
import os
import pathlib
import pickle
import tarfile
import zlib
from typing import Any

import numpy as np
import pytest
from torch_support import MIB, assert_same, bits, content, setting, torch

import mlstor
from mlstor.blob.files import FileBlob
from mlstor.formats.scrub import scrub
from mlstor.formats.zip_layout import Record, directory, header, lay_out
from mlstor.torch import UnverifiedWarning, load, save
from mlstor.torch.pickling import describe


def state_of(seed: int = 1) -> dict[str, Any]:
    return {"w": bits(seed, torch.int16, (MIB,)), "b": bits(seed + 1, torch.float32, (30,)), "step": seed}


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "state.pt"


def archive(records: dict[str, bytes]) -> bytes:
    """A zip as ours of any records."""
    layout = lay_out("archive", [Record(name, len(data)) for name, data in records.items()])
    crcs = [zlib.crc32(data) for data in records.values()]
    parts = [
        header("archive", place, crc) + records[place.name] for place, crc in zip(layout.placed, crcs, strict=True)
    ]
    return b"".join([*parts, directory("archive", layout, crcs)])


def test_map_location_is_torchs(path: pathlib.Path) -> None:
    save(state_of(), path)
    asked: list[str] = []

    def place(storage: Any, location: str) -> Any:
        asked.append(location)
        return storage

    assert_same(state_of(), load(path, place))
    assert asked == ["cpu", "cpu"]
    for location in ("cpu", torch.device("cpu"), {"cuda:0": "cpu"}):
        assert_same(state_of(), load(path, location))
    assert load(path, "meta")["w"].is_meta


def test_a_file_of_another_device_can_be_mapped(path: pathlib.Path) -> None:
    described = describe(state_of())
    pickled = described.pickle.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
    assert pickled != described.pickle
    data = {f"data/{key}": content(storage) for key, storage in described.storages}
    path.write_bytes(archive({"data.pkl": pickled, "byteorder": b"little", **data, "version": b"3\n"}))
    assert_same(state_of(), load(path, "cpu"))
    assert_same(state_of(), load(path, {"cuda:0": "cpu"}))


def test_a_big_endian_file_is_swapped(path: pathlib.Path) -> None:
    state = state_of()
    described = describe({key: state[key] for key in ("w", "b")})
    swapped = {"data/0": state["w"].numpy().byteswap().tobytes(), "data/1": state["b"].numpy().byteswap().tobytes()}
    path.write_bytes(archive({"data.pkl": described.pickle, "byteorder": b"big", **swapped, "version": b"3\n"}))
    loaded = load(path)
    assert torch.equal(loaded["w"], state["w"])
    assert torch.equal(loaded["b"], state["b"])
    into = {"w": torch.zeros_like(state["w"]), "b": torch.zeros_like(state["b"])}
    load(path, into=into)
    assert torch.equal(into["w"], state["w"])


def test_a_mapped_load_verifies_only_when_asked(path: pathlib.Path) -> None:
    save(state_of(), path)
    loaded = load(path, mmap=True, verify=True)
    assert_same(state_of(), loaded)
    offset = path.read_bytes().index(content(state_of()["w"].untyped_storage()))
    with path.open("r+b") as file:
        file.seek(offset + 1000)
        file.write(b"\xff")
    assert load(path, mmap=True)["w"][500] != state_of()["w"][500]
    assert load(path, verify=False)["w"][500] != state_of()["w"][500]
    with pytest.raises(mlstor.CorruptionError, match="data/0"):
        load(path, mmap=True, verify=True)


def test_what_is_mapped_is_the_file_that_was_verified(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(state_of(), path)
    by_torch = torch.load

    def replaced(*args: Any, **kwargs: Any) -> Any:
        save(state_of(5), path)
        return by_torch(*args, **kwargs)

    monkeypatch.setattr(torch, "load", replaced)
    with pytest.raises(OSError, match="replaced while it was read"):
        load(path, mmap=True, verify=True)


@pytest.mark.parametrize("numel", [3 * MIB, 10])
def test_a_file_that_is_replaced_is_not_called_damaged(
    path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, numel: int
) -> None:
    # A reader that looks every minute at what a training writes anew.
    stat = FileBlob.stat
    looks = 0

    def replaced(blob: FileBlob) -> Any:
        nonlocal looks
        found = stat(blob)
        looks += 1
        if looks == 1:
            save({"w": torch.ones(numel)}, path)
        return found

    monkeypatch.setattr(FileBlob, "stat", replaced)
    for read in (lambda: load(path), lambda: list(scrub(FileBlob(path)))):
        save({"w": torch.zeros(MIB)}, path)
        looks = 0
        assert "read it again" in _said(read)


def _said(read: Any) -> str:
    try:
        return str(read())
    except OSError as error:
        return str(error)


def test_torchs_setting_maps_by_default(path: pathlib.Path) -> None:
    save(state_of(), path)
    with setting("load.mmap", True):
        mapped = load(path)
        assert str(path) in pathlib.Path("/proc/self/maps").read_text()
        del mapped
        into = state_of(7)
        assert_same(state_of(), load(path, into=into))


def test_a_file_without_crcs_is_loaded_with_one_warning(path: pathlib.Path) -> None:
    with setting("save.compute_crc32", False):
        torch.save(state_of(), path)
    with pytest.warns(UnverifiedWarning, match="compute_crc32=False") as warned:
        assert_same(state_of(), load(path))
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert_same(state_of(), load(path, verify=False))
    assert_same(state_of(), load(path, mmap=True))


def test_the_format_before_the_zip_is_loaded_with_one_warning(path: pathlib.Path) -> None:
    torch.save(state_of(), path, _use_new_zipfile_serialization=False)
    with pytest.warns(UnverifiedWarning, match="before 1.6") as warned:
        assert_same(state_of(), load(path))
    assert len(warned) == 1
    assert_same(state_of(), load(path, verify=False))
    into = state_of(9)
    assert_same(state_of(), load(path, verify=False, into=into))


def test_a_cut_file_of_the_old_format_is_named(path: pathlib.Path) -> None:
    torch.save(state_of(), path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for nbytes in (50, 200, len(whole) - 1000):
        path.write_bytes(whole[:nbytes])
        with pytest.raises(mlstor.CorruptionError, match=r"state\.pt: the file ends early"):
            load(path, verify=False)


def test_what_is_no_checkpoint_is_said_to_be_none(path: pathlib.Path) -> None:
    for foreign in (b"hello, this is no checkpoint\n" * 9, pickle.dumps({"a": 1}), b""):
        path.write_bytes(foreign)
        with pytest.raises(mlstor.CorruptionError, match=r"state\.pt: .* not that of a file of torch\.save"):
            load(path)


def test_a_damaged_or_cut_zip_is_never_taken_for_the_old_format(path: pathlib.Path) -> None:
    save(state_of(), path)
    whole = path.read_bytes()
    for damaged in (b"\0" + whole[1:], whole[: len(whole) // 2], whole[:-1], b""):
        path.write_bytes(damaged)
        with pytest.raises(mlstor.CorruptionError, match=str(path)):
            load(path)


def test_a_tar_of_the_oldest_torch_goes_to_torch(path: pathlib.Path) -> None:
    with tarfile.open(path, "w") as tar:
        for name, values in (("storages", (0, [])), ("tensors", (0,)), ("pickle", ({"a": 1},))):
            member, pickled = tarfile.TarInfo(name), b"".join(map(pickle.dumps, values))
            member.size = len(pickled)
            tar.addfile(member, io.BytesIO(pickled))
    with pytest.warns(UnverifiedWarning):
        assert load(path, weights_only=False) == {"a": 1}


def test_a_class_runs_only_where_it_is_allowed(path: pathlib.Path) -> None:
    class Loud:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, ("exit 3",)

    save({"x": Loud(), "t": torch.ones(3)}, path)
    with pytest.raises(pickle.UnpicklingError, match="add_safe_globals"):
        load(path)
    assert load(path, weights_only=False)["x"] == 3 << 8


def test_the_variables_of_torch_are_honoured(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(np.float64, path)
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(pickle.UnpicklingError):
        load(path, weights_only=False)
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.warns(UserWarning, match="weights_only=False"):
        assert load(path) is np.float64
    with pytest.raises(pickle.UnpicklingError):
        load(path, weights_only=True)


def test_another_pickle_module_is_used_both_ways(path: pathlib.Path) -> None:
    import types

    class Unpickler(pickle._Unpickler):
        used = 0

        def load(self) -> Any:
            Unpickler.used += 1
            return super().load()

    class Pickler(pickle._Pickler):
        used = 0

        def dump(self, obj: Any) -> None:
            Pickler.used += 1
            super().dump(obj)

    module = types.ModuleType("own")
    vars(module).update(Pickler=Pickler, Unpickler=Unpickler, __name__="own")
    save(state_of(), path, pickle_module=module, pickle_protocol=4)
    assert_same(state_of(), load(path, pickle_module=module))
    assert (Pickler.used, Unpickler.used) == (1, 1)
    with pytest.raises(mlstor.UsageError, match="pickle_module"):
        load(path, pickle_module=module, weights_only=True)


@pytest.mark.parametrize("call", [lambda f: save(1, f), load])
def test_file_objects_are_refused_with_advice(call: Any) -> None:
    with pytest.raises(mlstor.UsageError, match=r"torch\.save and torch\.load take file objects"):
        call(io.BytesIO())


def test_what_can_not_be_done_is_said(path: pathlib.Path) -> None:
    save(state_of(), path)
    for call in (lambda: save(1, ""), lambda: load("")):
        with pytest.raises(mlstor.UsageError, match="the path is empty"):
            call()
    with pytest.raises(mlstor.UsageError, match="not str"):
        load("s3://bucket/x.pt", options="endpoint")  # type: ignore[arg-type]
    with pytest.raises(
        mlstor.UsageError, match="the option endpont is not for this kind of store, which has endpoint, reg"
    ):
        load("s3://bucket/x.pt", options={"endpont": "http://127.0.0.1:9"})
    with pytest.raises(mlstor.UsageError, match="load_safetensors"):
        load("x.safetensors")
    with pytest.raises(mlstor.UsageError, match="can't be mapped"):
        load("s3://bucket/x.pt", mmap=True, options={"endpoint": "http://127.0.0.1:9", "anonymous": True})
    with pytest.raises(mlstor.UsageError, match="into="):
        load(path, into=state_of(), map_location="cpu")
    with pytest.raises(mlstor.UsageError, match="not a size"):
        save(1, path, max_bandwidth="fast")
    with pytest.raises(mlstor.UsageError, match="above 0"):
        save(1, path, max_bandwidth=0)
    with torch.serialization.skip_data(), pytest.raises(mlstor.UsageError, match="skip_data"):
        save(state_of(), path)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.zeros(3)
    with pytest.raises(mlstor.UsageError, match="fake"):
        save({"fake": fake}, path)
    with pytest.raises(FileNotFoundError):
        load(path.with_name("none.pt"))
    with pytest.raises(FileNotFoundError):
        save(1, path.with_name("no-such-directory") / "x.pt")


def test_a_pickle_that_asks_for_more_than_the_file_holds_is_damage(path: pathlib.Path) -> None:
    described = describe({"w": torch.arange(10)})
    short = {"data.pkl": described.pickle, "data/0": bytes(40), "version": b"3\n"}
    path.write_bytes(archive(short))
    into = {"w": torch.zeros(10, dtype=torch.int64)}
    for place in (None, into):
        with pytest.raises(mlstor.CorruptionError, match="needs 80 bytes of the record data/0, which has 40"):
            load(path, into=place)
    path.write_bytes(archive({"data.pkl": described.pickle, "version": b"3\n"}))
    with pytest.raises(mlstor.CorruptionError, match="refers to the record 'data/0'"):
        load(path)
    path.write_bytes(archive({"version": b"3\n"}))
    with pytest.raises(mlstor.CorruptionError, match=r"data\.pkl"):
        load(path)


def test_a_zip_with_holes_is_read_where_its_headers_say(path: pathlib.Path) -> None:
    # zipfile leaves no holes; a prefix to each record's place is moved in by hand
    state = {"w": bits(1, torch.int16, (MIB,)), "v": bits(2, torch.int16, (MIB,))}
    described = describe(state)
    records = {"data.pkl": described.pickle, **{f"data/{key}": content(item) for key, item in described.storages}}
    records["version"] = b"3\n"
    layout = lay_out("archive", [Record(name, len(data)) for name, data in records.items()])
    hole = 12_345
    moved, shift = [], 0
    for place in layout.placed:
        moved.append(place._replace(header_offset=place.header_offset + shift, offset=place.offset + shift))
        shift += hole
    layout = layout._replace(
        placed=tuple(moved), directory_offset=layout.directory_offset + shift, nbytes=layout.nbytes + shift
    )
    crcs = [zlib.crc32(data) for data in records.values()]
    parts = [header("archive", at, crc) + records[at.name] + b"x" * hole for at, crc in zip(moved, crcs, strict=True)]
    path.write_bytes(b"".join([*parts, directory("archive", layout, crcs)]))
    assert_same(state, load(path))
    assert_same(state, torch.load(path))


def test_a_hole_of_any_size_is_not_read(path: pathlib.Path) -> None:
    small = {"data.pkl": pickle.dumps({"step": 3}, 2), "version": b"3\n"}
    layout = lay_out("archive", [Record(name, len(data)) for name, data in small.items()])
    crcs = [zlib.crc32(data) for data in small.values()]
    hole = 1 << 42
    with path.open("wb") as file:
        for place, crc in zip(layout.placed, crcs, strict=True):
            file.write(header("archive", place, crc) + small[place.name])
        try:
            file.seek(hole)
            file.write(directory("archive", layout._replace(directory_offset=hole), crcs))
        except OSError:
            pytest.skip("the file system has no files of 4 TiB")
    assert load(path) == {"step": 3}


def test_loaded_storages_can_be_resized(path: pathlib.Path) -> None:
    save({"w": bits(1, torch.int16, (4 * MIB,))}, path)
    storage = load(path)["w"].untyped_storage()
    storage.resize_(0)
    storage.resize_(100)
    assert storage.nbytes() == 100


def test_a_default_device_does_not_matter(path: pathlib.Path) -> None:
    save(state_of(), path)
    with torch.device("meta"):
        assert load(path)["w"].device.type == "cpu"
    with torch.inference_mode():
        loaded = load(path)
    assert_same(state_of(), loaded)
