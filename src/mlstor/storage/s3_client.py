"""Requests to S3 that are not the data path: listing, stat, deletion, multipart uploads."""

from __future__ import annotations

import base64
import errno
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING
from urllib.parse import quote

from mlstor.storage import crc32c, s3_xml
from mlstor.storage.s3_errors import Asker, refused
from mlstor.storage.store import ObjectInfo
from mlstor.storage.transfers import Digest

if TYPE_CHECKING:
    from mlstor._http import HttpEngine, Response
    from mlstor.storage.uploads import Part

#: As many as one request deletes, and as one page of a listing holds; S3's limits.
DELETE_KEYS = 1000
#: To complete an upload of 10,000 parts takes S3 minutes.
_COMPLETE_S = 600.0
#: An error that comes inside an answer with status 200, which the engine therefore doesn't retry.
_PASSING = ("InternalError", "SlowDown", "ServiceUnavailable", "RequestTimeout", "OperationAborted")
_CHECKSUMS = ("crc32c", "crc64nvme", "crc32", "sha256", "sha1")


def query(**pairs: str) -> str:
    """A query in the form that is signed: sorted, escaped, ``=`` even where there is no value."""
    return "&".join(f"{quote(name, safe='')}={quote(pairs[name], safe='')}" for name in sorted(pairs))


