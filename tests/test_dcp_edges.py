"""DCP with plans, files and tensors that are not as usual; each compared with stock torch where it can be."""

from __future__ import annotations

import errno
import io
import os
import pickle
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch.distributed.checkpoint as dcp  # noqa: E402
from dcp_support import a_state, assert_same, blank, load, quietly, save  # noqa: E402
from torch.distributed.checkpoint._extension import ExtensionRegistry, StreamTransformExtension  # noqa: E402

from mlstor.blob.directory import FileDirectory  # noqa: E402
from mlstor.blob.types import BlobInfo, read_all  # noqa: E402
from mlstor.errors import CorruptionError, UsageError  # noqa: E402
from mlstor.torch import (  # noqa: E402
    StorageReader,
    StorageWriter,
    UnverifiedWarning,
    dcp_handover,
    dcp_load,
    dcp_reader,
    dcp_writer,
)
from mlstor.torch.dcp_metadata import read_metadata  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def save_as(rank: int, state: dict[str, Any], path: Path, **options: Any) -> None:
    """What one rank of several does that save without collectives."""
    writer, planner = StorageWriter(path, **options), dcp.DefaultSavePlanner()
    planner.set_up_planner(state, writer.storage_meta(), True)
    writer.set_up_storage_writer(True, rank=rank, use_collectives=False)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    plans, metadata = planner.create_global_plan([plan])
    (plan,) = writer.prepare_global_plan(plans)
    writer.finish(metadata, [writer.write_data(planner.finish_plan(plan), planner).wait()])


def load_together(states: Sequence[dict[str, Any]], readers: Sequence[StorageReader], own: bool) -> None:
    """What ranks on one host do at the same time; with `own`, each has metadata of its own."""
    planners = [dcp.DefaultLoadPlanner() for _ in states]
    plans = []
    for rank, (state, reader, planner) in enumerate(zip(states, readers, planners, strict=True)):
        metadata = reader.read_metadata(rank=rank) if own else reader.read_metadata()
        planner.set_up_planner(state, metadata, rank == 0)
        reader.set_up_storage_reader(metadata, rank == 0, rank=rank, use_collectives=not own)
        plans.append(reader.prepare_local_plan(planner.create_local_plan()))
    plans = readers[0].prepare_global_plan(planners[0].create_global_plan(plans))
    errors: list[BaseException] = []

    def read(rank: int) -> None:
        try:
            readers[rank].read_data(plans[rank], planners[rank])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(rank,)) for rank in range(len(states))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a rank hangs"
    if errors:
        raise errors[0]


def test_what_each_rank_saved_of_its_own_is_not_handed_to_others(tmp_path: Path) -> None:
    for rank in range(3):
        save_as(rank, {"w": torch.full((200_000,), float(rank)), f"only{rank}": torch.ones(rank + 1)}, tmp_path)
    states = [{"w": torch.zeros(200_000), f"only{rank}": torch.zeros(rank + 1)} for rank in range(3)]
    load_together(states, [StorageReader(tmp_path) for _ in states], own=True)
    for rank, state in enumerate(states):
        assert (state["w"] == rank).all()
        assert (state[f"only{rank}"] == 1).all()


def test_ranks_that_load_two_checkpoints_share_nothing(tmp_path: Path) -> None:
    states = []
    for rank in range(2):
        save({"w": torch.full((200_000,), float(rank))}, tmp_path / str(rank))
        states.append({"w": torch.zeros(200_000)})
    load_together(states, [StorageReader(tmp_path / str(rank)) for rank in range(2)], own=False)
    assert [state["w"].unique().tolist() for state in states] == [[0.0], [1.0]]


def test_a_planner_that_fails_on_one_rank_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    monkeypatch.setattr(dcp_handover, "SHM", str(shared))
    save({"w": torch.ones(200_000)}, tmp_path)
    states = [{"w": torch.zeros(200_000)} for _ in range(3)]

    class Fails(StorageReader):
        def read_data(self, plan: Any, planner: Any) -> Any:
            planner.resolve_tensor = lambda request: 1 // 0
            return super().read_data(plan, planner)

    with pytest.raises(ZeroDivisionError):
        load_together(states, [StorageReader(tmp_path), Fails(tmp_path), StorageReader(tmp_path)], own=False)
    assert [float(state["w"].min()) for state in states] == [1.0, 0.0, 1.0]
    assert not list(shared.iterdir())


