"""What the tests of the AIStore store share: buckets of a running cluster, and arrays of transfers."""

from __future__ import annotations

import itertools
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy

from mlstor.storage import ais
from mlstor.storage.transfers import COMPLETION_DTYPE, TRANSFER_DTYPE, WHOLE, Op, zeros

if TYPE_CHECKING:
    from servers.aistore import Cluster

    from mlstor._io import Pattern
    from mlstor.storage.transfers import Transfers

_numbers = itertools.count()

#: Names that are hard to get through a URL, a redirect and back.
NAMES = (
    "plain",
    "with space",
    "two  spaces/ and slash ",
    "ümläut/日本語",
    "per%cent/%41%2F",
    "plus+plus/a+b",
    "quest?ion#hash&and=is",
    "quote\"s'n{b}[r]^`|\\",
    "emoji-\U0001f600",
    "dots..txt/.hidden",
    "a" * 200,
)


@contextmanager
def bucket(cluster: Cluster, prefix: str = "", **options: Any) -> Iterator[ais.AisStore]:
    """A store on a new bucket, which is destroyed with it."""
    name = f"test-{next(_numbers)}"
    with ais.open(f"ais://{name}/{prefix}", endpoint=cluster.endpoint, **options) as store:
        store.create_bucket(exist_ok=False)
        try:
            yield store
        finally:
            store.destroy_bucket()


def batch(op: Op, keys: Sequence[str], **fields: Any) -> tuple[Any, bytes]:
    """An array of transfers whose tags are 1000 and on, and its names."""
    encoded = [key.encode() for key in keys]
    made = zeros(len(keys), TRANSFER_DTYPE)
    made["op"], made["object_nbytes"] = op, WHOLE
    made["nbytes"] = WHOLE if op == Op.READ else 0
    made["tag"] = 1000 + numpy.arange(len(keys))
    made["key_nbytes"] = [len(name) for name in encoded]
    made["key_start"] = numpy.cumsum(made["key_nbytes"]) - made["key_nbytes"]
    for field, value in fields.items():
        made[field] = value
    return made, b"".join(encoded)


def carry_out(transfers: Transfers, made: Any, names: bytes, buffer: Any = None, pattern: Pattern | None = None) -> Any:
    """The completions of all, in the order of their tags."""
    transfers.submit(made, names, buffer, pattern)
    done = zeros(len(made), COMPLETION_DTYPE)
    count = 0
    deadline = time.monotonic() + 120
    while count < len(made):
        assert time.monotonic() < deadline, f"{count} of {len(made)} after two minutes"
        count += transfers.reap(done[count:], 1, 5.0)
    return done[numpy.argsort(done["tag"])]


def write_all(transfers: Transfers, keys: Sequence[str], contents: Sequence[bytes], **fields: Any) -> Any:
    sizes = [len(content) for content in contents]
    places = numpy.cumsum(sizes) - sizes
    made, names = batch(Op.WRITE, keys, nbytes=sizes, place=places, memory=1, **fields)
    return carry_out(transfers, made, names, b"".join(contents) or b" ")


def read_all(transfers: Transfers, keys: Sequence[str], room: int, **fields: Any) -> tuple[Any, list[bytes]]:
    made, names = batch(Op.READ, keys, memory=1, room=room, place=room * numpy.arange(len(keys)), **fields)
    buffer = bytearray(room * len(keys))
    done = carry_out(transfers, made, names, buffer)
    return done, [bytes(buffer[room * i :][: max(0, int(one["result"]))]) for i, one in enumerate(done)]


def ask_target(url: str, bucket_name: str, key: str) -> int:
    """The status that a target itself gives to a GET, by another HTTP client."""
    path = urllib.parse.quote(key, safe="/")
    try:
        with urllib.request.urlopen(f"{url}/v1/objects/{bucket_name}/{path}", timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
