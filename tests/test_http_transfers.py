"""Transfers over HTTP that go well: bytes, ranges, patterns, checksums, redirects, control requests."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import google_crc32c
import numpy
import pytest
import xxhash
from http_faults import FaultServer, body_of, s3_crc
from http_support import TRANSPORTS, Asked, carried_by, engine_on, reap_all, run, run_one
from hypothesis import given, settings, strategies as st

from mlstor import Pattern
from mlstor._http import HttpEngine
from mlstor.storage.transfers import WHOLE, Digest, Kind, Memory, Op


@pytest.fixture(scope="module", params=TRANSPORTS)
def server(request: pytest.FixtureRequest) -> Iterator[FaultServer]:
    with FaultServer() as server, carried_by(request.param):
        yield server


@pytest.fixture(scope="module")
def engine(server: FaultServer) -> Iterator[HttpEngine]:
    with engine_on(server) as engine:
        yield engine


def crc32c(data: bytes) -> int:
    return int(google_crc32c.value(data))


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 65536, 1_000_003])
def test_an_object_lands_in_its_place_and_nowhere_else(engine, nbytes):
    memory = bytearray(b"\xaa" * (nbytes + 200))
    done = run_one(engine, f"object/{nbytes}", buffer=memory, memory=Memory.BUFFER, place=100, room=nbytes)
    assert (Kind(done["kind"]), done["result"], done["object_nbytes"], done["status"]) == (0, nbytes, nbytes, 200)
    assert memory[100:-100] == body_of(nbytes)
    assert memory[:100] == memory[-100:] == b"\xaa" * 100
    assert done["etag"] == b"tag of it"
    assert 0 < done["submit_ns"] <= done["start_ns"] <= done["attempt_ns"] < done["first_byte_ns"] <= done["end_ns"]
    assert (done["attempts"], done["redirect_ns"], done["first_kind"]) == (1, 0, Kind.OK)


@pytest.mark.parametrize(
    ("offset", "nbytes", "known"),
    [(0, 10, WHOLE), (5, 1, 1000), (999, 1, WHOLE), (400, WHOLE, 1000), (17, WHOLE, WHOLE), (0, 1000, WHOLE)],
)
def test_a_range_is_the_bytes_asked_for(engine, server, offset, nbytes, known):
    want = body_of(1000)[offset : None if nbytes == WHOLE else offset + nbytes]
    memory = bytearray(1000)
    done = run_one(engine, "object/1000", buffer=memory, memory=Memory.BUFFER, room=1000, offset=offset, nbytes=nbytes,
                   object_nbytes=known)  # fmt: skip
    assert (done["kind"], done["result"], done["object_nbytes"], done["status"]) == (0, len(want), 1000, 206)
    assert memory[: len(want)] == want
    assert "range" in server.requests[-1].headers


def test_a_range_that_is_the_whole_object_is_asked_for_as_such(engine, server):
    done = run_one(engine, "object/1000", nbytes=1000, object_nbytes=1000)
    assert (done["status"], done["result"]) == (200, 1000)
    assert "range" not in server.requests[-1].headers


@pytest.mark.parametrize("path", ["unsized/20001", "until-close/20001", "drip/20001/4"])
def test_a_body_without_length_or_in_drops_is_taken_as_it_comes(engine, path):
    memory = bytearray(20001)
    done = run_one(engine, path, buffer=memory, memory=Memory.BUFFER, room=20001)
    assert (done["kind"], done["result"], done["object_nbytes"]) == (0, 20001, 20001)
    assert memory == body_of(20001)


def test_many_at_once_each_come_back_once_with_their_own_bytes(engine):
    asked, sizes = Asked(), [(i * 7919) % 50_000 for i in range(200)]
    for i, nbytes in enumerate(sizes):
        asked.add(f"object/{nbytes}/{i}", memory=Memory.BUFFER, place=i * 50_000, room=nbytes, object_nbytes=nbytes)
    memory = bytearray(200 * 50_000)
    done = run(engine, asked, memory)
    assert done["tag"].tolist() == list(range(200))
    assert done["result"].tolist() == sizes
    assert not done["kind"].any()
    for i, nbytes in enumerate(sizes):
        assert memory[i * 50_000 : i * 50_000 + nbytes] == body_of(nbytes)


def test_connections_are_kept_and_their_making_is_noted(server):
    with engine_on(server, workers=1, in_flight=2) as engine:
        first = run_one(engine, "object/10")
        assert first["flags"] & 1
        asked = Asked()
        for i in range(50):
            asked.add(f"object/10/{i}")
        done = run(engine, asked)
        assert (done["flags"] & 1).sum() <= 1
        counters = engine.counters()
        assert counters.connections <= 2
        assert (counters.requests, counters.received_bytes, counters.retries) == (51, 510, 0)


# ---- patterns and digests ----


@settings(max_examples=30)
@given(
    nbytes=st.integers(1, 300_000),
    offset=st.integers(0, 20_000),
    compressibility=st.sampled_from([0, 30]),
)
def test_what_a_pattern_wrote_is_what_a_pattern_reads(engine, server, nbytes, offset, compressibility):
    pattern = Pattern(7, 3, compressibility=compressibility)
    wrote = run_one(engine, "put/it", pattern=pattern, op=Op.WRITE, memory=Memory.PATTERN, place=42, nbytes=nbytes,
                    offset=offset)  # fmt: skip
    assert (wrote["kind"], wrote["result"], wrote["etag"]) == (0, nbytes, b"of a put")
    want = bytearray(nbytes)
    Pattern(7, 3, 42, compressibility).fill(want, offset)
    assert server.objects["/put/it"] == want
    if offset == 0:
        done = run_one(engine, "put/it", pattern=pattern, memory=Memory.PATTERN, place=42)
        assert (done["kind"], done["result"], done["damaged_blocks"]) == (0, nbytes, 0)
        other = run_one(engine, "put/it", pattern=pattern, memory=Memory.PATTERN, place=43)
        tail = nbytes % 4096 >= 40  # less of a block may hold nothing in which two patterns differ
        assert nbytes // 4096 + tail <= other["damaged_blocks"] <= nbytes // 4096 + 1


def test_a_damaged_block_is_counted_once_wherever_the_pieces_of_the_body_end(engine, server):
    want = bytearray(300_000)
    Pattern(1, file_id=5).fill(want)
    for at in (0, 4096, 150_000, 150_001, 299_999):
        want[at] ^= 1
    server.objects["/put/damaged"] = bytes(want)
    done = run_one(engine, "put/damaged", pattern=Pattern(1), memory=Memory.PATTERN, place=5)
    assert (done["kind"], done["damaged_blocks"]) == (0, 4)


@pytest.mark.parametrize(
    ("digest", "of"),
    [(Digest.CRC32C, crc32c), (Digest.CRC32, zlib.crc32), (Digest.XXH64, lambda d: xxhash.xxh64(d).intdigest())],
)
def test_digests_are_those_of_the_bytes(engine, server, digest, of):
    want = of(body_of(200_001))
    for fields in ({}, {"offset": 0, "nbytes": 200_001}):
        done = run_one(engine, "object/200001", digest=digest, **fields)
        assert (done["kind"], done["digest_value"]) == (0, want)
    done = run_one(engine, "object/200001", digest=digest, digest_value=want, flags=1)
    assert done["kind"] == Kind.OK
    done = run_one(engine, "object/200001", digest=digest, digest_value=want ^ 1, flags=1)
    assert (done["kind"], done["attempts"]) == (Kind.CHECKSUM, 1)
    done = run_one(engine, "put/d", buffer=body_of(5000), op=Op.WRITE, memory=Memory.BUFFER, nbytes=5000, digest=digest)
    assert done["digest_value"] == of(body_of(5000))


def test_s3_checksums_are_asked_for_sent_and_compared(engine, server):
    endpoint = engine.endpoint(server.url, dialect="s3")
    good, bad = s3_crc(crc32c(body_of(9000))), s3_crc(1)
    for said, kind, flags in ((good, Kind.OK, 2), (bad, Kind.CHECKSUM, 2), (bad + "-3", Kind.OK, 0)):
        server.extra = {"x-amz-checksum-crc32c": said}
        done = run_one(engine, "object/9000", endpoint=endpoint, digest=Digest.CRC32C)
        assert (done["kind"], done["flags"] & 2) == (kind, flags)
        assert server.requests[-1].headers["x-amz-checksum-mode"] == "ENABLED"
        done = run_one(engine, "object/9000", endpoint=endpoint, digest=Digest.CRC32C, offset=1, nbytes=10)
        assert (done["kind"], done["flags"] & 2) == (Kind.OK, 0)
    server.extra = {}
    assert [failure.kind for failure in engine.failures()][-1] == Kind.CHECKSUM
    run_one(engine, "put/c", buffer=body_of(9000), endpoint=endpoint, op=Op.WRITE, memory=Memory.BUFFER, nbytes=9000,
            digest=Digest.CRC32C)  # fmt: skip
    assert server.requests[-1].headers["x-amz-checksum-crc32c"] == good


@pytest.mark.parametrize("dialect", ["s3", "ais"])
def test_a_crc32_is_computed_and_stays_here(engine, server, dialect):
    endpoint, body = engine.endpoint(server.url, dialect=dialect), body_of(9000)
    server.extra = {"x-amz-checksum-crc32c": s3_crc(1), "Ais-Checksum-Type": "crc32c", "Ais-Checksum-Value": "00000001"}
    done = run_one(engine, "object/9000", endpoint=endpoint, digest=Digest.CRC32)
    assert (done["kind"], done["flags"] & 2, done["digest_value"]) == (Kind.OK, 0, zlib.crc32(body))
    assert "x-amz-checksum-mode" not in server.requests[-1].headers
    server.extra = {}
    done = run_one(engine, "put/e", buffer=body, endpoint=endpoint, op=Op.WRITE, memory=Memory.BUFFER, nbytes=9000,
                   digest=Digest.CRC32)  # fmt: skip
    assert done["digest_value"] == zlib.crc32(body)
    assert not [name for name in server.requests[-1].headers if "checksum" in name.lower()]


def test_aistore_checksums_are_sent_and_compared_but_for_ranges(engine, server):
    endpoint = engine.endpoint(server.url, dialect="ais")
    body = body_of(9000)
    for kind, digest, value in (
        ("xxhash2", Digest.XXH64, xxhash.xxh64(body).hexdigest()),
        ("xxhash", Digest.XXH64, xxhash.xxh64(body).hexdigest()),
        ("crc32c", Digest.CRC32C, f"{crc32c(body):08x}"),
    ):
        server.extra = {"Ais-Checksum-Type": kind, "Ais-Checksum-Value": value}
        done = run_one(engine, "object/9000", endpoint=endpoint, digest=digest)
        assert (done["kind"], done["flags"] & 2) == (Kind.OK, 2)
        server.extra["Ais-Checksum-Value"] = value[::-1]
        assert run_one(engine, "object/9000", endpoint=endpoint, digest=digest)["kind"] == Kind.CHECKSUM
        done = run_one(engine, "object/9000", endpoint=endpoint, digest=digest, nbytes=100)
        assert (done["kind"], done["flags"] & 2) == (Kind.OK, 0)
        server.extra = {}
        run_one(engine, "put/a", buffer=body, endpoint=endpoint, op=Op.WRITE, memory=Memory.BUFFER, nbytes=9000,
                digest=digest)  # fmt: skip
        sent = server.requests[-1].headers
        assert sent["ais-checksum-type"] == ("crc32c" if digest == Digest.CRC32C else "xxhash2")
        assert sent["ais-checksum-value"] == value


# ---- writes, and the rest ----


@pytest.mark.parametrize("nbytes", [0, 1, 65535, 65536, 3_000_000])
def test_a_body_from_memory_arrives_whole(engine, server, nbytes):
    memory = b"\xbb" * 10 + body_of(nbytes)
    done = run_one(engine, "put/memory", buffer=memory, op=Op.WRITE, memory=Memory.BUFFER, place=10, nbytes=nbytes)
    assert (done["kind"], done["result"], done["object_nbytes"]) == (0, nbytes, nbytes)
    assert server.objects["/put/memory"] == body_of(nbytes)
    sent = server.requests[-1].headers
    assert "expect" not in sent
    assert sent["content-type"] == "application/octet-stream"


def test_stat_and_delete_and_every_change_between_operations(engine, server):
    asked = Asked()
    for _ in range(3):
        asked.add("object/777", op=Op.STAT).add("object/777").add("object/777", op=Op.DELETE)
        asked.add("put/x", op=Op.WRITE, memory=Memory.BUFFER, nbytes=5).add("object/777", op=Op.STAT)
    order = numpy.random.default_rng(1).permutation(len(asked.rows))
    asked.rows = [asked.rows[i] for i in order]
    done = run(engine, asked, b"hello")
    assert not done["kind"].any()
    for completion in done:
        want = {Op.STAT: (0, 777, 200), Op.READ: (777, 777, 200), Op.DELETE: (0, WHOLE, 204), Op.WRITE: (5, 5, 200)}
        assert (completion["result"], completion["object_nbytes"], completion["status"]) == want[Op(completion["op"])]
    methods = [request.method for request in server.requests[-15:]]
    assert {name: methods.count(name) for name in set(methods)} == {"HEAD": 6, "GET": 3, "DELETE": 3, "PUT": 3}


@pytest.mark.parametrize("name", ["a b", "ä/ö€", "100%", "1+1", "x//y", "./..", "q?a=b&c", "#h", "\x01\x7f", "~-._"])
def test_any_name_reaches_the_server_as_it_is(engine, server, name):
    from urllib.parse import unquote

    endpoint = engine.endpoint(server.url + "/echo", key_prefix="pre fix/", query="z=1")
    done = run_one(engine, name, "y=2", endpoint=endpoint)
    assert done["kind"] == Kind.OK
    asked = server.requests[-1]
    assert unquote(asked.path) == f"/echo/pre fix/{name}"
    assert asked.query == "z=1&y=2"
    assert set(asked.path) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~/%")


def test_transfers_with_a_time_begin_then_and_let_others_pass(engine):
    import time

    now = time.monotonic_ns()
    asked = Asked().add("object/10", not_before_ns=now + 600_000_000).add("object/10", not_before_ns=now + 300_000_000)
    asked.add("object/10")
    done = run(engine, asked)
    late = done["start_ns"][:2].astype(int) - [now + 600_000_000, now + 300_000_000]
    assert (late >= 0).all()
    assert done["end_ns"][2] < done["start_ns"][1] < done["start_ns"][0]


# ---- redirects ----


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_followed_verbatim_and_timed_apart(server, status):
    with FaultServer() as target, engine_on(server) as engine:
        server.other = target.url
        endpoint = engine.endpoint(server.url, follow=True, dialect="ais", headers=[("X-Own", "yes")])
        behind = engine.endpoint(target.url)
        memory = bytearray(20)
        done = run_one(engine, f"redirect/{status}/object/1000", endpoint=endpoint, buffer=memory, memory=Memory.BUFFER,
                       room=20, offset=30, nbytes=20)  # fmt: skip
        assert (done["kind"], done["result"], done["endpoint"], done["attempts"]) == (0, 20, behind, 1)
        assert memory == body_of(1000)[30:50]
        assert 0 < done["redirect_ns"] < done["end_ns"] - done["attempt_ns"]
        [asked] = target.requests
        assert (asked.query, asked.headers["x-own"], asked.headers["range"]) == (
            "pid=proxy&utm=mark",
            "yes",
            "bytes=30-49",
        )
        for i in range(20):  # what a redirect says is read to its end, so that connections stay
            run_one(engine, f"redirect/{status}/object/1000/{i}", endpoint=endpoint)
        assert engine.counters().connections <= 4


def test_a_body_goes_only_to_where_it_was_redirected_to(server):
    with FaultServer() as target, engine_on(server) as engine:
        server.other = target.url
        endpoint = engine.endpoint(server.url, follow=True, dialect="ais")
        before = len(server.requests)
        done = run_one(engine, "redirect/307/put/x", endpoint=endpoint, buffer=body_of(100_000), op=Op.WRITE,
                       memory=Memory.BUFFER, nbytes=100_000, digest=Digest.CRC32C)  # fmt: skip
        assert (done["kind"], done["result"]) == (0, 100_000)
        assert target.objects["/put/x"] == body_of(100_000)
        assert [(request.method, request.headers["content-length"]) for request in server.requests[before:]] == [
            ("PUT", "0")
        ]
        assert target.requests[-1].headers["ais-checksum-value"] == f"{crc32c(body_of(100_000)):08x}"


def test_a_server_that_does_not_redirect_a_write_gets_the_body_and_not_an_empty_object(engine, server):
    endpoint = engine.endpoint(server.url, follow=True)
    done = run_one(
        engine, "put/direct", endpoint=endpoint, buffer=b"bytes", op=Op.WRITE, memory=Memory.BUFFER, nbytes=5
    )
    assert (done["kind"], done["result"]) == (0, 5)
    assert server.objects["/put/direct"] == b"bytes"


def test_credentials_go_to_the_same_server_only(server):
    with FaultServer() as target, engine_on(server) as engine:
        endpoint = engine.endpoint(server.url, follow=True)
        engine.bearer(endpoint, "secret-token")
        for other in (target, server):
            server.other = other.url
            assert run_one(engine, "redirect/307/object/10", endpoint=endpoint)["kind"] == Kind.OK
        assert "authorization" not in target.requests[-1].headers
        assert [request.headers.get("authorization") for request in server.requests[-2:]] == ["Bearer secret-token"] * 2
        engine.bearer(endpoint, "")
        run_one(engine, "object/10", endpoint=endpoint)
        assert "authorization" not in server.requests[-1].headers


def test_a_signature_is_what_botocore_makes_of_the_same_request(engine, server):
    auth, awsrequest = pytest.importorskip("botocore.auth"), pytest.importorskip("botocore.awsrequest")
    credentials = pytest.importorskip("botocore.credentials").Credentials("AKIDEXAMPLE", "secret/key", "a token")
    endpoint = engine.endpoint(server.url, dialect="s3", key_prefix="put/")
    engine.sign(endpoint, "AKIDEXAMPLE", "secret/key", "a token", region="eu-central-1")
    memory = body_of(100)
    run_one(engine, "sp ace/ä+%", "partNumber=1&uploadId=x%2Fy", endpoint=endpoint, buffer=memory, op=Op.WRITE,
            memory=Memory.BUFFER, nbytes=100, digest=Digest.CRC32C)  # fmt: skip
    engine.request(endpoint, "POST", "", "delete=", [("Content-MD5", "abc")], b"<xml/>")
    for asked in server.requests[-2:]:
        sent = asked.headers
        signed = sent["authorization"].split("SignedHeaders=")[1].split(",")[0].split(";")
        assert {"host", "x-amz-content-sha256", "x-amz-date", "x-amz-security-token"} <= set(signed)
        request = awsrequest.AWSRequest(asked.method, f"{server.url}{asked.path}?{asked.query}", data=asked.body)
        for name in signed:
            request.headers[name] = sent[name]
        request.context["timestamp"] = sent["x-amz-date"]
        signer = auth.S3SigV4Auth(credentials, "s3", "eu-central-1")
        canonical = signer.canonical_request(request)
        want = signer.signature(signer.string_to_sign(request, canonical), request)
        assert sent["authorization"].endswith(f"Signature={want}")
    assert server.requests[-2].headers["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD"


# ---- control requests ----


def test_a_request_gives_status_headers_and_body_whatever_the_status(engine, server):
    endpoint = engine.endpoint(server.url + "/echo", key_prefix="never")
    answer = engine.request(endpoint, "POST", query="a=1", headers=[("X-Thing", "1")], body=b"question")
    assert (answer.status, answer.body, answer.headers["x-method"]) == (200, b"/echo?a=1\nquestion", "POST")
    assert answer.url == f"{server.url}/echo?a=1"
    assert server.requests[-1].headers["x-thing"] == "1"
    answer = engine.request(0, "GET", "status/404")
    assert (answer.status, b"AsAsked" in answer.body) == (404, True)
    assert engine.request(0, "GET", "busy/2/503/100").body == body_of(100)
    answer = engine.request(0, "HEAD", "object/12345")
    assert (answer.headers["content-length"], answer.body) == ("12345", b"")
    assert engine.request(0, "GET", "object/1", body=b"a GET with a body").status == 200
    assert server.requests[-1].body == b"a GET with a body"


def test_a_request_does_not_wait_behind_data(server):
    with engine_on(server, workers=1, in_flight=1, stall_timeout_s=60) as engine:
        asked = Asked().add("stall/9/10").add("stall/9/11")
        engine.submit(asked.array, asked.names)
        assert engine.request(0, "GET", "object/5", timeout_s=20).body == body_of(5)
        engine.cancel()
        assert (reap_all(engine)["kind"] == Kind.CANCELLED).all()


def test_a_proxy_of_the_environment_is_asked_for_the_whole_url(server, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url)
    with engine_on(server) as engine:
        endpoint = engine.endpoint("http://nowhere.invalid/a%20b")
        assert run_one(engine, "c d", "q=1", endpoint=endpoint)["status"] == 404
        assert run_one(engine, "e", endpoint=endpoint)["status"] == 404
        asked = server.requests[-2:]
        assert [request.path for request in asked] == [
            f"http://nowhere.invalid/a%20b/{name}" for name in ("c%20d", "e")
        ]
        assert (asked[0].query, asked[0].headers["host"]) == ("q=1", "nowhere.invalid")
