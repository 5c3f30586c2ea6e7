"""The HTTP engine's life: what it refuses, cancel, close, forks, signals, memory that is held."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator

import numpy
import pytest
from http_faults import FaultServer, body_of
from http_support import TRANSPORTS, Asked, carried_by, engine_on, reap_all, run, run_one

from mlstor import Pattern
from mlstor._http import HttpEngine, build_info, place
from mlstor.storage.transfers import COMPLETION_DTYPE, TRANSFER_DTYPE, WHOLE, Kind, Memory, Op, zeros


@pytest.fixture(scope="module", params=TRANSPORTS)
def server(request: pytest.FixtureRequest) -> Iterator[FaultServer]:
    with FaultServer() as server, carried_by(request.param):
        yield server


@pytest.fixture(scope="module")
def engine(server: FaultServer) -> Iterator[HttpEngine]:
    with engine_on(server) as engine:
        yield engine


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"key_start": 2}, "outside names"),
        ({"key_nbytes": 2**32 - 1}, "outside names"),
        ({"query_start": 2**64 - 1, "query_nbytes": 2}, "outside names"),
        ({"endpoint": 1000}, "no such endpoint"),
        ({"op": 4}, "operation"),
        ({"digest": 4}, "digest"),
        ({"memory": 3}, "memory"),
        ({"memory": 1, "place": 5, "room": 4}, "outside the buffer"),
        ({"memory": 1, "place": 2**64 - 1, "room": 2}, "outside the buffer"),
        ({"memory": 2}, "needs a pattern"),
        ({"op": 1, "nbytes": 3}, "has a body"),
        ({"op": 1, "memory": 1, "nbytes": 9}, "outside the buffer"),
        ({"op": 1, "memory": 1, "nbytes": WHOLE}, "size is not known"),
        ({"nbytes": 0, "offset": 3}, "range of no bytes"),
        ({"nbytes": 2, "offset": WHOLE - 1}, "beyond 2"),
        ({"query_start": 0, "query_nbytes": 1}, "not escaped"),
    ],
)
def test_a_transfer_that_can_not_be_is_refused_and_none_is_taken(engine, server, fields, why):
    before = len(server.requests)
    array = Asked().add("x").add(" ").array
    array[1]["key_start"] = 0
    for name, value in fields.items():
        array[1][name] = value
    with pytest.raises(ValueError, match=f"transfer 1: .*{why}"):
        engine.submit(array, b" x", bytearray(8))
    assert engine.outstanding == 0
    assert len(server.requests) == before


def test_a_body_beyond_the_payload_buffer_is_refused(server):
    with engine_on(server, payload_bytes=1000) as engine:
        asked = Asked().add("put/x", op=Op.WRITE, memory=Memory.PATTERN, nbytes=1001)
        with pytest.raises(ValueError, match="in parts"):
            engine.submit(asked.array, asked.names, pattern=Pattern(1))


def test_wrong_arguments_are_refused_in_words(engine, server):
    with pytest.raises(ValueError, match="TRANSFER_DTYPE"):
        engine.submit(bytes(97), b"")
    with pytest.raises(ValueError, match="read-only"):
        engine.submit(Asked().add("x", memory=Memory.BUFFER, room=1).array, b"x", b"bytes")
    with pytest.raises(TypeError, match="Pattern"):
        engine.submit(Asked().add("x").array, b"x", pattern="no")
    for url in ("ftp://x", "http://", "x", "http://h:p", "http://h/?q", "http://h/#f", "http://h h/", "http://:80"):
        with pytest.raises(ValueError, match="a URL is"):
            engine.endpoint(url)
    with pytest.raises(ValueError, match="no user name") as caught:
        engine.endpoint("http://user:password@host")
    assert "password@" not in str(caught.value)
    for headers in ([("A\r\nB", "x")], [("A", "x\r\nB: y")], [("", "x")], [("A", "x\0y")]):
        with pytest.raises(ValueError, match=r"a header (is|holds)"):
            engine.endpoint(server.url, headers=headers)
        with pytest.raises(ValueError, match=r"a header (is|holds)"):
            engine.request(0, "GET", headers=headers)
    with pytest.raises(ValueError, match="dialect"):
        engine.endpoint(server.url, dialect="gopher")
    with pytest.raises(ValueError, match="query"):
        engine.endpoint(server.url, query="a b")
    with pytest.raises(ValueError, match="method"):
        engine.request(0, "BREW")
    with pytest.raises(ValueError, match="query"):
        engine.request(0, "GET", query="a b")
    with pytest.raises(ValueError, match="endpoint"):
        engine.request(99, "GET")
    with pytest.raises(ValueError, match="seconds"):
        engine.request(0, "GET", timeout_s=0)
    with pytest.raises(ValueError, match="token"):
        engine.bearer(0, "two words")
    with pytest.raises(ValueError, match="credential") as caught:
        engine.sign(0, "key", "sec\nret")
    assert "sec" not in str(caught.value).replace("second", "")
    for options in ({"workers": 257}, {"in_flight": 0}, {"tries": 0}, {"buffer_bytes": 1}, {"stall_timeout_s": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            HttpEngine(**options)


def test_nothing_to_do_is_done(engine):
    assert engine.submit(zeros(0, TRANSFER_DTYPE), b"") == 0
    assert engine.reap(zeros(4, COMPLETION_DTYPE)) == 0
    assert engine.failures() == []


def test_buffers_are_held_until_all_is_done_and_then_let_go(engine):
    memory, names = bytearray(10), bytearray(b"drip/10/4")
    array = Asked().add("drip/10/4", memory=Memory.BUFFER, room=10).array
    engine.submit(array, names, memory)
    for held in (memory, names):
        with pytest.raises(BufferError):
            held.append(1)
    assert (reap_all(engine)["result"] == 10).all()
    memory.append(1)
    names.append(1)


def test_reap_waits_no_longer_than_it_was_told(engine):
    asked = Asked().add("stall/99/1")
    engine.submit(asked.array, asked.names)
    out = zeros(1, COMPLETION_DTYPE)
    begun = time.monotonic()
    assert engine.reap(out, timeout_s=0.05) == 0
    assert time.monotonic() - begun >= 0.05
    engine.cancel()
    reap_all(engine)


def test_cancel_ends_what_waits_and_what_runs_and_nothing_later(server):
    with engine_on(server, workers=2, in_flight=2, stall_timeout_s=60, backoff_s=60, backoff_most_s=60) as engine:
        asked = Asked().add("stall/99/1").add("busy/99/503/1/cancel").add("stall-within/100000")
        for _ in range(50):
            asked.add("stall/99/2")
        asked.add("object/1", not_before_ns=time.monotonic_ns() + 10**12)
        engine.submit(asked.array, asked.names)
        time.sleep(0.2)
        begun = time.monotonic()
        engine.cancel()
        later = Asked().add("object/10", tag=1000)
        engine.submit(later.array, later.names)
        done = reap_all(engine)
        assert time.monotonic() - begun < 30
        assert len(done) == 55
        assert (done["kind"][:-1] == Kind.CANCELLED).all()
        assert (done["result"][:-1] == -errno.ECANCELED).all()
        assert (done["tag"][-1], done["result"][-1]) == (1000, 10)
        assert engine.failures() == []


def test_a_cancelled_write_that_the_server_has_whole_is_told_as_what_became_of_it(server):
    with engine_on(server, workers=1, in_flight=2, stall_timeout_s=60) as engine:
        asked = Asked()
        for key in ("think/1/9", "think/1/8"):
            asked.add(key, op=Op.WRITE, memory=Memory.PATTERN, nbytes=100_000)
        asked.add("put/not-begun", op=Op.WRITE, memory=Memory.PATTERN, nbytes=100_000)
        engine.submit(asked.array, asked.names, None, Pattern(1))
        while server.asked["/think/1/9"] + server.asked["/think/1/8"] < 2:
            time.sleep(0.01)
        engine.cancel()
        engine.cancel()
        done = reap_all(engine)
        assert done["kind"].tolist() == [Kind.OK, Kind.OK, Kind.CANCELLED]
        assert done["result"].tolist() == [100_000, 100_000, -errno.ECANCELED]
        assert server.asked["/put/not-begun"] == 0


def test_a_cancelled_write_is_waited_for_only_a_little(server):
    with engine_on(server, workers=1, in_flight=1, stall_timeout_s=60) as engine:
        asked = Asked().add("stall/9/9", op=Op.WRITE, memory=Memory.PATTERN, nbytes=1000)
        engine.submit(asked.array, asked.names, None, Pattern(1))
        while not server.asked["/stall/9/9"]:
            time.sleep(0.01)
        begun = time.monotonic()
        engine.cancel()
        assert reap_all(engine)["kind"].tolist() == [Kind.CANCELLED]
        assert 4 < time.monotonic() - begun < 50


def test_close_does_not_wait_for_the_server(server):
    engine = HttpEngine(workers=2, in_flight=2, stall_timeout_s=60)
    engine.endpoint(server.url)
    asked = Asked()
    for _ in range(20):
        asked.add("stall/99/3")
    engine.submit(asked.array, asked.names)
    time.sleep(0.1)
    begun = time.monotonic()
    engine.close()
    assert time.monotonic() - begun < 30
    engine.close()
    for use in (engine.cancel, engine.counters, engine.failures, lambda: engine.reap(zeros(1, COMPLETION_DTYPE))):
        with pytest.raises(ValueError, match="closed"):
            use()


def test_a_request_that_waits_ends_when_the_engine_is_closed(server):
    engine = HttpEngine(workers=1, stall_timeout_s=60)
    engine.endpoint(server.url)
    ends: list[str] = []

    def ask() -> None:
        try:
            engine.request(0, "GET", "stall/99/4")
        except ValueError as error:
            ends.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(12)]  # more than there are slots for
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    engine.close()
    for thread in threads:
        thread.join(60)
    assert ends == ["the HTTP engine is closed"] * 12


def test_requests_from_many_threads_at_once_each_get_their_own_answer(engine):
    found: list[bool] = []

    def ask(number: int) -> None:
        for i in range(10):
            nbytes = number * 100 + i
            found.append(engine.request(0, "GET", f"object/{nbytes}").body == body_of(nbytes))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 80


def test_credentials_can_be_renewed_while_transfers_run(server):
    with engine_on(server) as engine:
        endpoint = engine.endpoint(server.url, dialect="s3")
        asked = Asked()
        for i in range(200):
            asked.add(f"object/100/{i}", endpoint=endpoint)
        engine.sign(endpoint, "AKIDONE", "x" * 40)
        engine.submit(asked.array, asked.names)
        for i in range(50):
            engine.sign(endpoint, f"AKID{i}", "y" * 40, "token")
        assert not reap_all(engine)["kind"].any()
        run_one(engine, "object/1", endpoint=endpoint)
        assert "Credential=AKID49/" in server.requests[-1].headers["authorization"]


def test_an_engine_made_before_a_fork_says_so_in_the_child(engine):
    child = os.fork()
    if child == 0:
        try:
            engine.counters()
        except RuntimeError as error:
            os._exit(0 if "before a fork" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert run_one(engine, "object/10")["result"] == 10


def in_a_process(server: FaultServer, code: str) -> subprocess.Popen[str]:
    setup = f"""
        import sys, time
        sys.path[:0] = {sys.path!r}
        from http_support import *
        engine = HttpEngine(workers=2, stall_timeout_s=60)
        engine.endpoint({server.url!r})
        asked = Asked()
        for _ in range(40):
            asked.add("stall/99/5", memory=1, room=100)
        memory = bytearray(100)
        engine.submit(asked.array, asked.names, memory)
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(setup) + textwrap.dedent(code)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_ctrl_c_cancels_and_all_comes_back(server):
    code = """
        print("ready", flush=True)
        try:
            reap_all(engine)
        except KeyboardInterrupt:
            print(len(reap_all(engine)))
    """
    with in_a_process(server, code) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.1)
        child.send_signal(signal.SIGINT)
        said, errors = child.communicate(timeout=60)
    assert (said, errors, child.returncode) == ("40\n", "", 0)


