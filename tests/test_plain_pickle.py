"""Which pickles Python's own C unpickler may read in place of torch's restricted one."""

from __future__ import annotations

import collections
import contextlib
import io
import pickle
from typing import Any

import pytest
from hypothesis import given, strategies as st
from torch_support import bits, torch

import mlstor.torch as mt
from mlstor._io import plain_globals
from mlstor.torch import _stock
from mlstor.torch.pickling import describe

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**900), 2**900) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner),
    max_leaves=300,
)


@given(PLAIN)
def test_plain_containers_name_nothing(value: Any) -> None:
    assert plain_globals(pickle.dumps(value, 2)) == frozenset()


@given(PLAIN, st.data())
def test_a_part_of_a_pickle_is_not_plain(value: Any, data: st.DataObject) -> None:
    whole = pickle.dumps(value, 2)
    assert plain_globals(whole[: data.draw(st.integers(0, len(whole) - 1))]) is None
    assert plain_globals(whole + b".") is None


@given(st.binary(), st.booleans())
def test_any_bytes_are_looked_at_safely(data: bytes, begun: bool) -> None:
    pickled = b"\x80\2" + data if begun else data
    named = plain_globals(pickled)
    if named == frozenset():  # it may be refused, but imports nothing, nor takes much memory
        with contextlib.suppress(pickle.UnpicklingError, AttributeError, LookupError, TypeError, ValueError):
            pickle.loads(pickled)


@pytest.mark.parametrize("protocol", [0, 1, 3, 4, 5])
def test_other_protocols_are_left_to_torch(protocol: int) -> None:
    assert plain_globals(pickle.dumps({"a": [1, 2.5]}, protocol)) is None


def test_what_is_named_is_told() -> None:
    state = collections.OrderedDict(a=torch.ones(3), b=torch.zeros(2, dtype=torch.int16), c=torch.bfloat16)
    assert plain_globals(describe(state).pickle) == {
        "collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch FloatStorage", "torch ShortStorage",
        "torch bfloat16",
    }  # fmt: skip


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\2]r\xff\xff\xff\x7f.",  # Python's C unpickler would take 32 GiB for this number of its memo
        b"\x80\2]q\1.",
        b"\x80\2\x8cXa.",
        b"\x80\2cos\nsystem\nX\2\0\0\0ls\x85\x93.",
        b"\x80\2cos\nsystem\n",
        b"\x80\2cos",
        b"\x80\2c",
        b"\x80\2X\xff\xff\xff\xffa.",
        b"\x80\2(U\1ao.",
        b"\x80\2\x80\2N.",
        b"\x80\2",
        b"",
    ],
)
def test_pickles_that_are_not_plain(pickled: bytes) -> None:
    assert plain_globals(pickled) is None


@pytest.fixture
def no_careful(monkeypatch: pytest.MonkeyPatch) -> None:
    def careful(*_: object) -> None:
        raise AssertionError("torch's own unpickler was asked")

    monkeypatch.setattr(_stock, "_careful", careful)


class _Named(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(3, 4)
        self.norm = torch.nn.BatchNorm1d(4)


@pytest.mark.usefixtures("no_careful")
@pytest.mark.parametrize("writer", ["mlstor", "torch"])
def test_the_states_of_training_are_read_by_pythons_unpickler(tmp_path: Any, writer: str) -> None:
    model = _Named()
    optimizer = torch.optim.AdamW(model.parameters())
    model.norm(model.inner(torch.ones(2, 3))).sum().backward()
    optimizer.step()
    base = bits(3, torch.bfloat16, (40, 6))
    state = {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3, "lr": 0.5, "name": "a\ud800",
        "part": base[3:, 2:5].t(), "whole": base, "empty": torch.empty(0, 3), "grad": torch.ones(2, requires_grad=True),
        "conj": torch.ones(2, dtype=torch.complex64).conj(), "dtype": torch.float16, "big": 2**70,
    }  # fmt: skip
    (mt.save if writer == "mlstor" else torch.save)(state, tmp_path / "state.pt")  # type: ignore[operator]
    ours, theirs = mt.load(tmp_path / "state.pt"), torch.load(tmp_path / "state.pt")
    assert repr(ours) == repr(theirs)
    assert ours["model"]._metadata == theirs["model"]._metadata == model.state_dict()._metadata
    assert ours["part"].data_ptr() == ours["whole"].data_ptr() + (3 * 6 + 2) * 2
    assert ours["grad"].requires_grad
    assert ours["conj"].is_conj()
    assert ours["whole"]._backward_hooks is not ours["empty"]._backward_hooks
    torch.testing.assert_close(ours["part"], base[3:, 2:5].t(), rtol=0, atol=0)
    for name, tensor in theirs["model"].items():
        torch.testing.assert_close(ours["model"][name], tensor, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_a_storage_by_itself_stays_a_storage(tmp_path: Any) -> None:
    torch.save({"typed": torch.arange(5).storage(), "tensor": torch.ones(2)}, tmp_path / "state.pt")
    ours = mt.load(tmp_path / "state.pt")
    assert isinstance(ours["typed"], torch.storage.TypedStorage)
    assert ours["typed"].tolist() == [0, 1, 2, 3, 4]


def _loads(pickled: bytes) -> Any:
    load = _stock._plain(pickled, lambda reference: reference)
    assert load is not None
    return load()


@pytest.mark.parametrize("name", [b"torch._utils\n_rebuild_tensor_v2\n", b"collections\nOrderedDict\n"])
@pytest.mark.parametrize("key", [b"__call__", b"__class__", b"__defaults__", b"anything"])
def test_a_pickle_changes_nothing_of_what_it_names(name: bytes, key: bytes) -> None:
    attribute = b"X" + len(key).to_bytes(4, "little") + key + b"c" + b"collections\nOrderedDict\n"
    for state in (b"}(" + attribute + b"u", b"}}(" + attribute + b"u\x86"):  # a dictionary's way, and that of slots
        with pytest.raises((AttributeError, TypeError)):
            _loads(b"\x80\2c" + name + state + b"b.")
    assert not hasattr(_stock._plain_names()["torch._utils _rebuild_tensor_v2"], "anything")
    assert _stock._plain_names()["collections OrderedDict"] is collections.OrderedDict


def test_a_kind_of_storage_that_a_pickle_changes_is_its_own() -> None:
    changed = _loads(b"\x80\2ctorch\nFloatStorage\n}X\6\0\0\0_dtypectorch\nint8\nsb.")
    assert changed.dtype is torch.int8
    assert _loads(b"\x80\2ctorch\nFloatStorage\n.").dtype is torch.float32


def test_other_names_are_left_to_torch(tmp_path: Any) -> None:
    torch.save({"set": {1, 2}, "size": torch.Size([2])}, tmp_path / "state.pt")
    assert mt.load(tmp_path / "state.pt") == {"set": {1, 2}, "size": torch.Size([2])}
    torch.save(io.BytesIO, tmp_path / "class.pt")
    with pytest.raises(pickle.UnpicklingError, match="add_safe_globals"):
        mt.load(tmp_path / "class.pt")
