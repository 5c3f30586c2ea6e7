"""Which pickles Python's own C unpickler may read in place of torch's restricted one."""

from __future__ import annotations

import collections
import contextlib
import io
import pickle
import zipfile
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from torch_support import bits, torch

import mlstor.torch as mt
from mlstor._io import is_plain_pickle
from mlstor.torch import _stock

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**900), 2**900) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner),
    max_leaves=300,
)
NAMES = {b"collections\nOrderedDict": "OrderedDict", b"m\nf": "function", b"m\nv": "value"}
ORDERED = b"ccollections\nOrderedDict\n)R"


def is_plain(pickled: bytes) -> bool:
    return is_plain_pickle(pickled, NAMES)


@given(PLAIN)
def test_plain_containers_are_plain(value: Any) -> None:
    assert is_plain(pickle.dumps(value, 2))
    assert is_plain_pickle(pickle.dumps(value, 2), {})


@given(PLAIN, st.data())
def test_a_part_of_a_pickle_is_not_plain(value: Any, data: st.DataObject) -> None:
    whole = pickle.dumps(value, 2)
    assert not is_plain(whole[: data.draw(st.integers(0, len(whole) - 1))])
    assert not is_plain(whole + b".")


#: Pieces of pickles, so that many a heap of them is one.
PIECES = st.sampled_from(
    [bytes([code]) for code in b"(N)]}tRQsuaeb.\x85\x86\x87\x88\x89"]
    + [b"K\1", b"q\0", b"q\1", b"h\0", b"h\1", b"X\1\0\0\0a", b"\x8a\1\1", b"cm\nf\n", b"cm\nv\n", ORDERED]
)


class _Reading(pickle.Unpickler):
    """Says what a plain pickle leads the C unpickler to do beyond plain containers."""

    def find_class(self, module: str, name: str, /) -> Any:
        return collections.OrderedDict if name == "OrderedDict" else self.called if name == "f" else "a value"

    def called(self, *arguments: Any) -> str:
        return "made"

    def persistent_load(self, reference: Any) -> str:
        assert isinstance(reference, tuple)
        return "a reference"


@settings(max_examples=1000)
@given(st.lists(PIECES | st.binary(max_size=3), max_size=30))
def test_a_plain_pickle_is_read_without_an_error(pieces: list[bytes]) -> None:
    pickled = b"\x80\2" + b"".join(pieces) + b"."
    if is_plain(pickled):
        with contextlib.suppress(TypeError, ValueError):  # of a key that can't be one, and of OrderedDict's arguments
            _Reading(io.BytesIO(pickled), fix_imports=False).load()


@pytest.mark.parametrize("protocol", [0, 1, 3, 4, 5])
def test_other_protocols_are_left_to_torch(protocol: int) -> None:
    assert not is_plain(pickle.dumps({"a": [1, 2.5]}, protocol))


@pytest.mark.parametrize(
    "body",
    [
        ORDERED + b"}b", ORDERED + b"(NNu", b"](NNe", b"]Na", b"}NNs", b"cm\nf\n)R", b"cm\nv\n", b")Q", b"]q\0h\0\x86",
        b"]r\0\0\0\0", b"ccollections\nOrderedDict\n",
    ],
)  # fmt: skip
def test_bodies_that_are_plain(body: bytes) -> None:
    assert is_plain(b"\x80\2" + body + b".")


