"""`mlstor verify`: every kind of checkpoint read through, and damage named, without unpickling anything."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zlib
from pathlib import Path

import pytest
from s3_support import bucket
from servers.weed import weed  # noqa: F401 - a fixture
from zip_support import make_zip

from mlstor import cli, verify
from mlstor.blob.target import open_blob
from mlstor.errors import CorruptionError, UsageError
from mlstor.formats import dcp_sidecar
from mlstor.formats.inert_pickle import stored
from mlstor.formats.scrub import scrub


class Storage:
    """Pickles to a reference, as torch's storages do."""

    def __init__(self, key: str) -> None:
        self.key = key


class Tensor:
    def __init__(self, key: str) -> None:
        self.key = key

    def __reduce__(self):
        return Tensor, (Storage(self.key), 0, (2,))


class Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        return ("storage", "FloatStorage", obj.key, "cpu", 1) if isinstance(obj, Storage) else None


def pickled(obj: object) -> bytes:
    import io

    file = io.BytesIO()
    Pickler(file, 2).dump(obj)
    return file.getvalue()


RECORDS = [
    ("data.pkl", pickled({"model": {"w": Tensor("0")}, "optim": [Tensor("1"), 3]}), -1),
    ("data/0", os.urandom(70_000), 64),
    ("data/1", os.urandom(3_000_000), 64),
    ("version", b"3\n", -1),
]


def write(path: Path, sums: bool = True) -> Path:
    path.write_bytes(make_zip("a", RECORDS, sums=sums)[0])
    return path


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 4]))


def statuses(path: Path) -> dict[str, str]:
    return {finding.record: finding.status for finding in scrub(open_blob(path))}


def run(capsys, *words: str | Path) -> tuple[int, dict]:
    code = cli.main(["verify", "--json", *map(str, words)])
    return code, json.loads(capsys.readouterr().out)


def test_an_intact_file_is_ok(tmp_path, capsys):
    path = write(tmp_path / "a.pt")
    code, said = run(capsys, path)
    assert code == 0
    assert said["status"] == "ok"
    (file,) = said["files"]
    assert file["verified_nbytes"] == file["nbytes"] == sum(len(data) for _, data, _ in RECORDS)
    assert file["parts"] == 4
    assert cli.main(["verify", str(path)]) == 0
    assert "1 files, 3.07 MB: 1 ok" in capsys.readouterr().out


