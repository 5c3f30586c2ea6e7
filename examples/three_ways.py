"""One epoch over the same images of an S3 bucket in three ways: staged to scratch, streamed, and by s3torchconnector.

The images have CIFAR-10's shape: a byte for the class and 3 x 32 x 32 bytes of pixels, 3,073 bytes each; their contents
are made up. They lie in the bucket twice: as one object each in a folder of its class, and as tar archives of up to
10,000. Each way trains the same small network in the same order, so that the losses have to be equal.

    python examples/three_ways.py s3://BUCKET/PREFIX --endpoint http://localhost:9000 --samples 50000

Credentials are found where AWS's tools find them; --anonymous sends none.
"""

from __future__ import annotations

import argparse
import io
import os
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from mlstor.storage.store import Store, open_store
from mlstor.storage.transfers import COMPLETION_DTYPE, TRANSFER_DTYPE, Kind, Memory, Op, zeros
from mlstor.stream.failures import failed
from mlstor.torch import EpochSampler, ObjectDataset

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGE_NBYTES = 3 * 32 * 32
SAMPLE_NBYTES = 1 + IMAGE_NBYTES
IN_AN_ARCHIVE = 10_000
AT_ONCE = 1_000  # objects that are written by one call


class Way(NamedTuple):
    """What one way took. Times from before its first request, s."""

    name: str
    first_batch_s: float
    total_s: float
    batches: int
    last_loss: float


def decode(data: Any) -> tuple[torch.Tensor, int]:
    """The pixels and the class of a sample's bytes."""
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return raw[1:].reshape(3, 32, 32).float() / 255, int(raw[0])


def from_sample(sample: Any) -> tuple[torch.Tensor, int]:
    """The transform of `ObjectDataset`."""
    return decode(sample.data)


def from_reader(reader: Any) -> tuple[torch.Tensor, int]:
    """The transform of s3torchconnector's dataset."""
    return decode(reader.read())


class Unpacked(Dataset[tuple[torch.Tensor, int]]):
    """Files on local scratch."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with open(self.paths[index], "rb") as file:
            return decode(file.read())


# -- the data --


def samples(count: int) -> Iterator[tuple[str, bytes]]:
    """Names and bytes; an image's brightness tells its class, so that there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        label = number % len(CLASSES)
        image = torch.randint(20 * label, 20 * label + 60, (IMAGE_NBYTES,), dtype=torch.uint8, generator=generator)
        yield f"{CLASSES[label]}/{number:06d}.bin", bytes([label]) + image.numpy().tobytes()


def fill(store: Store, count: int) -> None:
    """Write the samples both ways, unless so many are there."""
    present = sum(len(page.keys) for page in store.list("images/"))
    if present == count:
        return
    if present:
        raise SystemExit(f"{store.url}/images holds {present} objects, not {count}: give another prefix or --samples")
    waiting = list(samples(count))
    for number, at in enumerate(range(0, count, IN_AN_ARCHIVE)):
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for name, data in waiting[at : at + IN_AN_ARCHIVE]:
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
        store.write(f"archives/{number:04d}.tar", packed.getvalue())
    transfers = store.transfers()  # the images last: they are what is looked for
    for at in range(0, count, AT_ONCE):
        write(transfers, waiting[at : at + AT_ONCE])
    transfers.close()


def write(transfers: Any, objects: Sequence[tuple[str, bytes]]) -> None:
    """Write objects, all of them under way at once."""
    names = [f"images/{name}".encode() for name, _ in objects]
    asked, done = zeros(len(names), TRANSFER_DTYPE), zeros(len(names), COMPLETION_DTYPE)
    at = 0
    for row, name in zip(asked, names, strict=True):
        row["key_start"], row["key_nbytes"] = at, len(name)
        at += len(name)
    asked["tag"] = range(len(names))
    asked["op"], asked["memory"] = Op.WRITE, Memory.BUFFER
    asked["nbytes"] = asked["room"] = SAMPLE_NBYTES
    asked["place"] = [number * SAMPLE_NBYTES for number in range(len(names))]
    transfers.submit(asked, b"".join(names), bytearray().join(data for _, data in objects))
    came = 0
    while came < len(done):
        came += transfers.reap(done[came:], len(done) - came)
    for row in done[done["kind"] != Kind.OK]:
        raise failed(transfers, row, names[int(row["tag"])].decode())


