"""One of several processes of a gloo group, started by test_dcp_worlds.py: saves and loads in worlds of 1 to 4.

python dcp_worlds.py RANK DIRECTORY
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from mlstor import default_engine
from mlstor.torch import StorageReader, StorageWriter

WORLD = 4
SHAPE = (301, 1999)


def whole(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "rows": torch.randn(SHAPE, generator=generator),
        "columns": torch.randn(SHAPE, generator=generator).bfloat16(),
        "few": torch.randn(3, 5, generator=generator),
        "copies": torch.randn(700, 800, generator=generator),
        "plain": torch.randn(400, 300, generator=generator),
        "cube": torch.randn(12, 34, 56, generator=generator),
    }


PLACES = {"rows": Shard(0), "columns": Shard(1), "few": Shard(0), "copies": Replicate(), "cube": Shard(1)}


def state_of(tensors: dict[str, torch.Tensor], mesh: DeviceMesh, step: int) -> dict[str, Any]:
    distributed = {name: distribute_tensor(tensors[name], mesh, [place]) for name, place in PLACES.items()}
    return {"model": distributed, "plain": tensors["plain"].clone(), "step": step}


def check(state: dict[str, Any], tensors: dict[str, torch.Tensor], mesh: DeviceMesh, step: int, case: str) -> None:
    for name in PLACES:
        found: DTensor = state["model"][name]
        wanted = distribute_tensor(tensors[name], mesh, [PLACES[name]])
        assert torch.equal(found.to_local(), wanted.to_local()), (case, name)
    assert torch.equal(state["plain"], tensors["plain"]), case
    assert state["step"] == step, case


def blank(mesh: DeviceMesh) -> dict[str, Any]:
    return state_of({name: torch.zeros_like(tensor) for name, tensor in whole(0).items()}, mesh, 0)


def read_bytes() -> int:
    return default_engine().counters().read_bytes


def reshard(rank: int, root: Path, meshes: dict[int, DeviceMesh]) -> None:
    """Saved by each world and loaded by each; with stock torch on either side, 1 as 4, 2 as 3, 3 as 2, 4 as 1."""
    for saved in range(1, WORLD + 1):
        tensors = whole(saved)
        for kind, writer in (("ours", StorageWriter), ("stock", dcp.FileSystemWriter)):
            path = root / f"{kind}{saved}"
            if rank < saved:
                group = meshes[saved].get_group()
                dcp.save(state_of(tensors, meshes[saved], saved), storage_writer=writer(path), process_group=group)
        dist.barrier()
        for loaded in range(WORLD, 0, -1):
            if rank >= loaded:
                continue
            mesh = meshes[loaded]
            readers: list[tuple[str, Any]] = [("ours", StorageReader(root / f"ours{saved}"))]
            if saved + loaded == WORLD + 1:
                readers.append(("stock", StorageReader(root / f"stock{saved}")))
                readers.append(("ours", dcp.FileSystemReader(root / f"ours{saved}")))
            for kind, reader in readers:
                state = blank(mesh)
                with warnings.catch_warnings():
                    # parts of stock items can't be verified; parts of ours can
                    warnings.simplefilter("ignore" if kind == "stock" else "error")
                    dcp.load(state, storage_reader=reader, process_group=mesh.get_group())
                check(state, tensors, mesh, saved, f"{kind} {saved} -> {loaded} by {type(reader)}")
                if kind == "ours" and isinstance(reader, StorageReader):
                    assert reader.unverified_bytes == 0
        dist.barrier()


def once_per_host(rank: int, root: Path) -> None:
    """What all ranks want is read once, and handed over; types are converted where they must be."""
    tensor = torch.randn(3_000_000, generator=torch.Generator().manual_seed(5))
    dcp.save({"a": tensor, "b": tensor[:1_000_000] * 2}, storage_writer=StorageWriter(root / "replicated"))
    nbytes = sum(entry.stat().st_size for entry in (root / "replicated").glob("*.distcp"))
    for share in (True, False):
        before = read_bytes()
        state = {"a": torch.zeros(3_000_000), "b": torch.zeros(1_000_000, dtype=torch.float64 if rank == 3 else None)}
        dcp.load(state, storage_reader=StorageReader(root / "replicated", share_reads=share))
        assert torch.equal(state["a"], tensor)
        assert torch.equal(state["b"].float(), tensor[:1_000_000] * 2)
        total = torch.tensor(read_bytes() - before)
        dist.all_reduce(total)
        if share:
            assert total < 1.6 * nbytes, (total, nbytes)
        else:
            assert total > 3.9 * nbytes, (total, nbytes)
    # One rank converts what it would give: the others read for themselves
    dtype = torch.float64 if rank < 2 else torch.float32
    state = {"a": torch.zeros(3_000_000, dtype=dtype), "b": torch.zeros(1_000_000, dtype=dtype)}
    dcp.load(state, storage_reader=StorageReader(root / "replicated"))
    assert torch.equal(state["a"].float(), tensor)
    assert not list(Path("/dev/shm").glob("mlstor-*")), "left in shared memory"


def own_metadata(rank: int, root: Path) -> None:
    """Without collectives each rank has its own state, of the same names and shapes."""
    dcp.save(
        {"w": torch.full((300_000,), float(rank))}, storage_writer=StorageWriter(root / "own"), use_collectives=False
    )
    state = {"w": torch.zeros(300_000)}
    dcp.load(state, storage_reader=StorageReader(root / "own"))
    assert (state["w"] == rank).all(), state["w"].unique()


def damage(rank: int, root: Path) -> None:
    """One rank that finds damage fails the load on all, and nobody waits for it."""
    if rank == 0:
        name = next(iter((root / "replicated").glob("__*.distcp")))
        with open(name, "r+b") as file:
            file.seek(3_000_000)
            file.write(b"damage")
    dist.barrier()
    state = {"a": torch.zeros(3_000_000), "b": torch.zeros(1_000_000)}
    with pytest.raises(dcp.api.CheckpointException, match="not what was written"):
        dcp.load(state, storage_reader=StorageReader(root / "replicated"))


def asynchronous(rank: int, root: Path, mesh: DeviceMesh) -> None:
    """Threads and processes upload what was staged; what training does meanwhile is not seen."""
    writer = StorageWriter(root / "async")
    for number, kind in enumerate(
        (dcp.state_dict_saver.AsyncCheckpointerType.THREAD, dcp.state_dict_saver.AsyncCheckpointerType.PROCESS) * 2
    ):
        tensors = whole(40 + number)
        state = state_of(whole(40 + number), mesh, number)  # replicas may share memory with their source
        future = dcp.async_save(
            state, checkpoint_id=root / f"async{number}", storage_writer=writer, async_checkpointer_type=kind
        )
        for tensor in (*state["model"].values(), state["plain"]):
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).fill_(-1)
        future.result()
        into = blank(mesh)
        dcp.load(into, storage_reader=StorageReader(root / f"async{number}"))
        check(into, tensors, mesh, number, f"async {number}")
    assert writer.stall_s > 0
    writer.close()


def main() -> None:
    rank, root = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{root}/group", rank=rank, world_size=WORLD)
    meshes = {size: DeviceMesh("cpu", list(range(size))) for size in range(1, WORLD + 1)}
    # In one go: to start the processes takes longer than all they do
    reshard(rank, root, meshes)
    once_per_host(rank, root)
    own_metadata(rank, root)
    damage(rank, root)
    asynchronous(rank, root, meshes[WORLD])
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