class S3Client:
    """Control requests for one bucket, by one endpoint of an engine whose key prefix is `prefix`.

    Keys are relative to `prefix`. May be called from several threads at once. Errors are `OSError` with errno, a
    sentence and ``s3://BUCKET/KEY``; those of the server have `status` and `code`.
    """

    def __init__(
        self, engine: HttpEngine, endpoint: int, bucket: str, prefix: str, asker: Callable[[], Asker], tries: int
    ) -> None:
        self.engine = engine
        self.endpoint = endpoint
        self.prefix = prefix
        self.asker = asker
        self._bucket = bucket
        self._tries = tries

    def url(self, key: str = "") -> str:
        return f"s3://{self._bucket}/{self.prefix}{key}" if key or self.prefix else f"s3://{self._bucket}"

    def call(
        self,
        method: str,
        key: str = "",
        query: str = "",
        headers: Sequence[tuple[str, str]] = (),
        body: bytes = b"",
        timeout_s: float | None = None,
    ) -> Response:
        """One request, of the bucket itself where `key` is ""; a status of 300 or more is raised."""
        response = self.engine.request(self.endpoint, method, key, query, headers, body, timeout_s)
        if response.status >= 300:
            raise refused(self.url(key), response.status, s3_xml.refusal(response.body), self.asker())
        return response

    # ---- objects ----

    def stat(self, key: str) -> ObjectInfo:
        if not key:
            raise OSError(errno.EINVAL, "an object has a key that is not empty", self.url())
        try:
            response = self.call("HEAD", key, headers=[("x-amz-checksum-mode", "ENABLED")])
        except OSError as error:
            if not 300 <= getattr(error, "status", 0) < 500:
                raise
            # The answer to HEAD has no body: which of the reasons it is, that to GET tells.
            self.call("GET", key, headers=[("Range", "bytes=0-0")])
            raise
        if not response.headers.get("content-length", "").isdigit():
            raise OSError(errno.EBADMSG, "the server does not say how long the object is", self.url(key))
        found = ((kind, response.headers.get(f"x-amz-checksum-{kind}")) for kind in _CHECKSUMS)
        checksum = next(((kind, value) for kind, value in found if value), None)
        etag = response.headers.get("etag", "").strip('"')
        return ObjectInfo(int(response.headers["content-length"]), etag, checksum)

    def crc32c(self, key: str) -> int | None:
        """Of a whole object, if the server has it; that of an object's parts (``...-N``) is another thing."""
        kind, value = self.stat(key).checksum or ("", "")
        return None if kind != "crc32c" or "-" in value else crc32c.from_base64(value)

    def delete(self, keys: Sequence[str]) -> None:
        """Remove up to `DELETE_KEYS` objects; where many can't go at once, or XML can't hold a name, one by one."""
        if not all(keys):  # a DELETE of the bucket itself would delete that
            raise OSError(errno.EINVAL, "an object has a key that is not empty", self.url())
        together = [key for key in keys if s3_xml.is_expressible(key)]
        single = [key for key in keys if not s3_xml.is_expressible(key)]
        if len(together) > 1:
            try:
                self._delete_together(together)
            except OSError as error:
                if getattr(error, "status", 0) not in (405, 501):
                    raise
                single = list(keys)
        else:
            single = list(keys)
        for key in single:
            self._delete_one(key)

    def _delete_together(self, keys: Sequence[str]) -> None:
        body = s3_xml.deletion(self.prefix + key for key in keys)
        # S3 wants one checksum of this body or another; MD5 is the one that every server knows.
        md5 = base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
        headers = [("Content-MD5", md5), ("Content-Type", "application/xml")]
        response = self.call("POST", "", query(delete=""), headers, body)
        failures = [(key, why) for key, why in s3_xml.deletion_failures(response.body) if why.code != "NoSuchKey"]
        if failures:
            key, why = failures[0]
            error = refused(f"s3://{self._bucket}/{key}", 0, why, self.asker())
            if len(failures) > 1:
                error.strerror = f"{error.strerror} (and {len(failures) - 1} more objects)"
            raise error

    def _delete_one(self, key: str) -> None:
        try:
            self.call("DELETE", key)
        except FileNotFoundError as error:
            if getattr(error, "code", "") == "NoSuchBucket":
                raise

    def page(self, prefix: str, delimiter: str = "", token: str = "") -> s3_xml.Listing:
        """One page of a listing; `prefix` and what comes back are whole keys."""
        pairs = {"list-type": "2", "prefix": prefix, "encoding-type": "url"}
        if delimiter:
            pairs["delimiter"] = delimiter
        if token:
            pairs["continuation-token"] = token
        return s3_xml.listing(self.call("GET", "", query(**pairs)).body)

    # ---- multipart uploads ----

    def begin_upload(self, key: str, digest: Digest) -> str:
        headers = []
        if digest is Digest.CRC32C:
            # Of the whole object, not of its parts' checksums: only that can be compared by who reads it.
            headers = [("x-amz-checksum-algorithm", "CRC32C"), ("x-amz-checksum-type", "FULL_OBJECT")]
        return s3_xml.upload_id(self.call("POST", key, query(uploads=""), headers).body)

    def complete_upload(self, key: str, upload_id: str, parts: Sequence[Part]) -> str:
        """Its ETag. Errors inside an answer with status 200 are errors; passing ones are tried again."""
        body, headers = s3_xml.completion(parts), _whole_checksum(parts)
        for left in reversed(range(self._tries)):
            try:
                response = self.call("POST", key, query(uploadId=upload_id), headers, body, _COMPLETE_S)
            except FileNotFoundError as error:
                # An earlier attempt may have been carried out though its answer was lost.
                if getattr(error, "code", "") == "NoSuchUpload" and self._is_complete(key, parts):
                    return _etag_of(parts)
                raise
            why = s3_xml.refusal(response.body)
            if why is None:
                return s3_xml.completed_etag(response.body)
            if why.code not in _PASSING or not left:
                raise refused(self.url(key), response.status, why, self.asker())
            time.sleep(0.1 * (self._tries - left))
        raise AssertionError("tries is positive")

    def _is_complete(self, key: str, parts: Sequence[Part]) -> bool:
        try:
            return self.stat(key).etag == _etag_of(parts)
        except (OSError, ValueError):
            return False

    def abort_upload(self, key: str, upload_id: str) -> None:
        """Forget an upload; one that isn't there any more is no error."""
        try:
            self.call("DELETE", key, query(uploadId=upload_id))
        except FileNotFoundError as error:
            if getattr(error, "code", "") == "NoSuchBucket":
                raise

    def unfinished_uploads(self) -> Iterator[s3_xml.Upload]:
        """Multipart uploads below the prefix that nobody completed or aborted, of whichever run; keys are relative."""
        # Not with encoding-type=url: SeaweedFS says then that keys are escaped, and leaves them as they are.
        pairs = {"uploads": "", "prefix": self.prefix}
        while True:
            found, key_marker, id_marker = s3_xml.uploads(self.call("GET", "", query(**pairs)).body)
            for upload in found:
                yield upload._replace(key=upload.key.removeprefix(self.prefix))
            if not key_marker:
                return
            pairs["key-marker"], pairs["upload-id-marker"] = key_marker, id_marker


class S3Uploads:
    """An `S3Client`'s multipart uploads, as `PartedTransfers` uses them."""

    #: S3's limit
    most_parts = 10_000

    def __init__(self, client: S3Client) -> None:
        self._client = client
        self.begin = client.begin_upload
        self.complete = client.complete_upload
        self.abort = client.abort_upload

    def query(self, upload_id: str, number: int) -> str:
        return query(partNumber=str(number), uploadId=upload_id)


def _whole_checksum(parts: Sequence[Part]) -> list[tuple[str, str]]:
    crc = parts[0].crc32c
    for part in parts[1:]:
        if crc is None or part.crc32c is None:
            return []
        crc = crc32c.combine(crc, part.crc32c, part.nbytes)
    if crc is None:
        return []
    return [("x-amz-checksum-type", "FULL_OBJECT"), ("x-amz-checksum-crc32c", crc32c.to_base64(crc))]


def _etag_of(parts: Iterable[Part]) -> str:
    """What S3 names an object made of `parts`, if their ETags are MD5s (else ValueError): MD5 of these, and their
    number.
    """
    etags = [bytes.fromhex(part.etag) for part in parts]
    return f"{hashlib.md5(b''.join(etags), usedforsecurity=False).hexdigest()}-{len(etags)}"