@pytest.mark.parametrize(("record", "tensor"), [("data/0", "state['model']['w']"), ("data/1", "state['optim'][0]")])
def test_a_flipped_bit_is_named_by_tensor_record_and_offset(tmp_path, capsys, record, tensor):
    path = write(tmp_path / "a.pt")
    placed = next(one for one in make_zip("a", RECORDS)[1].placed if one.name == record)
    flip(path, placed.offset + placed.nbytes // 2)
    assert cli.main(["verify", str(path)]) == 3
    out = capsys.readouterr().out
    assert (
        f"tensor {tensor}, record {record}, bytes {placed.offset} to {placed.offset + placed.nbytes}: its CRC-32" in out
    )
    assert [status for name, status in statuses(path).items() if name != record] == ["ok"] * 3


def test_damage_of_a_header_or_of_the_directory_is_found(tmp_path):
    layout = make_zip("a", RECORDS)[1]
    for offset, record in ((layout.placed[1].header_offset + 1, "data/0"), (layout.directory_offset + 1, "")):
        path = write(tmp_path / "a.pt")
        flip(path, offset)
        assert statuses(path)[record] == "damaged"
    path = write(tmp_path / "b.pt")
    flip(path, 0)
    assert statuses(path)["data.pkl"] == "damaged"
    os.truncate(path, path.stat().st_size - 1)
    assert statuses(path) == {"": "damaged"}


def test_a_file_without_sums_is_unverified_and_no_failure(tmp_path, capsys):
    path = write(tmp_path / "a.pt", sums=False)
    code, said = run(capsys, path)
    assert (code, said["status"]) == (0, "unverified")
    assert said["files"][0]["verified_nbytes"] == 0
    assert cli.main(["verify", str(path)]) == 0
    assert "4 parts unverified: it was written without CRC-32s" in capsys.readouterr().out


def test_nothing_of_a_pickle_is_carried_out(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    found = stored(pickled({"evil": Evil(), "w": Tensor("0")}))
    assert found == {"0": ("state['w']", "cpu")}
    assert not (tmp_path / "made").exists()
    with pytest.raises(ValueError, match="can't be unpickled"):
        stored(b"\x80\x02}q\x00X")


def test_a_directory_is_searched_and_foreign_files_are_left_alone(tmp_path, capsys):
    (tmp_path / "run" / "step1").mkdir(parents=True)
    write(tmp_path / "run" / "step1" / "a.pt")
    write(tmp_path / "run" / "b.ckpt")
    (tmp_path / "run" / "notes.txt").write_text("no checkpoint")
    (tmp_path / "run" / "data.bin").write_bytes(bytes(1000))
    code, said = run(capsys, tmp_path / "run")
    assert code == 0
    assert sorted(os.path.basename(file["name"]) for file in said["files"]) == ["a.pt", "b.ckpt"]
    (tmp_path / "run" / "b.ckpt").write_bytes(b"")
    code, said = run(capsys, tmp_path / "run")
    assert code == 3
    assert {os.path.basename(file["name"]): file["status"] for file in said["files"]} == {
        "a.pt": "ok",
        "b.ckpt": "damaged",
    }


def test_an_option_that_the_store_has_not_is_said(capsys):
    assert cli.main(["verify", "s3://bucket/a.pt", "--endpoint", "http://127.0.0.1:9", "-o", "colour=red"]) == 2
    assert "colour is not for this kind of store, which has endpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", ["insecure=n", "anonymous=maybe", "path_style=1", "follow=disabled", "split_reads=yes,no"]
)
def test_what_is_neither_yes_nor_no_is_not_taken_for_yes(capsys, option):
    assert cli.main(["verify", "s3://bucket/a.pt", "--endpoint", "http://127.0.0.1:9", "-o", option]) == 2
    assert f"the option {option} is neither yes nor no" in capsys.readouterr().err


def test_a_directory_without_checkpoints_and_a_missing_file_are_said(tmp_path, capsys):
    with pytest.raises(UsageError, match="holds no checkpoint"):
        verify.main([str(tmp_path)])
    assert cli.main(["verify", str(tmp_path / "gone.pt")]) == 1
    assert "No such file" in capsys.readouterr().out


def test_data_files_of_a_save_that_was_not_completed_are_damage(tmp_path, capsys):
    (tmp_path / "__0_0.distcp").write_bytes(b"x" * 100)
    code, said = run(capsys, tmp_path)
    assert code == 3
    assert "not completed" in said["files"][0]["findings"][0]["why"]


# -- what torch writes --


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def test_files_of_torch_save(tmp_path, torch, capsys):
    state = {"model": {"w": torch.arange(100_000.0)}, "few": [torch.ones(3)], "none": torch.empty(0)}
    torch.save(state, tmp_path / "a.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    code, said = run(capsys, tmp_path)
    assert code == 0
    assert [file["status"] for file in said["files"]] == ["ok", "unverified"]
    path = tmp_path / "a.pt"
    flip(path, path.read_bytes().index(torch.arange(100_000.0).numpy()[5000:5100].tobytes()))
    code, said = run(capsys, path)
    assert code == 3
    assert [one["tensor"] for one in said["files"][0]["findings"]] == ["state['model']['w']"]


def test_distributed_checkpoints_of_stock_torch(tmp_path, torch, capsys):
    import torch.distributed.checkpoint as dcp

    state = {"model": {"w": torch.arange(100_000.0), "b": torch.ones(3)}, "step": 3}
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(state, checkpoint_id=tmp_path / "step3", no_dist=True)
    code, said = run(capsys, tmp_path)
    assert code == 0
    assert {os.path.basename(file["name"]): file["status"] for file in said["files"]} == {
        ".metadata": "unverified",
        "__0_0.distcp": "ok",
    }
    data = tmp_path / "step3" / "__0_0.distcp"
    flip(data, data.read_bytes().index(torch.arange(100_000.0).numpy()[5000:5100].tobytes()))
    code, said = run(capsys, tmp_path)
    assert code == 3
    damaged = [one for file in said["files"] for one in file["findings"] if one["status"] == "damaged"]
    assert [(one["tensor"], one["record"]) for one in damaged] == [("model.w", "data/0")]
    os.truncate(data, 1000)
    assert "its items go to" in run(capsys, tmp_path)[1]["files"][1]["findings"][0]["why"]
    data.unlink()
    assert "missing" in run(capsys, tmp_path)[1]["files"][1]["findings"][0]["why"]


@pytest.mark.parametrize("place", [None, ("__0_0.distcp", -5, 10), ("a\0b", 0, 10), ("__0_0.distcp", "0", 10)])
def test_metadata_that_can_not_be_are_damage(tmp_path, torch, capsys, place):
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

    places = None if place is None else {MetadataIndex("w"): _StorageInfo(*place)}
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({}, None, places)))
    (tmp_path / "__0_0.distcp").write_bytes(b"x" * 100)
    code, said = run(capsys, tmp_path)
    assert code == 3
    assert [(file["name"], file["status"]) for file in said["files"]] == [(str(tmp_path / ".metadata"), "damaged")]


