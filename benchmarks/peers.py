"""What others write and read checkpoints with, to the durable end: torch, safetensors, DCP, loops."""

from __future__ import annotations

import mmap
import os
import random
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.child import Job, measure
from benchmarks.harness import Sample

if TYPE_CHECKING:
    import torch

MIB = 1 << 20
TENSOR_BYTES = 32 * MIB  # of the size of a 7-8B model's square projections


def write_loop(job: Job) -> Sample:
    """write() of 1 MiB from one buffer, then fsync."""
    block = random.randbytes(MIB)

    def work() -> None:
        handle = os.open(job.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        for _ in range(job.nbytes // MIB):
            if os.write(handle, block) != MIB:
                raise OSError(f"short write to {job.path}")
        os.fsync(handle)
        os.close(handle)

    return measure(job, work)[0]


def read_loop(job: Job) -> Sample:
    """readv() of 1 MiB at a time into new memory that takes the whole file."""

    def work() -> mmap.mmap:
        handle = os.open(job.path, os.O_RDONLY)
        memory = mmap.mmap(-1, job.nbytes)
        view = memoryview(memory)
        position = 0
        while position < job.nbytes:
            got = os.readv(handle, [view[position : position + MIB]])
            if got == 0:
                raise OSError(f"{job.path} ends at byte {position}")
            position += got
        os.close(handle)
        view.release()
        return memory

    return measure(job, work)[0]


def torch_save(job: Job) -> Sample:
    """torch.save to a path (its own C++ writer), then fsync."""
    import torch

    state = make_state(job.nbytes)

    def work() -> None:
        torch.save(state, job.path)
        fsync(job.path)

    return measure(job, work)[0]


def torch_load(job: Job) -> Sample:
    """torch.load into new memory, its defaults."""
    import torch

    sample, state = measure(job, lambda: torch.load(job.path))
    require_state(state, job.nbytes)
    return sample


def safetensors_save(job: Job) -> Sample:
    """safetensors.torch.save_file, then fsync."""
    from safetensors.torch import save_file

    state = make_state(job.nbytes)

    def work() -> None:
        save_file(state, job.path)
        fsync(job.path)

    return measure(job, work)[0]


def safetensors_load(job: Job) -> Sample:
    """safetensors.torch.load_file, then one element per page: a mapped file is read when touched."""
    from safetensors.torch import load_file

    def work() -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = load_file(job.path)
        for tensor in state.values():
            flat = tensor.view(-1)
            flat[:: mmap.PAGESIZE // tensor.element_size()].sum().item()
            flat[-1].item()
        return state

    sample, state = measure(job, work)
    require_state(state, job.nbytes)
    return sample


def dcp_save(job: Job) -> Sample:
    """torch.distributed.checkpoint.save by one rank with a FileSystemWriter that syncs its files."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    state = make_state(job.nbytes)
    writer = FileSystemWriter(job.path, sync_files=True, thread_count=job.threads)

    def work() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that there is one rank only
            save(state, storage_writer=writer)

    return measure(job, work)[0]


def dcp_load(job: Job) -> Sample:
    """torch.distributed.checkpoint.load by one rank into tensors that are there and touched, as DCP asks."""
    import torch
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    state = {name: torch.ones_like(tensor) for name, tensor in make_state(job.nbytes).items()}

    def work() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load(state, storage_reader=FileSystemReader(job.path))

    sample = measure(job, work)[0]
    require_state(state, job.nbytes)
    return sample


def make_state(nbytes: int) -> dict[str, torch.Tensor]:
    """A state of float32 tensors of 32 MiB, `nbytes` in all: random, all finite, no two alike."""
    import torch

    generator = torch.Generator().manual_seed(1)
    block = torch.rand(TENSOR_BYTES // 4, generator=generator)
    return {f"layers.{i}.weight": block + i for i in range(nbytes // TENSOR_BYTES)}


def require_state(state: dict[str, torch.Tensor], nbytes: int) -> None:
    """Look whether what was loaded is what `make_state` made: who skips the bytes is no contender."""
    import torch

    for name, tensor in make_state(nbytes).items():
        if not torch.equal(state[name], tensor):
            raise ValueError(f"{name} was not loaded as it was saved")


def fsync(path: str) -> None:
    """Make a file that another wrote durable."""
    handle = os.open(Path(path), os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
