"""How long an asynchronous save keeps the training: the second one, when all that is reused is there."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.child import measure
from benchmarks.harness import Sample, remove
from benchmarks.torch.job import TorchJob, make_state

JOB = TorchJob


def second(job: TorchJob, begin: Callable[[str], Callable[[], object]]) -> Sample:
    """Save twice; the clock runs while the second call has not returned. ``begin(path)`` saves and returns a function
    that waits for the durable end.
    """
    first = f"{job.path}-first"
    begin(first)()
    remove(Path(first))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DCP: that there is one rank only
        sample, wait = measure(job, lambda: begin(job.path))
        wait()
    return sample


def ours(job: TorchJob) -> Sample:
    """mlstor.torch.async_save: copied into an arena, then written from there."""
    from mlstor.torch import async_save

    state = make_state(job)
    return second(job, lambda path: async_save(state, path).result)


def dcp(job: TorchJob) -> Sample:
    """dcp.async_save by one rank, in a thread, which syncs its files. `how`: "default" stages into new memory, "stager"
    passes the same DefaultStager each time. (A FileSystemWriter that keeps its copy pins memory, which needs CUDA.)
    """
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
    from torch.distributed.checkpoint.state_dict_saver import async_save

    state = make_state(job)
    options: dict[str, Any] = {}
    if job.how == "stager":
        options["async_stager"] = DefaultStager(StagingOptions(False, False, False, False))

    def begin(path: str) -> Callable[[], object]:
        future: Any = async_save(dict(state), checkpoint_id=path, **options)
        wait: Callable[[], object] = future.result
        return wait

    return second(job, begin)
