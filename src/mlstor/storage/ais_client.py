"""Requests to an AIStore cluster that are not the data path: map, listing, buckets, parts, memory, summary.

All of them go to the proxy, which answers or redirects. AIStore 5.0's sources (api/, ais/) say what each looks like.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import msgspec

from mlstor._http import HttpEngine
from mlstor.errors import UsageError
from mlstor.storage.store import ObjectInfo, Page

if TYPE_CHECKING:
    from mlstor._http import Response

#: Names by which api/apc/provider.go knows where a bucket's objects come from.
PROVIDERS = ("ais", "aws", "gcp", "azure", "oci")

# api/apc/lsmsg.go: LsNameSize, and LsNoDirs, since virtual directories are not objects
_LIST_FLAGS = str(32 | 8192)
# api/apc/lsmsg.go: EntryIsDir
_IS_DIRECTORY = 1 << 8
_LIST_TIMEOUT_S = 300.0
_SUMMARY_TIMEOUT_S = 600.0

_ERRNO = {
    400: errno.EINVAL,
    401: errno.EACCES,
    403: errno.EACCES,
    404: errno.ENOENT,
    409: errno.EEXIST,
    410: errno.ENOENT,
    416: errno.EINVAL,
    429: errno.EBUSY,
    501: errno.EOPNOTSUPP,
    503: errno.EBUSY,
    507: errno.ENOSPC,
}


class _Entry(msgspec.Struct):
    n: str
    s: int = 0
    f: int = 0


class _Listing(msgspec.Struct):
    # msgp writes an empty list as an array, a missing one as nil
    Entries: list[_Entry] | None = None
    UUID: str = ""
    ContinuationToken: str = ""


def status_error(status: int, message: str, url: str, token: bool) -> OSError:
    """The `OSError` for a refusal: the errno nearest to `status`, what the server said, and what to try.

    Parameters
    ----------
    status
        HTTP status of the answer.
    message
        What the server said, may be empty.
    url
        Of the request.
    token
        Whether a token was sent with it.
    """
    said = " ".join(message.split()) or f"HTTP status {status}"
    if status in (401, 403):
        said += (
            "; the token was refused: is it expired, or for other buckets?"
            if token
            else "; no token was sent: set AIS_AUTHN_TOKEN or AIS_AUTHN_TOKEN_FILE"
        )
    return OSError(_ERRNO.get(status, errno.EIO), f"{said} (HTTP {status})", url)


class AisClient:
    """One bucket of one cluster, through the proxy at `endpoint`. Any thread may call it.

    Parameters
    ----------
    endpoint
        URL of a proxy, ``http://host:port``.
    bucket, provider
        The bucket; `provider` is one of `PROVIDERS`.
    token
        AuthN's JSON web token, "" for none. Goes into no message and no result.
    ca_file, insecure
        CA certificates for https, and whether to do without verification.
    tries
        Attempts per request, the first included.
    """

    def __init__(
        self,
        endpoint: str,
        bucket: str,
        *,
        provider: str = "ais",
        token: str = "",
        ca_file: str | None = None,
        insecure: bool = False,
        tries: int = 5,
    ) -> None:
        self.endpoint = endpoint
        self.bucket = bucket
        self.provider = provider
        self.query = "" if provider == "ais" else f"provider={provider}"
        self.token = token
        self.tls: dict[str, Any] = {"ca_file": ca_file, "insecure": insecure}
        self._engine = HttpEngine(1, 16, tries=tries, **self.tls)
        self._proxy = self.add(self._engine, endpoint, follow=True)

    def add(self, engine: HttpEngine, url: str, **options: Any) -> int:
        """A new endpoint of `engine` at `url`, with this client's token; `options` as `HttpEngine.endpoint` takes."""
        endpoint = engine.endpoint(url, dialect="ais", **options)
        if self.token:
            engine.bearer(endpoint, self.token)
        return endpoint

    def call(
        self,
        method: str,
        path: str,
        query: str = "",
        action: dict[str, Any] | None = None,
        *,
        accept: str = "",
        timeout_s: float = 60.0,
        engine: HttpEngine | None = None,
        endpoint: int | None = None,
        body: bytes = b"",
    ) -> Response:
        """The answer to a request with `action` as its JSON body.

        Raises
        ------
        OSError
            If the server refuses it, or can't be reached.
        """
        headers = []
        if action is not None:
            body = json.dumps(action).encode()
        if body:
            headers.append(("Content-Type", "application/json"))
        if accept:
            headers.append(("Accept", accept))
        answer = (engine or self._engine).request(
            self._proxy if endpoint is None else endpoint,
            method,
            path,
            query=query,
            headers=headers,
            body=body,
            timeout_s=timeout_s,
        )
        if answer.status >= 400:
            raise status_error(answer.status, _message(answer), answer.url, bool(self.token))
        return answer

    def map(self, timeout_s: float = 60.0) -> bytes:
        """The cluster map as JSON."""
        return self.call("GET", "v1/daemon", "what=smap", timeout_s=timeout_s).body

    def head(self, key: str) -> ObjectInfo:
        """What the cluster says of an object; `key` is its whole name in the bucket."""
        answer = self.call("HEAD", self.path(key), _joined(self.query, "props=name%2Csize%2Cchecksum"))
        value = answer.headers.get("ais-checksum-value", "")
        return ObjectInfo(
            int(answer.headers.get("content-length", 0)),
            answer.headers.get("etag", "").strip('"'),
            (answer.headers["ais-checksum-type"], value) if value else None,
        )

    def path(self, key: str) -> str:
        return f"v1/objects/{self.bucket}/{key}"

    def pages(self, prefix: str) -> Iterator[Page]:
        """Pages of all names that begin with `prefix`, and sizes; the next is fetched while one is looked at.

        AIStore lists a page by asking every target, so that the targets share the work; a page has 10,000 names at
        most (api/apc/lsmsg.go), and its last name is where the next begins.
        """
        value = {"props": "name,size", "prefix": prefix, "flags": _LIST_FLAGS, "uuid": "", "continuation_token": ""}
        with ThreadPoolExecutor(1, "mlstor-list") as ahead:
            waiting = ahead.submit(self._page, dict(value))
            while True:
                listing = waiting.result()
                value.update(uuid=listing.UUID, continuation_token=listing.ContinuationToken)
                if listing.ContinuationToken:
                    waiting = ahead.submit(self._page, dict(value))
                if listing.Entries:
                    yield _page(listing.Entries)
                if not listing.ContinuationToken:
                    return

    def flagged(self, prefix: str, flags: int) -> Iterator[list[tuple[str, int, int]]]:
        """Pages of names, sizes and flags of all entries that begin with `prefix`; `flags` (api/apc/lsmsg.go) go with
        those of an ordinary listing.
        """
        value = {"props": "name,size", "prefix": prefix, "flags": str(int(_LIST_FLAGS) | flags), "uuid": ""}
        token = None
        while token != "":
            listing = self._page({**value, "continuation_token": token or ""})
            value["uuid"], token = listing.UUID, listing.ContinuationToken
            yield [(entry.n, entry.s, entry.f) for entry in listing.Entries or () if not entry.f & _IS_DIRECTORY]

    def _page(self, value: dict[str, str]) -> _Listing:
        answer = self.call(
            "GET",
            f"v1/buckets/{self.bucket}",
            self.query,
            {"action": "list", "value": value},
            accept="application/msgpack",
            timeout_s=_LIST_TIMEOUT_S,
        )
        try:
            return msgspec.msgpack.decode(answer.body, type=_Listing)
        except msgspec.DecodeError as error:
            raise OSError(errno.EBADMSG, f"the listing can't be read: {error}", answer.url) from None

    def summary(self, prefix: str = "") -> tuple[int, int]:
        """How many objects begin with `prefix`, and their bytes, as the targets count them: not from a listing.

        Raises
        ------
        OSError
            ENOENT for a missing bucket; ETIMEDOUT if the targets take more than 10 minutes.
        """
        path = f"v1/buckets/{self.bucket}"
        value = {"prefix": prefix, "cached": True, "present": True}
        job = self.call("GET", path, self.query, {"action": "summary-bck", "value": value}).body.decode()
        deadline, pause = time.monotonic() + _SUMMARY_TIMEOUT_S, 0.02
        while time.monotonic() < deadline:
            time.sleep(pause)
            pause = min(2 * pause, 2.0)
            answer = self.call("GET", path, self.query, {"action": "summary-bck", "value": {**value, "uuid": job}})
            if answer.status == 200:
                buckets = json.loads(answer.body)
                count = sum(int(one["ObjCount"]["obj_count_present"]) for one in buckets)
                return count, sum(int(one["TotalSize"]["size_all_present_objs"]) for one in buckets)
        raise OSError(errno.ETIMEDOUT, "the targets did not finish counting", f"{self.endpoint}/{path}")

    def checksum_type(self) -> str:
        """Of the bucket's objects: ``"xxhash2"`` by default, ``"none"`` if it keeps none."""
        props = self.call("HEAD", f"v1/buckets/{self.bucket}", self.query).headers.get("ais-bucket-props", "{}")
        return str(json.loads(props).get("checksum", {}).get("type", "none"))

    def create(self, exist_ok: bool) -> None:
        try:
            self.call("POST", f"v1/buckets/{self.bucket}", self.query, {"action": "create-bck"})
        except FileExistsError:
            if not exist_ok:
                raise

    def destroy(self) -> None:
        self.call("DELETE", f"v1/buckets/{self.bucket}", self.query, {"action": "destroy-bck"})

    def memory_bytes(self, hosts: dict[str, str]) -> int | None:
        """Memory of the hosts that targets run on, each host once; None if a target does not tell.

        Parameters
        ----------
        hosts
            Target's id to the address of its host.
        """
        told = json.loads(self.call("GET", "v1/cluster", "what=sysinfo").body).get("target") or {}
        most: dict[str, int] = {}
        for target, host in hosts.items():
            total = ((told.get(target) or {}).get("mem") or {}).get("Total", 0)
            if total <= 0:
                return None
            most[host] = max(most.get(host, 0), int(total))
        return sum(most.values()) if most else None

    def begin_parts(self, key: str) -> str:
        """Begin a multipart upload of the object named `key`; returns its id."""
        return self.call("POST", self.path(key), self.query, {"action": "mpt-upload"}).body.decode()

    def complete_parts(self, key: str, upload: str, numbers: Sequence[int]) -> None:
        parts = [{"part-number": number, "etag": ""} for number in numbers]
        query = _joined(self.query, f"uploadId={upload}")
        self.call("POST", self.path(key), query, {"action": "mpt-complete", "value": parts}, timeout_s=600.0)

    def abort_parts(self, key: str, upload: str) -> None:
        """Give up an upload and its parts; one that is not there any more is no error."""
        with contextlib.suppress(FileNotFoundError):
            self.call("DELETE", self.path(key), _joined(self.query, f"uploadId={upload}"), {"action": "mpt-abort"})

    def close(self) -> None:
        self._engine.close()


