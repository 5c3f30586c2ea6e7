"""DCP's writer and reader in one process: round trips, stock torch on either side, what lies on disk."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch.distributed.checkpoint as dcp  # noqa: E402
from dcp_support import a_state, assert_same, blank, load, quietly, save  # noqa: E402

from mlstor.errors import CorruptionError, UsageError  # noqa: E402
from mlstor.formats.dcp_sidecar import parse, unseal  # noqa: E402
from mlstor.torch import StorageReader, StorageWriter, UnverifiedWarning  # noqa: E402

# torch warns once per process that typed storages are old
pytestmark = [
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_what_was_saved_is_loaded_and_every_byte_verified(tmp_path: Path) -> None:
    state = a_state()
    save(state, tmp_path / "new" / "ck")
    loaded, reader = load(state, tmp_path / "new" / "ck")
    assert_same(loaded, state)
    assert reader.unverified_bytes == 0
    assert reader.verified_bytes > 5_000_000
    assert names(tmp_path / "new" / "ck") == [".metadata", "__0_0.distcp", "__0_0.distcp.sums"]


def test_stock_torch_reads_what_mlstor_wrote(tmp_path: Path) -> None:
    state = a_state()
    save(state, tmp_path)
    into = blank(state)
    quietly(dcp.load, into, storage_reader=dcp.FileSystemReader(tmp_path))
    assert_same(into, state)
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(tmp_path, tmp_path / "one.pt")
    assert_same(torch.load(tmp_path / "one.pt"), state)


@pytest.mark.parametrize("threads", [1, 3])
def test_what_stock_torch_wrote_is_read_and_verified(tmp_path: Path, threads: int) -> None:
    state = a_state()
    quietly(dcp.save, state, storage_writer=dcp.FileSystemWriter(tmp_path, thread_count=threads))
    loaded, reader = load(state, tmp_path)
    assert_same(loaded, state)
    assert reader.unverified_bytes == 0
    assert reader.verified_bytes > 5_000_000


def test_stock_items_without_crc_are_loaded_as_unverified(tmp_path: Path) -> None:
    state = {"w": torch.arange(300_000), "n": 3}
    torch.utils.serialization.config.save.compute_crc32 = False
    try:
        quietly(dcp.save, state, storage_writer=dcp.FileSystemWriter(tmp_path))
    finally:
        torch.utils.serialization.config.save.compute_crc32 = True
    with pytest.warns(UnverifiedWarning, match="unverified") as caught:
        loaded, reader = load(state, tmp_path)
    assert len(caught) == 1
    assert_same(loaded, state)
    assert reader.verified_bytes == 0


def test_items_are_archives_whose_crcs_are_true(tmp_path: Path) -> None:
    state = {"large": torch.arange(1_000_000, dtype=torch.float32), "small": torch.arange(10)}
    save(state, tmp_path)
    content = (tmp_path / "__0_0.distcp").read_bytes()
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    assert len(metadata.storage_data) == 2
    for info in metadata.storage_data.values():
        item = tmp_path / "item.zip"
        item.write_bytes(content[info.offset : info.offset + info.length])
        with zipfile.ZipFile(item) as archive:
            assert archive.testzip() is None
        assert subprocess.run(["unzip", "-tq", item], capture_output=True, check=False).returncode == 0


def test_sums_are_those_of_the_file(tmp_path: Path) -> None:
    import google_crc32c

    save(a_state(), tmp_path)
    content = (tmp_path / "__0_0.distcp").read_bytes()
    sums = parse((tmp_path / "__0_0.distcp.sums").read_bytes(), "sums")
    assert sums.nbytes == len(content)
    for chunk, value in enumerate(sums.values.tolist()):
        start, end = sums.span(chunk)
        assert google_crc32c.value(content[start:end]) == value
    _, files = unseal((tmp_path / ".metadata").read_bytes(), "metadata")
    assert files == {"__0_0.distcp": sums.file_id}


def test_types_are_converted_and_strides_kept_as_stock_does(tmp_path: Path) -> None:
    wide = torch.randn(300, 2000)
    save({"a": wide, "b": wide, "c": wide}, tmp_path)
    into = {
        "a": torch.zeros(300, 2000, dtype=torch.float64),
        "b": torch.zeros(2000, 300).t(),
        "c": torch.zeros(300, 4000),
    }
    column_wise, every_other = into["b"], into["c"][:, ::2]
    into["c"] = every_other
    reader = StorageReader(tmp_path)
    quietly(dcp.load, into, storage_reader=reader)
    assert torch.equal(into["a"], wide.double())
    assert torch.equal(column_wise, wide)
    assert torch.equal(every_other, wide)
    assert reader.unverified_bytes == 0


def test_a_load_is_seen_by_autograd(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(5))
    save({"w": weight}, tmp_path)
    leaf = torch.zeros(5)
    loss = (torch.nn.Parameter(torch.ones(5)) * leaf).sum()
    quietly(dcp.load, {"w": leaf}, storage_reader=StorageReader(tmp_path))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_save_that_dies_before_its_metadata_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    old, new = a_state(1), a_state(2)
    save(old, tmp_path)

    class Dies(StorageWriter):
        def finish(self, metadata: Any, results: Any) -> None:
            raise OSError("killed")

    with pytest.warns(UserWarning, match="there is a checkpoint already"), pytest.raises(BaseException, match="killed"):
        quietly(dcp.save, new, storage_writer=Dies(tmp_path))
    assert "__0_1.distcp" in names(tmp_path)
    assert_same(load(old, tmp_path)[0], old)
    with pytest.warns(UserWarning, match="there is a checkpoint already"):
        save(new, tmp_path)
    assert_same(load(new, tmp_path)[0], new)
    assert names(tmp_path) == [".metadata", "__0_2.distcp", "__0_2.distcp.sums"]


@pytest.mark.filterwarnings("ignore:.*there is a checkpoint already")
def test_whoever_looks_while_it_is_overwritten_finds_a_whole_checkpoint(tmp_path: Path) -> None:
    save({"w": torch.full((300_000,), 0)}, tmp_path)
    over, looks, wrong = threading.Event(), [0], list[str]()

    def is_whole(name: str) -> bool:
        try:
            return (tmp_path / name).stat().st_size > 2_400_000
        except FileNotFoundError:
            return False

    def watch() -> None:
        while not over.is_set():
            before = (tmp_path / ".metadata").read_bytes()  # raises if it is not there
            files = {info.relative_path for info in pickle.loads(before).storage_data.values()}
            short = [name for name in files if not is_whole(name)]
            if short and (tmp_path / ".metadata").read_bytes() == before:
                wrong.extend(short)
            looks[0] += 1

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        try:
            for value in range(1, 6):
                save({"w": torch.full((300_000,), value)}, tmp_path)
        finally:
            over.set()
        watching.result()
    assert not wrong
    assert looks[0] > 5
    assert load({"w": torch.zeros(300_000, dtype=torch.int64)}, tmp_path)[0]["w"].unique().tolist() == [5]


def test_overwriting_can_be_refused(tmp_path: Path) -> None:
    save({"n": 1}, tmp_path)
    with pytest.raises(BaseException, match="checkpoint already"):
        save({"n": 2}, tmp_path, overwrite=False)


def test_stock_may_overwrite_and_its_files_are_not_taken_for_damage(tmp_path: Path) -> None:
    save(a_state(1), tmp_path)
    with pytest.warns(UserWarning, match="existing checkpoint"):
        quietly(dcp.save, a_state(2), storage_writer=dcp.FileSystemWriter(tmp_path))
    assert "__0_0.distcp.sums" in names(tmp_path)
    assert_same(load(a_state(2), tmp_path)[0], a_state(2))


def test_each_rank_has_its_own_metadata_without_collectives(tmp_path: Path) -> None:
    state = a_state()
    quietly(dcp.save, state, storage_writer=StorageWriter(tmp_path), use_collectives=False)
    assert names(tmp_path) == ["__0.metadata", "__0_0.distcp", "__0_0.distcp.sums"]
    for reader in (StorageReader(tmp_path), dcp.FileSystemReader(tmp_path)):
        into = blank(state)
        quietly(dcp.load, into, storage_reader=reader)
        assert_same(into, state)


def test_plans_may_be_cached(tmp_path: Path) -> None:
    for seed in range(3):
        planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
        path = tmp_path / str(seed)
        quietly(dcp.save, a_state(seed), storage_writer=StorageWriter(path), planner=planner)
        assert_same(load(a_state(seed), path)[0], a_state(seed))


def test_a_pickle_of_other_classes_is_refused_unless_trusted(tmp_path: Path) -> None:
    save({"n": 1}, tmp_path)
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    metadata.planner_data = Touch(tmp_path / "touched")
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UsageError, match=r"trust=True"):
        StorageReader(tmp_path).read_metadata()
    assert not (tmp_path / "touched").exists()
    StorageReader(tmp_path, trust=True).read_metadata()
    assert (tmp_path / "touched").exists()


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_places_are_told_from_what_is_none() -> None:
    assert StorageWriter.validate_checkpoint_id("/a/b")
    assert StorageWriter.validate_checkpoint_id(Path("/a/b"))
    assert StorageReader.validate_checkpoint_id("s3://bucket/run")
    assert not StorageReader.validate_checkpoint_id("gs://bucket/run")
    assert not StorageReader.validate_checkpoint_id(Path("s3://bucket/run"))
    with pytest.raises(UsageError, match="as text"):
        StorageWriter(Path("s3://bucket/run"))
    with pytest.raises(UsageError, match="gs://"):
        StorageWriter("gs://bucket/run")


def test_writer_and_reader_survive_pickling(tmp_path: Path) -> None:
    writer = pickle.loads(pickle.dumps(StorageWriter(tmp_path, max_bandwidth="1GB/s")))
    quietly(dcp.save, {"n": torch.arange(5)}, storage_writer=writer)
    into = {"n": torch.zeros(5, dtype=torch.int64)}
    quietly(dcp.load, into, storage_reader=pickle.loads(pickle.dumps(StorageReader(tmp_path))))
    assert into["n"].tolist() == [0, 1, 2, 3, 4]


def flips(nbytes: int) -> list[int]:
    """Some offsets in a file: both ends, and others all over it."""
    return sorted({*range(0, min(nbytes, 400), 23), *range(0, nbytes, max(1, nbytes // 60)), nbytes - 1, nbytes - 9})


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "__0_0.distcp.sums"])
def test_a_flipped_byte_is_found_wherever_it_is(tmp_path: Path, name: str) -> None:
    state = {"w": torch.arange(400_000), "v": torch.arange(30), "t": torch.randn(50, 60).t(), "n": [1, 2]}
    save(state, tmp_path / "good")
    content = (tmp_path / "good" / name).read_bytes()
    bad = tmp_path / "bad"
    shutil.copytree(tmp_path / "good", bad)
    for at in flips(len(content)):
        (bad / name).write_bytes(content[:at] + bytes([content[at] ^ 0x20]) + content[at + 1 :])
        if name.endswith(".sums"):  # the data are whole: loaded, verified by the archives' own sums
            with pytest.warns(UserWarning, match="verified by the items' own CRC-32s, but .*damaged"):
                assert_same(load(state, bad)[0], state)
            continue
        with pytest.raises(BaseException) as caught:  # torch's own wrapper is no Exception
            load(state, bad)
        text = str(caught.value) + str(getattr(caught.value, "failures", ""))
        assert "differs" in text or "does not match" in text or "damaged" in text, (at, text)


def test_damage_names_file_tensor_and_offset(tmp_path: Path) -> None:
    state = {"model": {"w": torch.arange(400_000)}}
    save(state, tmp_path)
    with open(tmp_path / "__0_0.distcp", "r+b") as file:
        file.seek(2_500_000)
        file.write(b"\xff\xff")
    with pytest.raises(BaseException, match="differs") as caught:
        load(state, tmp_path)
    text = str(caught.value)
    assert "__0_0.distcp: bytes 2097152 to 3145728 (of model.w)" in text
    loaded, reader = load(state, tmp_path, verify=False)
    assert (loaded["model"]["w"] != state["model"]["w"]).sum() in (1, 2)
    assert reader.verified_bytes == 0


def test_a_damaged_stock_file_is_found(tmp_path: Path) -> None:
    state = {"w": torch.arange(400_000), "n": 1}
    quietly(dcp.save, state, storage_writer=dcp.FileSystemWriter(tmp_path))
    content = bytearray((tmp_path / "__0_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "__0_0.distcp").write_bytes(content)
    with pytest.raises(BaseException, match=r"w .* is not what was written"):
        load(state, tmp_path)


def test_missing_sums_leave_the_archives_own(tmp_path: Path) -> None:
    state = a_state()
    save(state, tmp_path)
    (tmp_path / "__0_0.distcp.sums").unlink()
    with pytest.warns(UserWarning, match="verified by the items' own CRC-32s, but .*missing"):
        loaded, reader = load(state, tmp_path)
    assert_same(loaded, state)
    assert reader.unverified_bytes == 0


def test_a_short_data_file_is_an_error(tmp_path: Path) -> None:
    state = {"w": torch.arange(400_000)}
    save(state, tmp_path)
    os.truncate(tmp_path / "__0_0.distcp", 2_000_000)
    with pytest.raises(BaseException, match="it has 2000000 bytes, and was written with"):
        load(state, tmp_path)


def test_corruption_is_an_exception() -> None:
    assert issubclass(CorruptionError, Exception)
