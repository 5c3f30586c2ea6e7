"""The pickle of an object, and the storages that it refers to, in the form that `torch.load` reads."""

from __future__ import annotations

import copyreg
import io
import pickle
import sys
from collections import OrderedDict
from types import ModuleType
from typing import Any, NamedTuple

import torch

from mlstor.errors import UsageError
from mlstor.torch import _stock

#: torch.save's own
DEFAULT_PROTOCOL = 2


class Described(NamedTuple):
    """An object taken apart: what a checkpoint file holds of it."""

    #: the record data.pkl
    pickle: bytes
    #: (key, storage) in the order of the keys; the record data/<key> holds the storage's bytes
    storages: list[tuple[str, torch.UntypedStorage]]


class _Stored:
    """Stands for a tensor's storage in its reduction; `entry` is what the pickle holds of it."""

    __slots__ = ("entry",)

    def __init__(self, entry: tuple[Any, ...]) -> None:
        self.entry = entry


class _NoHooks:
    """Stands for the empty OrderedDict of a tensor's hooks. Each tensor has its own: they are filled after loading."""


class _Seen:
    """The storages that a pickler met. Holds each: a freed one's address could come back as another's."""

    def __init__(self) -> None:
        self.keys: dict[int, str] = {}
        self.storages: list[tuple[str, torch.UntypedStorage]] = []
        self.dtypes: dict[int, torch.dtype] = {}
        self.kinds: dict[torch.dtype, Any] = {}
        #: types that are no storages: the pickler asks for every object
        self.others: set[type] = set()

    def identify(self, thing: Any) -> tuple[Any, ...] | None:
        """A storage's entry in the pickle, as `torch.load` wants it; None for anything else."""
        if not isinstance(thing, torch.storage.TypedStorage) and not torch.is_storage(thing):
            self.others.add(type(thing))
            return None
        if isinstance(thing, torch.storage.TypedStorage):
            # a typed storage's own methods warn that it is deprecated; these do not
            typed: Any = thing
            storage: Any = typed._untyped_storage
            dtype = typed.dtype
            kind = getattr(torch, typed._pickle_storage_type())
            numel = typed._size()
        else:
            storage, dtype = thing, torch.uint8
            kind = _stock.storage_type(storage)
            numel = storage.nbytes()
        device = getattr(thing, "_fake_device", None)
        return self._entry(storage, dtype, kind, numel, None if device is None else str(device))

    def reduce(self, tensor: torch.Tensor) -> Any:
        """A tensor's reduction. For the common kind it is what torch's own gives, at a third of the time."""
        dtype = tensor.dtype
        if (
            tensor.layout is not torch.strided
            or tensor.device.type != "cpu"
            or tensor.is_quantized
            or tensor.is_nested
            or tensor.__dict__
            or tensor._backward_hooks
            or _stock.has_own_reduction(tensor)
        ):
            return tensor.__reduce_ex__(DEFAULT_PROTOCOL)  # type: ignore[no-untyped-call]
        storage = tensor.untyped_storage()
        kind = self.kinds.get(dtype)
        if kind is None:
            kind = self.kinds[dtype] = _stock.kind_of(dtype)
        entry = self._entry(storage, dtype, kind, storage.nbytes() // dtype.itemsize, None)
        place = tensor.storage_offset(), tuple(tensor.size()), tensor.stride()
        return _stock.rebuild_tensor, (_Stored(entry), *place, tensor.requires_grad, _NoHooks())

    def _entry(
        self, storage: torch.UntypedStorage, dtype: torch.dtype, kind: Any, numel: int, device: str | None
    ) -> tuple[Any, ...]:
        if storage.device.type != "meta":
            address = storage.data_ptr()
            if address and self.dtypes.setdefault(address, dtype) != dtype:
                raise UsageError(
                    "two tensors or storages view the same memory as different types, which the format can't hold: "
                    "clone() one of them"
                )
        key = self.keys.get(storage._cdata)
        if key is None:
            key = self.keys[storage._cdata] = str(len(self.keys))
            self.storages.append((key, storage))
        return ("storage", kind, key, _stock.location_of(storage) if device is None else device, numel)


class _Pickler(pickle.Pickler):
    seen: _Seen

    def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
        kind = type(obj)
        if kind in self.seen.others:
            return None
        if kind is _Stored:
            entry: tuple[Any, ...] = obj.entry
            return entry
        return self.seen.identify(obj)


def _pickler_of(module: ModuleType) -> Any:
    """A pickler class of another module (dill, cloudpickle) that knows storages. Any: made at run time."""

    def persistent_id(self: Any, obj: Any) -> tuple[Any, ...] | None:
        seen: _Seen = self.seen
        return seen.identify(obj)

    return type("Pickler", (module.Pickler,), {"persistent_id": persistent_id})


def _refuse_fake(tensor: Any) -> Any:
    raise UsageError("the state holds a fake tensor, which has no bytes: save real tensors, outside FakeTensorMode")


def _reductions(seen: _Seen) -> dict[type, Any]:
    """Python's table of reductions, a quick one for tensors, and a refusal where torch's words would not help."""
    table: dict[type, Any] = dict(copyreg.dispatch_table)
    table[torch.Tensor] = seen.reduce
    table[_NoHooks] = lambda _: (OrderedDict, ())
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    if fake is not None:
        table[fake.FakeTensor] = _refuse_fake
    return table


def describe(obj: Any, *, pickle_module: ModuleType = pickle, pickle_protocol: int = DEFAULT_PROTOCOL) -> Described:
    """Take `obj` apart into a pickle and its storages.

    Parameters
    ----------
    obj
        Anything that `torch.save` takes.
    pickle_module
        Whose `Pickler` is used.
    pickle_protocol
        Default 2, as in torch.

    Raises
    ------
    UsageError
        If two tensors see the same memory as different types, or a tensor is fake (has no bytes).
    """
    seen = _Seen()
    out = io.BytesIO()
    pickler = (_Pickler if pickle_module is pickle else _pickler_of(pickle_module))(out, protocol=pickle_protocol)
    pickler.seen = seen
    if pickle_module is pickle:
        pickler.dispatch_table = _reductions(seen)
    pickler.dump(obj)
    for key, storage in seen.storages:
        if storage.device.type == "meta":
            raise UsageError(f"storage {key} of the state is on the meta device and has no bytes: save real tensors")
    return Described(out.getvalue(), seen.storages)
