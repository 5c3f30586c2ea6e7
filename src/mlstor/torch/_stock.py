"""What of torch itself is called beyond its documented functions; the only module that does so.

`torch.load` has no hook for where bytes come from, so its private `_load` is called with a reader of ours. Written
against torch 2.13; tests/test_torch_stock.py fails in words when torch changes one of these.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import pickle
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import _weights_only_unpickler, serialization
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mlstor._io import is_plain_pickle
from mlstor.errors import UsageError

_TRUE = ("1", "y", "yes", "true")
#: What a dense tensor's pickle calls.
rebuild_tensor: Any = torch._utils._rebuild_tensor_v2


class Reader(Protocol):
    """The part of torch's zip reader that its `_load` uses, and `storage`."""

    def has_record(self, name: str) -> bool: ...
    def get_record(self, name: str) -> bytes: ...
    def get_record_offset(self, name: str) -> int: ...
    def get_storage_from_record(self, name: str, nbytes: int, kind: Any) -> Any: ...
    def storage(self, name: str, nbytes: int) -> torch.UntypedStorage: ...
    def serialization_id(self) -> str: ...


def rebuild(reader: Reader, map_location: Any, pickle_module: ModuleType | None, arguments: Mapping[str, Any]) -> Any:
    """The object that `data.pkl` describes, with its storages from `reader`.

    Parameters
    ----------
    pickle_module
        None: torch's restricted unpickler, which runs no code of the file.

    Raises
    ------
    pickle.UnpicklingError
        If the restricted unpickler meets a class that it does not allow.
    """
    if pickle_module is not None:
        return _by_torch(reader, map_location, pickle_module, arguments)
    try:
        if reader.has_record("byteorder") and reader.get_record("byteorder") != b"little":
            return _by_torch(reader, map_location, _weights_only_unpickler, {"encoding": "utf-8"})
        return _restricted(reader, map_location)
    except pickle.UnpicklingError as error:
        if not any(word in str(error) for word in ("GLOBAL", "allow")):  # a damaged pickle: no class is missing
            raise
        raise pickle.UnpicklingError(
            f"{error}\nWith weights_only=True (the default) only tensors and plain containers are loaded. If you trust "
            "the file, allow the class with torch.serialization.add_safe_globals([...]), or set weights_only=False"
        ) from None


def _by_torch(reader: Reader, map_location: Any, module: ModuleType, arguments: Mapping[str, Any]) -> Any:
    load: Any = serialization._load  # Any: torch does not type it
    with _located(map_location):
        return load(reader, map_location, module, "data.pkl", None, **arguments)


def _restricted(reader: Reader, map_location: Any) -> Any:
    """What `_by_torch` does with the restricted unpickler, for storages that need no change.

    torch looks for a FakeTensorMode three times per tensor, a quarter of the time for many small tensors; the caller
    has looked once.
    """
    # the reader makes storages of the meta device itself; torch would make new ones of them
    where = _stays if is_meta(map_location) else map_location
    restore: Any = serialization._get_restore_location(where)  # type: ignore[no-untyped-call]
    typed_storage: Any = torch.storage.TypedStorage
    known: dict[str, Any] = {}

    def storage_of(reference: Any) -> Any:
        if not isinstance(reference, tuple) or len(reference) != 5 or reference[0] != "storage":
            raise pickle.UnpicklingError("the pickle refers to something that is no storage")
        _, kind, key, location, numel = reference
        typed = known.get(key)
        if typed is None:
            dtype = torch.uint8 if kind is torch.UntypedStorage else getattr(kind, "dtype", None)
            if not isinstance(dtype, torch.dtype):
                raise pickle.UnpicklingError("the pickle refers to a storage of no type of torch")
            storage = restore(reader.storage(f"data/{key}", numel * dtype.itemsize), location)
            typed = typed_storage(wrap_storage=storage, dtype=dtype, _internal=True)
            if numel:  # storages without bytes are no one's alias, as in torch
                known[key] = typed
        return typed

    pickled = reader.get_record("data.pkl")
    load = _plain(pickled, storage_of) or _careful(pickled, storage_of)
    with _located(map_location):
        result = load()
        torch._utils._validate_loaded_sparse_tensors()  # type: ignore[no-untyped-call]
    return result


def _careful(pickled: bytes, storage_of: Callable[[Any], Any]) -> Callable[[], Any]:
    """torch's restricted unpickler."""
    unpickler = _weights_only_unpickler.Unpickler(io.BytesIO(pickled), encoding="utf-8")
    vars(unpickler)["persistent_load"] = storage_of
    return unpickler.load


def _plain(pickled: bytes, storage_of: Callable[[Any], Any]) -> Callable[[], Any] | None:
    """Python's C unpickler, at a tenth of the time, where it does no more than torch's; None for other pickles."""
    if not is_plain_pickle(pickled, _plain_kinds()):
        return None
    unpickler: Any = _PlainUnpickler(io.BytesIO(pickled), fix_imports=False, encoding="utf-8")
    unpickler.persistent_load = storage_of
    load: Callable[[], Any] = unpickler.load
    return load