# -- the ways --


def staged(url: str, options: dict[str, Any], scratch: str) -> Dataset[Any]:
    """List, copy to local scratch, unpack, and read from there."""
    store = open_store(f"{url}/archives", **options)
    for key in sorted(key for page in store.list() for key in page.keys):
        path = os.path.join(scratch, key)
        with open(path, "wb") as file:
            data = store.read(key)
            assert isinstance(data, bytes)
            file.write(data)
        with tarfile.open(path) as archive:
            archive.extractall(os.path.join(scratch, "images"), filter="data")
        os.unlink(path)
    store.close()
    found = [os.path.join(where, name) for where, _, names in os.walk(scratch) for name in names]
    return Unpacked(sorted(found))


def streamed(url: str, options: dict[str, Any]) -> Dataset[Any]:
    """Each image from its object, a batch of them at once."""
    return ObjectDataset(f"{url}/images", from_sample, options=options)


def connector(url: str, options: dict[str, Any]) -> Dataset[Any]:
    """Each image from its object by Amazon's connector for PyTorch."""
    from s3torchconnector import S3ClientConfig, S3MapDataset

    store = open_store(url, **options)
    facts = store.describe()
    store.close()
    config = S3ClientConfig(unsigned=facts["signed"] == "anonymous", force_path_style=facts["addressing"] == "path")
    endpoint = None if facts["endpoint_from"] == "AWS" else facts["endpoint"]
    made: Dataset[Any] = S3MapDataset.from_prefix(
        f"{url}/images/", region=facts["region"], endpoint=endpoint, transform=from_reader, s3client_config=config
    )
    return made


def train(name: str, make: Any, count: int, batch_size: int, workers: int) -> Way:
    """One epoch; the clock starts before the dataset is made."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(IMAGE_NBYTES, 64), torch.nn.ReLU())
    network.append(torch.nn.Linear(64, len(CLASSES)))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02)
    start = time.monotonic()
    dataset = make()
    sampler = EpochSampler(count, seed=7)
    loader: DataLoader[Any] = DataLoader(dataset, batch_size, sampler=sampler, num_workers=workers)
    first = loss_now = 0.0
    batches = 0
    for images, labels in loader:
        if not batches:
            first = time.monotonic() - start
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        loss_now, batches = loss.item(), batches + 1
    return Way(name, first, time.monotonic() - start, batches, loss_now)


def main(argv: Sequence[str] | None = None) -> list[Way]:
    """Run all ways and print what they took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url", help="s3://BUCKET/PREFIX")
    parser.add_argument("--endpoint", help="the server; else the environment's, else AWS")
    parser.add_argument("--region")
    parser.add_argument("--anonymous", action="store_true", help="send no credentials")
    parser.add_argument("--samples", type=int, default=50_000, help="images (50000)")
    parser.add_argument("--batch", type=int, default=256, help="images of a batch (256)")
    parser.add_argument("--workers", type=int, default=2, help="of the DataLoader (2)")
    parser.add_argument("--scratch", help="directory for the staged way (the one for temporary files)")
    given = parser.parse_args(argv)
    said = {"endpoint": given.endpoint, "region": given.region, "anonymous": given.anonymous or None}
    options = {name: value for name, value in said.items() if value is not None}
    url = given.url.rstrip("/")
    store = open_store(url, **options)
    fill(store, given.samples)
    store.close()
    ways = []
    with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
        for name, make in (
            ("staged", partial(staged, url, options, scratch)),
            ("streamed", partial(streamed, url, options)),
            ("s3torchconnector", partial(connector, url, options)),
        ):
            ways.append(train(name, make, given.samples, given.batch, given.workers))
    print(f"{given.samples} images of {SAMPLE_NBYTES} bytes, batches of {given.batch}, {given.workers} workers")
    print(f"{'way':18}{'first batch':>14}{'total':>12}{'images/s':>12}{'last loss':>12}")
    for way in ways:
        rate = given.samples / way.total_s
        print(f"{way.name:18}{way.first_batch_s:12.2f} s{way.total_s:10.2f} s{rate:12,.0f}{way.last_loss:12.6f}")
    return ways


if __name__ == "__main__":
    main()