@pytest.mark.parametrize(
    "body",
    [
        b"]r\xff\xff\xff\x7f",  # Python's C unpickler would take 32 GiB for this number of its memo
        b"]q\1", b"q\0", b"(q\0t", b"h\0", b"]q\0h\1",
        # items, elements and attributes of what has them in its own way: a tensor would be written to
        b"cm\nf\n)RNNs", b"cm\nf\n)R(NNu", b"]NNs", b")NNs", b"}(Nu", b"}Ns", b"}NNu", b"}(s",
        b"cm\nf\n)R(NNe", b"cm\nf\n)RNa", b"}Na", b"]e", ORDERED + b"Na",
        b"cm\nf\n)R}b", b"cm\nv\n}b", b"ccollections\nOrderedDict\n}b", b"}}b", ORDERED + b")b", ORDERED + b"N}\x86b",
        # calls of other things, or with other things; a function that is kept
        b"N)R", b"cm\nv\n)R", b"cm\nf\n]R", b"cm\nf\nR", b"cm\nf\n", b"cm\nf\n\x85", b"]cm\nf\na", b"(cm\nf\nt", b"NQ",
        b"cos\nsystem\n)R", b"cm\nff\n", b"cm\nf", b"cm", b"c", b"c\n\n",
        b"(", b"N(", b"NN", b"", b"t", b"\x85", b"(\x85", b"N\x86", b"(N\x86",
        # operations that no pickler writes for these, or that end early
        b"\x8c\1a", b"X\xff\xff\xff\xffa", b"X\1\0\0", b"U\1a", b"\x80\2N", b"N0", b"N2", b"\x8a", b"\x8a\5a", b"\x81",
    ],
)  # fmt: skip
def test_bodies_that_are_not_plain(body: bytes) -> None:
    assert not is_plain(b"\x80\2" + body + b".")


@pytest.mark.parametrize("pickled", [b"", b"\x80", b"\x80\2", b"\x80\2N", b"N.", b"\x80\3N."])
def test_what_is_no_whole_pickle_of_protocol_2_is_not_plain(pickled: bytes) -> None:
    assert not is_plain(pickled)


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


def test_nothing_that_a_plain_pickle_names_takes_attributes_but_what_is_made_for_it() -> None:
    for name, found in _stock._plain_names().items():
        if found is not None:
            with pytest.raises((AttributeError, TypeError)):
                setattr(found, "anything", 1)  # noqa: B010  # what a pickle's slots do
            with pytest.raises(TypeError):
                found.__class__ = int
        else:
            assert _stock._plain_kinds()[name] == "value"
    assert sorted(_stock._plain_kinds().values())[:2] == ["OrderedDict", "function"]


def _hostile(tmp_path: Any, swap: Callable[[bytes], bytes]) -> Any:
    """A file whose sums are right and whose pickle is `swap` of that of a tensor in a dictionary."""
    torch.save({"t": torch.zeros(4)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "bad.pt", "w") as bad:
        for name in good.namelist():
            data = good.read(name)
            if name.endswith("data.pkl"):
                assert swap(data) != data
                data = swap(data)
            bad.writestr(name, data)
    return tmp_path / "bad.pt"


@pytest.mark.parametrize(
    "added",
    [
        b"K\0G?\xf0\0\0\0\0\0\0s",  # an item of the tensor
        b"(K\0G?\xf0\0\0\0\0\0\0u",
        b"]" * 200_000 + b"a" * 199_999 + b"Ns",  # which ends the process in torch's own indexing
        b"Na",
    ],
)
def test_a_pickle_that_would_write_into_a_tensor_is_refused(tmp_path: Any, added: bytes) -> None:
    path = _hostile(tmp_path, lambda pickled: pickled.replace(b"Rq\rs.", b"R" + added + b"q\rs."))
    with pytest.raises(pickle.UnpicklingError, match=r"(?i)only .*(set|append).* (dict|lists)"):
        mt.load(path)


def test_a_reference_to_something_else_is_refused_without_bad_advice(tmp_path: Any) -> None:
    path = _hostile(tmp_path, lambda pickled: pickled.replace(b"X\7\0\0\0storage", b"X\6\0\0\0module"))
    with pytest.raises(pickle.UnpicklingError, match="no storage") as caught:
        mt.load(path)
    assert "add_safe_globals" not in str(caught.value)


def test_other_names_are_left_to_torch(tmp_path: Any) -> None:
    torch.save({"set": {1, 2}, "size": torch.Size([2])}, tmp_path / "state.pt")
    assert mt.load(tmp_path / "state.pt") == {"set": {1, 2}, "size": torch.Size([2])}
    torch.save(io.BytesIO, tmp_path / "class.pt")
    with pytest.raises(pickle.UnpicklingError, match="add_safe_globals"):
        mt.load(tmp_path / "class.pt")
