"""S3 by Amazon's s3torchconnector in Python threads: what a training job that uses it gets, and what that costs.

The same store and transfers as `s3.S3Store` has, within the limits of the connector: no checksums; no CA file of one's
own and no server without a valid certificate; the region and the profile are its only say in how requests are signed
(its own credential chain finds the keys); every PUT is a multipart upload of at least three requests; a GET comes in
ranges of `part_bytes`, all of them asked for at once, however slowly they are taken. It tells no HTTP status, number
of attempts, connections or requests, so that retries are part of a latency and those counters stay 0.
"""

from __future__ import annotations

import errno
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from mlstor.errors import UsageError
from mlstor.storage import aws_config, s3_options
from mlstor.storage.store import ObjectInfo, Page

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from typing_extensions import Buffer

    from mlstor.storage.s3_connector_transfers import ConnectorTransfers

_DELETE_THREADS = 8


class S3ConnectorStore:
    """See `store.Store`; made by `s3.open` with ``client="s3torchconnector"``."""

    def __init__(
        self,
        url: str,
        *,
        endpoint: str | None,
        region: str | None,
        profile: str | None,
        anonymous: bool,
        path_style: bool | None,
        part_bytes: int,
        tries: int,
    ) -> None:
        self._given = {name: value for name, value in locals().items() if name not in ("self", "url")}
        try:
            from s3torchconnector import S3ClientConfig, S3Exception
            from s3torchconnector._s3client import S3Client
        except ImportError:
            raise UsageError("s3torchconnector is not installed: `pip install mlstor[s3]`") from None
        loaded = aws_config.load_profile(profile)
        self.url = url
        self.exception: type[Exception] = S3Exception
        self.place = s3_options.place(url, loaded, endpoint, region, path_style, None, False)
        self.part_bytes = part_bytes
        self._anonymous = anonymous
        config = S3ClientConfig(
            part_size=part_bytes,
            unsigned=anonymous,
            force_path_style=self.place.path_style,
            max_attempts=tries,
            profile=profile,
        )
        custom = self.place.endpoint if self.place.endpoint_from != "AWS" else None
        self.client = S3Client(self.place.region, endpoint=custom, s3client_config=config)

    def __reduce__(self) -> tuple[Any, ...]:
        from mlstor.storage import s3

        return partial(s3.open, self.url, client="s3torchconnector", **self._given), ()

    def error(self, key: str, error: Exception) -> OSError:
        """The `OSError` of what the connector raised: it tells no more than its text."""
        text = _said(str(error))
        return OSError(_errno_of(text), f"s3torchconnector: {text}", f"s3://{self.place.bucket}/{key}")

    # ---- listing and single objects ----

    def list(self, prefix: str = "") -> Iterator[Page]:
        mine = len(self.place.prefix)
        try:
            for found in self.client.list_objects(self.place.bucket, self.place.prefix + prefix):
                objects = [info for info in found.object_info if len(info.key) > mine]
                if objects:
                    yield Page([info.key[mine:] for info in objects], [info.size for info in objects])
        except self.exception as error:
            raise self.error(self.place.prefix + prefix, error) from None

    def stat(self, key: str) -> ObjectInfo:
        try:
            found = self.client.head_object(self.place.bucket, self.place.prefix + key)
        except self.exception as error:
            raise self.error(self.place.prefix + key, error) from None
        return ObjectInfo(found.size, found.etag.strip('"'))

    def read(self, key: str, into: Buffer | None = None, offset: int = 0, nbytes: int | None = None) -> bytes | int:
        total = self.stat(key).nbytes
        nbytes = max(0, total - offset) if nbytes is None else nbytes
        if offset < 0 or nbytes < 0 or offset + nbytes > total:
            text = f"bytes {offset} to {offset + nbytes} are not all in an object of {total} bytes"
            raise OSError(errno.EINVAL, text, f"{self.url}/{key}")
        memory = memoryview(bytearray(nbytes) if into is None else into).cast("B")
        if memory.nbytes < nbytes:
            raise ValueError(f"{nbytes} bytes do not fit into a buffer of {memory.nbytes}")
        at = 0
        if nbytes:
            try:
                for chunk in self.chunks(self.place.prefix + key, offset, offset + nbytes):
                    memory[at : at + len(chunk)] = chunk
                    at += len(chunk)
            except self.exception as error:
                raise self.error(self.place.prefix + key, error) from None
        if at != nbytes:
            raise OSError(errno.EIO, f"{at} of {nbytes} bytes came", f"{self.url}/{key}")
        return bytes(memory) if into is None else nbytes

    def chunks(self, key: str, start: int | None, end: int | None) -> Iterator[bytes]:
        """The connector's own stream of parts, without its readers, which copy once more."""
        stream: Iterator[bytes] = self.client._get_object_stream(self.place.bucket, key, start, end)
        return stream

    def write(self, key: str, source: Buffer) -> None:
        try:
            self.put(self.place.prefix + key, [memoryview(source).cast("B")])
        except self.exception as error:
            raise self.error(self.place.prefix + key, error) from None

    def put(self, key: str, pieces: Iterable[memoryview]) -> None:
        writer: Any = self.client.put_object(self.place.bucket, key)  # its types are incomplete
        for piece in pieces:
            writer.write(piece)
        writer.close()

    def delete(self, keys: Iterable[str]) -> None:
        with ThreadPoolExecutor(_DELETE_THREADS, thread_name_prefix="mlstor-delete") as pool:
            for _ in pool.map(self.remove, keys):
                pass

    def remove(self, key: str) -> None:
        try:
            self.client.delete_object(self.place.bucket, self.place.prefix + key)
        except self.exception as error:
            refused = self.error(self.place.prefix + key, error)
            if refused.errno != errno.ENOENT or "bucket" in str(error):
                raise refused from None

    def transfers(self, *, workers: int = 0, in_flight: int = 8) -> ConnectorTransfers:
        """Transfers by ``max(1, workers) * in_flight`` threads, of which each does one at a time."""
        from mlstor.storage.s3_connector_transfers import ConnectorTransfers

        return ConnectorTransfers(self, max(1, workers) * in_flight)

    def describe(self) -> dict[str, Any]:
        import s3torchconnector

        return {
            "scheme": "s3",
            "client": f"s3torchconnector {s3torchconnector.__version__}",
            "endpoint": self.place.endpoint,
            "endpoint_from": self.place.endpoint_from,
            "bucket": self.place.bucket,
            "prefix": self.place.prefix,
            "addressing": "path" if self.place.path_style else "virtual host",
            "region": self.place.region,
            "region_from": self.place.region_from,
            "signed": "anonymous" if self._anonymous else "by s3torchconnector's own credential chain",
            "part_bytes": self.part_bytes,
            "unknown": ["http status", "attempts", "connections", "requests", "checksums"],
        }

    def close(self) -> None:
        """Nothing is left open: the connector keeps its threads until the process ends."""


def _said(text: str) -> str:
    """What is worth telling of it: of an answer that it did not expect it quotes all, a signature's parts too."""
    plain, _, result = text.partition("MetaRequestResult")
    found = [
        re.search(form, result)
        for form in (r"response_status: (\d+)", "<Code>(.*?)</Code>", "<Message>(.*?)</Message>")
    ]
    return " ".join([*plain.split(), *(match[1] for match in found if match)])


def _errno_of(text: str) -> int:
    lower = text.lower()
    if any(words in lower for words in ("does not exist", "nosuch", "not found", "404")):
        return errno.ENOENT
    if any(words in lower for words in ("forbidden", "denied", "403", "credentials", "signature", "invalidaccesskey")):
        return errno.EACCES
    return errno.EIO
