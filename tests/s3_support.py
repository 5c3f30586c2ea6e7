"""What the tests of the S3 store share: stores of a test server, buckets, arrays of transfers."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from servers.weed import OWNER, Keys, Weed

from mlstor.storage import s3
from mlstor.storage.transfers import COMPLETION_DTYPE, TRANSFER_DTYPE, WHOLE, Memory, Op, Transfers

_serial = itertools.count()

#: Names that go wrong where one side escapes otherwise than the other.
NAMES = [
    "plain",
    "with space",
    "a+b",
    "100%",
    "%2F",
    "%41",
    "q?x=1&y=2",
    "hash#tag",
    "tilde~",
    "quote'\"",
    "back\\slash",
    "colon:semi;",
    "comma,equals=",
    "(round)[square]{curly}",
    "star*bang!",
    "at@dollar$",
    "<angle>&amp;",
    "ümläut",
    "日本語/ファイル",
    "emoji-\U0001f600",
    ".leading-dot",
    "..two-dots",
    "dir/.hidden",
    "dir/sub/deep/leaf",
    "trailing.",
    "trailing space ",
]


def forget_aws(patch: pytest.MonkeyPatch) -> None:
    """Neither the developer's AWS variables nor their profile files; no questions to instance metadata."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        patch.delenv(name)
    patch.setenv("AWS_CONFIG_FILE", "/nonexistent/config")
    patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent/credentials")
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def use_keys(patch: pytest.MonkeyPatch, keys: Keys, token: str = "") -> None:
    patch.setenv("AWS_ACCESS_KEY_ID", keys.access_key)
    patch.setenv("AWS_SECRET_ACCESS_KEY", keys.secret_key)
    if token:
        patch.setenv("AWS_SESSION_TOKEN", token)


def open_bucket(server: Weed, bucket: str, keys: Keys | None = OWNER, prefix: str = "", **options: Any) -> s3.S3Store:
    """A store of a bucket that may not exist; on a server with identities it is signed with `keys`."""
    url = f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"
    if not server.identities or keys is None:
        options.setdefault("anonymous", True)
        return s3.open(url, endpoint=server.endpoint, **options)  # type: ignore[return-value]
    with pytest.MonkeyPatch.context() as patch:
        forget_aws(patch)
        use_keys(patch, keys)
        return s3.open(url, endpoint=server.endpoint, **options)  # type: ignore[return-value]


def make_bucket(server: Weed, name: str = "") -> str:
    """A new bucket's name."""
    name = name or f"bucket-{os.getpid()}-{next(_serial)}"
    store = open_bucket(server, name)
    try:
        store._here().client.call("PUT")
    finally:
        store.close()
    return name


@contextmanager
def bucket(server: Weed, prefix: str = "", **options: Any) -> Iterator[s3.S3Store]:
    """A store of a new bucket."""
    store = open_bucket(server, make_bucket(server), prefix=prefix, **options)
    try:
        yield store
    finally:
        store.close()


def listed(store: Any, prefix: str = "") -> dict[str, int]:
    """All keys and sizes; fails if one comes twice."""
    pairs = [pair for page in store.list(prefix) for pair in zip(page.keys, page.sizes, strict=True)]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def transfers_of(op: Op, keys: Sequence[str], **fields: Any) -> tuple[Any, bytes]:
    """Transfers of `keys`, tagged 0, 1, ...; fields by name, scalar or one for each."""
    array = np.zeros(len(keys), TRANSFER_DTYPE)
    names = [key.encode() for key in keys]
    array["op"] = op
    array["tag"] = np.arange(len(keys))
    array["key_nbytes"] = [len(name) for name in names]
    array["key_start"] = np.cumsum(array["key_nbytes"], dtype=np.uint64) - array["key_nbytes"]
    array["object_nbytes"] = WHOLE
    if op == Op.READ:
        array["nbytes"] = WHOLE
    for name, value in fields.items():
        array[name] = value
    return array, b"".join(names)


def reap_all(transfers: Transfers) -> Any:
    """Completions of all that is outstanding, by tag."""
    done: Any = np.zeros(transfers.outstanding, COMPLETION_DTYPE)
    count = 0
    while transfers.outstanding:
        got = transfers.reap(done[count:], 1, 60)
        assert got, "nothing came for a minute"
        count += got
    assert count == len(done)
    return done[np.argsort(done["tag"], kind="stable")]


def run(
    transfers: Transfers, op: Op, keys: Sequence[str], buffer: Any = None, pattern: Any = None, **fields: Any
) -> Any:
    """Carry out one transfer of each key; completions in the order of the keys."""
    if buffer is not None:
        fields.setdefault("memory", Memory.BUFFER)
    elif pattern is not None:
        fields.setdefault("memory", Memory.PATTERN)
    array, names = transfers_of(op, keys, **fields)
    assert transfers.submit(array, names, buffer, pattern) == len(keys)
    return reap_all(transfers)
