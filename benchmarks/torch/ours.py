"""How mlstor saves and loads a state in files. Every load compares all sums, unless it says otherwise."""

from __future__ import annotations

import tempfile

from benchmarks.child import measure
from benchmarks.harness import Sample
from benchmarks.torch.job import TorchJob, make_room, make_state, require_state
from benchmarks.torch.peers import dcp_load_with, dcp_save_with, warm_dcp

JOB = TorchJob


def warm() -> None:
    """A small state there and back: what is imported and made at the first call is there before the clock starts, the
    engine with it.
    """
    import torch

    from mlstor.torch import load as load_state, save as save_state

    with tempfile.TemporaryDirectory() as directory:
        save_state({"small": torch.zeros(1000)}, f"{directory}/small")
        load_state(f"{directory}/small")


def warm_safetensors() -> None:
    """As `warm`, in the format of safetensors."""
    import torch

    from mlstor.torch import load_safetensors as load_state, save_safetensors as save_state

    with tempfile.TemporaryDirectory() as directory:
        save_state({"small": torch.zeros(1000)}, f"{directory}/small")
        load_state(f"{directory}/small")


def save(job: TorchJob) -> Sample:
    """mlstor.torch.save: preallocated, synced, renamed, the directory synced."""
    from mlstor.torch import save as save_state

    state = make_state(job)
    warm()
    return measure(job, lambda: save_state(state, job.path))[0]


def save_safetensors(job: TorchJob) -> Sample:
    """The same in the format of safetensors."""
    from mlstor.torch import save_safetensors as save_state

    state = make_state(job)
    warm_safetensors()
    return measure(job, lambda: save_state(state, job.path))[0]


def load(job: TorchJob) -> Sample:
    """mlstor.torch.load into new memory; `how` "unverified": without a look at the sums."""
    from mlstor.torch import load as load_state

    warm()
    sample, state = measure(job, lambda: load_state(job.path, verify=job.how != "unverified"))
    require_state(job, state)
    return sample


def load_into(job: TorchJob) -> Sample:
    """mlstor.torch.load into the tensors of a state that is there."""
    from mlstor.torch import load as load_state

    state = make_room(job)
    warm()
    sample, _ = measure(job, lambda: load_state(job.path, into=state))
    require_state(job, state)
    return sample


def load_safetensors(job: TorchJob) -> Sample:
    """A safetensors file into new memory; `how` "into": into a state that is there."""
    from mlstor.torch import load_safetensors as load_state

    room = make_room(job) if job.how == "into" else None
    warm_safetensors()
    sample, state = measure(job, lambda: load_state(job.path, into=room))
    require_state(job, state)
    return sample


def dcp_save(job: TorchJob) -> Sample:
    """torch.distributed.checkpoint.save through mlstor's StorageWriter."""
    from mlstor.torch import StorageWriter

    state = make_state(job)
    warm_dcp(StorageWriter, None)
    return measure(job, lambda: dcp_save_with(StorageWriter(job.path), state))[0]


def dcp_load(job: TorchJob) -> Sample:
    """torch.distributed.checkpoint.load through mlstor's StorageReader."""
    from mlstor.torch import StorageReader, StorageWriter

    state = make_room(job)
    warm_dcp(StorageWriter, StorageReader)
    sample, _ = measure(job, lambda: dcp_load_with(StorageReader(job.path), state))
    require_state(job, state)
    return sample