def test_without_collectives_an_old_checkpoint_with_them_is_not_left_for_loads_to_take(tmp_path: Path) -> None:
    old, new = {"w": torch.zeros(5)}, {"w": torch.ones(5)}
    save(old, tmp_path)
    with pytest.raises(UsageError, match="with collectives"):
        save_as(0, new, tmp_path)
    assert_same(load(old, tmp_path)[0], old)


def test_with_collectives_ranks_metadata_are_replaced_and_said(tmp_path: Path) -> None:
    for rank in range(2):
        save_as(rank, {"w": torch.zeros(5)}, tmp_path)
    with pytest.raises(BaseException, match="checkpoint already"):
        save({"w": torch.ones(5)}, tmp_path, overwrite=False)
    with pytest.warns(UserWarning, match="there is a checkpoint already"):
        save({"w": torch.ones(5)}, tmp_path)
    assert names(tmp_path) == [".metadata", "__0_1.distcp", "__0_1.distcp.sums"]


def test_a_rank_without_collectives_is_not_refused_for_what_another_saved_just_now(tmp_path: Path) -> None:
    for rank in range(2):
        save_as(rank, {"w": torch.full((5,), float(rank))}, tmp_path, overwrite=False)
    with pytest.raises(UsageError, match="checkpoint already"):
        save_as(1, {"w": torch.ones(5)}, tmp_path, overwrite=False)


@pytest.mark.parametrize("kind", [StorageReader, StorageWriter])
def test_options_that_are_no_mapping_are_refused(kind: Any, tmp_path: Path) -> None:
    wrong: Any = 5
    with pytest.raises(UsageError, match="takes names and values"):
        kind(tmp_path, options=wrong)


def test_leftovers_of_killed_writers_of_metadata_are_removed(tmp_path: Path) -> None:
    for name in ("..metadata.0123abcd.mlstor-tmp", ".__0_0.distcp.0123abcd.mlstor-tmp", "mine.txt", "__0_0.txt"):
        (tmp_path / name).write_bytes(b"x")
    save({"n": 1}, tmp_path)
    assert names(tmp_path) == [".metadata", "__0_0.distcp", "__0_0.distcp.sums", "__0_0.txt", "mine.txt"]


def test_a_save_is_good_where_the_directory_can_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: FileDirectory) -> list[str]:
        raise OSError(errno.EACCES, "no listing here", self.name)

    monkeypatch.setattr(FileDirectory, "names", fails)
    with pytest.warns(UserWarning, match="could not be removed"):
        save({"w": torch.ones(5)}, tmp_path)
    assert_same(load({"w": torch.ones(5)}, tmp_path)[0], {"w": torch.ones(5)})


def test_memory_for_copies_is_bounded_whatever_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcp_writer, "COPIED_BYTES", 1 << 20)
    state = {f"small{number}": torch.randn(100_000) for number in range(8)}
    state |= {f"conj{number}": torch.randn(150_000, dtype=torch.complex64).conj() for number in range(3)}
    state |= {"large": torch.randn(600_000), "object": b"x" * 1_200_000}
    save(state, tmp_path)
    files = sorted(tmp_path.glob("*.distcp"))
    assert len(files) >= 6
    assert max(file.stat().st_size for file in files) < 4 << 20
    loaded, reader = load(state, tmp_path)
    assert_same(loaded, state)
    assert reader.unverified_bytes == 0
    into = blank(state)
    quietly(dcp.load, into, storage_reader=dcp.FileSystemReader(tmp_path))
    assert_same(into, state)