@pytest.mark.parametrize("code", ["", "del engine, memory\n", "raise SystemExit\n"])
def test_a_process_ends_with_transfers_under_way(server, code):
    with in_a_process(server, code) as child:
        _, errors = child.communicate(timeout=60)
    assert (errors, child.returncode) == ("", 0)


def test_placement_fills_in_the_endpoints_by_key():
    array = Asked().add("obj1").add("obj2").add("ä ö").array
    names = "obj1obj2ä ö".encode()
    digests = numpy.array([11, 22, 33], "<u8")
    endpoints = numpy.array([5, 6, 7], "<u4")
    place(array, names, b"ais/@#/bench/", digests, endpoints)
    assert set(array["endpoint"].tolist()) <= {5, 6, 7}
    again = array.copy()
    place(again, names, b"ais/@#/bench/", digests[::-1].copy(), endpoints[::-1].copy())
    assert (again["endpoint"] == array["endpoint"]).all()
    with pytest.raises(ValueError, match="transfer 1"):
        place(array, b"obj1", b"", digests, endpoints)
    with pytest.raises(ValueError, match="one digest"):
        place(array, names, b"", digests, endpoints[:2].copy())


def test_the_build_names_its_libcurl():
    assert build_info()["libcurl"][0].isdigit()


def test_a_stream_of_small_submissions_holds_no_more_than_what_is_under_way(engine):
    for i in range(300):
        done = run(engine, Asked().add(f"object/{i}"))
        assert done["result"].tolist() == [i]


