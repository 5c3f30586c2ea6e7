"""What a contender of the PyTorch benchmark is to do, and the states that they save and load."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.child import Job

if TYPE_CHECKING:
    import torch

MIB = 1 << 20
TENSOR_BYTES = 32 * MIB  # a square projection of a 7-8B model in bf16
REGION = "us-east-1"


@dataclass(frozen=True)
class TorchJob(Job):
    """A `Job` on a state dict, or on a data set.

    Attributes
    ----------
    how : str
        Which of the ways that the function knows.
    count : int
        Number of tensors, or of objects; 0: as many tensors of 32 MiB as `nbytes` has.
    endpoint : str
        Of an object store; empty for files.
    """

    how: str = ""
    count: int = 0
    endpoint: str = ""

    @property
    def each_bytes(self) -> int:
        """Bytes of a tensor."""
        return self.nbytes // self.count if self.count else TENSOR_BYTES


def block_of(job: TorchJob) -> torch.Tensor:
    """Random 16-bit numbers, of the size of a tensor."""
    import torch

    generator = torch.Generator().manual_seed(1)
    return torch.randint(-(1 << 15), 1 << 15, (job.each_bytes // 2,), dtype=torch.int16, generator=generator)


def make_state(job: TorchJob) -> dict[str, torch.Tensor]:
    """Tensors of bf16, random, no two alike. Some are no numbers: they are compared bit by bit."""
    import torch

    block = block_of(job)
    count = job.count or job.nbytes // TENSOR_BYTES
    return {f"layers.{i}.weight": (block ^ i).view(torch.bfloat16) for i in range(count)}


def make_room(job: TorchJob) -> dict[str, torch.Tensor]:
    """The same state before it is loaded: allocated and touched, with other contents."""
    import torch

    count = job.count or job.nbytes // TENSOR_BYTES
    return {f"layers.{i}.weight": torch.ones(job.each_bytes // 2, dtype=torch.bfloat16) for i in range(count)}


def require_state(job: TorchJob, state: Mapping[str, torch.Tensor]) -> None:
    """Look whether what was loaded is what `make_state` made: who skips the bytes is no contender."""
    import torch

    block = block_of(job)
    count = job.count or job.nbytes // TENSOR_BYTES
    if len(state) != count:
        raise ValueError(f"{len(state)} tensors were loaded where {count} were saved")
    for i in range(count):
        if not torch.equal(state[f"layers.{i}.weight"].view(torch.int16), block ^ i):
            raise ValueError(f"layers.{i}.weight was not loaded as it was saved")


def fsync(path: str) -> None:
    """Make a file that another wrote durable."""
    handle = os.open(Path(path), os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def use_endpoint(job: TorchJob) -> None:
    """The test server for clients that take their endpoint from the environment; it checks no signatures."""
    os.environ.update(
        AWS_ENDPOINT_URL=job.endpoint,
        AWS_ACCESS_KEY_ID="any",
        AWS_SECRET_ACCESS_KEY="any",
        AWS_EC2_METADATA_DISABLED="true",
        AWS_REGION=REGION,
    )