def test_all_files_together_get_the_memory_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcp_reader, "SCRATCH_BYTES", 4 << 20)
    state = {f"w{number}": torch.randn(700, 400) for number in range(16)}
    quietly(dcp.save, state, storage_writer=dcp.FileSystemWriter(tmp_path, thread_count=4))
    held: dict[str, int] = {}

    class Watched(dcp_load.FileLoad):
        def _flush(self, sums: Any) -> None:
            held[self._blob.name] = max(held.get(self._blob.name, 0), sum(want.nbytes for want in self._wants))
            super()._flush(sums)

    monkeypatch.setattr(dcp_reader, "FileLoad", Watched)
    into = {name: torch.zeros(700, 400, dtype=torch.float64) for name in state}
    quietly(dcp.load, into, storage_reader=StorageReader(tmp_path))
    assert_same({name: tensor.float() for name, tensor in into.items()}, state)
    assert len(held) == 4
    assert 0 < sum(held.values()) <= 4 * 700 * 400 * 4 + 100_000


class Flip(StreamTransformExtension):
    """Every bit the other way round."""

    def transform_to(self, output: Any) -> Any:
        class Writer(io.RawIOBase):
            def writable(self) -> bool:
                return True

            def write(self, content: Any) -> int:
                return output.write(bytes(byte ^ 255 for byte in bytes(content)))  # type: ignore[no-any-return]

        return Writer()

    def transform_from(self, input: Any) -> Any:
        return io.BytesIO(bytes(byte ^ 255 for byte in input.read(-1)))

    def get_descriptor(self) -> str:
        return "stream.flip/1"

    @staticmethod
    def from_descriptor(version: str) -> Flip:
        return Flip()

    @staticmethod
    def registry_name() -> str:
        return "stream.flip"


def test_extensions_of_torch_are_undone_for_tensors_and_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"w": torch.arange(300.0), "n": [1, 2], "text": "abc"}
    quietly(dcp.save, state, storage_writer=dcp.FileSystemWriter(tmp_path, _extensions=[Flip()]))
    monkeypatch.setattr(ExtensionRegistry, "from_descriptor_list", lambda self, descriptors: [Flip()])
    with pytest.warns(UnverifiedWarning):
        loaded, _ = load(state, tmp_path)
    assert_same(loaded, state)


class Raw(dcp.DefaultSavePlanner):
    """Objects that are streams already are not pickled, as some frameworks' planners do."""

    def transform_object(self, write_item: Any, object: Any) -> Any:
        return object if isinstance(object, io.BytesIO) else super().transform_object(write_item, object)


