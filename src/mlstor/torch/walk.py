"""The leaves of a nested state: their names, and where two states differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, MutableSequence
from typing import Any, NamedTuple

import torch

from mlstor.torch import _stock

_ORDINARY = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
_PLAIN = (
    *(bool, int, float, complex, str, bytes, type(None)),
    *(torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format),
)


class Pair(NamedTuple):
    """A leaf of one state and what lies in its place in the other."""

    path: str
    wanted: Any
    found: Any
    #: what holds `found`, and under which key or index; None at the root
    holder: Any
    key: Any


def leaves(tree: Any, path: str = "state") -> Iterator[tuple[str, Any]]:
    """Every leaf of nested mappings, lists and tuples, with its path, as ``state['model']['w']``."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves(value, f"{path}[{key!r}]")
    elif _is_sequence(tree):
        for index, value in enumerate(tree):
            yield from leaves(value, f"{path}[{index}]")
    else:
        yield path, tree


def pair(wanted: Any, found: Any) -> tuple[list[Pair], list[str]]:
    """The leaves of two states side by side, and what differs in words: keys, types, shapes, dtypes, strides.

    Values that are no tensors may differ, lists and tuples of such values among them.
    """
    pairs: list[Pair] = []
    differences: list[str] = []
    _pair(Pair("state", wanted, found, None, None), pairs, differences)
    return pairs, differences


def _pair(place: Pair, pairs: list[Pair], differences: list[str]) -> None:
    path, wanted, found = place.path, place.wanted, place.found
    if isinstance(wanted, Mapping) and isinstance(found, Mapping):
        differences += [f"{path}[{key!r}] is in the file only" for key in wanted if key not in found]
        differences += [f"{path}[{key!r}] is not in the file" for key in found if key not in wanted]
        for key, value in wanted.items():
            if key in found:
                _pair(Pair(f"{path}[{key!r}]", value, found[key], found, key), pairs, differences)
    elif _is_sequence(wanted) and _is_sequence(found):
        as_a_whole = isinstance(wanted, tuple) or len(wanted) != len(found)
        if as_a_whole and can_be_set(place) and not (_has_tensors(wanted) or _has_tensors(found)):
            pairs.append(place)  # a value, as what Python's random.getstate() gives
            return
        if len(wanted) != len(found):
            differences.append(f"{path} has {len(wanted)} elements in the file, {len(found)} here")
            return
        for index, (one, other) in enumerate(zip(wanted, found, strict=True)):
            _pair(Pair(f"{path}[{index}]", one, other, found, index), pairs, differences)
    elif isinstance(wanted, torch.Tensor) and isinstance(found, torch.Tensor):
        differences += [f"{path}: {text}" for text in _tensors_differ(wanted, found)]
        pairs.append(place)
    elif any(isinstance(side, (torch.Tensor, Mapping)) or _is_sequence(side) for side in (wanted, found)):
        differences.append(f"{path} is of type {type(wanted).__name__} in the file, {type(found).__name__} here")
    else:
        if place.holder is not None and not can_be_set(place) and not _are_equal(wanted, found):
            kind = type(place.holder).__name__
            differences.append(f"{path} is {wanted!r} in the file, {found!r} here, in a {kind}, which can't be changed")
        pairs.append(place)


def can_be_set(place: Pair) -> bool:
    """Whether another value can be put in the place of what was found."""
    return isinstance(place.holder, (MutableMapping, MutableSequence))


def _has_tensors(tree: Any) -> bool:
    if isinstance(tree, Mapping):
        return any(map(_has_tensors, tree.values()))
    return any(map(_has_tensors, tree)) if _is_sequence(tree) else isinstance(tree, torch.Tensor)


def _are_equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except (ValueError, RuntimeError):  # arrays of several elements are neither equal nor different
        return False


def _tensors_differ(wanted: torch.Tensor, found: torch.Tensor) -> Iterator[str]:
    if wanted.dtype != found.dtype:
        yield f"dtype {wanted.dtype} in the file, {found.dtype} here"
    if wanted.layout != found.layout:
        yield f"layout {wanted.layout} in the file, {found.layout} here"
    elif wanted.is_nested != found.is_nested:
        yield "nested on one side only"
    elif wanted.is_nested:
        there, here = ([tuple(part.shape) for part in parts(tensor)] for tensor in (wanted, found))
        if there != here:
            yield f"nested tensors of shapes {there} in the file, {here} here"
    elif wanted.shape != found.shape:
        yield f"shape {tuple(wanted.shape)} in the file, {tuple(found.shape)} here"
    elif _stock.is_wrapper(wanted) or _stock.is_wrapper(found):
        yield from _wrappers_differ(wanted, found)
    elif wanted.layout != torch.strided:
        yield from _sparse_differ(wanted, found)
    elif wanted.is_quantized and wanted.qscheme() != found.qscheme():
        yield f"{wanted.qscheme()} in the file, {found.qscheme()} here"
    elif wanted.numel() > 1 and wanted.stride() != found.stride():
        yield f"stride {wanted.stride()} in the file, {found.stride()} here"


def _wrappers_differ(wanted: torch.Tensor, found: torch.Tensor) -> Iterator[str]:
    if type(wanted) is not type(found):
        yield f"{type(wanted).__name__} in the file, {type(found).__name__} here"
        return
    there, here = parts(wanted), parts(found)
    if len(there) != len(here):
        yield f"made of {len(there)} tensors in the file, {len(here)} here"
    for one, other in zip(there, here, strict=False):
        yield from _tensors_differ(one, other)


def _sparse_differ(wanted: torch.Tensor, found: torch.Tensor) -> Iterator[str]:
    if wanted.layout == torch.sparse_coo:
        if wanted.sparse_dim() != found.sparse_dim():
            yield f"{wanted.sparse_dim()} sparse dimensions in the file, {found.sparse_dim()} here"
        return
    there, here = tuple(wanted.values().shape), tuple(found.values().shape)
    if there != here:
        yield f"values of shape {there} in the file, {here} here"


def parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The dense tensors that a tensor consists of, whose memory `copy_` writes to; none of a sparse COO one, which gets
    new ones.
    """
    tensor = tensor.detach()
    if tensor.is_nested:
        return list(tensor.unbind())
    if _stock.is_wrapper(tensor):
        return [part for one in _stock.inner(tensor) for part in parts(one)]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor] if tensor.layout == torch.strided else []


def is_ordinary(leaf: Any) -> bool:
    """Whether a leaf is a tensor whose elements lie in a storage of its own kind, or a value without tensors in it."""
    if isinstance(leaf, torch.Tensor):
        return type(leaf) in _ORDINARY and leaf.layout == torch.strided and not (leaf.is_nested or leaf.is_quantized)
    return isinstance(leaf, _PLAIN)


def record_number(leaf: Any) -> int | None:
    """What torch noted on the storage of a tensor that was loaded to the meta device: see `records.outline`."""
    if not isinstance(leaf, torch.Tensor) or leaf.layout != torch.strided or leaf.is_nested:
        return None
    number: int | None = getattr(leaf.untyped_storage(), "_checkpoint_offset", None)
    return number


def _is_sequence(tree: Any) -> bool:
    return isinstance(tree, (list, tuple)) and not isinstance(tree, torch.Size)
