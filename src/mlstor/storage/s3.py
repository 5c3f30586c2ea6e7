"""Buckets of S3 and of what speaks its protocol (MinIO, SeaweedFS, Ceph, AIStore's ``/s3``), on the HTTP engine."""

from __future__ import annotations

import errno
import itertools
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from mlstor.errors import UsageError
from mlstor.storage import aws_config, credentials, s3_list, s3_options
from mlstor.storage.s3_client import DELETE_KEYS, S3Client
from mlstor.storage.s3_errors import Asker, failed
from mlstor.storage.s3_transfers import S3Transfers
from mlstor.storage.singles import Singles
from mlstor.storage.store import ObjectInfo, Page
from mlstor.storage.transfers import Digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from typing_extensions import Buffer

    from mlstor._http import HttpEngine
    from mlstor.storage.s3_xml import Upload
    from mlstor.storage.store import Store

#: Requests of a listing or deletion at once.
_LIST_THREADS = 8
_DELETE_THREADS = 4
#: Largest body that is made from a pattern, as the engine's own default; large parts raise it.
_PAYLOAD_BYTES = 64 << 20


def open(
    url: str,
    *,
    endpoint: str | None = None,
    region: str | None = None,
    profile: str | None = None,
    anonymous: bool = False,
    path_style: bool | None = None,
    ca_file: str | None = None,
    insecure: bool = False,
    part_bytes: int = s3_options.PART_BYTES,
    part_threshold_bytes: int = s3_options.PART_THRESHOLD_BYTES,
    split_reads: bool = True,
    tries: int = 5,
    follow: bool | None = None,
    client: str = "mlstor",
) -> Store:
    """The store of ``s3://BUCKET[/PREFIX]``; keys are relative to ``PREFIX/``.

    Parameters
    ----------
    endpoint
        ``http://host:port``; by default ``AWS_ENDPOINT_URL_S3``, ``AWS_ENDPOINT_URL``, the profile's, else AWS.
    region
        By default ``AWS_REGION``, ``AWS_DEFAULT_REGION``, the profile's, else us-east-1.
    profile
        Of AWS's files; by default ``AWS_PROFILE``. One that is given here also goes before the environment's keys.
    anonymous
        Requests are not signed, and no credentials are looked for.
    path_style
        ``host/bucket`` and not ``bucket.host``; by default for custom endpoints.
    ca_file
        The CAs to trust; by default ``AWS_CA_BUNDLE``, the profile's, else the system's.
    insecure
        No look at the server's certificate.
    part_bytes, part_threshold_bytes
        Objects above the threshold are written and read in parts of this size, in parallel. 8 MiB and 16 MiB.
    split_reads
        False: a GET is one request, however large.
    tries
        Attempts of a request in all.
    follow
        Ask with an empty PUT where to send a body; by default for endpoints that end with ``/s3`` (AIStore). Other
        servers take the empty PUT for the object.
    client
        ``mlstor``, or ``s3torchconnector``: Amazon's connector does the transfers, to see what it costs.

    Raises
    ------
    UsageError
        If an option is not understood, credentials are not found, or the build lacks the HTTP engine.
    """
    if client == "s3torchconnector":
        from mlstor.storage import s3_connector

        if ca_file or insecure or follow:
            raise UsageError("--client s3torchconnector takes no ca_file, insecure or follow: it has no such options")
        return s3_connector.S3ConnectorStore(
            url,
            endpoint=endpoint,
            region=region,
            profile=profile,
            anonymous=anonymous,
            path_style=path_style,
            part_bytes=part_bytes,
            tries=tries,
        )
    if client != "mlstor":
        raise UsageError(f"client is mlstor or s3torchconnector, not {client!r}")
    return S3Store(
        url,
        endpoint=endpoint,
        region=region,
        profile=profile,
        anonymous=anonymous,
        path_style=path_style,
        ca_file=ca_file,
        insecure=insecure,
        part_bytes=part_bytes,
        part_threshold_bytes=part_threshold_bytes,
        split_reads=split_reads,
        tries=tries,
        follow=follow,
    )


