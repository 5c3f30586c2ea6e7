"""The pickle of an object, and the storages that it refers to, in the form that `torch.load` reads."""

from __future__ import annotations

import copyreg
import io
import pickle
import sys
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


class _Seen:
    """The storages that a pickler met. Holds each: a freed one's address could come back as another's."""

    def __init__(self) -> None:
        self.keys: dict[int, str] = {}
        self.storages: list[tuple[str, torch.UntypedStorage]] = []
        self.dtypes: dict[int, torch.dtype] = {}
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
        device = getattr(thing, "_fake_device", None)
        return ("storage", kind, key, _stock.location_of(storage) if device is None else str(device), numel)


class _Pickler(pickle.Pickler):
    seen: _Seen

    def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
        return None if type(obj) in self.seen.others else self.seen.identify(obj)


def _pickler_of(module: ModuleType) -> Any:
    """A pickler class of another module (dill, cloudpickle) that knows storages. Any: made at run time."""

    def persistent_id(self: Any, obj: Any) -> tuple[Any, ...] | None:
        seen: _Seen = self.seen
        return seen.identify(obj)

    return type("Pickler", (module.Pickler,), {"persistent_id": persistent_id})


def _refuse_fake(tensor: Any) -> Any:
    raise UsageError("the state holds a fake tensor, which has no bytes: save real tensors, outside FakeTensorMode")


def _refusals() -> dict[type, Any]:
    """Python's table of reductions, and ours for what would fail with a message about torch's insides."""
    table: dict[type, Any] = dict(copyreg.dispatch_table)
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
        pickler.dispatch_table = _refusals()
    pickler.dump(obj)
    for key, storage in seen.storages:
        if storage.device.type == "meta":
            raise UsageError(f"storage {key} of the state is on the meta device and has no bytes: save real tensors")
    return Described(out.getvalue(), seen.storages)
