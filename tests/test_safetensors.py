"""Files of the safetensors format: read and written by the package as by us, verified, and refused in words."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given, settings, strategies as st

torch = pytest.importorskip("torch")
package = pytest.importorskip("safetensors.torch")

from safetensors import safe_open  # noqa: E402

from mlstor.blob.target import open_blob  # noqa: E402
from mlstor.errors import CorruptionError, UsageError  # noqa: E402
from mlstor.formats.safetensors_file import Tensor, header, lay_out, read_header  # noqa: E402
from mlstor.formats.scrub import scrub  # noqa: E402
from mlstor.torch import UnverifiedWarning  # noqa: E402
from mlstor.torch.safetensors import _DTYPES, load_safetensors, save_safetensors  # noqa: E402

torch.set_num_threads(1)
#: Those that the package's own loader knows by name.
DTYPES = [dtype for dtype in _DTYPES.values() if dtype != torch.float8_e8m0fnu]


def tensor_of(dtype, shape, seed=0):
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), generator=torch.Generator().manual_seed(seed))
    return raw.to(torch.uint8).view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


def same(one, other):
    assert list(one) == list(other) or sorted(one) == sorted(other)
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert one[name].shape == other[name].shape
        assert torch.equal(one[name].flatten().view(torch.uint8), other[name].flatten().view(torch.uint8)), name


STATES = st.lists(
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 7), max_size=3)), max_size=8, unique_by=str
)


@given(described=STATES, metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=20), max_size=3))
@settings(max_examples=25)
def test_round_trips_with_the_package(tmp_path_factory, described, metadata):
    path = tmp_path_factory.mktemp("st") / "a.safetensors"
    state = {f"t{number}": tensor_of(dtype, shape, number) for number, (dtype, shape) in enumerate(described)}
    save_safetensors(state, path, metadata)
    same(load_safetensors(path), state)
    same(package.load_file(path), state)
    with safe_open(path, "pt") as other:
        said = other.metadata()
        assert {key: value for key, value in said.items() if key != "mlstor.crc32"} == metadata
    package.save_file(state, path, metadata or None)
    with pytest.warns(UnverifiedWarning, match=r"none of mlstor's checksums"):
        same(load_safetensors(path), state)
    same(load_safetensors(path, verify=False), state)


def test_every_type_of_elements(tmp_path):
    state = {str(dtype): tensor_of(dtype, (5, 3)) for dtype in _DTYPES.values()}
    save_safetensors(state, tmp_path / "a.safetensors")
    same(load_safetensors(tmp_path / "a.safetensors"), state)


def test_large_tensors_lie_where_direct_io_needs_no_copy(tmp_path):
    state = {f"{number}": torch.randn(512, 512) for number in range(6)}
    state |= {"odd": torch.randn(300_001), "scalar": torch.tensor(1.5), "text": torch.ones(7, dtype=torch.uint8)}
    path = tmp_path / "a.safetensors"
    save_safetensors(state, path)
    found = read_header(open_blob(path).read, path.stat().st_size, "a").tensors
    residues = [state[str(number)].data_ptr() % 4096 for number in range(6)]
    common = max(set(residues), key=residues.count)
    for number, residue in enumerate(residues):
        if residue == common:
            assert found[str(number)].offset % 4096 == residue
    for name, one in found.items():
        assert one.offset % state[name].itemsize == 0
    same(load_safetensors(path), state)


def test_tensors_on_the_way_into_given_ones(tmp_path):
    state = {"w": torch.randn(300, 1000), "b": torch.arange(5), "t": torch.randn(4, 6), "e": torch.empty(0)}
    path = tmp_path / "a.safetensors"
    save_safetensors(state, path)
    into = {
        "w": torch.zeros(300, 1000, requires_grad=True),
        "b": torch.zeros(5, dtype=torch.int64),
        "t": torch.zeros(6, 4).t(),
        "e": torch.empty(0),
    }
    places = {name: tensor.data_ptr() for name, tensor in into.items()}
    version = into["w"]._version
    loaded = load_safetensors(path, into=into)
    same(loaded, state)
    assert {name: tensor.data_ptr() for name, tensor in loaded.items()} == places
    assert all(loaded[name] is into[name] for name in into)
    assert into["w"]._version > version


def test_tied_tensors_are_filled_one_after_another(tmp_path):
    one = torch.zeros(100)
    save_safetensors({"a": torch.arange(100.0), "b": torch.arange(100.0)}, tmp_path / "a.safetensors")
    load_safetensors(tmp_path / "a.safetensors", into={"a": one, "b": one})
    assert torch.equal(one, torch.arange(100.0))


def test_what_does_not_fit_is_named_and_nothing_is_touched(tmp_path):
    save_safetensors({"a": torch.ones(3), "b": torch.ones(4), "c": torch.ones(5)}, tmp_path / "a.safetensors")
    into = {"a": torch.zeros(3), "b": torch.zeros(2, 2), "c": torch.zeros(5, dtype=torch.int32), "d": torch.zeros(1)}
    with pytest.raises(UsageError) as caught:
        load_safetensors(tmp_path / "a.safetensors", into=into)
    for text in (
        "'b' has the shape [2, 2], and [4]",
        "'c' is of torch.int32, and of torch.float32",
        "'d' is not in the file",
    ):
        assert text in str(caught.value)
    assert not into["a"].any()
    with pytest.raises(UsageError, match="'b' is expanded"):
        load_safetensors(tmp_path / "a.safetensors", into={**into, "b": torch.zeros(1).expand(4)})


def test_what_is_no_place_for_tensors_is_refused_in_words(tmp_path):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.two_tensor import TwoTensor

    path = tmp_path / "a.safetensors"
    save_safetensors({"a": torch.ones(3), "b": torch.ones(2)}, path)
    plain = torch.zeros(3)
    with FakeTensorMode():
        fake = torch.zeros(2)
    with pytest.raises(UsageError, match="text by text"):
        save_safetensors({"a": plain}, path, ["format"])
    for into, named in (
        ({"a": plain, "b": TwoTensor(torch.zeros(2), torch.zeros(2))}, "'b' is no dense tensor with memory"),
        ({"a": plain, "b": torch.zeros(2, device="meta")}, "'b' is no dense tensor"),
        ({"a": plain, "b": fake}, "'b' is no dense tensor"),
        ({"a": plain, "b": [0.0, 0.0]}, "these are none: 'b'"),
        (torch.nn.Linear(2, 2), "not Linear"),
    ):
        with pytest.raises(UsageError, match=named):
            load_safetensors(path, into=into)
    assert not plain.any()
    with FakeTensorMode(), pytest.raises(UsageError, match="FakeTensorMode"):
        load_safetensors(path)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: [torch.ones(4)], "give a dict"),
        (lambda: torch.nn.Linear(2, 2), "give a dict"),
        (lambda: {3: torch.ones(4)}, "3; convert"),
        (lambda: {"x": torch.ones(4).to_sparse()}, "dense"),
        (lambda: {"x": torch.ones(4, 4).t()[:2]}, "contiguous"),
        (lambda: {"x": torch.ones(4, device="meta")}, "no memory"),
        (lambda: {"x": torch.ones(4, dtype=torch.complex128)}, "complex128"),
        (lambda: {"x": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)}, "qint8"),
        (lambda: {"x": 3}, "tensors alone"),
        (lambda: (lambda base: {"x": base[:6], "y": base[5:]})(torch.ones(10)), "'x', 'y'"),
        (lambda: {"__metadata__": torch.ones(1)}, "rename"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_what_the_format_cannot_hold_is_refused(tmp_path, make, named):
    path = tmp_path / "a.safetensors"
    with pytest.raises(UsageError, match=named):
        save_safetensors(make(), path)
    assert not path.exists()


def test_views_of_one_memory_that_do_not_overlap_are_taken(tmp_path):
    base = torch.arange(10.0)
    save_safetensors({"x": base[:5], "y": base[5:]}, tmp_path / "a.safetensors")
    same(load_safetensors(tmp_path / "a.safetensors"), {"x": base[:5].clone(), "y": base[5:].clone()})


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path):
    path = tmp_path / "a.safetensors"
    state = {"w": tensor_of(torch.float32, (9,), 1), "b": tensor_of(torch.bfloat16, (5,), 2)}
    save_safetensors(state, path, {"format": "pt"})
    raw = path.read_bytes()
    end = 8 + struct.unpack_from("<Q", raw)[0]
    text_end = len(raw[:end].rstrip(b" "))
    said_at = raw.index(b"mlstor.crc32")
    # Every byte, but for the padding some.
    for at in [*range(text_end), text_end, (text_end + end) // 2, end - 1, *range(end, len(raw))]:
        damaged = bytearray(raw)
        damaged[at] ^= 1 << at % 7
        path.write_bytes(damaged)
        if said_at <= at < said_at + len("mlstor.crc32") + 3 + 8:
            continue  # then the file has no sums for its header: unverified, below
        with pytest.raises((CorruptionError, UsageError)):
            load_safetensors(path)
    path.write_bytes(raw)
    path.write_bytes(raw.replace(b"mlstor.crc32", b"mlstor.crc31"))
    assert {finding.status for finding in scrub(open_blob(path))} == {"unverified"}


def test_damage_names_tensor_and_bytes(tmp_path):
    path = tmp_path / "a.safetensors"
    save_safetensors({"w": torch.zeros(100), "b": torch.zeros(10)}, path)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CorruptionError, match=r"tensor 'w' \(bytes \d+ to \d+ of the file\) is not what was written"):
        load_safetensors(path)
    with pytest.raises(CorruptionError, match="`into` is undefined"):
        load_safetensors(path, into={"w": torch.zeros(100), "b": torch.zeros(10)})
    assert load_safetensors(path, verify=False)["w"][-1] != 0
    assert {one.tensor: one.status for one in scrub(open_blob(path))} == {"w": "damaged", "b": "ok"}


def test_sums_that_another_program_copied_with_the_metadata_are_not_believed(tmp_path):
    """Programs keep the metadata of a file and write changed tensors: that is no damage."""
    path = tmp_path / "a.safetensors"
    save_safetensors({"w": torch.zeros(100)}, path, {"format": "pt"})
    with safe_open(path, "pt") as other:
        metadata = other.metadata()
    assert "mlstor.crc32" in metadata
    package.save_file({"w": torch.ones(100)}, path, metadata)
    with pytest.warns(UnverifiedWarning):
        assert torch.equal(load_safetensors(path)["w"], torch.ones(100))
    assert {one.status for one in scrub(open_blob(path))} == {"unverified"}
    save_safetensors({"w": torch.ones(100)}, path, metadata)
    assert {one.status for one in scrub(open_blob(path))} == {"ok"}


def put(described: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = described if isinstance(described, bytes) else json.dumps(described).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "cut short"),
        (put({"a": F32}, bytes(8), length=1 << 40), "cut short"),
        (put({"a": F32}, bytes(7)), "the file at"),
        (put({"a": F32}, bytes(9)), "the file at"),
        (
            put(b'{"a":' + json.dumps(F32).encode() + b',"a":' + json.dumps(F32).encode() + b"}", bytes(8)),
            "more than once",
        ),
        (put({"a": {**F32, "data_offsets": [8, 16]}}, bytes(16)), "where"),
        (put({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, bytes(12)), "where"),
        (put({"a": {**F32, "shape": [3]}}, bytes(8)), "lies in 8 bytes"),
        (put({"a": {**F32, "shape": [-2]}}, bytes(8)), "shape"),
        (put({"a": {**F32, "shape": [True, 2]}}, bytes(8)), "shape"),
        (put({"a": {**F32, "shape": [1 << 70, 1 << 70]}}, bytes(8)), "lies in 8 bytes"),
        (put({"a": {"dtype": [], "shape": [0], "data_offsets": [0, 0]}}), "elements of type"),
        (put({"a": {"dtype": "F32"}}, bytes(8)), "described by"),
        (put([1]), "no JSON object"),
        (put(b"{" * 3), "damaged"),
        (put(b"[" * 100_000), "damaged"),
        (put({"__metadata__": {"a": 1}}), "text by text"),
    ],
)
def test_a_header_that_contradicts_itself_is_damage(raw, why):
    with pytest.raises(CorruptionError, match=why):
        read_header(lambda at, nbytes: raw[at : at + nbytes], len(raw), "a")


def test_an_unknown_type_of_elements_is_said():
    raw = put({"a": {**F32, "dtype": "F128"}}, bytes(8))
    with pytest.raises(UsageError, match="F128"):
        read_header(lambda at, nbytes: raw[at : at + nbytes], len(raw), "a")


def test_a_header_of_many_tensors_is_read_in_two_pieces():
    tensors = [Tensor(f"layer.{number}.weight", "U8", (1,), 1) for number in range(3000)]
    layout = lay_out(tensors, {})
    raw = header(layout, {one.name: number for number, one in enumerate(layout.placed)}) + bytes(3000)
    found = read_header(lambda at, nbytes: raw[at : at + nbytes], len(raw), "a")
    assert len(found.tensors) == 3000
    assert found.sums is not None
    assert list(found.sums.values()) == list(range(3000))
