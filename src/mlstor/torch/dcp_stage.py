"""Copies of a state for ``dcp.async_save``, in memory that is used again by the next save."""

from __future__ import annotations

import copy
import threading
import time
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mlstor.torch.storages import allocate

#: Copies start at multiples of it: elements of every type are aligned, and of large ones whole pages.
_ALIGN_BYTES = 64
_PAGE_BYTES = 4096
#: Between two looks whether the upload is over.
_LOOK_S = 0.002
#: torch calls the writer within milliseconds after `stage`; if nobody did for so long, there is no upload.
_BEGIN_S = 10.0


class Stager:
    """Copies the tensors of a state into one storage.

    One storage, because a process that uploads (``AsyncCheckpointerType.PROCESS``) gets it as one descriptor: torch
    then moves it to shared memory, once, and later copies go there directly.
    """

    def __init__(self) -> None:
        #: how long the last call of `stage` took, s
        self.stall_s = 0.0
        self._arena: torch.UntypedStorage | None = None
        self._staged: weakref.ref[StagedState] | None = None
        self._caller: threading.Thread | None = None
        self._upload: threading.Thread | None = None
        self._staged_s = 0.0

    @property
    def nbytes(self) -> int:
        """Memory that holds copies, bytes."""
        return self._arena.nbytes() if self._arena is not None else 0

    def touch(self) -> None:
        """torch called the writer: if another thread than that of `stage`, it is the one that uploads."""
        thread = threading.current_thread()
        if self._caller is not None and thread is not self._caller:
            self._upload = thread

    def stage(self, state: dict[str, Any]) -> StagedState:
        """A copy of `state`: tensors on the CPU, sharing memory where the originals do; other objects deep-copied."""
        start = time.monotonic()
        spans = _Spans()
        with torch.no_grad():
            for tensor in _plain_tensors(state):
                spans.add(tensor)
            nbytes = spans.place()
            arena = self._free_arena(nbytes)
            spans.copy_to(arena)
            staged = StagedState(_packed(state, spans, arena))
        self._staged = weakref.ref(staged)
        self._caller, self._upload = threading.current_thread(), None
        self._staged_s = time.monotonic()
        self.stall_s = self._staged_s - start
        return staged

    def close(self) -> None:
        """Give the memory up; copies that are still in use keep it."""
        self._arena = None

    def _free_arena(self, nbytes: int) -> torch.UntypedStorage:
        """A storage that nobody reads: the old one, if it is large enough. The upload is over then."""
        while self._in_use() and not self._upload_is_over():
            time.sleep(_LOOK_S)
        if self._arena is None or self._arena.nbytes() < nbytes or self._in_use():
            self._arena = None  # before the new one is made: memory for one state, not for two
            self._arena = allocate([nbytes])[0]
        return self._arena

    def _in_use(self) -> bool:
        """Whether the last copy, or a tensor of it, lives; the upload gives them up when it is over."""
        if self._staged is not None and self._staged() is not None:
            return True
        return self._arena is not None and torch._C._storage_Use_Count(self._arena._cdata) > 1

    def _upload_is_over(self) -> bool:
        """Whether the copies are kept only by somebody who looks at them, as the traceback of an upload that failed.

        torch's executors end their thread with the save.
        """
        if self._upload is not None:
            return not self._upload.is_alive()
        return time.monotonic() - self._staged_s > _BEGIN_S


class _Spans:
    """The stretches of memory that the tensors of a state cover, each once, and where their copies lie."""

    def __init__(self) -> None:
        #: storage's identity -> (storage, sorted [first byte, end, place of the copy])
        self._of: dict[int, tuple[torch.UntypedStorage, list[list[int]]]] = {}

    def add(self, tensor: torch.Tensor) -> None:
        if not tensor.numel():
            return
        storage = tensor.untyped_storage()
        first = int(tensor.storage_offset()) * tensor.itemsize
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        _, spans = self._of.setdefault(storage._cdata, (storage, []))
        spans.append([first - first % _ALIGN_BYTES, first + (last + 1) * tensor.itemsize, 0])

    def place(self) -> int:
        """Gives each its place, and returns the bytes of all."""
        total = 0
        for _, spans in self._of.values():
            spans.sort()
            merged = spans[:1]
            for span in spans[1:]:
                if span[0] <= merged[-1][1]:
                    merged[-1][1] = max(merged[-1][1], span[1])
                else:
                    merged.append(span)
            for span in merged:
                nbytes = span[1] - span[0]
                total += -total % (_PAGE_BYTES if nbytes >= _PAGE_BYTES else _ALIGN_BYTES)
                span[2] = total
                total += nbytes
            spans[:] = merged
        return total

    def copy_to(self, arena: torch.UntypedStorage) -> None:
        devices = set()
        for storage, spans in self._of.values():
            for first, end, place in spans:
                source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(
                    storage, first, (end - first,), (1,)
                )
                _view(arena, torch.uint8, place, (end - first,), (1,)).copy_(source, non_blocking=True)
            if storage.device.type != "cpu":
                devices.add(storage.device)
        for device in devices:
            torch.accelerator.synchronize(device)

    def view(self, tensor: torch.Tensor, arena: torch.UntypedStorage) -> torch.Tensor:
        """The copy of a tensor that was added."""
        if not tensor.numel():
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        first = int(tensor.storage_offset()) * tensor.itemsize
        _, spans = self._of[tensor.untyped_storage()._cdata]
        start, _, place = spans[bisect_right(spans, first, key=lambda span: span[0]) - 1]
        return _view(arena, tensor.dtype, place + first - start, tensor.shape, tensor.stride())


