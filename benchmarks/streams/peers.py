"""Other clients of S3, each as its documentation shows it, with as many operations at a time as mlstor has."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from benchmarks.child import measure
from benchmarks.harness import BenchmarkError, Sample
from benchmarks.streams.job import StreamJob, by_threads, counted

JOB = StreamJob
REGION = "us-east-1"
NOISE_BYTES = 1 << 20  # repeated in larger objects, as in mlstor's


def body(job: StreamJob) -> bytes:
    """What is written: incompressible, the same object again and again, there before the clock starts."""
    noise = random.Random(job.seed).randbytes(min(job.nbytes, NOISE_BYTES))
    return noise * (job.nbytes // len(noise))


def boto3_client(job: StreamJob) -> Any:
    """One client for all threads, without retries, unsigned."""
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config

    config = Config(
        signature_version=UNSIGNED,
        s3={"addressing_style": "path"},
        max_pool_connections=job.in_flight,
        retries={"max_attempts": 0},
    )
    return boto3.client("s3", endpoint_url=job.endpoint, region_name=REGION, config=config)


def boto3_get(job: StreamJob) -> Sample:
    """get_object and read, in threads."""
    client = boto3_client(job)
    return by_threads(job, lambda i: len(client.get_object(Bucket=job.bucket, Key=job.key(i))["Body"].read()))


def boto3_put(job: StreamJob) -> Sample:
    """put_object, in threads."""
    client, data = boto3_client(job), body(job)

    def one(number: int) -> int:
        client.put_object(Bucket=job.bucket, Key=job.key(number), Body=data)
        return len(data)

    return by_threads(job, one)


def connector(job: StreamJob) -> Any:
    """s3torchconnector's client, unsigned."""
    from s3torchconnector import S3ClientConfig
    from s3torchconnector._s3client import S3Client

    config = S3ClientConfig(unsigned=True, force_path_style=True)
    return S3Client(REGION, endpoint=job.endpoint, s3client_config=config)


def s3torchconnector_get(job: StreamJob) -> Sample:
    """get_object and read, in threads, as its map-style dataset does in DataLoader workers."""
    client = connector(job)
    return by_threads(job, lambda i: len(client.get_object(job.bucket, job.key(i)).read()))


def s3torchconnector_put(job: StreamJob) -> Sample:
    """put_object, write, close, in threads."""
    client, data = connector(job), body(job)

    def one(number: int) -> int:
        writer = client.put_object(job.bucket, job.key(number))
        writer.write(data)
        writer.close()
        return len(data)

    return by_threads(job, one)


def obstore_client(job: StreamJob) -> Any:
    """obstore's S3 store, unsigned."""
    from obstore.store import S3Store

    return S3Store(
        job.bucket,
        endpoint=job.endpoint,
        region=REGION,
        skip_signature=True,
        virtual_hosted_style_request=False,
        client_options={"allow_http": True, "timeout": "60s"},
    )


def obstore_threads_get(job: StreamJob) -> Sample:
    """get and bytes, in threads."""
    store = obstore_client(job)
    return by_threads(job, lambda i: len(store.get(job.key(i)).bytes()))


def obstore_threads_put(job: StreamJob) -> Sample:
    """put in one request, in threads."""
    store, data = obstore_client(job), body(job)

    def one(number: int) -> int:
        store.put(job.key(number), data, use_multipart=False)
        return len(data)

    return by_threads(job, one)


def obstore_asyncio_get(job: StreamJob) -> Sample:
    """get_async and bytes_async, in tasks of one event loop."""
    store = obstore_client(job)

    async def one(number: int) -> int:
        return len(await (await store.get_async(job.key(number))).bytes_async())

    return by_tasks(job, one)


def obstore_asyncio_put(job: StreamJob) -> Sample:
    """put_async in one request, in tasks of one event loop."""
    store, data = obstore_client(job), body(job)

    async def one(number: int) -> int:
        await store.put_async(job.key(number), data, use_multipart=False)
        return len(data)

    return by_tasks(job, one)


def by_tasks(job: StreamJob, one: Callable[[int], Awaitable[int]]) -> Sample:
    """Run ``one(number)``, which returns bytes, in ``job.in_flight`` tasks for ``job.seconds``."""
    order = job.order()

    async def loop(numbers: Iterator[int], end_s: float) -> int:
        done = 0
        while time.monotonic() < end_s:
            if await one(order[next(numbers) % len(order)]) != job.nbytes:
                raise BenchmarkError("an object of another length")
            done += 1
        return done

    async def tasks(seconds: float) -> int:
        numbers, end_s = itertools.count(), time.monotonic() + seconds
        return sum(await asyncio.gather(*(loop(numbers, end_s) for _ in range(job.in_flight))))

    async def warm() -> None:
        await asyncio.gather(*(one(order[i % len(order)]) for i in range(job.warm_operations)))

    with contextlib.closing(asyncio.new_event_loop()) as events:
        events.run_until_complete(warm())
        sample, operations = measure(job, lambda: events.run_until_complete(tasks(job.seconds)))
    return counted(sample, operations, operations * job.nbytes)
