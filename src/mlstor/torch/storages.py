"""Memory for what is loaded: one storage per record, made before the first byte is read."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable
from typing import Any

import torch

#: Below this a storage is left to the allocator. 2 MiB pages need a 2 MiB boundary inside, so twice their size.
_HUGE_FROM_BYTES = 4 << 20
_HUGE_BYTES = 2 << 20
_MADV_HUGEPAGE = 14  # asm-generic/mman-common.h


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return libc


def _storage(nbytes: int) -> torch.UntypedStorage:
    kind: Any = torch.UntypedStorage  # Any: torch types its constructor for no arguments
    made: torch.UntypedStorage = kind(nbytes, device="cpu")  # whatever default device the caller has set
    return made


def allocate(sizes: Iterable[int]) -> list[torch.UntypedStorage]:
    """CPU storages of the given sizes in bytes, not filled.

    Large ones are marked for huge pages: the first touch of memory in pages of 4 KiB costs more than reading it does.
    They are ordinary storages of torch's allocator, so that they can be resized.
    """
    storages = [_storage(nbytes) for nbytes in sizes]
    for storage in storages:
        if storage.nbytes() < _HUGE_FROM_BYTES:
            continue
        first = -(-storage.data_ptr() // _HUGE_BYTES) * _HUGE_BYTES
        end = (storage.data_ptr() + storage.nbytes()) // _HUGE_BYTES * _HUGE_BYTES
        # Advice only: a kernel without huge pages refuses it, and everything works as before
        _libc().madvise(first, end - first, _MADV_HUGEPAGE)
    return storages