class S3Store:
    """See `store.Store`; made by `open`. What it has open belongs to one process, and is opened anew after a fork."""

    def __init__(
        self,
        url: str,
        *,
        endpoint: str | None,
        region: str | None,
        profile: str | None,
        anonymous: bool,
        path_style: bool | None,
        ca_file: str | None,
        insecure: bool,
        part_bytes: int,
        part_threshold_bytes: int,
        split_reads: bool,
        tries: int,
        follow: bool | None,
    ) -> None:
        self._given = {name: value for name, value in locals().items() if name not in ("self", "url")}
        s3_options.check_sizes(part_bytes, part_threshold_bytes)
        if tries < 1:
            raise UsageError("tries counts all attempts: at least 1")
        if anonymous and profile:
            raise UsageError("anonymous requests use no profile: give one of both")
        loaded = aws_config.load_profile(profile)
        self.url = url
        self._place = s3_options.place(url, loaded, endpoint, region, path_style, ca_file, follow)
        self._source = None if anonymous else credentials.find(profile)
        self._insecure = insecure
        self._tries = tries
        self._part_bytes = part_bytes
        self._split_reads = split_reads
        self._part_threshold_bytes = part_threshold_bytes
        self._payload_bytes = max(_PAYLOAD_BYTES, part_threshold_bytes)
        self._lock = threading.RLock()
        self._session: _Session | None = None
        self._closed = False
        self._engine_class()

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(open, self.url, **self._given), ()

    def __repr__(self) -> str:
        return f"<S3Store {self.url}>"

    @staticmethod
    def _engine_class() -> type[HttpEngine]:
        try:
            from mlstor._http import HttpEngine
        except ImportError as error:
            raise UsageError(
                f"this build of mlstor has no HTTP engine ({error}): install libcurl's headers and build it again"
            ) from None
        return HttpEngine

    def _here(self) -> _Session:
        """What this process has open."""
        with self._lock:
            if self._closed:
                raise ValueError("the store is closed")
            if self._session is None or self._session.pid != os.getpid():
                self._session = _Session(self)
            return self._session

    def _engine(self, workers: int, in_flight: int) -> HttpEngine:
        engine = self._engine_class()(
            workers,
            in_flight,
            tries=self._tries,
            payload_bytes=self._payload_bytes,
            ca_file=self._place.ca_file,
            insecure=self._insecure,
        )
        engine.endpoint(
            self._place.base, key_prefix=self._place.prefix, dialect="s3", follow=self._place.follow
        )  # the first: 0, as transfers name it if they name none
        return engine

    def _asker(self) -> Asker:
        source, session = self._source, self._session
        problem = session.signer.problem if session and session.signer else ""
        return Asker(self._place.bucket, self._place.endpoint, source.name if source else "", problem)

    # ---- listing and single objects ----

    def list(self, prefix: str = "") -> Iterator[Page]:
        """See `Store.list`. An object whose key is the URL's prefix itself has no relative key and is left out."""
        client = self._here().client
        mine = len(self._place.prefix)
        for listing in s3_list.pages(client.page, self._place.prefix + prefix, _LIST_THREADS):
            pairs = [(key[mine:], size) for key, size in zip(listing.keys, listing.sizes, strict=True)]
            pairs = [pair for pair in pairs if pair[0]]
            yield Page([key for key, _ in pairs], [size for _, size in pairs])

    def stat(self, key: str) -> ObjectInfo:
        return self._here().client.stat(key)

    def read(self, key: str, into: Buffer | None = None, offset: int = 0, nbytes: int | None = None) -> bytes | int:
        """See `Store.read`; what is large comes in parallel ranges. A range beyond the object's end is an error."""
        total = self.stat(key).nbytes
        if nbytes is None:
            nbytes = max(0, total - offset)
        if offset < 0 or nbytes < 0 or offset + nbytes > total:
            text = f"bytes {offset} to {offset + nbytes} are not all in an object of {total} bytes"
            raise OSError(errno.EINVAL, text, self._here().client.url(key))
        memory = memoryview(bytearray(nbytes) if into is None else into).cast("B")
        if memory.nbytes < nbytes:
            raise ValueError(f"{nbytes} bytes do not fit into a buffer of {memory.nbytes}")
        if nbytes:
            self._here().singles.read(key, memory[:nbytes], offset, nbytes, total, Digest.CRC32C)
        return bytes(memory) if into is None else nbytes

    def write(self, key: str, source: Buffer) -> None:
        if not key:
            raise OSError(errno.EINVAL, "an object has a key that is not empty", self.url)
        self._here().singles.write(key, source, Digest.CRC32C)

    def delete(self, keys: Iterable[str]) -> None:
        client, keys = self._here().client, iter(keys)
        with ThreadPoolExecutor(_DELETE_THREADS, thread_name_prefix="mlstor-delete") as pool:
            while batch := list(itertools.islice(keys, DELETE_KEYS * _DELETE_THREADS)):
                chunks = [batch[i : i + DELETE_KEYS] for i in range(0, len(batch), DELETE_KEYS)]
                for _ in pool.map(client.delete, chunks):
                    pass

    # ---- uploads that were left ----

    def unfinished_uploads(self) -> Iterator[Upload]:
        """Multipart uploads below the URL that nobody completed or aborted, of whichever run; keys are relative."""
        return self._here().client.unfinished_uploads()

    def abort_upload(self, key: str, upload_id: str) -> None:
        """Forget one of them, and the parts that it holds."""
        self._here().client.abort_upload(key, upload_id)

    # ---- many ----

    def transfers(self, *, workers: int = 0, in_flight: int = 8) -> S3Transfers:
        return self._transfers(self._here(), workers, in_flight, explain=True)

    def _transfers(self, session: _Session, workers: int, in_flight: int, explain: bool) -> S3Transfers:
        return S3Transfers(
            self._engine(workers, in_flight),
            session.client,
            session.signer,
            part_bytes=self._part_bytes,
            threshold_bytes=self._part_threshold_bytes,
            payload_bytes=self._payload_bytes,
            split_reads=self._split_reads,
            explain=explain,
        )

    def describe(self) -> dict[str, Any]:
        place = self._place
        return {
            "scheme": "s3",
            "client": "mlstor",
            "endpoint": place.endpoint,
            "endpoint_from": place.endpoint_from,
            "bucket": place.bucket,
            "prefix": place.prefix,
            "addressing": "path" if place.path_style else "virtual host",
            "region": place.region,
            "region_from": place.region_from,
            "signed": "SigV4" if self._source else "anonymous",
            "credentials": self._source.name if self._source else "",
            "follow": place.follow,
            "insecure": self._insecure,
            "part_bytes": self._part_bytes,
            "part_threshold_bytes": self._part_threshold_bytes,
            "split_reads": self._split_reads,
            "tries": self._tries,
        }

    def close(self) -> None:
        with self._lock:
            self._closed = True
            session, self._session = self._session, None
        if session and session.pid == os.getpid():
            session.close()


class _Session:
    """What a store has open in one process: an engine for control requests, who signs, and single transfers."""

    def __init__(self, store: S3Store) -> None:
        self.pid = os.getpid()
        self.signer: credentials.Signer | None = None
        place = store._place
        if store._source:
            self.signer = credentials.Signer(store._source, place.region)
        self.engine = store._engine(1, 16)
        if self.signer:
            self.signer.attach(self.engine, 0)
        self.client = S3Client(self.engine, 0, place.bucket, place.prefix, store._asker, store._tries)
        self.singles = Singles(
            lambda: store._transfers(self, 1, 8, explain=False),
            lambda failure: failed(failure.url, failure, store._asker()),
        )

    def close(self) -> None:
        try:
            self.singles.close()
        finally:
            if self.signer:
                self.signer.close()
            self.engine.close()
