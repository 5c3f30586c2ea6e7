"""`load(into=)`: straight into the tensors of a state that is there, verified, or not touched at all."""

from __future__ import annotations

import pathlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from torch_support import KINDS, MIB, PLAIN, assert_same, bits, content, leaves, states, torch

import mlstor
from mlstor.torch import load, save

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse (CSR|BSR) tensor support:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*quantize.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*(quantiz|ao\\.).*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("states") / "state.pt"


def blank(path: pathlib.Path) -> Any:
    """The state in a file with every storage zeroed and every value another."""
    state = torch.load(path)
    for leaf in leaves(state):
        if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided and not leaf.is_nested and not leaf.is_meta:
            content_of = torch.empty(0, dtype=torch.uint8).set_(leaf.untyped_storage())
            content_of.zero_()
    return _emptied(state)


def _emptied(tree: Any) -> Any:
    """Values in dicts and lists forgotten; those in tuples can't be set."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            tree[key] = _emptied(value)
    elif isinstance(tree, list):
        tree[:] = [_emptied(value) for value in tree]
    elif not isinstance(tree, (torch.Tensor, tuple)):
        return "before"
    return tree


@settings(max_examples=60)
@given(state=states(PLAIN))
def test_a_state_is_filled_in_place(path: pathlib.Path, state: Any) -> None:
    save(state, path)
    into = blank(path)
    places = [leaf.data_ptr() for leaf in leaves(into) if isinstance(leaf, torch.Tensor)]
    assert load(path, into=into) is into
    assert [leaf.data_ptr() for leaf in leaves(into) if isinstance(leaf, torch.Tensor)] == places
    assert_same(state, into)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"storage", "meta"}))
def test_each_kind_is_filled(path: pathlib.Path, kind: str) -> None:
    save({"x": KINDS[kind](5), "y": 1}, path)
    into = {"x": KINDS[kind](5 + 77), "y": 2}
    load(path, into=into)
    assert_same({"x": KINDS[kind](5), "y": 1}, into)


def test_a_training_state_is_filled_without_a_second_copy(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(seed: int) -> tuple[Any, Any]:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(700, 600), torch.nn.BatchNorm1d(600), torch.nn.Linear(600, 3))
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.randn(4, 700)).sum().backward()
        optimizer.step()
        return model, {"model": model.state_dict(), "optim": optimizer.state_dict(), "step": seed}

    _, state = made(1)
    save(state, path)
    model, into = made(2)

    def refuse(sizes: Any) -> Any:
        sizes = list(sizes)
        assert not sizes, f"{sizes} bytes were allocated"
        return []

    monkeypatch.setattr("mlstor.torch.devices.allocate", refuse)
    load(path, into=into)
    assert_same(state, into)
    assert torch.equal(model[0].weight, state["model"]["0.weight"])


def test_what_differs_is_named_and_nothing_is_touched(path: pathlib.Path) -> None:
    save(
        {"a": torch.ones(4), "b": torch.ones(4), "c": torch.ones(2, 3), "d": [torch.ones(1), 2], "e": torch.ones(3)},
        path,
    )
    into = {
        "a": torch.zeros(5),
        "b": torch.zeros(4, dtype=torch.float16),
        "c": torch.zeros(3, 2).t(),
        "d": [torch.zeros(1)],
        "f": torch.zeros(1),
        "e": torch.zeros(3),
    }
    with pytest.raises(mlstor.UsageError) as refused:
        load(path, into=into)
    text = str(refused.value)
    for words in (
        "state['a']: shape (4,) in the file, (5,) here",
        "state['b']: dtype torch.float32 in the file, torch.float16 here",
        "state['c']: stride (3, 1) in the file, (1, 2) here",
        "state['d'] has 2 elements in the file, 1 here",
        "state['f'] is not in the file",
        "nothing was loaded",
    ):
        assert words in text
    assert not into["e"].any()
    with pytest.raises(mlstor.UsageError, match=r"state\['e'\] is in the file only"):
        load(path, into={key: value for key, value in into.items() if key != "e"})


def test_a_type_that_differs_is_named(path: pathlib.Path) -> None:
    save({"a": torch.ones(4), "b": 3, "t": (1, torch.ones(1))}, path)
    with pytest.raises(mlstor.UsageError) as refused:
        load(path, into={"a": 3, "b": {"x": 1}, "t": (2, torch.ones(1))})
    for words in ("state['a'] is of type Tensor in the file, int here", "state['b'] is of type int", "in a tuple"):
        assert words in str(refused.value)


def test_values_in_lists_and_tuples_are_set_whatever_their_number(path: pathlib.Path) -> None:
    # What a resuming job has: generators' states, betas that a schedule moves, losses of each step.
    saved = {
        "python": random.Random(1).getstate(),
        "optim": {"param_groups": [{"betas": (0.9, 0.95), "params": [0, 1]}]},
        "losses": [3.0, 2.0, 1.0],
        "w": [torch.ones(2), (1, (2, 3))],
    }
    save(saved, path)
    into = {
        "python": random.Random(2).getstate(),
        "optim": {"param_groups": [{"betas": (0.8, 0.999), "params": [0, 1]}]},
        "losses": [],
        "w": [torch.zeros(2), (1, (0, 0, 0))],
    }
    load(path, into=into)
    assert_same(saved, into)


def test_arrays_in_a_tuple_are_set(path: pathlib.Path) -> None:
    saved = {"numpy": np.random.RandomState(1).get_state(), "w": torch.ones(2)}
    save(saved, path)
    into = {"numpy": np.random.RandomState(2).get_state(), "w": torch.zeros(2)}
    load(path, into=into, weights_only=False)
    assert into["w"].all()
    restored = np.random.RandomState()
    restored.set_state(into["numpy"])
    assert restored.randint(1 << 30) == np.random.RandomState(1).randint(1 << 30)
    save((torch.ones(2), np.arange(3)), path)
    with pytest.raises(mlstor.UsageError, match="in a tuple, which can't be changed"):
        load(path, into=(torch.zeros(2), np.arange(4)), weights_only=False)


SPECIAL_DIFFERENCES: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "nested": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(4)]),
        r"nested tensors of shapes \[\(2,\), \(3,\)\] in the file, \[\(2,\), \(4,\)\] here",
    ),
    "csr": (
        lambda: torch.eye(4).to_sparse_csr(),
        lambda: torch.ones(4, 4).to_sparse_csr(),
        r"values of shape \(4,\) in the file, \(16,\) here",
    ),
    "bsr": (
        lambda: torch.eye(4).to_sparse_bsr((2, 2)),
        lambda: torch.eye(4).to_sparse_bsr((1, 1)),
        "values of shape",
    ),
    "coo": (
        lambda: torch.ones(2, 3).to_sparse(2),
        lambda: torch.ones(2, 3).to_sparse(1),
        "2 sparse dimensions in the file, 1 here",
    ),
    "scheme": (
        lambda: torch.quantize_per_tensor(torch.ones(2, 2), 0.5, 3, torch.quint8),
        lambda: torch.quantize_per_channel(torch.ones(2, 2), torch.ones(2), torch.ones(2), 0, torch.quint8),
        r"torch.per_tensor_affine in the file, torch.per_channel_affine\w* here",
    ),
}


@pytest.mark.parametrize("kind", sorted(SPECIAL_DIFFERENCES))
def test_what_differs_in_tensors_of_special_kinds_is_named_and_nothing_is_touched(
    path: pathlib.Path, kind: str
) -> None:
    saved, here, words = SPECIAL_DIFFERENCES[kind]
    save({"a": torch.ones(3), "x": saved()}, path)
    into = {"a": torch.zeros(3), "x": here()}
    with pytest.raises(mlstor.UsageError, match=r"state\['x'\]: " + words):
        load(path, into=into)
    assert not into["a"].any()


def test_sparse_tensors_of_other_numbers_of_elements_are_filled(path: pathlib.Path) -> None:
    save({"x": torch.eye(4).to_sparse()}, path)
    into = {"x": torch.ones(4, 4).to_sparse()}
    load(path, into=into)
    assert torch.equal(into["x"].to_dense(), torch.eye(4))


def test_jagged_tensors_are_filled_in_place(path: pathlib.Path) -> None:
    def jagged(value: float) -> Any:
        parts = [torch.full((2, 3), value), torch.full((4, 3), value)]
        return torch.nested.nested_tensor(parts, layout=torch.jagged)

    save({"x": jagged(5)}, path)
    into = {"x": jagged(0)}
    place = into["x"].values().data_ptr()
    load(path, into=into, weights_only=False)
    assert (into["x"].values() == 5).all()
    assert into["x"].values().data_ptr() == place


def test_a_wrapper_is_no_place_for_a_plain_tensor(path: pathlib.Path) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    save({"a": torch.ones(3), "x": torch.ones(2)}, path)
    into = {"a": torch.zeros(3), "x": TwoTensor(torch.zeros(2), torch.zeros(2))}
    with pytest.raises(mlstor.UsageError, match=r"state\['x'\]: Tensor in the file, TwoTensor here"):
        load(path, into=into)
    assert not into["a"].any()
    save({"a": torch.ones(3), "x": TwoTensor(torch.ones(2), torch.full((2,), 2.0))}, path)
    load(path, into=into, weights_only=False)
    assert into["a"].all()
    assert torch.equal(into["x"].a, torch.ones(2))
    assert torch.equal(into["x"].b, torch.full((2,), 2.0))


def test_a_state_that_holds_itself_is_refused_in_words(path: pathlib.Path) -> None:
    state: dict[str, Any] = {"w": torch.ones(3)}
    state["self"] = state
    save(state, path)
    into: dict[str, Any] = {"w": torch.zeros(3)}
    into["self"] = into
    with pytest.raises(mlstor.UsageError, match="a state holds itself"):
        load(path, into=into)
    assert not into["w"].any()


def test_a_long_list_of_differences_is_cut(path: pathlib.Path) -> None:
    save({str(index): torch.ones(1) for index in range(50)}, path)
    with pytest.raises(mlstor.UsageError, match="and 30 more") as refused:
        load(path, into={})
    assert str(refused.value).count("in the file only") == 20


@pytest.mark.parametrize("kind", ["scalar", "quantized"])
def test_places_without_memory_are_refused(path: pathlib.Path, kind: str) -> None:
    # What a model made on the meta device has: a copy to it would do nothing, silently.
    from torch._subclasses.fake_tensor import FakeTensorMode

    save({"real": torch.ones(4), "w": torch.ones(3), "x": KINDS[kind](5)}, path)
    into = {"real": torch.zeros(4), "w": torch.empty(3, device="meta"), "x": KINDS[kind](6)}
    with pytest.raises(mlstor.UsageError, match=r"state\['w'\] is on the meta device here.*"):
        load(path, into=into)
    with FakeTensorMode():
        into["w"] = torch.zeros(3)
    with pytest.raises(mlstor.UsageError, match=r"state\['w'\] is a fake tensor here.*"):
        load(path, into=into)
    assert not into["real"].any()


class Nothing(torch.nn.Module):  # type: ignore[misc]
    def forward(self, x):  # type: ignore[no-untyped-def]
        return x


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_program_is_no_state(path: pathlib.Path) -> None:
    for module in (torch.nn.Linear(2, 2), Nothing()):  # the code of one is compressed
        torch.jit.save(torch.jit.script(module), path)
        with pytest.raises(mlstor.UsageError, match=r"TorchScript|compressed"):
            load(path, into={"weight": torch.zeros(2, 2)}, weights_only=False)
        assert torch.equal(load(path, weights_only=False, verify=False)(torch.ones(2)), module(torch.ones(2)))


def test_memory_that_is_shared_here_only_is_refused(path: pathlib.Path) -> None:
    save({"a": torch.ones(4), "b": torch.full((4,), 2.0)}, path)
    one = torch.zeros(4)
    with pytest.raises(mlstor.UsageError, match="share memory here, but not in the file"):
        load(path, into={"a": one, "b": one})
    assert not one.any()


@pytest.mark.parametrize("kind", ["quantized", "sparse", "nested", "csr"])
def test_memory_that_is_shared_here_only_is_refused_where_the_state_is_copied_too(
    path: pathlib.Path, kind: str
) -> None:
    # States with such tensors are loaded beside `into`.
    special = KINDS[kind]
    save({"a": torch.ones(4), "b": torch.full((4,), 2.0), "x": special(1), "y": special(2)}, path)
    one, apart = torch.zeros(6), torch.zeros(4)
    for into in (
        {"a": one[:4], "b": one[2:], "x": special(3), "y": special(3)},
        {"a": one[:4], "b": apart, **dict.fromkeys(("x", "y"), special(3))},
    ):
        with pytest.raises(mlstor.UsageError, match="share memory here, but not in the file"):
            load(path, into=into)
        assert not one.any()
    whole, tied = torch.arange(4.0), special(1)
    save({"a": whole, "b": whole[1:], "x": tied, "y": tied}, path)
    place, here = torch.zeros(4), special(5)
    load(path, into={"a": place, "b": place[1:], "x": here, "y": here})
    assert torch.equal(place, whole)
    assert_same(tied, here)


def test_memory_that_is_shared_in_the_file_only_is_filled_twice(path: pathlib.Path) -> None:
    for numel in (4, MIB):
        one = bits(3, torch.int16, (numel,))
        save({"a": one, "b": one, "c": one[1:]}, path)
        into = {name: torch.zeros(numel - (name == "c"), dtype=torch.int16) for name in "abc"}
        load(path, into=into)
        assert torch.equal(into["a"], one)
        assert torch.equal(into["b"], one)
        assert torch.equal(into["c"], one[1:])


def test_one_large_storage_of_many_views_is_read_straight(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As FSDP's flat parameters are: the views together cover the storage, none does so alone.
    flat = bits(3, torch.int16, (MIB,))
    save({"a": flat[: MIB // 2], "b": flat[MIB // 2 :]}, path)
    place = torch.zeros(MIB + 10, dtype=torch.int16)[5:-5]
    monkeypatch.setattr(
        "mlstor.torch.devices.allocate", lambda sizes: pytest.fail("memory was made") if list(sizes) else []
    )
    load(path, into={"a": place[: MIB // 2], "b": place[MIB // 2 :]})
    assert torch.equal(place, flat)


def test_bytes_around_a_view_are_left_alone(path: pathlib.Path) -> None:
    for numel in (10, MIB):
        whole = bits(3, torch.int16, (numel,))
        save({"v": whole[2:-2]}, path)
        around = torch.full((numel,), 77, dtype=torch.int16)
        load(path, into={"v": around[2:-2]})
        assert torch.equal(around[2:-2], whole[2:-2])
        assert around[0] == around[1] == around[-1] == around[-2] == 77


def test_autograd_sees_the_change(path: pathlib.Path) -> None:
    for numel in (4, MIB):
        save({"w": torch.ones(numel)}, path)
        weight = torch.nn.Parameter(torch.zeros(numel))
        loss = (weight * weight).sum()
        load(path, into={"w": weight})
        assert torch.equal(weight.detach(), torch.ones(numel))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("numel", [10, MIB])
@pytest.mark.parametrize("shape_of", [lambda tensor: tensor, lambda tensor: tensor[1:]], ids=["whole", "part"])
def test_damage_says_that_the_content_is_undefined(
    path: pathlib.Path, numel: int, shape_of: Callable[[Any], Any]
) -> None:
    tensor = bits(3, torch.int16, (numel,))
    save({"layer": {"w": shape_of(tensor)}}, path)
    whole = bytearray(path.read_bytes())
    whole[whole.index(content(tensor.untyped_storage())) + 7] ^= 0x10
    path.write_bytes(whole)
    with pytest.raises(mlstor.CorruptionError) as found:
        load(path, into={"layer": {"w": shape_of(torch.zeros_like(tensor))}})
    for words in (str(path), "state['layer']['w']", "data/0", "undefined"):
        assert words in str(found.value)


def test_a_damaged_local_header_says_it_too(path: pathlib.Path) -> None:
    save({"w": bits(3, torch.int16, (MIB,))}, path)
    whole = bytearray(path.read_bytes())
    whole[whole.index(b"/data/0") + 1] ^= 0x20
    path.write_bytes(whole)
    with pytest.raises(mlstor.CorruptionError, match=r"local header.*undefined"):
        load(path, into={"w": torch.zeros(MIB, dtype=torch.int16)})


def test_a_state_in_inference_mode_is_filled(path: pathlib.Path) -> None:
    save({"w": torch.ones(5)}, path)
    with torch.inference_mode():
        into = {"w": torch.zeros(5)}
        load(path, into=into)
    assert torch.equal(into["w"], torch.ones(5))
