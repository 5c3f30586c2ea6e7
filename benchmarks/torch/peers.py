"""How others save and load a state in files: torch, safetensors and its streamers, DCP."""

from __future__ import annotations

import importlib
import tempfile
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from benchmarks.child import measure
from benchmarks.harness import Sample
from benchmarks.torch.job import TorchJob, fsync, make_room, make_state, require_state

if TYPE_CHECKING:
    import torch

    State = Mapping[str, torch.Tensor]

JOB = TorchJob


# ---- one file ----


def torch_save(state: State, path: str) -> None:
    """As everybody calls it."""
    import torch

    torch.save(state, path)


def safetensors_save(state: State, path: str) -> None:
    """Of the safetensors package."""
    from safetensors.torch import save_file

    save_file(dict(state), path)


def torch_save_without_crc(state: State, path: str) -> None:
    """Its records have no checksum within."""
    import torch
    from torch.utils.serialization import config

    config.save.compute_crc32 = False
    torch.save(state, path)


SAVERS: dict[str, Callable[[State, str], None]] = {
    "torch": torch_save,
    "torch without CRC": torch_save_without_crc,
    "safetensors": safetensors_save,
}


def save(job: TorchJob) -> Sample:
    """Save one file as `how` says, then fsync."""
    state = make_state(job)
    warm(job.how, loads=False)

    def work() -> None:
        SAVERS[job.how](state, job.path)
        fsync(job.path)

    return measure(job, work)[0]


def torch_load(path: str) -> State:
    """Into new memory, its defaults."""
    import torch

    loaded: State = torch.load(path)
    return loaded


def torch_map(path: str) -> State:
    """Mapped: nothing is read yet."""
    import torch

    loaded: State = torch.load(path, mmap=True)
    return loaded


def safetensors_map(path: str) -> State:
    """Mapped, the default."""
    from safetensors.torch import load_file

    return load_file(path)


def safetensors_pread(path: str) -> State:
    """Read into new memory."""
    from safetensors.torch import load_file

    return load_file(path, backend="pread")


def runai(path: str) -> State:
    """Run:ai model streamer, its defaults: 16 threads. The tensors are the caller's own."""
    package: Any = importlib.import_module("runai_model_streamer")  # not typed
    with package.SafetensorsStreamer() as streamer:
        streamer.stream_file(path)
        return dict(streamer.get_tensors())


def fastsafetensors(path: str) -> State:
    """fastsafetensors without GPUDirect: 16 threads. The tensors hold their memory."""
    package: Any = importlib.import_module("fastsafetensors")  # not typed
    with package.fastsafe_open(path, device="cpu", nogds=True) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping


# And whether the memory is the caller's own at once; what is mapped is read when it is copied.
LOADERS: dict[str, tuple[Callable[[str], State], bool]] = {
    "torch": (torch_load, True),
    "torch, mmap": (torch_map, False),
    "safetensors, mmap": (safetensors_map, False),
    "safetensors, pread": (safetensors_pread, True),
    "Run:ai": (runai, True),
    "fastsafetensors": (fastsafetensors, True),
}


SAFETENSORS = ("safetensors", "safetensors, mmap", "safetensors, pread", "Run:ai", "fastsafetensors")


def load(job: TorchJob) -> Sample:
    """Load one file until all bytes are in memory of one's own; what was loaded is held to the end."""
    loader, is_own = LOADERS[job.how]
    warm(job.how)

    def work() -> State:
        state = loader(job.path)
        return state if is_own else {name: tensor.clone() for name, tensor in state.items()}

    sample, state = measure(job, work)
    require_state(job, state)
    return sample


def into(job: TorchJob) -> Sample:
    """Load one file and copy it into a state that is there, which the peers have no better way to fill."""
    loader, _ = LOADERS[job.how]
    warm(job.how)
    state = make_room(job)

    def work() -> State:
        loaded = loader(job.path)
        for name, tensor in state.items():
            tensor.copy_(loaded[name])
        return loaded

    sample, _ = measure(job, work)
    require_state(job, state)
    return sample


def warm(how: str, loads: bool = True) -> None:
    """A small state there and back: what is imported and made at the first call is there before the clock starts."""
    import torch

    saver = safetensors_save if how in SAFETENSORS else SAVERS[how if how in SAVERS else "torch"]
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/small"
        saver({"small": torch.zeros(1000)}, path)
        if loads:
            loader, _ = LOADERS[how]
            loader(path)["small"].clone()


# ---- DCP ----


def dcp_save(job: TorchJob) -> Sample:
    """One rank with a FileSystemWriter of `threads` threads that syncs its files."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    state = make_state(job)
    warm_dcp(FileSystemWriter, None)
    writer = FileSystemWriter(job.path, sync_files=True, thread_count=job.threads)
    return measure(job, lambda: dcp_save_with(writer, state))[0]


def dcp_load(job: TorchJob) -> Sample:
    """One rank into tensors that are there and touched, as DCP asks."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter

    state = make_room(job)
    warm_dcp(FileSystemWriter, FileSystemReader)
    sample, _ = measure(job, lambda: dcp_load_with(FileSystemReader(job.path), state))
    require_state(job, state)
    return sample


def warm_dcp(writer: Any, reader: Any) -> None:
    """As `warm`, with classes of DCP; `reader` None: a save only."""
    import torch

    state = {"small": torch.zeros(1000)}
    with tempfile.TemporaryDirectory() as directory:
        dcp_save_with(writer(directory), state)
        if reader:
            dcp_load_with(reader(directory), state)


def dcp_save_with(writer: Any, state: State) -> None:
    """torch.distributed.checkpoint.save by one rank."""
    from torch.distributed.checkpoint.state_dict_saver import save

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that there is one rank only
        save(dict(state), storage_writer=writer)


def dcp_load_with(reader: Any, state: State) -> None:
    """torch.distributed.checkpoint.load by one rank."""
    from torch.distributed.checkpoint.state_dict_loader import load

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load(dict(state), storage_reader=reader)