def test_a_trailer_that_can_not_be_is_damage():
    sealed = dcp_sidecar.seal(b"pickle", {})
    assert dcp_sidecar.unseal(sealed, "m") == (b"pickle", {})
    body = sealed[:-12].replace(b'{"sums":{}}', b'["sums",{}]')
    with pytest.raises(CorruptionError, match="can't be read"):
        dcp_sidecar.unseal(body + struct.pack("<I", zlib.crc32(body)) + sealed[-8:], "m")


def test_distributed_checkpoints_of_ours_are_verified_to_the_last_byte(tmp_path, torch, capsys):
    import torch.distributed.checkpoint as dcp

    from mlstor.torch import StorageWriter

    state = {"w": torch.arange(600_000.0), "b": torch.ones(3), "step": 3}
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(state, storage_writer=StorageWriter(tmp_path), no_dist=True)
    code, said = run(capsys, tmp_path)
    assert code == 0
    assert {os.path.basename(file["name"]): file["status"] for file in said["files"]} == {
        ".metadata": "ok",
        "__0_0.distcp": "ok",
    }
    data, beside, metadata = (tmp_path / name for name in ("__0_0.distcp", "__0_0.distcp.sums", ".metadata"))
    for path, offsets in (
        (data, (0, 100, data.stat().st_size // 2, data.stat().st_size - 1)),
        (beside, (0, 40, beside.stat().st_size - 1)),
        (metadata, (0, *(metadata.stat().st_size - before for before in (1000, 20, 8, 1)))),
    ):
        for offset in offsets:
            flip(path, offset)
            code, said = run(capsys, tmp_path)
            assert code == 3
            assert [file["name"] for file in said["files"] if file["status"] == "damaged"] == [str(path)]
            flip(path, offset)
    flip(data, data.stat().st_size // 2)
    file = run(capsys, tmp_path)[1]["files"][1]
    (damaged,) = file["findings"]
    assert file["nbytes"] == data.stat().st_size
    assert file["verified_nbytes"] == data.stat().st_size - damaged["nbytes"]
    assert damaged["tensor"] == "w"
    assert damaged["offset"] <= data.stat().st_size // 2 < damaged["offset"] + damaged["nbytes"]
    flip(data, data.stat().st_size // 2)
    beside.unlink()
    assert "missing" in run(capsys, tmp_path)[1]["files"][1]["findings"][0]["why"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_data_file_that_stock_torch_has_replaced_is_no_damage(tmp_path, torch, capsys):
    import torch.distributed.checkpoint as dcp

    from mlstor.torch import StorageWriter

    dcp.save({"w": torch.zeros(100)}, storage_writer=StorageWriter(tmp_path), no_dist=True)
    dcp.save({"w": torch.ones(100)}, checkpoint_id=tmp_path, no_dist=True)
    code, said = run(capsys, tmp_path)
    assert code == 0
    assert {os.path.basename(file["name"]): file["status"] for file in said["files"]} == {
        ".metadata": "unverified",
        "__0_0.distcp": "ok",
    }


def test_markers_of_a_checkpoint_directory(tmp_path, torch, capsys):
    from mlstor.formats import marker_check
    from mlstor.torch import CheckpointDirectory, checkpoint_directory

    assert marker_check.FORMAT == checkpoint_directory.FORMAT
    checkpoints = CheckpointDirectory(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, {"w": torch.full((100,), float(step))})
    (tmp_path / "notes-20260101.json").write_text("{}")
    code, said = run(capsys, tmp_path)
    assert code == 0
    assert [os.path.basename(file["name"]) for file in said["files"]] == [
        *("step-00000001.json", "step-00000002.json", "step-00000001.pt", "step-00000002.pt"),
    ]
    one, two = tmp_path / "step-00000001.pt", tmp_path / "step-00000002.pt"
    one.write_bytes(two.read_bytes())
    code, said = run(capsys, tmp_path)
    assert code == 3
    assert [file["status"] for file in said["files"]] == ["damaged", "ok", "ok", "ok"]
    one.unlink()
    marker = json.loads((tmp_path / "step-00000002.json").read_text())
    (tmp_path / "step-00000002.json").write_text(json.dumps({**marker, "data": f"../{tmp_path.name}/{two.name}"}))
    assert "it names '../" in run(capsys, tmp_path)[1]["files"][1]["findings"][0]["why"]
    (tmp_path / "step-00000002.json").write_text("{")
    code, said = run(capsys, tmp_path)
    assert [file["status"] for file in said["files"]] == ["damaged", "damaged", "ok"]
    assert "missing" in said["files"][0]["findings"][0]["why"]


def test_objects_and_prefixes_of_a_store(weed, torch, capsys):  # noqa: F811
    from mlstor.torch import save_safetensors

    where = ("--endpoint", weed.endpoint, "-o", "anonymous=yes")
    with bucket(weed) as store:
        records = [*RECORDS, ("data/2", os.urandom(20_000_000), 64)]
        content, layout = make_zip("a", records)
        store.write("run/a.pt", content)
        save_safetensors(
            {"w": torch.arange(3.0)},
            f"{store.url}/run/b.safetensors",
            options={"endpoint": weed.endpoint, "anonymous": True},
        )
        code, said = run(capsys, *where, f"{store.url}/run")
        assert code == 0
        assert [(file["name"].rpartition("/")[2], file["status"]) for file in said["files"]] == [
            ("a.pt", "ok"),
            ("b.safetensors", "ok"),
        ]
        damaged = bytearray(content)
        damaged[layout.placed[-1].offset + 11_000_000] ^= 1
        store.write("run/a.pt", bytes(damaged))
        code, said = run(capsys, *where, f"{store.url}/run/a.pt", store.url)
        assert code == 3
        assert [file["status"] for file in said["files"]] == ["damaged", "damaged", "ok"]
        assert [one["record"] for one in said["files"][0]["findings"]] == ["data/2"]
        assert run(capsys, *where, f"{store.url}/run/gone.pt")[0] == 1