def find_endpoint(endpoint: str | None) -> str:
    """`endpoint`, else ``AIS_ENDPOINT``, else ``http://localhost:8080``, as AIStore's own clients have it.

    Raises
    ------
    UsageError
        If it is not an http:// or https:// URL.
    """
    url = (endpoint or os.environ.get("AIS_ENDPOINT") or "http://localhost:8080").rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"the AIStore endpoint {url!r} is not a URL; give one such as http://proxy:8080")
    return url


def find_token(token: str | None) -> str:
    """`token`, else that of ``AIS_AUTHN_TOKEN``, ``AIS_AUTHN_TOKEN_FILE`` or AIStore's CLI; "" if there is none.

    Raises
    ------
    UsageError
        If a token file was named but can't be read.
    """
    if token := token or os.environ.get("AIS_AUTHN_TOKEN", ""):
        return token.strip()
    named = os.environ.get("AIS_AUTHN_TOKEN_FILE", "")
    path = named or os.path.expanduser("~/.config/ais/cli/auth.token")
    try:
        with open(path, encoding="utf-8") as file:
            return str(json.load(file)["token"])
    except FileNotFoundError:
        if not named:
            return ""
        raise UsageError(f"AIS_AUTHN_TOKEN_FILE names {path}, which does not exist") from None
    except (OSError, ValueError, KeyError, TypeError):
        # not the exception's own text: it may quote the file
        raise UsageError(f"{path} is not a token file as `ais auth login` writes it") from None


def _page(entries: list[_Entry]) -> Page:
    # sorted by name, so that a copy (an object on its way to another target) is next to its like
    keys, sizes = [], []
    last = None
    for entry in entries:
        if entry.n != last and not entry.f & _IS_DIRECTORY:
            keys.append(entry.n)
            sizes.append(entry.s)
        last = entry.n
    return Page(keys, sizes)


def _message(answer: Response) -> str:
    """What an error says: in its body, or for HEAD in a header (cmn/err.go); {"message": ..., "status": ...}."""
    text = answer.body or answer.headers.get("hdr-error", "").encode()
    try:
        return str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        return text[:300].decode("utf-8", "replace")


def _joined(*queries: str) -> str:
    return "&".join(filter(None, queries))
