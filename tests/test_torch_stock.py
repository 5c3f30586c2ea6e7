"""What of torch is used beyond its documentation is still there; each failure says what mlstor loses by it."""

from __future__ import annotations

import inspect
import io
import pickle
import subprocess
import sys
from typing import Any

import pytest
from torch_support import bits, torch

from mlstor.torch import _stock


def _takes(function: object, names: list[str]) -> bool:
    return list(inspect.signature(function).parameters)[: len(names)] == names  # type: ignore[arg-type]


def test_torch_still_has_what_load_calls() -> None:
    from torch import _weights_only_unpickler

    serialization: Any = torch.serialization

    wanted = ["zip_file", "map_location", "pickle_module", "pickle_file", "overall_storage"]
    assert _takes(serialization._load, wanted), (
        "torch.serialization._load changed: load() with weights_only=False breaks"
    )
    assert _takes(_weights_only_unpickler.Unpickler, ["file", "encoding"]), "torch's restricted unpickler changed"
    assert serialization._serialization_tls.map_location is None, (
        "_serialization_tls: rebuilt tensors lose their device"
    )
    assert not serialization._serialization_tls.skip_data, (
        "_serialization_tls.skip_data: load() reads what it should not"
    )
    assert serialization._is_meta_location("meta"), "_is_meta_location: map_location='meta' breaks"
    restore = serialization._get_restore_location("cpu")
    assert restore(torch.UntypedStorage(3), "cuda:0").device.type == "cpu", "_get_restore_location: map_location breaks"
    assert torch._guards.active_fake_mode() is None, "active_fake_mode: load() can't tell FakeTensorMode"
    torch._utils._validate_loaded_sparse_tensors()


def test_torch_still_has_what_save_calls() -> None:
    serialization: Any = torch.serialization
    storage = torch.UntypedStorage(3)
    assert serialization.location_tag(storage) == "cpu"
    assert serialization.normalize_storage_type(type(storage)) is torch.UntypedStorage
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.uint8, _internal=True)
    assert (typed._pickle_storage_type(), typed._size()) == ("ByteStorage", 3)


def test_the_restricted_loader_gives_what_torchs_own_gives() -> None:
    from mlstor.torch.pickling import describe

    state = {"a": bits(1, torch.float32, (3, 4)).t(), "b": torch.empty(0), "c": torch.nn.Parameter(torch.ones(2))}
    described = describe(state)

    class Reader:
        def has_record(self, name: str) -> bool:
            return name == "data.pkl"

        def get_record(self, name: str) -> bytes:
            return described.pickle

        def get_record_offset(self, name: str) -> int:
            return 64

        def storage(self, name: str, nbytes: int) -> object:
            return dict(described.storages)[name.removeprefix("data/")]

        def get_storage_from_record(self, name: str, nbytes: int, kind: object) -> object:
            return _stock.Holder(self.storage(name, nbytes))  # type: ignore[arg-type]

        def serialization_id(self) -> str:
            return ""

    import pickle

    short = _stock.rebuild(Reader(), None, None, {})  # type: ignore[arg-type]
    full = _stock.rebuild(Reader(), None, pickle, {"encoding": "utf-8"})  # type: ignore[arg-type]
    for key in state:
        assert torch.equal(short[key], full[key])
        assert short[key].data_ptr() == full[key].data_ptr() == state[key].data_ptr()
        assert type(short[key]) is type(full[key]) is type(state[key])


def test_a_storage_written_behind_autograds_back_counts_as_changed() -> None:
    tensor = torch.zeros(3)
    before = tensor._version
    _stock.changed(tensor)
    assert tensor._version == before + 1


def test_the_meta_device_keeps_the_place_of_a_storage() -> None:
    out = io.BytesIO()
    torch.save({"a": torch.ones(5)}, out)
    out.seek(0)
    loaded = torch.load(out, map_location="meta")
    assert loaded["a"].untyped_storage()._checkpoint_offset > 0, "_checkpoint_offset is gone: into= can't find records"


def test_the_package_needs_torch_only_when_used() -> None:
    program = (
        "import sys, mlstor.torch as t; print('save' in t.__all__, 'torch' in sys.modules, 'mlstor._io' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False", "False"]
    import mlstor.torch

    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        mlstor.torch.lode  # noqa: B018
    assert mlstor.torch.save.__module__ == "mlstor.torch.saving"


def test_the_quick_reduction_of_tensors_is_torchs_own() -> None:
    """Opcode by opcode, but for the memo's numbers."""
    import pickletools
    import zipfile
    from collections.abc import Iterator

    from mlstor.torch.pickling import describe

    whole = bits(1, torch.float32, (6, 4))
    state = {
        "plain": torch.arange(5),
        "views": [whole, whole[1:3], whole.t(), whole[:, 2], whole.reshape(-1)[3:3]],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "wants a gradient": torch.ones(3, requires_grad=True),
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "bool": torch.tensor([True, False]),
        "complex": torch.ones(2, dtype=torch.complex64).conj(),
        "newer": [torch.zeros(4, dtype=torch.float8_e4m3fn), torch.zeros(4, dtype=torch.uint16)],
        "empty": torch.empty(0, 3),
    }
    stock = io.BytesIO()
    torch.save(state, stock)

    def told(data: bytes) -> Iterator[tuple[str, Any]]:
        for opcode, argument, _ in pickletools.genops(data):
            if "PUT" not in opcode.name and opcode.name != "MEMOIZE":
                yield opcode.name, None if "GET" in opcode.name else argument

    with zipfile.ZipFile(stock) as archive:
        assert list(told(describe(state).pickle)) == list(told(archive.read("archive/data.pkl")))


def test_loaded_tensors_have_hooks_of_their_own() -> None:
    from mlstor.torch.pickling import describe

    class Storages(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> Any:
            return torch.storage.TypedStorage(wrap_storage=torch.UntypedStorage(8), dtype=torch.float32, _internal=True)

    first, second = Storages(io.BytesIO(describe([torch.ones(2), torch.zeros(2)]).pickle)).load()
    assert first._backward_hooks == {}
    assert first._backward_hooks is not second._backward_hooks
