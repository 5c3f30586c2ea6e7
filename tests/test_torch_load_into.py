"""`load(into=)`: straight into the tensors of a state that is there, verified, or not touched at all."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
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


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
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

    monkeypatch.setattr("mlstor.torch.into.allocate", refuse)
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
    save({"a": torch.ones(4), "b": 3, "t": (1, 2)}, path)
    with pytest.raises(mlstor.UsageError) as refused:
        load(path, into={"a": 3, "b": {"x": 1}, "t": (1, 3)})
    for words in ("state['a'] is of type Tensor in the file, int here", "state['b'] is of type int", "in a tuple"):
        assert words in str(refused.value)


def test_a_long_list_of_differences_is_cut(path: pathlib.Path) -> None:
    save({str(index): torch.ones(1) for index in range(50)}, path)
    with pytest.raises(mlstor.UsageError, match="and 30 more") as refused:
        load(path, into={})
    assert str(refused.value).count("in the file only") == 20


@pytest.mark.parametrize("kind", ["scalar", "quantized"])
def test_places_without_memory_are_refused(path: pathlib.Path, kind: str) -> None:
    # What a model made on the meta device has: a copy to it would do nothing, silently.
    save({"real": torch.ones(4), "w": torch.ones(3), "x": KINDS[kind](5)}, path)
    into = {"real": torch.zeros(4), "w": torch.empty(3, device="meta"), "x": KINDS[kind](6)}
    with pytest.raises(mlstor.UsageError, match=r"state\['w'\] is on the meta device here.*"):
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
        "mlstor.torch.into.allocate", lambda sizes: pytest.fail("memory was made") if list(sizes) else []
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