class _Rebuild:
    """Stands for torch's function of the same effect: a pickle could set attributes of that, but can't of this."""

    __slots__ = ()

    def __call__(
        self, storage: Any, offset: int, size: Any, stride: Any, requires_grad: bool, hooks: Any, metadata: Any = None
    ) -> torch.Tensor:
        # without the look for a FakeTensorMode: the caller has looked
        empty = torch.empty((0,), dtype=storage.dtype, device=storage._untyped_storage.device)
        tensor = empty.set_(storage._untyped_storage, offset, size, stride)
        if requires_grad:
            tensor.requires_grad = requires_grad
        if metadata:
            torch._utils.set_tensor_metadata(tensor, metadata)  # type: ignore[no-untyped-call]
        tensor._backward_hooks = hooks
        return tensor


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        storage_kind: Any = serialization.StorageType
        found = _plain_names()[f"{module_name}\n{global_name}".encode()]
        return storage_kind(global_name) if found is None else found


@functools.cache
def _plain_names() -> dict[bytes, Any]:
    """What a plain pickle may name. None: a kind of storage, which is made for each load."""
    kinds: Any = torch.storage._dtype_to_storage_type_map()
    return {
        b"collections\nOrderedDict": OrderedDict,
        b"torch._utils\n_rebuild_tensor_v2": _Rebuild(),
        **{f"torch\n{kind}".encode(): None for kind in kinds.values()},
        **{str(dtype).replace(".", "\n").encode(): dtype for dtype in kinds},
    }


@functools.cache
def _plain_kinds() -> dict[bytes, str]:
    """What `is_plain_pickle` is to know of the names."""
    of_type = {_Rebuild: "function", type: "OrderedDict"}
    return {name: of_type.get(type(found), "value") for name, found in _plain_names().items()}


def _stays(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
    return storage


@contextlib.contextmanager
def _located(map_location: Any) -> Iterator[None]:
    """Tensors that are rebuilt without a storage look here where they belong. torch sets it back only on success."""
    serialization._serialization_tls.map_location = map_location
    try:
        yield
    finally:
        serialization._serialization_tls.map_location = None


def pickle_module_of(weights_only: bool | None, pickle_module: ModuleType | None) -> ModuleType | None:
    """The module to unpickle with, or None for the restricted unpickler, by the rules and variables of `torch.load`.

    Raises
    ------
    UsageError
        If arguments or variables contradict each other.
    """
    asked = weights_only
    if weights_only is None:
        weights_only = pickle_module is None
    safe = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0").lower() in _TRUE
    unsafe = os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0").lower() in _TRUE
    if safe and unsafe:
        raise UsageError("set only one of TORCH_FORCE_WEIGHTS_ONLY_LOAD and TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    if safe:
        weights_only = True
    elif unsafe and asked is None:
        warnings.warn("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set: weights_only=False", UserWarning, stacklevel=4)
        weights_only = False
    if not weights_only:
        module = pickle_module or pickle
        serialization._check_dill_version(module)
        return module
    if pickle_module is not None:
        raise UsageError("weights_only=True has its own unpickler: leave pickle_module= out, or set weights_only=False")
    return None


def kind_of(dtype: torch.dtype) -> Any:
    """The class that stands in pickles for storages of a dtype: torch.FloatStorage for float32."""
    return getattr(torch, torch.storage._dtype_to_storage_type_map()[dtype])


def has_own_reduction(tensor: torch.Tensor) -> bool:
    """Whether a dense tensor of the CPU is pickled otherwise than most: newer dtypes, and lazy conj() and neg()."""
    metadata: Any = torch._utils.get_tensor_metadata(tensor)  # type: ignore[no-untyped-call]
    return tensor.dtype not in torch.storage._dtype_to_storage_type_map() or bool(metadata)


def passes_to_torch() -> bool:
    """Whether torch's FakeTensorMode or `skip_data` is active: no bytes are to be read then."""
    return torch._guards.active_fake_mode() is not None or serialization._serialization_tls.skip_data


def is_meta(map_location: Any) -> bool:
    """Whether a `map_location` asks for tensors without bytes."""
    answer: Any = serialization._is_meta_location
    return bool(answer(map_location))


def maps_by_default() -> bool:
    """torch's setting for ``mmap=None``."""
    from torch.utils.serialization import config

    return config.load.mmap


def storage_type(storage: Any) -> Any:
    """The class that a pickle names for an untyped storage."""
    kind: Any = serialization.normalize_storage_type
    return kind(type(storage))


def location_of(storage: Any) -> str:
    """The name of a storage's device, as a pickle says it."""
    tag: Any = serialization.location_tag
    return str(tag(storage))


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of a subclass that has no memory of its own but holds other tensors, as DTensor."""
    answer: Any = is_traceable_wrapper_subclass
    return bool(answer(tensor))


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether a tensor was made in FakeTensorMode: it has no memory, whatever device it names."""
    module: Any = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and isinstance(tensor, module.FakeTensor)


def inner(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that a wrapper holds."""
    wrapper: Any = tensor
    names, _ = wrapper.__tensor_flatten__()
    held = [getattr(wrapper, name) for name in names]  # a DTensor's mesh is among them
    return [one for one in held if isinstance(one, torch.Tensor)]


class Holder:
    """What `Reader.get_storage_from_record` gives back: torch asks it for its untyped storage."""

    __slots__ = ("_untyped_storage",)

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self._untyped_storage = storage

    def _typed_storage(self) -> Holder:
        return self


def changed(tensor: torch.Tensor) -> None:
    """Tell autograd that a tensor's memory was written behind its back."""
    if tensor.is_inference():  # autograd never looks at these
        return
    torch._C._autograd._unsafe_set_version_counter((tensor,), (tensor._version + 1,))