def test_no_transfer_asks_an_s3_bucket_itself(server):
    with engine_on(server) as engine:
        endpoint = engine.endpoint(f"{server.url}/bucket", dialect="s3")
        for op in Op:
            array = Asked().add("", op=op, endpoint=endpoint).array
            with pytest.raises(ValueError, match="key is empty"):
                engine.submit(array, b"")


@pytest.mark.parametrize("what", ["transfer", "request"])
def test_what_is_submitted_while_others_wait_for_their_server_begins_at_once(server, what):
    with engine_on(server, workers=1, stall_timeout_s=60) as engine:
        run_one(engine, "object/1")  # the connection is there
        stalled = Asked().add(f"stall/99/beside-a-{what}")
        engine.submit(stalled.array, stalled.names)
        time.sleep(0.1)
        took_s = []
        for _ in range(10):  # the machine may stand still meanwhile
            begun = time.monotonic()
            if what == "request":
                assert engine.request(0, "GET", "object/2").status == 200
            else:
                quick = Asked().add("object/2")
                engine.submit(quick.array, quick.names)
                assert engine.reap(zeros(1, COMPLETION_DTYPE), timeout_s=10) == 1
            took_s.append(time.monotonic() - begun)
        assert min(took_s) < 0.5  # not when the worker looks for stalls, once a second


