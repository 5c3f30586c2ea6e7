"""A flipped bit anywhere in a file is found, or changes nothing: no load gives other values than were saved."""

from __future__ import annotations

import io
import pathlib
import random
import struct
import warnings
import zipfile
from collections import Counter
from typing import Any

import pytest
from torch_support import MIB, assert_same, bits, content, torch

import mlstor
from mlstor.torch import load, save

#: What a flip may do without a change of the state, by the fields of APPNOTE.TXT: nobody reads them.
HARMLESS = {
    "local header: version, flags, time, date",
    "local header: CRC and sizes",  # of torch's own files: they stand behind the data
    "padding",
    "data descriptor",
    "directory: versions, time, date, attributes",
    "directory: flags",
    "version",
    "end",
}


def state_of() -> dict[str, Any]:
    return {"small": bits(1, torch.int32, (40,)), "large": bits(2, torch.int16, (MIB // 2 + 9,)), "step": 3}


def written(path: pathlib.Path, how: str) -> bytes:
    (save if how == "ours" else torch.save)(state_of(), path)
    return path.read_bytes()


def regions(whole: bytes) -> dict[int, str]:
    """What each byte of a zip is, but for the records' data, of which some bytes are looked at."""
    named: dict[int, str] = {}

    def name(start: int, end: int, what: str) -> None:
        named.update(dict.fromkeys(range(start, end), what))

    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        infos = archive.infolist()
        start_dir = archive.start_dir
    limits = [info.header_offset for info in infos[1:]] + [start_dir]
    for info, limit in zip(infos, limits, strict=True):
        at = info.header_offset
        name_nbytes, extra_nbytes = struct.unpack_from("<HH", whole, at + 26)
        data = at + 30 + name_nbytes + extra_nbytes
        name(at, at + 4, "local header: signature")
        name(at + 4, at + 8, "local header: version, flags, time, date")
        name(at + 8, at + 10, "local header: method")
        name(at + 10, at + 14, "local header: version, flags, time, date")
        name(at + 14, at + 26, "local header: CRC and sizes")
        name(at + 26, at + 30, "local header: lengths")
        name(at + 30, at + 30 + name_nbytes, "local header: name")
        name(at + 30 + name_nbytes, data, "padding")
        record = info.filename.partition("/")[2]
        chosen = range(data, data + info.file_size)
        some = chosen if info.file_size < 400 else random.Random(1).sample(chosen, 40)
        named.update(dict.fromkeys(some, "data" if record.startswith("data/") else record))
        name(data + info.file_size, limit, "data descriptor")
    at = start_dir
    for _ in infos:
        name_nbytes, extra_nbytes = struct.unpack_from("<HH", whole, at + 28)
        end = at + 46 + name_nbytes + extra_nbytes
        name(at, end, "directory: signature, method, lengths, name, offset")
        name(at + 4, at + 8, "directory: versions, time, date, attributes")
        name(at + 8, at + 10, "directory: flags")
        name(at + 12, at + 16, "directory: versions, time, date, attributes")
        name(at + 16, at + 28, "directory: CRC and sizes")
        name(at + 36, at + 42, "directory: versions, time, date, attributes")
        at = end
    name(at, len(whole), "end")
    return named


@pytest.mark.parametrize("how", ["ours", "torch's"])
def test_every_flip_is_found_or_harmless(tmp_path: pathlib.Path, how: str) -> None:
    path = tmp_path / "state.pt"
    whole = written(path, how)
    random_bits = random.Random(7)
    outcomes: dict[str, Counter[str]] = {}
    named = regions(whole)
    per_region: dict[str, list[int]] = {}
    for place, region in named.items():
        per_region.setdefault(region, []).append(place)
    with path.open("r+b") as file:
        for region, places in per_region.items():
            for place in random_bits.sample(places, min(len(places), 40)):
                file.seek(place)
                file.write(bytes([whole[place] ^ 1 << random_bits.randrange(8)]))
                file.flush()
                outcomes.setdefault(region, Counter())[_outcome(path)] += 1
                file.seek(place)
                file.write(whole[place : place + 1])
                file.flush()
    print(how, {region: dict(counts) for region, counts in sorted(outcomes.items())})
    assert set(outcomes) >= {"data", "data.pkl", "byteorder", "local header: name", "directory: CRC and sizes", "end"}
    for region, counts in outcomes.items():
        assert set(counts) <= {"found", "the same"}
        if region not in HARMLESS:
            assert not counts["the same"], f"a flip in {region!r} of {how} file was not noticed: {counts}"


def _outcome(path: pathlib.Path) -> str:
    """Found, or the same state; another state fails the test."""
    try:
        loaded = load(path)
    except (mlstor.CorruptionError, mlstor.UsageError) as error:  # or a flag or method that torch.save never writes
        return "found" if str(path) in str(error) else f"found, but not named: {error}"
    assert_same(state_of(), loaded)
    return "the same"


@pytest.mark.parametrize("how", ["ours", "torch's"])
def test_damage_names_file_tensor_and_place(tmp_path: pathlib.Path, how: str) -> None:
    path = tmp_path / "state.pt"
    whole = bytearray(written(path, how))
    for key, record in (("small", "data/0"), ("large", "data/1")):
        start = whole.index(content(state_of()[key].untyped_storage()))
        nbytes = state_of()[key].untyped_storage().nbytes()
        whole[start + nbytes - 1] ^= 0x80
        path.write_bytes(whole)
        whole[start + nbytes - 1] ^= 0x80
        with pytest.raises(mlstor.CorruptionError) as found:
            load(path)
        for words in (str(path), f"state['{key}']", record, f"bytes {start} to {start + nbytes} of the file"):
            assert words in str(found.value)


@pytest.mark.parametrize("how", ["ours", "torch's"])
def test_damage_of_a_local_header_names_the_tensor_behind_it(tmp_path: pathlib.Path, how: str) -> None:
    path = tmp_path / "state.pt"
    whole = bytearray(written(path, how))
    for key, record in (("small", b"data/0"), ("large", b"data/1")):
        at = whole.index(record)
        whole[at] ^= 0x20
        path.write_bytes(whole)
        whole[at] ^= 0x20
        header = whole.rindex(b"PK\3\4", 0, at)
        for into in (
            None,
            {"small": bits(3, torch.int32, (40,)), "large": bits(3, torch.int16, (MIB // 2 + 9,)), "step": 1},
        ):
            with pytest.raises(mlstor.CorruptionError) as found:
                load(path, into=into)
            for words in (str(path), f"tensor state['{key}']", record.decode(), f"header at offset {header}"):
                assert words in str(found.value)
            assert ("undefined" in str(found.value)) is (into is not None)


def test_many_damaged_records_are_counted(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "state.pt"
    save([torch.full((9,), 1000 + index) for index in range(10)], path)
    whole = bytearray(path.read_bytes())
    for index in range(10):
        whole[whole.index(struct.pack("<2q", 1000 + index, 1000 + index))] ^= 0xF0
    path.write_bytes(whole)
    with pytest.raises(mlstor.CorruptionError, match=r"state\[0\].*and 6 more records are not what was written"):
        load(path)


def test_a_hole_of_zeros_is_found(tmp_path: pathlib.Path) -> None:
    # What a lost write-back of the page cache leaves.
    path = tmp_path / "state.pt"
    save({"w": bits(2, torch.int16, (4 * MIB,)) + 1}, path)
    with path.open("r+b") as file:
        file.seek(MIB)
        file.write(bytes(MIB))
    with pytest.raises(mlstor.CorruptionError, match=r"state\['w'\]"):
        load(path)


def test_damage_to_the_pickle_is_found_before_it_is_unpickled(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "state.pt"
    save({"key": 1}, path)
    path.write_bytes(path.read_bytes().replace(b"key", b"KEY", 1))
    for allowed in (True, False):
        with pytest.raises(mlstor.CorruptionError, match=r"record data\.pkl"):
            load(path, weights_only=allowed)


class Config:
    """A class that weights_only=True does not allow."""

    def __init__(self, w: Any) -> None:
        self.w = w


def test_damage_is_named_where_the_state_can_not_be_made_without_its_bytes(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "state.pt"
    tensor = bits(3, torch.int32, (500,))
    save({"config": Config(tensor)}, path)
    whole = bytearray(path.read_bytes())
    whole[whole.index(content(tensor.untyped_storage())) + 5] ^= 1
    path.write_bytes(whole)
    with pytest.raises(mlstor.CorruptionError, match=r"tensor state\['config'\]\.w \(record data/0, bytes"):
        load(path)


def test_damage_of_a_state_that_holds_itself_is_named(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "state.pt"
    state: dict[str, Any] = {"w": bits(3, torch.int32, (500,))}
    state["self"] = state
    save(state, path)
    whole = bytearray(path.read_bytes())
    whole[whole.index(content(state["w"].untyped_storage())) + 5] ^= 1
    path.write_bytes(whole)
    with pytest.raises(mlstor.CorruptionError, match=r"tensor state\['w'\] \(record data/0"):
        load(path)


def test_quantized_damage_is_named(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "state.pt"
    values = torch.arange(600, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is going to drop quantized tensors
        state = {"q": torch.quantize_per_tensor(values, 10.0, 0, torch.quint8)}
        save(state, path)
        whole = bytearray(path.read_bytes())
        whole[whole.index(state["q"].int_repr().numpy().tobytes()) + 5] ^= 1
        path.write_bytes(whole)
        with pytest.raises(mlstor.CorruptionError, match=r"tensor state\['q'\] \(record data/0, bytes"):
            load(path)
