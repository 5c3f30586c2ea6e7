"""An HTTP server on loopback in which each path does one thing wrong, for what a real server won't do on demand.

Paths: /KIND/ARGUMENT/ARGUMENT/anything. Objects hold `body_of(nbytes)`. What was asked is kept in `requests`.
"""

from __future__ import annotations

import base64
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, BinaryIO

from typing_extensions import Self

SERVER_ERROR = b'<?xml version="1.0"?><Error><Code>%s</Code><Message>as was asked for</Message></Error>'


_STRETCH = bytes((i * 7 + (i >> 8) * 13) & 0xFF for i in range(65521))


def body_of(nbytes: int) -> bytes:
    """What the server's objects hold: bytes that differ from one place to the next."""
    return (_STRETCH * (nbytes // len(_STRETCH) + 1))[:nbytes]


@dataclass(frozen=True)
class Request:
    """One request as it came."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes
    connection: int


class FaultServer:
    """Use as a context; `url` is its address, `objects` what was put into /put/..., `requests` all requests."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.requests: list[Request] = []
        self.objects: dict[str, bytes] = {}
        self.asked: Counter[str] = Counter()
        self.other = ""  # where /redirect sends to, if not here
        self.extra: dict[str, str] = {}  # headers of /object
        self.raw, self.raw_times = b"", 1 << 30  # what /raw answers, and how often before it is an object of 2 bytes
        self.stopping = threading.Event()
        self.lock = threading.Lock()
        self.connections: list[socket.socket] = []
        self.threads = [threading.Thread(target=self._accept, daemon=True)]

    def __enter__(self) -> Self:
        self.threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Closes the port and all connections, waits for the threads."""
        self.stopping.set()
        socket.create_connection(("127.0.0.1", self.port)).close()  # wakes the accept
        self.threads[0].join()
        self.listener.close()
        with self.lock:
            for connection in self.connections:
                with suppress(OSError):  # it may be gone already
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in self.threads[1:]:
            thread.join()

    def paths(self) -> list[str]:
        """Of the requests so far."""
        with self.lock:
            return [request.path for request in self.requests]

    def _accept(self) -> None:
        while True:
            connection, _ = self.listener.accept()
            if self.stopping.is_set():
                connection.close()
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self.lock:
                self.connections.append(connection)
                number = len(self.connections)
            thread = threading.Thread(target=self._serve, args=(connection, number), daemon=True)
            self.threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket, number: int) -> None:
        with connection, connection.makefile("rb") as stream:
            try:
                while not self.stopping.is_set():
                    request = self._read(connection, stream, number)
                    if request is None or not self._answer(connection, request):
                        return
            except OSError:
                return  # the client went away, or the server ends

    def _read(self, connection: socket.socket, stream: BinaryIO, number: int) -> Request | None:
        first = stream.readline().decode("latin-1").split()
        if len(first) != 3:
            return None
        headers = {}
        while line := stream.readline().decode("latin-1").strip():
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        if first[1] == "/refuse-body":  # before it is read
            self.send(connection, 403, SERVER_ERROR % b"TooEarly", Connection="close")
            time.sleep(0.2)
            return None
        body = stream.read(int(headers.get("content-length", 0))) or b""
        path, _, query = first[1].partition("?")
        request = Request(first[0], path, query, headers, body, number)
        with self.lock:
            self.requests.append(request)
            self.asked[path] += 1
        return request

    def _answer(self, connection: socket.socket, request: Request) -> bool:
        """False: the connection is not to be used again."""
        kind, *arguments = request.path.lstrip("/").split("/")
        answer: Callable[..., bool] = getattr(self, f"do_{kind.replace('-', '_')}", self.do_missing)
        return answer(connection, request, *arguments)

    def send(
        self, connection: socket.socket, status: int, body: bytes = b"", head: bool = False, **headers: str | int
    ) -> bool:
        """An answer with its length; underscores of header names stand for hyphens."""
        lines = [f"HTTP/1.1 {status} Status", f"Content-Length: {len(body)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        connection.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + (b"" if head else body))
        return True

    # ---- what goes well ----

    def do_object(self, connection: socket.socket, request: Request, nbytes: str, *_: str) -> bool:
        """Ranges, HEAD and DELETE too."""
        body = body_of(int(nbytes))
        if request.method == "DELETE":
            return self.send(connection, 204)
        extra: dict[str, Any] = dict(self.extra)
        wanted = request.headers.get("range")
        if wanted is None:
            return self.send(connection, 200, body, request.method == "HEAD", ETag='"tag of it"', **extra)
        first, last = wanted.removeprefix("bytes=").split("-")
        start, end = int(first), min(int(last or len(body)), len(body) - 1)
        if start >= len(body):
            return self.send(connection, 416, SERVER_ERROR % b"InvalidRange")
        said = f"bytes {start}-{end}/{len(body)}"
        return self.send(connection, 206, body[start : end + 1], Content_Range=said, **extra)

    def do_put(self, connection: socket.socket, request: Request, *_: str) -> bool:
        """PUT keeps, GET gives back."""
        if request.method == "PUT":
            self.objects[request.path] = request.body
            return self.send(connection, 200, ETag='"of a put"')
        return self.send(connection, 200, self.objects[request.path])

    def do_echo(self, connection: socket.socket, request: Request, *_: str) -> bool:
        """The request line's target and the body."""
        return self.send(
            connection, 200, f"{request.path}?{request.query}\n".encode() + request.body, X_Method=request.method
        )

    def do_unsized(self, connection: socket.socket, request: Request, nbytes: str, *_: str) -> bool:
        """In chunks, without a length; with a trailer."""
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        body = body_of(int(nbytes))
        for at in range(0, len(body), 1000):
            piece = body[at : at + 1000]
            connection.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
        connection.sendall(b"0\r\nContent-Length: 3\r\n\r\n")
        return True

    def do_until_close(self, connection: socket.socket, request: Request, nbytes: str, *_: str) -> bool:
        connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + body_of(int(nbytes)))
        return False

    def do_drip(self, connection: socket.socket, request: Request, nbytes: str, pieces: str, *_: str) -> bool:
        """Slowly, `pieces` pieces 50 ms apart."""
        body, count = body_of(int(nbytes)), int(pieces)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body))
        for i in range(count):
            time.sleep(0.05)
            connection.sendall(body[len(body) * i // count : len(body) * (i + 1) // count])
        return True

    def do_think(self, connection: socket.socket, request: Request, after_s: str, nbytes: str, *_: str) -> bool:
        """Silence, then the object."""
        self.stopping.wait(float(after_s))
        return self.do_object(connection, request, nbytes)

    # ---- what does not ----

    def do_missing(self, connection: socket.socket, request: Request, *_: str) -> bool:
        return self.send(connection, 404, SERVER_ERROR % b"NoSuchKey", request.method == "HEAD")

    def do_status(self, connection: socket.socket, request: Request, status: str, *_: str) -> bool:
        return self.send(connection, int(status), SERVER_ERROR % b"AsAsked", request.method == "HEAD")

    def do_json(self, connection: socket.socket, request: Request, status: str, *_: str) -> bool:
        return self.send(connection, int(status), b'{"status":1,"message":"it said \\"no\\" to this"}')

    def do_busy(
        self, connection: socket.socket, request: Request, times: str, status: str, nbytes: str, *_: str
    ) -> bool:
        """A status some times, then the object."""
        if self.asked[request.path] <= int(times):
            return self.send(connection, int(status), SERVER_ERROR % b"SlowDown", request.method == "HEAD")
        return self.do_object(connection, request, nbytes)

    def do_later(self, connection: socket.socket, request: Request, after_s: str, nbytes: str, *_: str) -> bool:
        """503 with Retry-After, then the object."""
        if self.asked[request.path] == 1:
            return self.send(connection, 503, Retry_After=after_s)
        return self.do_object(connection, request, nbytes)

    def do_reset(self, connection: socket.socket, request: Request, times: str, nbytes: str, *_: str) -> bool:
        """A reset some times, then the object."""
        if self.asked[request.path] <= int(times):
            self._reset(connection)
            return False
        return self.do_object(connection, request, nbytes)

    def do_torn(self, connection: socket.socket, request: Request, nbytes: str, *_: str) -> bool:
        """A reset in the middle of the body."""
        body = body_of(int(nbytes))
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body[: len(body) // 2])
        time.sleep(0.05)
        self._reset(connection)
        return False

    def do_half(self, connection: socket.socket, request: Request, times: str, nbytes: str, *_: str) -> bool:
        """A body that ends in its middle some times, then the object."""
        if self.asked[request.path] > int(times):
            return self.do_object(connection, request, nbytes)
        body = body_of(int(nbytes))
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body[: len(body) // 2])
        return False

    def do_unsized_half(self, connection: socket.socket, request: Request, nbytes: str, *_: str) -> bool:
        """A body in chunks whose last one never comes."""
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % int(nbytes))
        connection.sendall(body_of(int(nbytes) // 2))
        return False

    def do_stall(self, connection: socket.socket, request: Request, times: str, nbytes: str, *_: str) -> bool:
        """No answer some times, then the object."""
        if self.asked[request.path] <= int(times):
            self.stopping.wait(60)
            return False
        return self.do_object(connection, request, nbytes)

    def do_stall_within(self, connection: socket.socket, request: Request, nbytes: str, *_: str) -> bool:
        body = body_of(int(nbytes))
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body[: len(body) // 2])
        self.stopping.wait(60)
        return False

    def do_whole(self, connection: socket.socket, request: Request, nbytes: str, *_: str) -> bool:
        """Takes no notice of a range."""
        return self.send(connection, 200, body_of(int(nbytes)))

    def do_elsewhere(self, connection: socket.socket, request: Request, nbytes: str, *_: str) -> bool:
        """Another range than was asked for."""
        return self.send(connection, 206, body_of(10), Content_Range=f"bytes 1-10/{nbytes}")

    def do_garbage(self, connection: socket.socket, request: Request, *_: str) -> bool:
        connection.sendall(b"\x00\x01 this is not HTTP\r\n\r\n")
        return False

    def do_loop(self, connection: socket.socket, request: Request, status: str, *_: str) -> bool:
        return self.send(connection, int(status), b"moved", Location=f"{self.url}{request.path}")

    def do_redirect(self, connection: socket.socket, request: Request, status: str, *rest: str) -> bool:
        """To the same path, without these two parts, at `other`; as AIStore's proxy, with marks in the query."""
        place = f"{self.other or self.url}/{'/'.join(rest)}?pid=proxy&utm=mark"
        return self.send(connection, int(status), b"<a href=there>Moved</a>", Location=place)

    def do_raw(self, connection: socket.socket, request: Request, *_: str) -> bool:
        """These very bytes."""
        if self.raw_times <= 0:
            return self.do_object(connection, request, "2")
        self.raw_times -= 1
        connection.sendall(self.raw)
        return True

    def do_astray(self, connection: socket.socket, request: Request, *_: str) -> bool:
        return self.send(connection, 307, Location="ftp://127.0.0.1/somewhere")

    @staticmethod
    def _reset(connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RD)
        connection.close()


def s3_crc(crc: int) -> str:
    """A CRC-32C as S3 writes it."""
    return base64.b64encode(crc.to_bytes(4, "big")).decode()
