"""Transfers over the engine's own connections: what they send, when a connection is used again, and by whom else."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Iterator

import pytest
from http_faults import FaultServer, body_of
from http_support import Asked, carried_by, engine_on, run, run_one

from mlstor._http import HttpEngine
from mlstor.storage.transfers import Kind, Memory, Op


@pytest.fixture(scope="module")
def server() -> Iterator[FaultServer]:
    with FaultServer() as server:
        yield server


@pytest.fixture
def engine(server: FaultServer) -> Iterator[HttpEngine]:
    """One connection at a time."""
    with engine_on(server, workers=1, in_flight=1, libcurl_only=False) as engine:
        yield engine


def test_both_ways_ask_for_the_same(server):
    asked = []
    for libcurl_only in (False, True):
        with engine_on(server, workers=1, in_flight=1, libcurl_only=libcurl_only) as engine:
            endpoint = engine.endpoint(
                f"{server.url}/object/1000", dialect="s3", query="x=1", headers=[("X-Empty", ""), ("X-Own", "a b")]
            )
            engine.sign(endpoint, "AKID", "secret")
            begun = len(server.requests)
            run_one(engine, "key ä", endpoint=endpoint, digest=1)
            run_one(engine, "key", "y=2", endpoint=endpoint, offset=5, nbytes=10)
            run_one(engine, "key", endpoint=endpoint, op=Op.STAT)
            run_one(engine, "key", endpoint=endpoint, op=Op.DELETE)
            for nbytes in (0, 100):
                run_one(
                    engine,
                    "key",
                    buffer=b"b" * 100,
                    endpoint=endpoint,
                    op=Op.WRITE,
                    memory=Memory.BUFFER,
                    nbytes=nbytes,
                )
            asked.append(server.requests[begun:])
    for ours, theirs in zip(*asked, strict=True):
        for request in (ours, theirs):
            del request.headers["x-amz-date"]
            request.headers["authorization"], _, signature = request.headers["authorization"].partition(" Signature=")
            assert len(signature) == 64
        assert (ours.method, ours.path, ours.query, ours.body) == (
            theirs.method,
            theirs.path,
            theirs.query,
            theirs.body,
        )
        assert ours.headers == theirs.headers


def test_libcurl_carries_what_has_headers_of_its_own_framing(server):
    with engine_on(server, libcurl_only=False) as engine:
        endpoint = engine.endpoint(server.url, headers=[("User-Agent", "somebody"), ("Accept", "text/plain")])
        assert run_one(engine, "object/10", endpoint=endpoint)["result"] == 10
        found = server.requests[-1].headers
        assert (found["user-agent"], found["accept"]) == ("somebody", "text/plain")


@pytest.mark.parametrize(
    ("raw", "result", "again"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", 2, True),
        (b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok", 2, True),
        (b"HTTP/1.1 103 Early\r\nLink: a\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", 2, True),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", 2, False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", 2, False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nX", 2, False),
        (b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 30_000 + b"\r\nContent-Length: 2\r\n\r\nok", 2, True),
        (b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 70_000 + b"\r\nContent-Length: 2\r\n\r\nok", None, False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok!", None, False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", None, False),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", None, False),
    ],
)
def test_a_connection_is_used_again_where_nothing_speaks_against_it(server, engine, raw, result, again):
    server.raw = raw
    memory = bytearray(4)
    first = run_one(engine, "raw", buffer=memory, memory=Memory.BUFFER, room=4)
    if result is None:
        assert (first["kind"], first["result"], first["attempts"]) == (Kind.OTHER, -errno.EIO, 1)
        assert engine.failures()[0].message
    else:
        assert (first["kind"], first["result"], bytes(memory)) == (Kind.OK, result, b"ok\0\0")
    before = server.requests[-1].connection
    assert run_one(engine, "object/10")["kind"] == Kind.OK
    assert (server.requests[-1].connection == before) == again


def test_a_timeout_that_was_sent_to_a_resting_connection_is_no_answer(server, engine):
    """As HAProxy does: 408 and the end, which may cross the next request."""
    run_one(engine, "object/10")
    server.raw, server.raw_times = b"HTTP/1.1 408 Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", 1
    done = run_one(engine, "raw")
    assert (done["kind"], done["result"], done["attempts"]) == (Kind.OK, 2, 1)
    server.raw_times = 99
    with engine_on(server, workers=1, libcurl_only=False) as fresh:
        assert run_one(fresh, "raw")["status"] == 408  # a new connection's is meant
    server.raw_times = 0


def test_an_answer_before_the_body_was_sent_counts(engine):
    nbytes = 32 << 20
    done = run_one(engine, "refuse-body", buffer=bytes(nbytes), op=Op.WRITE, memory=Memory.BUFFER, nbytes=nbytes)
    assert (done["kind"], done["status"], done["attempts"]) == (Kind.HTTP, 403, 1)
    assert run_one(engine, "object/10")["kind"] == Kind.OK


def test_a_body_that_the_server_takes_slowly_arrives_whole(server, engine):
    body = body_of(20_000_000)
    done = run_one(engine, "put/slow", buffer=body, op=Op.WRITE, memory=Memory.BUFFER, nbytes=len(body))
    assert done["result"] == len(body)
    assert server.objects["/put/slow"] == body


def test_a_write_by_a_connection_that_the_server_closed_is_sent_again(engine):
    with FaultServer() as server, engine_on(server, workers=1, in_flight=1, tries=1, libcurl_only=False) as engine:
        for i in range(5):
            body = bytes([i]) * 300_000
            done = run_one(engine, "put/x", buffer=body, op=Op.WRITE, memory=Memory.BUFFER, nbytes=len(body))
            assert (done["kind"], done["attempts"]) == (Kind.OK, 1)
            assert server.objects["/put/x"] == body
            server.connections[-1].shutdown(socket.SHUT_RDWR)
            if i % 2:
                time.sleep(0.02)  # otherwise it may cross the next request


def test_servers_have_connections_of_their_own(server, engine):
    with FaultServer() as other:
        endpoint = engine.endpoint(other.url)
        asked = Asked()
        for i in range(20):
            asked.add(f"object/{i}", endpoint=endpoint if i % 2 else 0)
        assert run(engine, asked)["result"].tolist() == list(range(20))
        assert len(other.connections) == 1
    assert engine.counters().connections == 2


def test_a_name_is_resolved(server, engine):
    endpoint = engine.endpoint(f"http://localhost:{server.port}")
    for _ in range(3):
        assert run_one(engine, "object/10", endpoint=endpoint)["result"] == 10
    assert server.requests[-1].headers["host"] == f"localhost:{server.port}"


def test_the_tests_of_faults_run_over_both(server):
    with carried_by("libcurl"), engine_on(server, workers=1, in_flight=1) as engine:
        server.raw = b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 70_000 + b"\r\nContent-Length: 2\r\n\r\nok"
        assert run_one(engine, "raw")["kind"] == Kind.OK  # only our own refuses this
