"""Objects in AIStore: ``ais://BUCKET/PREFIX``, by its native API.

Reads go straight to the target that holds the object, found by rendezvous hashing over the cluster map, where the
cluster allows that; else by the proxy's redirects. Writes go by the proxy: a target that is asked directly takes an
object that isn't its own, and an old map is enough for that.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mlstor._http import HttpEngine
from mlstor.errors import UsageError
from mlstor.storage.ais_batch import BatchReader
from mlstor.storage.ais_client import PROVIDERS, AisClient, find_endpoint, find_token, status_error
from mlstor.storage.ais_map import ClusterMap, Routes, parse_map
from mlstor.storage.ais_transfers import Access, AisTransfers
from mlstor.storage.parts import PartedTransfers
from mlstor.storage.singles import ERRNO, Singles
from mlstor.storage.store import ObjectInfo, Page
from mlstor.storage.transfers import WHOLE, Digest, Failure, Kind

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from mlstor.storage.uploads import Part

#: Largest body that an engine makes of a pattern, and from which on an object is written in parts.
_PAYLOAD_BYTES = 64 << 20
_PART_BYTES = 32 << 20
_PROBE_TIMEOUT_S = 5.0
# A name that no object has.
_PROBE = ".mlstor-probe"


def open(
    url: str,
    *,
    endpoint: str | None = None,
    via_proxy: bool | None = None,
    direct_writes: bool = False,
    provider: str = "ais",
    token: str | None = None,
    ca_file: str | None = None,
    insecure: bool = False,
    tries: int = 5,
    patience_s: float = 60.0,
    part_bytes: int = _PART_BYTES,
    part_threshold_bytes: int = _PAYLOAD_BYTES,
    split_reads: bool = False,
) -> AisStore:
    """The objects under ``ais://BUCKET/PREFIX``; asks the cluster for its map, and whether it can be read directly.

    Parameters
    ----------
    url
        Need not exist yet, nor its bucket.
    endpoint
        URL of a proxy. None: ``AIS_ENDPOINT``, else ``http://localhost:8080``.
    via_proxy
        True: all requests go by the proxy; False: reads must not; None: as the cluster allows.
    direct_writes
        Writes and deletions go straight to the target, too. The map is then looked at every second; an object that is
        written within the second in which a target joins or leaves may be found again only after a rebalance.
    provider
        Where the bucket's objects come from: ais, aws, gcp, azure, oci.
    token
        AuthN's token. None: ``AIS_AUTHN_TOKEN``, the file ``AIS_AUTHN_TOKEN_FILE``, or that of AIStore's CLI. Stays
        out of a pickled store: the other process looks for its own.
    ca_file, insecure
        For https: CA certificates instead of the system's, and no verification at all.
    tries
        Attempts per request, the first included.
    patience_s
        How long a transfer is sent again while its target or the proxy doesn't answer.
    part_bytes, part_threshold_bytes
        Objects above the threshold (at most 64 MiB) are written in parts of `part_bytes`, in parallel.
    split_reads
        Reads above the threshold are made of parallel ranges, which the store's checksum does not cover.

    Raises
    ------
    UsageError
        If the URL or an option is not understood, or `via_proxy` is False and the cluster allows no direct reads.
    OSError
        If the cluster can't be reached, or refuses the token.
    """
    bucket, prefix = _parsed(url)
    if provider not in PROVIDERS:
        raise UsageError(f"provider {provider!r} is unknown; AIStore has {', '.join(PROVIDERS)}")
    if not 0 < part_threshold_bytes <= _PAYLOAD_BYTES:
        raise UsageError(f"part_threshold_bytes is {part_threshold_bytes}; give at most {_PAYLOAD_BYTES} (64 MiB)")
    if part_bytes < 4096 or part_bytes % 4096:
        raise UsageError(f"part_bytes is {part_bytes}; give a multiple of 4096")
    options = {
        "endpoint": find_endpoint(endpoint),
        "via_proxy": via_proxy,
        "direct_writes": direct_writes,
        "provider": provider,
        "ca_file": ca_file,
        "insecure": insecure,
        "tries": tries,
        "patience_s": patience_s,
        "part_bytes": part_bytes,
        "part_threshold_bytes": part_threshold_bytes,
        "split_reads": split_reads,
    }
    return AisStore(bucket, prefix, find_token(token), options)


class AisStore:
    """See `mlstor.storage.store.Store`; made by `open`.

    Attributes
    ----------
    url : str
    access : Access
        How the cluster is reached. `access.servers` names the `endpoint` of completions.
    cluster : ClusterMap
        As last fetched.
    """

    def __init__(self, bucket: str, prefix: str, token: str, options: dict[str, Any]) -> None:
        self.url = f"ais://{bucket}/{prefix}"
        self._prefix = prefix
        self._options = options
        self._client = AisClient(
            options["endpoint"],
            bucket,
            provider=options["provider"],
            token=token,
            ca_file=options["ca_file"],
            insecure=options["insecure"],
            tries=options["tries"],
        )
        self._singles = Singles(lambda: self.transfers(workers=1, in_flight=16), self._error)
        self._digest: Digest | None = None
        try:
            self.cluster = self._get_map()
            refused = "asked for" if options["via_proxy"] else self._probe()
        except BaseException:
            self._client.close()
            raise
        if refused and options["via_proxy"] is False:
            self._client.close()
            raise UsageError(f"{options['endpoint']} allows no direct reads ({refused}); leave out via_proxy=False")
        self.access = Access(not refused, refused, options["direct_writes"] and not refused)

    def __repr__(self) -> str:
        return f"AisStore({self.url!r}, endpoint={self._options['endpoint']!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.url, self._options)

    def _get_map(self) -> ClusterMap:
        self.cluster = parse_map(self._client.map(), self._client.endpoint)
        return self.cluster

    def _probe(self) -> str:
        """Why the targets can't be asked directly, "" if they can."""
        if not self.cluster.targets:
            return "the map has no targets"
        with HttpEngine(1, 16, tries=1, connect_timeout_s=_PROBE_TIMEOUT_S, **self._client.tls) as engine:
            for target in self.cluster.targets:
                for url in target.urls:
                    endpoint = self._client.add(engine, url)
                    try:
                        status = engine.request(
                            endpoint,
                            "HEAD",
                            self._client.path(_PROBE),
                            query="&".join(filter(None, ["props=size", self._client.query])),
                            timeout_s=_PROBE_TIMEOUT_S,
                        ).status
                    except OSError as error:
                        return f"target {target.id} at {url}: {error.strerror or error}"
                    # it looked for the object, which is not there
                    if status not in (200, 404):
                        return f"target {target.id} at {url} answered {status}"
        return ""

    # ---- objects ----

    def list(self, prefix: str = "") -> Iterator[Page]:
        """See `Store.list`. Pages come one after the other, in the order of names; the targets share the work."""
        whole, cut = self._prefix + prefix, len(self._prefix)
        for page in self._client.pages(whole):
            kept = list(zip(*page, strict=True))
            if whole.endswith("*"):  # which AIStore takes for a wild card
                kept = [(key, nbytes) for key, nbytes in kept if key.startswith(whole)]
            if kept:
                yield Page([key[cut:] for key, _ in kept], [nbytes for _, nbytes in kept])

    def summary(self, prefix: str = "") -> tuple[int, int]:
        """Number of objects under `prefix`, and their bytes, as the targets count them: to hold a listing against."""
        return self._client.summary(self._prefix + prefix)

    def stat(self, key: str) -> ObjectInfo:
        return self._client.head(self._prefix + key)

    def read(self, key: str, into: Buffer | None = None, offset: int = 0, nbytes: int | None = None) -> bytes | int:
        """See `Store.read`. The store's checksum of an object that is read whole is compared."""
        if into is None:
            there = self.stat(key).nbytes
            wanted = max(0, there - offset if nbytes is None else min(nbytes, there - offset))
            if not wanted and there:
                return b""
            memory = bytearray(wanted)
            whole = offset == 0 and wanted == there
            count = self._read(key, memory, 0, WHOLE, there) if whole else self._read(key, memory, offset, wanted)
            return bytes(memory[:count])
        if offset == 0 and nbytes is None:
            return self._read(key, into, 0, WHOLE)
        return self._read(key, into, offset, WHOLE if nbytes is None else nbytes)

    def _read(self, key: str, into: Buffer, offset: int, nbytes: int, object_nbytes: int = WHOLE) -> int:
        digest = self.digest() if nbytes == WHOLE and offset == 0 else Digest.NONE
        return self._singles.read(key, into, offset, nbytes, object_nbytes, digest)

    def read_member(self, key: str, archpath: str) -> bytes:
        """A member of an archive (.tar, .tgz, .zip, .tar.lz4), which the target takes out of it.

        Raises
        ------
        OSError
            ENOENT if there is no such archive, or no such member in it.
        """
        path = self._client.path(self._prefix + key)
        query = "&".join(filter(None, [member_query(archpath), self._client.query]))
        return self._client.call("GET", path, query, timeout_s=300.0).body

    def write(self, key: str, source: Buffer) -> None:
        """See `Store.write`. A checksum goes with it, which the target compares."""
        self._singles.write(key, source, Digest.CRC32C)

    def delete(self, keys: Iterable[str]) -> None:
        """See `Store.delete`."""
        self._singles.delete(keys)

    def _error(self, failure: Failure) -> OSError:
        if failure.kind == Kind.HTTP:
            return status_error(failure.status, failure.message, failure.url, bool(self._client.token))
        return OSError(ERRNO.get(failure.kind, errno.EIO), failure.message, failure.url)

    # ---- buckets ----

    def create_bucket(self, exist_ok: bool = True) -> None:
        """Make the bucket; with `exist_ok` one that is there already is no error."""
        self._client.create(exist_ok)

    def destroy_bucket(self) -> None:
        """Remove the bucket with all that is in it, whoever wrote it."""
        self._client.destroy()

    def digest(self) -> Digest:
        """The checksum that the bucket's objects can be verified by: that of its ``checksum.type``; of a bucket that
        does not exist yet that of a new one.
        """
        if self._digest is None:
            try:
                kind = self._client.checksum_type()
            except FileNotFoundError:
                return Digest.XXH64
            # xxhash and xxhash2 are two libraries for the same XXH64
            self._digest = {"xxhash": Digest.XXH64, "xxhash2": Digest.XXH64, "crc32c": Digest.CRC32C}.get(
                kind, Digest.NONE
            )
        return self._digest

    def memory_bytes(self) -> int | None:
        """Memory of the hosts that the targets run on, in bytes, each host once; None if a target does not tell."""
        return self._client.memory_bytes(self._get_map().hosts())

    # ---- many at once ----

    def transfers(self, *, workers: int = 0, in_flight: int = 8) -> PartedTransfers:
        """See `Store.transfers`. The `endpoint` of a completion is an index of `access.servers`."""
        options = self._options
        engine = HttpEngine(
            workers, in_flight, tries=options["tries"], payload_bytes=_PAYLOAD_BYTES, **self._client.tls
        )
        try:
            routes = Routes(engine, self._client, self._prefix, self.access.mutations, self.access.servers)
            name = f"{self._client.provider}/@#/{self._client.bucket}/{self._prefix}".encode()
            straight = AisTransfers(
                engine, routes, name, self._get_map, self.cluster, self.access, options["patience_s"]
            )
            return PartedTransfers(
                straight,
                _Uploads(self._client, self._prefix),
                part_bytes=options["part_bytes"],
                threshold_bytes=options["part_threshold_bytes"],
                window=2 * engine.workers * engine.in_flight,
                payload_bytes=_PAYLOAD_BYTES,
                split_reads=options["split_reads"],
            )
        except BaseException:
            engine.close()
            raise

    def batches(self, *, workers: int = 1, in_flight: int = 8) -> BatchReader:
        """GetBatch requests; up to `workers` x `in_flight` at once, from as many threads."""
        return BatchReader(self._client, self._prefix, workers, in_flight, self._options["tries"])

    def describe(self) -> dict[str, Any]:
        """See `Store.describe`. `reads` is direct or proxy; `direct_refused` and `direct_lost` say why not direct."""
        access = self.access
        return {
            "scheme": "ais",
            "endpoint": self._client.endpoint,
            "bucket": self._client.bucket,
            "provider": self._client.provider,
            "reads": "direct" if access.direct and not access.lost else "proxy",
            "writes": "direct" if access.mutations and not access.lost else "proxy",
            "direct_refused": access.reason,
            "direct_lost": access.lost,
            "handed_to_proxy": access.resent,
            "map_errors": list(access.map_errors),
            "authentication": "token" if self._client.token else "none",
            "cluster": self.cluster.cluster,
            "map_version": self.cluster.version,
            "targets": len(self.cluster.targets),
            **{name: self._options[name] for name in _RECORDED},
        }

    def close(self) -> None:
        try:
            self._singles.close()
        finally:
            self._client.close()

    def __enter__(self) -> AisStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