def test_a_worker_full_of_stalled_transfers_goes_on_with_the_next(server):
    with engine_on(server, workers=1, in_flight=2, tries=1, stall_timeout_s=0.2) as engine:
        asked = Asked()
        for i in range(6):
            asked.add(f"stall/99/full-{i}")
        done = run(engine, asked)
        assert (done["kind"] == Kind.STALLED).all()


def test_a_connection_that_a_child_still_holds_keeps_no_worker_busy():
    with FaultServer() as server, engine_on(server, workers=1) as engine:
        run_one(engine, "object/1")
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        try:
            server.extra["Connection"] = "close"  # the engine closes its descriptor; the child's stays
            run_one(engine, "object/1")
            assert len(server.connections) == 1
            server.connections[0].shutdown(socket.SHUT_RDWR)
            spent_ns = []
            for _ in range(3):  # the least of them: a worker may be kept from its processor
                before = engine.counters()
                time.sleep(0.6)
                engine.request(0, "GET", "object/1")  # what the worker did is counted when it wakes
                spent_ns.append(engine.counters().busy_ns - before.busy_ns)
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert min(spent_ns) < 50_000_000  # a worker that turns in circles: 100 ms


def test_eight_requests_are_under_way_at_once(server):
    path = "stall/99/eight"
    with engine_on(server, workers=1, stall_timeout_s=60) as engine:

        def ask() -> None:
            with pytest.raises(OSError, match="GET"):
                engine.request(0, "GET", path, timeout_s=6)

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        until = time.monotonic() + 5.5
        while server.paths().count(f"/{path}") < 8 and time.monotonic() < until:
            time.sleep(0.01)
        asked = server.paths().count(f"/{path}")
        for thread in threads:
            thread.join()
        assert asked == 8
