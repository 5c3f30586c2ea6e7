"""What the tests of checkpoints share: states of every kind that torch saves, and whether two are the same."""

from __future__ import annotations

import pathlib
import subprocess
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

#: Bytes from which a record is written from where it lies.
MIB = 1 << 20
DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.bool, torch.complex64, torch.complex128),
)


def setting(name: str, value: Any) -> Any:
    """A context with one of torch's own settings for files changed."""
    from torch.utils.serialization import config

    settings: Any = config  # it has methods that its types don't
    return settings.patch(name, value)


def bits(seed: int, dtype: Any, shape: tuple[int, ...]) -> Any:
    """A tensor of random values that every dtype can hold."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)


def _quantized(seed: int) -> Any:
    return torch.quantize_per_tensor(bits(seed, torch.float32, (9, 7)), 0.5, 3, torch.qint8)


def _per_channel(seed: int) -> Any:
    scales, zeros = torch.tensor([0.1, 0.2, 0.4]), torch.tensor([0, 1, 2])
    return torch.quantize_per_channel(bits(seed, torch.float32, (3, 8)), scales, zeros, 0, torch.quint8)


#: One-tensor makers by kind, from a seed. Those in PLAIN can be loaded to the meta device.
PLAIN: dict[str, Callable[[int], Any]] = {
    "empty": lambda seed: torch.empty(0, 3),
    "scalar": lambda seed: bits(seed, torch.float64, ()),
    "parameter": lambda seed: torch.nn.Parameter(bits(seed, torch.float32, (5, 4))),
    "buffer": lambda seed: torch.nn.Buffer(bits(seed, torch.float32, (5, 4))),
    "transposed": lambda seed: bits(seed, torch.float32, (6, 5)).t(),
    "strided": lambda seed: bits(seed, torch.int32, (40, 6))[3:30:3, ::2],
    "expanded": lambda seed: bits(seed, torch.int64, (1, 3)).expand(7, 3),
    "channels last": lambda seed: bits(seed, torch.float32, (2, 3, 4, 5)).to(memory_format=torch.channels_last),
    "conjugate": lambda seed: bits(seed, torch.complex64, (4, 3)).conj(),
    "negative": lambda seed: torch._neg_view(bits(seed, torch.float32, (4, 3))),
    "not small": lambda seed: bits(seed, torch.int16, (100_000,)),
    "middle": lambda seed: bits(seed, torch.int32, (150_000,)),
    "large": lambda seed: bits(seed, torch.int16, (MIB // 2 + seed % 77,)),
    "part of a large one": lambda seed: bits(seed, torch.float32, (MIB // 4 + 5,))[100:1000],
}
SPECIAL: dict[str, Callable[[int], Any]] = {
    "meta": lambda seed: torch.empty(3, 4, device="meta"),
    "sparse": lambda seed: (torch.eye(6) * (seed + 1)).to_sparse(),
    "csr": lambda seed: (torch.eye(6) * (seed + 1)).to_sparse_csr(),
    "bsr": lambda seed: (torch.eye(6) * (seed + 1)).to_sparse_bsr((2, 2)),
    "quantized": _quantized,
    "per channel": _per_channel,
    "nested": lambda seed: torch.nested.nested_tensor([torch.ones(2) * seed, torch.ones(3)]),
    "storage": lambda seed: bits(seed, torch.uint8, (33,)).untyped_storage(),
}
KINDS = {**PLAIN, **SPECIAL}

_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False),
    st.text(max_size=5),
    st.binary(min_size=1, max_size=5),
    st.sampled_from([torch.Size([2, 3]), torch.float16, torch.device("cpu"), torch.strided]),
)


def tensors(kinds: dict[str, Callable[[int], Any]] = KINDS) -> st.SearchStrategy[Any]:
    """Tensors of some kinds, and of every dtype."""
    of_kind = st.builds(lambda kind, seed: kinds[kind](seed), st.sampled_from(sorted(kinds)), st.integers(0, 99))
    shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
    return st.one_of(of_kind, st.builds(bits, st.integers(0, 99), st.sampled_from(DTYPES), shapes))


def states(kinds: dict[str, Callable[[int], Any]] = KINDS) -> st.SearchStrategy[Any]:
    """Nested states of tensors and values; some tensors share their memory with another."""
    leaf = st.one_of(tensors(kinds), _VALUES)
    keys = st.one_of(st.text(max_size=4), st.integers(-3, 300))
    tree = st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.dictionaries(keys, inner, max_size=4),
            st.lists(inner, max_size=4),
            st.lists(inner, max_size=3).map(tuple),
            st.dictionaries(keys, inner, max_size=3).map(OrderedDict),
        ),
        max_leaves=8,
    )
    return tree.map(_with_aliases)


def _with_aliases(tree: Any) -> Any:
    found = [leaf for leaf in leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided]
    plain = [leaf for leaf in found if not leaf.is_nested and not leaf.is_quantized and leaf.dim()]
    return {"tree": tree, "aliases": [[leaf[1:] for leaf in plain], plain[:2]]}


def leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in leaves(value)]
    if isinstance(tree, (list, tuple)) and not isinstance(tree, torch.Size):
        return [leaf for value in tree for leaf in leaves(value)]
    return [tree]


def content(storage: Any) -> bytes:
    """The bytes of a storage."""
    whole: bytes = torch.empty(0, dtype=torch.uint8).set_(storage).numpy().tobytes()
    return whole


def assert_same(one: Any, other: Any) -> None:
    """Types, shapes, strides, bytes and sharing of two states agree."""
    seen: dict[int, int] = {}
    _compare(one, other, seen)


def _compare(one: Any, other: Any, seen: dict[int, int]) -> None:
    if isinstance(one, (torch.UntypedStorage, torch.TypedStorage)):
        # torch gives a plain storage back as a typed one
        assert content(one.untyped()) == content(other.untyped())
        return
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            _compare(one[key], other[key], seen)
    elif isinstance(one, (list, tuple)) and not isinstance(one, torch.Size):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            _compare(left, right, seen)
    elif isinstance(one, torch.Tensor):
        _tensors(one, other, seen)
    else:
        assert one == other


def _tensors(one: Any, other: Any, seen: dict[int, int]) -> None:
    assert (one.dtype, one.layout, one.device, one.requires_grad) == (
        other.dtype,
        other.layout,
        other.device,
        other.requires_grad,
    )
    if one.is_nested:
        for left, right in zip(one.unbind(), other.unbind(), strict=True):
            assert torch.equal(left, right)
        return
    assert one.shape == other.shape
    if one.layout != torch.strided:
        assert torch.equal(one.to_dense(), other.to_dense())
    elif one.is_quantized:
        assert torch.equal(one.int_repr(), other.int_repr())
        assert one.qscheme() == other.qscheme()
    else:
        assert one.stride() == other.stride()
        assert (one.is_conj(), one.is_neg()) == (other.is_conj(), other.is_neg())
        if one.device.type != "meta":
            assert torch.equal(_bytes(one), _bytes(other))
            if one.numel():
                place = one.untyped_storage().data_ptr()
                assert seen.setdefault(place, other.untyped_storage().data_ptr()) == other.untyped_storage().data_ptr()
                assert one.storage_offset() == other.storage_offset()


def _bytes(tensor: Any) -> Any:
    """The elements' bits: NaNs are alike, and every dtype can be compared."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def unzip_tests(path: pathlib.Path) -> None:
    """`unzip -t` finds every CRC right."""
    done = subprocess.run(["unzip", "-tq", str(path)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