_RECORDED = ("insecure", "tries", "patience_s", "part_bytes", "part_threshold_bytes", "split_reads")


class _Uploads:
    """AIStore's multipart uploads, as `PartedTransfers` asks for them."""

    #: core/ufest.go: MaxChunkCount
    most_parts = 9999

    def __init__(self, client: AisClient, prefix: str) -> None:
        self._client = client
        self._prefix = prefix

    def begin(self, key: str, digest: Digest) -> str:
        return self._client.begin_parts(self._prefix + key)

    def query(self, upload_id: str, number: int) -> str:
        return f"partNumber={number}&uploadId={upload_id}"

    def complete(self, key: str, upload_id: str, parts: Sequence[Part]) -> str:
        self._client.complete_parts(self._prefix + key, upload_id, [part.number for part in parts])
        return ""

    def abort(self, key: str, upload_id: str) -> None:
        self._client.abort_parts(self._prefix + key, upload_id)


def member_query(archpath: str) -> str:
    """The `query` of a READ that is to take a member out of an archive; it comes whole, never a range of it."""
    from urllib.parse import quote

    return f"archpath={quote(archpath, safe='')}"


def _reopened(url: str, options: dict[str, Any]) -> AisStore:
    return open(url, **options)


def _parsed(url: str) -> tuple[str, str]:
    """Bucket, and prefix with its closing slash."""
    scheme, _, rest = url.partition("://")
    bucket, _, prefix = rest.partition("/")
    if scheme != "ais" or not bucket:
        raise UsageError(f"{url!r} names no bucket; give ais://BUCKET or ais://BUCKET/PREFIX")
    if bucket[0] in "@#":
        raise UsageError(f"{url!r} is a bucket of another cluster; give that cluster's --endpoint and ais://BUCKET")
    prefix = prefix.strip("/")
    return bucket, f"{prefix}/" if prefix else ""


__all__ = ["AisStore", "member_query", "open"]