class RawLoad(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        self.found = {**getattr(self, "found", {}), read_item.dest_index.fqn: value.getvalue()}


def test_items_without_bytes_do_not_hide_their_neighbours(tmp_path: Path) -> None:
    state = {"a": io.BytesIO(), "b": io.BytesIO(b"content"), "c": io.BytesIO(), "w": torch.randn(5)}
    quietly(dcp.save, state, storage_writer=StorageWriter(tmp_path), planner=Raw())
    into, planner = {**state, "w": torch.zeros(5)}, RawLoad()
    quietly(dcp.load, into, storage_reader=StorageReader(tmp_path), planner=planner)
    assert planner.found == {"a": b"", "b": b"content", "c": b""}
    assert torch.equal(into["w"], state["w"])


def test_metadata_of_another_python_are_read(tmp_path: Path) -> None:
    save({"n": 1}, tmp_path)
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    metadata.storage_meta.checkpoint_id = Path("/a/b")
    pickled = pickle.dumps(metadata, protocol=2)
    assert b"cpathlib\nPosixPath\n" in pickled
    found, _ = read_metadata(pickled.replace(b"cpathlib\n", b"cpathlib._local\n"), "metadata")
    assert found.storage_meta is not None
    assert found.storage_meta.checkpoint_id == Path("/a/b")


class Moving:
    """A blob that another replaces while it is read."""

    name = "moving"

    def __init__(self, contents: list[bytes]) -> None:
        self.contents = contents

    def stat(self) -> BlobInfo:
        return BlobInfo(len(self.contents[0]), str(len(self.contents)))

    def read(self, offset: int, nbytes: int) -> bytes:
        if len(self.contents) > 1:
            self.contents.pop(0)
        if offset + nbytes > len(self.contents[0]):
            raise OSError(errno.ENODATA, "too short", self.name)
        return self.contents[0][offset : offset + nbytes]


def test_a_small_blob_is_of_one_moment() -> None:
    blob: Any = Moving([b"old one", b"new", b"newest one"])
    assert read_all(blob) == b"newest one"
    blob = Moving([bytes(n) for n in range(20)])
    with pytest.raises(OSError, match="replaced") as caught:
        read_all(blob)
    assert caught.value.errno == errno.ESTALE


def test_a_data_file_that_is_replaced_meanwhile_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save({"w": torch.ones(400_000)}, tmp_path / "a")
    save({"w": torch.zeros(400_000)}, tmp_path / "b")
    parse = dcp_load.parse

    def replace(content: bytes, name: str) -> Any:
        shutil.copy(tmp_path / "b" / "__0_0.distcp", tmp_path / "new")
        os.replace(tmp_path / "new", tmp_path / "a" / "__0_0.distcp")
        return parse(content, name)

    monkeypatch.setattr(dcp_load, "parse", replace)
    with pytest.raises(BaseException, match="changed while it was read"):
        load({"w": torch.ones(400_000)}, tmp_path / "a")


def test_tied_tensors_that_differ_in_the_file_are_no_damage_and_the_later_one_wins(tmp_path: Path) -> None:
    state = {"a": torch.randn(1_000_000), "b": torch.randn(1_000_000), "c": torch.randn(500_000)}
    save(state, tmp_path)
    found = []
    for reader in (StorageReader(tmp_path), dcp.FileSystemReader(tmp_path)):
        base = torch.zeros(1_000_000)
        into = {"a": base, "b": base.view(1000, 1000).view(-1), "c": base[250_000:750_000]}
        quietly(dcp.load, into, storage_reader=reader)
        found.append(base)
    assert torch.equal(*found)
    assert torch.equal(found[0][:250_000], state["b"][:250_000])


def test_tensors_of_inference_mode_are_loaded_from_several_files(tmp_path: Path) -> None:
    state = {f"w{number}": torch.randn(3, 50) for number in range(4)}
    quietly(dcp.save, state, storage_writer=dcp.FileSystemWriter(tmp_path, thread_count=3))
    with torch.inference_mode():
        into = {name: torch.zeros(3, 50, dtype=torch.float64) for name in state}
        quietly(dcp.load, into, storage_reader=StorageReader(tmp_path))
        assert_same({name: tensor.float() for name, tensor in into.items()}, state)


@contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


def test_the_default_device_of_the_job_does_not_matter(tmp_path: Path) -> None:
    state = a_state()
    with default_device("meta"):
        writer = save(state, tmp_path / "a")
        quietly(lambda: dcp.async_save(state, checkpoint_id=tmp_path / "b", storage_writer=writer).result())
    for path in (tmp_path / "a", tmp_path / "b"):
        into = blank(state)
        into["large"] = into["large"].double()
        with default_device("meta"):
            quietly(dcp.load, into, storage_reader=StorageReader(path))
        into["large"] = into["large"].bfloat16()
        assert_same(into, state)


def test_a_data_file_that_was_cut_short_is_damage(tmp_path: Path) -> None:
    state = {"w": torch.arange(600_000.0), "b": torch.ones(3)}
    save(state, tmp_path / "ours")
    quietly(dcp.save, state, storage_writer=dcp.FileSystemWriter(tmp_path / "stock"), no_dist=True)
    for kind, said in (("ours", "was written with"), ("stock", "goes to")):
        data = tmp_path / kind / "__0_0.distcp"
        os.truncate(data, data.stat().st_size // 2)
        with pytest.raises(BaseException, match=f"{data.name}: it .* {said}") as failed:
            load(blank(state), tmp_path / kind)
        [cause] = getattr(failed.value, "failures", {0: (failed.value,)}).values()
        assert isinstance(cause[0], CorruptionError)


def test_without_sums_what_the_items_own_sums_verify_is_not_called_unverified(tmp_path: Path) -> None:
    state = {"w": torch.arange(600_000.0)}
    save(state, tmp_path)
    (tmp_path / "__0_0.distcp.sums").unlink()
    with pytest.warns(UserWarning, match="is missing") as warned:
        dcp.load(blank(state), storage_reader=StorageReader(tmp_path), no_dist=True)
    said = [one.message for one in warned if "is missing" in str(one.message)]
    assert len(said) == 1
    assert not isinstance(said[0], UnverifiedWarning)
    assert "all that was wanted is verified" in str(said[0])