def _view(storage: torch.UntypedStorage, dtype: torch.dtype, offset: int, shape: Any, strides: Any) -> torch.Tensor:
    """A tensor on a storage, `offset` bytes into it."""
    empty = torch.empty(0, dtype=dtype, device="cpu")
    # Any: a storage is taken by set_, but torch's stubs do not say so for sizes and strides
    return empty.set_(storage, offset // dtype.itemsize, tuple(shape), tuple(strides))


def _is_stageable(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and not (tensor.is_quantized or tensor.is_nested or tensor.is_meta or tensor.is_conj() or tensor.is_neg())
    )


def _inner(tensor: torch.Tensor) -> list[torch.Tensor] | None:
    """The tensors that a distributed tensor, or another wrapper, is made of; None if it is none."""
    from torch.distributed._shard.sharded_tensor.api import ShardedTensor

    if isinstance(tensor, ShardedTensor):
        return [shard.tensor for shard in tensor.local_shards()]
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        parts = [getattr(tensor, name) for name in names]  # a DTensor's mesh is among them
        return [part for part in parts if isinstance(part, torch.Tensor)]
    return None


def _plain_tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        inner = _inner(value)
        if inner is not None:
            yield from (found for part in inner for found in _plain_tensors(part))
        elif _is_stageable(value):
            yield value.detach()
    elif isinstance(value, dict):
        yield from (found for part in value.values() for found in _plain_tensors(part))
    elif isinstance(value, (list, tuple)):
        yield from (found for part in value for found in _plain_tensors(part))


class _Wrapper(NamedTuple):
    """A tensor that is made of others."""

    kind: Any
    parts: dict[str, Any]
    context: Any
    shape: torch.Size
    strides: tuple[int, ...]


class StagedState(dict[str, Any]):
    """A staged state. It is pickled in parts: torch 2.13 crashes when it pickles a DTensor whose local tensor does not
    begin where its storage does."""

    def __init__(self, packed: dict[str, Any]) -> None:
        super().__init__(_unpacked(packed))
        self._packed = packed

    def __reduce_ex__(self, protocol: Any) -> Any:
        return StagedState, (self._packed,)


def _mapped(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """Dicts, lists and tuples again, with `leaf` of what is in them."""
    if isinstance(value, dict):
        return {key: _mapped(part, leaf) for key, part in value.items()}
    if isinstance(value, (list, tuple)) and not isinstance(value, _Wrapper):
        parts = [_mapped(part, leaf) for part in value]
        if hasattr(value, "_fields"):  # a named tuple
            return type(value)(*parts)
        return parts if isinstance(value, list) else type(value)(parts)
    return leaf(value)


def _unpacked(value: Any) -> Any:
    def leaf(found: Any) -> Any:
        if not isinstance(found, _Wrapper):
            return found
        return found.kind.__tensor_unflatten__(_unpacked(found.parts), found.context, found.shape, found.strides)

    return _mapped(value, leaf)


def _packed(value: Any, spans: _Spans, arena: torch.UntypedStorage) -> Any:
    """The state again, of copies."""

    def leaf(found: Any) -> Any:
        return _packed_tensor(found, spans, arena) if isinstance(found, torch.Tensor) else copy.deepcopy(found)

    return _mapped(value, leaf)


def _packed_tensor(tensor: torch.Tensor, spans: _Spans, arena: torch.UntypedStorage) -> Any:
    from torch.distributed._shard.sharded_tensor.api import ShardedTensor
    from torch.distributed._shard.sharded_tensor.shard import Shard

    if isinstance(tensor, ShardedTensor):
        shards = [
            Shard(_packed_tensor(shard.tensor, spans, arena), copy.deepcopy(shard.metadata))
            for shard in tensor.local_shards()
        ]
        return ShardedTensor._init_from_local_shards_and_global_metadata(
            shards, tensor.metadata(), process_group=tensor._process_group
        )
    if is_traceable_wrapper_subclass(tensor):
        names, context = tensor.__tensor_flatten__()
        parts = {name: getattr(tensor, name) for name in names}
        inner = {
            name: _packed_tensor(part, spans, arena) if isinstance(part, torch.Tensor) else part
            for name, part in parts.items()
        }
        return _Wrapper(type(tensor), inner, context, tensor.shape, tensor.stride())
    if _is_stageable(tensor):
        return spans.view(tensor.detach(), arena)
    return tensor.detach().cpu().clone()
