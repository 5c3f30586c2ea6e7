"""Which bytes of a stored tensor a part of it is, and where they go: arithmetic on shapes and strides."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Runs shorter than this are not worth a read of their own: what lies between them is read with them.
SHORT_BYTES = 256 << 10
#: Most bytes that are read at once for such a part; a larger one is taken in slabs.
SLAB_BYTES = 32 << 20


class Box(NamedTuple):
    """A part of a row-major tensor; all in elements."""

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    itemsize: int

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        steps = [1]
        for size in reversed(self.shape[1:]):
            steps.append(steps[-1] * max(size, 1))
        return tuple(reversed(steps)) if self.shape else ()

    @property
    def nbytes(self) -> int:
        return math.prod(self.lengths) * self.itemsize

    def span(self) -> tuple[int, int]:
        """Where in the tensor's bytes the part starts and ends; not all between need belong to it."""
        if not self.nbytes:
            return 0, 0
        strides = self.strides
        first = sum(offset * stride for offset, stride in zip(self.offsets, strides, strict=True))
        last = first + sum((length - 1) * stride for length, stride in zip(self.lengths, strides, strict=True))
        return first * self.itemsize, (last + 1) * self.itemsize

    def outer(self) -> int:
        """How many dimensions lie outside of a run: the part's bytes in the others follow one another."""
        for dimension in range(len(self.shape) - 1, -1, -1):
            if self.lengths[dimension] != self.shape[dimension]:
                return dimension
        return 0


def straight(box: Box, destination: torch.Tensor) -> list[tuple[int, int, int]] | None:
    """Reads that go straight to their places: (first byte in the tensor, bytes, address).

    Parameters
    ----------
    box
        What is wanted.
    destination
        A tensor of the box's lengths and its type, on the CPU.

    Returns
    -------
    list of tuples, or None
        None if the runs are short, or do not lie in the destination as they do in the file.
    """
    outer = box.outer()
    run = math.prod(box.lengths[outer:])
    expected = 1
    for dimension in range(len(box.lengths) - 1, outer - 1, -1):
        length = box.lengths[dimension]
        if length != 1 and destination.stride(dimension) != expected:
            return None
        expected *= length
    start, end = box.span()
    run_nbytes = run * box.itemsize
    if run_nbytes == end - start:
        return [(start, run_nbytes, destination.data_ptr())]
    if run_nbytes < SHORT_BYTES:
        return None
    lengths = box.lengths[:outer]
    sources = start + _places(lengths, box.strides[:outer]) * box.itemsize
    targets = destination.data_ptr() + _places(lengths, destination.stride()[:outer]) * box.itemsize
    return [(source, run_nbytes, target) for source, target in zip(sources.tolist(), targets.tolist(), strict=True)]


def _places(lengths: Sequence[int], strides: Sequence[int]) -> NDArray[Any]:
    """The offset of every index of a box, in row-major order."""
    places = np.zeros(1, np.int64)
    for length, stride in zip(lengths, strides, strict=True):
        places = (places[:, None] + np.arange(length, dtype=np.int64) * stride).ravel()
    return places


def slabs(box: Box, destination: torch.Tensor, most_bytes: int = SLAB_BYTES) -> Iterator[tuple[Box, torch.Tensor]]:
    """The part in pieces whose spans are at most `most_bytes`, where that can be, each with its destination."""
    start, end = box.span()
    dimension = next((index for index, length in enumerate(box.lengths) if length > 1), None)
    if end - start <= most_bytes or dimension is None:
        yield box, destination
        return
    length = box.lengths[dimension]
    step = max(1, length * most_bytes // (end - start))
    for first in range(0, length, step):
        count = min(step, length - first)
        offsets, lengths = list(box.offsets), list(box.lengths)
        offsets[dimension] += first
        lengths[dimension] = count
        part = box._replace(offsets=tuple(offsets), lengths=tuple(lengths))
        yield from slabs(part, destination.narrow(dimension, first, count), most_bytes)


def part_of(box: Box, memory: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The box in `memory`, a tensor of bytes that holds its span."""
    return memory.view(dtype).as_strided(box.lengths, box.strides)


def apart(indices: Sequence[int], tensors: Mapping[int, torch.Tensor]) -> list[list[int]]:
    """The indices in lists, to be loaded one after the other, so that no two tensors of a list overlap in memory.

    Tied tensors may differ in the file: the later one is to win, and bytes of one must not be taken for the other's.
    Without overlaps it is one list.
    """
    spans = sorted((*_memory(tensors[index]), index) for index in indices if index in tensors)
    before: dict[int, list[int]] = {}
    open_: list[tuple[int, int]] = []
    for start, end, index in spans:
        open_ = [other for other in open_ if other[0] > start]
        for _, other in open_ if end > start else ():
            before.setdefault(max(index, other), []).append(min(index, other))
        open_.append((end, index))
    turns: dict[int, int] = {}
    for index in sorted(indices):
        turns[index] = max((turns[other] + 1 for other in before.get(index, ())), default=0)
    lists: list[list[int]] = [[] for _ in range(max(turns.values(), default=-1) + 1)]
    for index in indices:
        lists[turns[index]].append(index)
    return lists


def _memory(tensor: torch.Tensor) -> tuple[int, int]:
    """The first byte that a tensor may cover, and the end; nothing where that can't be said."""
    known = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    if not known or tensor.is_meta or not tensor.numel():
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize
