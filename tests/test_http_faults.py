"""What goes wrong over HTTP: how it is told, what is tried again, and what never is."""

from __future__ import annotations

import errno
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest
from http_faults import FaultServer, body_of
from http_support import TRANSPORTS, Asked, carried_by, engine_on, run, run_one

from mlstor._http import HttpEngine
from mlstor.storage.transfers import Kind, Memory, Op


@pytest.fixture(scope="module", params=TRANSPORTS)
def server(request: pytest.FixtureRequest) -> Iterator[FaultServer]:
    with FaultServer() as server, carried_by(request.param):
        yield server


@pytest.fixture
def engine(server: FaultServer) -> Iterator[HttpEngine]:
    with engine_on(server) as engine:
        yield engine


@pytest.fixture
def name(server: FaultServer, request: pytest.FixtureRequest) -> str:
    """Ends a path, so that no two tests count together."""
    return f"{len(server.requests)}"


# ---- tried again ----


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again_and_that_is_told(engine, name, status):
    done = run_one(engine, f"busy/2/{status}/1000/{name}")
    assert (done["kind"], done["result"], done["attempts"]) == (Kind.OK, 1000, 3)
    assert (done["first_kind"], done["first_status"], done["status"]) == (Kind.HTTP, status, 200)
    assert done["attempt_ns"] > done["start_ns"]
    assert engine.counters().retries == 2
    assert engine.failures() == []


def test_a_server_that_stays_busy_is_given_up_after_the_tries(server, engine, name):
    done = run_one(engine, f"busy/99/503/1000/{name}")
    assert (done["kind"], done["result"], done["attempts"], done["status"]) == (Kind.HTTP, -errno.EBUSY, 5, 503)
    [failure] = engine.failures()
    assert (failure.kind, failure.status, failure.message) == (Kind.HTTP, 503, "SlowDown: as was asked for")
    assert failure.url == f"{server.url}/busy/99/503/1000/{name}"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 412, 501])
def test_a_refusal_is_not_tried_again(server, engine, name, status):
    done = run_one(engine, f"status/{status}/{name}")
    assert (done["kind"], done["attempts"], done["status"]) == (Kind.HTTP, 1, status)
    assert done["result"] == -{404: errno.ENOENT, 401: errno.EACCES, 403: errno.EACCES}.get(status, errno.EIO)
    [failure] = engine.failures()
    assert failure.message == "AsAsked: as was asked for"
    head = run_one(engine, f"status/{status}/{name}", op=Op.STAT)
    assert (head["kind"], head["status"]) == (Kind.HTTP, status)
    assert engine.failures()[0].message == f"the server answered with status {status}"


def test_a_json_refusal_is_read_too(engine, name):
    run_one(engine, f"json/400/{name}")
    assert engine.failures()[0].message == 'it said "no" to this'


@pytest.mark.parametrize(
    ("path", "kind"),
    [("reset/2/1000", Kind.RESET), ("half/2/1000", Kind.SHORT), ("stall/2/1000", Kind.STALLED)],
)
def test_what_breaks_off_is_tried_again_and_what_came_before_does_not_count(engine, name, path, kind):
    memory = bytearray(1000)
    done = run_one(engine, f"{path}/{name}", buffer=memory, memory=Memory.BUFFER, room=1000, digest=1)
    assert (done["kind"], done["result"], done["attempts"], done["first_kind"]) == (Kind.OK, 1000, 3, kind)
    assert memory == body_of(1000)


@pytest.mark.parametrize(
    ("path", "kind", "error"),
    [
        ("torn/500000", Kind.RESET, errno.ECONNRESET),
        ("half/9/500000", Kind.SHORT, errno.ENODATA),
        ("unsized-half/5000", Kind.SHORT, errno.ENODATA),
        ("stall-within/500000", Kind.STALLED, errno.ETIMEDOUT),
        ("reset/99/10", Kind.RESET, errno.ECONNRESET),
    ],
)
def test_what_stays_broken_ends_with_its_kind(server, name, path, kind, error):
    with engine_on(server, tries=2) as engine:
        done = run_one(engine, f"{path}/{name}")
        assert (Kind(done["kind"]), done["attempts"], Kind(done["first_kind"])) == (kind, 2, kind)
        assert done["result"] == -error
        assert engine.failures()[0].message


def test_retry_after_is_waited_for_up_to_the_cap(engine, name):
    done = run_one(engine, f"later/1/100/{name}")  # one second, cap half of it
    waited = (done["attempt_ns"] - done["start_ns"]) / 1e9
    assert (done["kind"], done["attempts"]) == (Kind.OK, 2)
    assert waited >= 0.5
    done = run_one(engine, f"later/0/100/{name}")
    assert (done["kind"], done["attempts"]) == (Kind.OK, 2)


def test_waits_grow_and_are_random(server, name):
    waits = []
    with engine_on(server, tries=4, backoff_s=0.02, in_flight=16) as engine:
        asked = Asked()
        for i in range(32):
            asked.add(f"busy/9/503/1/{name}/{i}")
        done = run(engine, asked)
        waits = ((done["attempt_ns"] - done["start_ns"]) / 1e9).tolist()
    assert max(waits) < 10
    assert len({round(wait, 4) for wait in waits}) > 10


def test_a_transfer_that_waits_for_its_retry_holds_nobody_up(server, name):
    with engine_on(server, workers=1, in_flight=2, backoff_s=30, backoff_most_s=30, tries=2) as engine:
        asked = Asked().add(f"busy/1/503/10/{name}")
        for i in range(20):
            asked.add(f"object/10/{name}/{i}")
        engine.submit(asked.array, asked.names)
        from mlstor.storage.transfers import COMPLETION_DTYPE, zeros

        out = zeros(21, COMPLETION_DTYPE)
        assert engine.reap(out, 20, timeout_s=60) == 20
        assert not out["kind"][:20].any()


def test_a_kept_connection_that_the_server_closed_is_replaced_without_a_failure(name):
    with FaultServer() as server, engine_on(server, workers=1, in_flight=1, tries=1) as engine:
        for _ in range(5):
            done = run_one(engine, f"object/10/{name}")
            assert (done["kind"], done["attempts"]) == (Kind.OK, 1)
            with server.lock:
                for connection in server.connections:
                    try:
                        connection.shutdown(socket.SHUT_RDWR)
                    except OSError:
                        continue
            time.sleep(0.02)


# ---- the wrong object ----


def test_an_object_of_another_length_than_the_catalog_says_is_refused(engine, name):
    for path in ("object/1000", "unsized/1000"):
        for known in (999, 1001):
            done = run_one(engine, f"{path}/{name}", object_nbytes=known)
            assert (done["kind"], done["attempts"], done["result"]) == (Kind.LENGTH, 1, -errno.EMSGSIZE)
    done = run_one(engine, f"object/1000/{name}", object_nbytes=999, op=Op.STAT)
    assert (done["kind"], done["object_nbytes"]) == (Kind.LENGTH, 1000)


@pytest.mark.parametrize("path", ["object/1000", "unsized/1000", "until-close/1000"])
def test_nothing_is_written_beyond_the_room(engine, path):
    memory = bytearray(1000)
    done = run_one(engine, path, buffer=memory, memory=Memory.BUFFER, room=999)
    assert done["kind"] == Kind.LENGTH
    assert memory[999] == 0


def test_a_range_beyond_the_end_is_refused(engine):
    assert run_one(engine, "object/1000", offset=990, nbytes=20)["kind"] == Kind.LENGTH
    done = run_one(engine, "object/1000", offset=1000, nbytes=20)
    assert (done["kind"], done["status"], done["result"]) == (Kind.HTTP, 416, -errno.EINVAL)


@pytest.mark.parametrize("path", ["whole/1000", "elsewhere/1000"])
def test_a_server_that_takes_no_notice_of_ranges_is_found_out(engine, path):
    done = run_one(engine, path, offset=10, nbytes=20)
    assert (done["kind"], done["attempts"]) == (Kind.LENGTH, 1)
    assert "range" in engine.failures()[0].message


def test_what_is_no_http_is_an_error(engine):
    done = run_one(engine, "garbage")
    assert (done["kind"], done["result"] < 0) == (Kind.OTHER, True)


# ---- redirects ----


@pytest.mark.parametrize("op", [Op.READ, Op.WRITE, Op.STAT])
def test_a_redirect_loop_ends(server, engine, name, op):
    endpoint = engine.endpoint(server.url, follow=True)
    fields = {"memory": Memory.BUFFER, "nbytes": 3} if op == Op.WRITE else {}
    done = run_one(engine, f"loop/307/{name}", buffer=b"abc", endpoint=endpoint, op=op, **fields)
    assert (done["kind"], done["result"], done["attempts"]) == (Kind.REDIRECT, -errno.ELOOP, 1)
    assert server.paths().count(f"/loop/307/{name}") == 6


def test_a_redirect_out_of_http_is_not_followed(server, engine):
    endpoint = engine.endpoint(server.url, follow=True)
    assert run_one(engine, "astray", endpoint=endpoint)["kind"] == Kind.REDIRECT


def test_a_redirect_is_a_refusal_where_none_is_to_be_followed(engine):
    done = run_one(engine, "redirect/307/object/10")
    assert (done["kind"], done["status"]) == (Kind.HTTP, 307)


def test_a_failure_behind_a_redirect_shows_no_query(server, engine, name):
    endpoint = engine.endpoint(server.url, follow=True)
    run_one(engine, f"redirect/307/status/403/{name}", endpoint=endpoint)
    [failure] = engine.failures()
    assert failure.url.endswith(f"/status/403/{name}")


def test_an_authorization_header_does_not_follow_to_another_server(server, name):
    with engine_on(server) as engine, FaultServer() as elsewhere:
        endpoint = engine.endpoint(
            server.url, headers=[("Authorization", "Bearer of-ours"), ("X-Other", "1")], follow=True
        )
        server.other = elsewhere.url
        try:
            assert run_one(engine, f"redirect/307/object/10/{name}", endpoint=endpoint)["kind"] == Kind.OK
        finally:
            server.other = ""
        assert server.requests[-1].headers["authorization"] == "Bearer of-ours"
        assert "authorization" not in elsewhere.requests[-1].headers
        assert elsewhere.requests[-1].headers["x-other"] == "1"


def test_a_retry_starts_where_the_transfer_did(server, engine, name):
    server.other = ""
    endpoint = engine.endpoint(server.url, follow=True)
    done = run_one(engine, f"redirect/307/busy/1/503/10/{name}", endpoint=endpoint)
    assert (done["kind"], done["attempts"], done["first_status"]) == (Kind.OK, 2, 503)
    assert server.paths().count(f"/redirect/307/busy/1/503/10/{name}") == 2


def test_a_control_answer_is_bounded(engine):
    with pytest.raises(OSError, match="64 MiB") as caught:
        engine.request(0, "GET", f"object/{(64 << 20) + 1}")
    assert caught.value.errno == errno.EMSGSIZE
    assert len(engine.request(0, "GET", f"object/{64 << 20}").body) == 64 << 20


# ---- no connection ----


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_nobody_listens(server):
    with engine_on(server, tries=2) as engine:
        endpoint = engine.endpoint(f"http://127.0.0.1:{free_port()}")
        done = run_one(engine, "x", endpoint=endpoint)
        assert (done["kind"], done["result"], done["attempts"]) == (Kind.CONNECT, -errno.ECONNREFUSED, 2)
        with pytest.raises(ConnectionRefusedError) as caught:
            engine.request(endpoint, "GET", "x")
        assert caught.value.filename == engine.failures()[0].url


