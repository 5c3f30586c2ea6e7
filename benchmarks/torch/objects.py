"""Checkpoints in an S3 bucket: mlstor and s3torchconnector, as one file and through DCP."""

from __future__ import annotations

from typing import Any

from benchmarks.child import measure
from benchmarks.harness import Sample
from benchmarks.torch.job import REGION, TorchJob, make_room, make_state, require_state, use_endpoint
from benchmarks.torch.ours import warm
from benchmarks.torch.peers import dcp_load_with, dcp_save_with, warm as warm_torch, warm_dcp

JOB = TorchJob
THREADS = 8  # s3torchconnector has one upload per file and thread


def connector_config() -> Any:
    """As its documentation sets it for a fast network; the test server checks no signatures."""
    from s3torchconnector import S3ClientConfig

    return S3ClientConfig(throughput_target_gbps=100.0, unsigned=True, force_path_style=True)


def checkpoint(job: TorchJob) -> Any:
    """s3torchconnector's file-like objects."""
    from s3torchconnector import S3Checkpoint

    return S3Checkpoint(REGION, endpoint=job.endpoint, s3client_config=connector_config())


def connector_save(job: TorchJob) -> Sample:
    """torch.save to S3Checkpoint's writer."""
    import torch

    state, store = make_state(job), checkpoint(job)
    warm_torch("torch", loads=False)

    def work() -> None:
        with store.writer(job.path) as writer:
            torch.save(state, writer)

    return measure(job, work)[0]


def connector_load(job: TorchJob) -> Sample:
    """torch.load from S3Checkpoint's reader."""
    import torch

    store = checkpoint(job)
    warm_torch("torch")

    def work() -> Any:
        with store.reader(job.path) as reader:
            return torch.load(reader)

    sample, state = measure(job, work)
    require_state(job, state)
    return sample


def connector_dcp_save(job: TorchJob) -> Sample:
    """DCP through S3StorageWriter."""
    use_endpoint(job)
    from s3torchconnector.dcp import S3StorageWriter
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    state = make_state(job)
    warm_dcp(FileSystemWriter, None)
    writer = S3StorageWriter(REGION, job.path, s3client_config=connector_config(), thread_count=THREADS)
    return measure(job, lambda: dcp_save_with(writer, state))[0]


def connector_dcp_load(job: TorchJob) -> Sample:
    """DCP through S3StorageReader, its DCP-optimised reader."""
    use_endpoint(job)
    from s3torchconnector.dcp import S3StorageReader
    from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter

    state = make_room(job)
    warm_dcp(FileSystemWriter, FileSystemReader)
    reader = S3StorageReader(REGION, job.path, s3client_config=connector_config())
    sample, _ = measure(job, lambda: dcp_load_with(reader, state))
    require_state(job, state)
    return sample


def options_of(job: TorchJob) -> dict[str, Any]:
    """mlstor's options for the test server."""
    return {"endpoint": job.endpoint, "anonymous": True}


def save(job: TorchJob) -> Sample:
    """mlstor.torch.save to a URL."""
    from mlstor.torch import save as save_state

    state = make_state(job)
    warm()
    return measure(job, lambda: save_state(state, job.path, options=options_of(job)))[0]


def load(job: TorchJob) -> Sample:
    """mlstor.torch.load from a URL, verified."""
    from mlstor.torch import load as load_state

    warm()
    sample, state = measure(job, lambda: load_state(job.path, options=options_of(job)))
    require_state(job, state)
    return sample


def dcp_save(job: TorchJob) -> Sample:
    """DCP through mlstor's StorageWriter."""
    from mlstor.torch import StorageWriter

    state = make_state(job)
    warm_dcp(StorageWriter, None)
    return measure(job, lambda: dcp_save_with(StorageWriter(job.path, options=options_of(job)), state))[0]


def dcp_load(job: TorchJob) -> Sample:
    """DCP through mlstor's StorageReader, verified."""
    from mlstor.torch import StorageReader, StorageWriter

    state = make_room(job)
    warm_dcp(StorageWriter, StorageReader)
    sample, _ = measure(job, lambda: dcp_load_with(StorageReader(job.path, options=options_of(job)), state))
    require_state(job, state)
    return sample
