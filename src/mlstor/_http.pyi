# The HTTP engine as Python sees it. mypy.stubtest checks this file against the built module.
from collections.abc import Iterable
from types import TracebackType
from typing import NamedTuple, TypeAlias, final

from typing_extensions import Buffer, Self

from mlstor._io import Pattern
from mlstor.storage.transfers import Failure, TransferCounters

# A writable buffer; the type system does not tell it from a read-only one.
_Writable: TypeAlias = Buffer
_Headers: TypeAlias = Iterable[tuple[str, str]]

class Response(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes
    url: str

@final
class HttpEngine:
    def __new__(
        cls,
        workers: int = 0,
        in_flight: int = 8,
        *,
        tries: int = 5,
        backoff_s: float = 0.05,
        backoff_most_s: float = 5.0,
        connect_timeout_s: float = 10.0,
        stall_timeout_s: float = 30.0,
        payload_bytes: int = 67108864,
        buffer_bytes: int = 0,
        ca_file: str | None = None,
        insecure: bool = False,
        libcurl_only: bool = False,
    ) -> Self: ...
    @property
    def workers(self) -> int: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def outstanding(self) -> int: ...
    def endpoint(
        self,
        url: str,
        *,
        key_prefix: str = "",
        query: str = "",
        dialect: str = "plain",
        headers: _Headers = (),
        follow: bool = False,
    ) -> int: ...
    def sign(
        self,
        endpoint: int,
        access_key: str,
        secret_key: str,
        token: str = "",
        region: str = "us-east-1",
        service: str = "s3",
    ) -> None: ...
    def bearer(self, endpoint: int, token: str) -> None: ...
    def submit(
        self,
        transfers: Buffer,
        names: Buffer,
        buffer: Buffer | None = None,
        pattern: Pattern | None = None,
    ) -> int: ...
    def reap(self, out: _Writable, min_done: int = 1, timeout_s: float | None = None) -> int: ...
    def failures(self) -> list[Failure]: ...
    def cancel(self) -> None: ...
    def counters(self) -> TransferCounters: ...
    def request(
        self,
        endpoint: int,
        method: str,
        key: str = "",
        query: str = "",
        headers: _Headers = (),
        body: Buffer = b"",
        timeout_s: float | None = None,
    ) -> Response: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *exception: type[BaseException] | BaseException | TracebackType | None) -> None: ...

def place(transfers: _Writable, names: Buffer, uname_prefix: bytes, digests: Buffer, endpoints: Buffer) -> None: ...
def build_info() -> dict[str, str]: ...