def test_a_server_that_comes_back_is_reached_again(server):
    port = free_port()
    with engine_on(server, tries=10, backoff_s=0.1) as engine:
        endpoint = engine.endpoint(f"http://127.0.0.1:{port}")
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

        def later() -> None:
            time.sleep(0.2)
            listener.bind(("127.0.0.1", port))
            listener.listen()
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

        thread = threading.Thread(target=later)
        thread.start()
        done = run_one(engine, "x", endpoint=endpoint)
        thread.join()
        listener.close()
        assert (done["kind"], done["result"], done["first_kind"]) == (Kind.OK, 2, Kind.CONNECT)


def test_a_name_that_does_not_resolve(server):
    with engine_on(server, tries=1, stall_timeout_s=20) as engine:
        endpoint = engine.endpoint("http://no-such-host.invalid")
        done = run_one(engine, "x", endpoint=endpoint)
        assert (done["kind"], done["result"]) == (Kind.RESOLVE, -errno.EHOSTUNREACH)


def test_a_connection_that_is_never_accepted_ends_by_the_connect_timeout(server):
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(0)
    waiting = []
    for _ in range(3):  # fills the backlog: the next SYN gets no answer
        client = socket.socket()
        client.setblocking(False)
        client.connect_ex(listener.getsockname())
        waiting.append(client)
    with engine_on(server, tries=1, connect_timeout_s=0.3, stall_timeout_s=20) as engine:
        endpoint = engine.endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}")
        done = run_one(engine, "x", endpoint=endpoint)
        assert (done["kind"], done["result"]) == (Kind.CONNECT, -errno.ETIMEDOUT)
    for held in (*waiting, listener):
        held.close()


def test_a_request_ends_by_its_timeout(engine):
    begun = time.monotonic()
    with pytest.raises(TimeoutError):
        engine.request(0, "GET", "stall/99/1", timeout_s=0.2)
    assert time.monotonic() - begun < 30


def test_a_server_may_think_as_long_as_the_request_waits(engine, server, name):
    answer = engine.request(0, "POST", f"think/1.5/10/{name}", timeout_s=20)  # the stall timeout is 0.5 s
    assert (answer.status, len(answer.body)) == (200, 10)
    assert server.asked[f"/think/1.5/10/{name}"] == 1


# ---- TLS ----


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    """A server with a certificate of its own making: its URL and the certificate's file."""
    place = tmp_path_factory.mktemp("tls")
    key, certificate = place / "key.pem", place / "certificate.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        check=False, capture_output=True,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("no openssl to make a certificate with")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    listener = socket.create_server(("127.0.0.1", 0))
    ending = threading.Event()

    def serve() -> None:
        while True:
            raw, _ = listener.accept()
            if ending.is_set():
                raw.close()
                return
            try:
                with context.wrap_socket(raw, server_side=True) as connection:
                    while connection.recv(4096):
                        body = body_of(100_000)
                        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            except OSError:
                continue  # a client that trusts nobody

    thread = threading.Thread(target=serve)
    thread.start()
    yield f"https://127.0.0.1:{listener.getsockname()[1]}", str(certificate)
    ending.set()
    socket.create_connection(listener.getsockname()).close()
    thread.join()
    listener.close()


def test_a_certificate_is_trusted_when_its_maker_is(server, tls):
    url, certificate = tls
    for options, kind in (({}, Kind.TLS), ({"ca_file": certificate}, Kind.OK), ({"insecure": True}, Kind.OK)):
        with engine_on(server, **options) as engine:
            memory = bytearray(100_000)
            done = run_one(
                engine, "x", endpoint=engine.endpoint(url), buffer=memory, memory=Memory.BUFFER, room=100_000
            )
            assert (Kind(done["kind"]), done["attempts"]) == (kind, 1)
            assert (memory == body_of(100_000)) == (kind == Kind.OK)


def test_a_ca_file_that_is_not_there_is_said_at_once(server):
    with pytest.raises(FileNotFoundError, match=r"no-such\.pem"), engine_on(server, ca_file="/no-such.pem"):
        pass
