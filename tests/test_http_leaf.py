"""SHA-256, URL escaping, request signatures and AIStore's placement in C against independent oracles."""

from __future__ import annotations

import ctypes as ct
import datetime
import hashlib
import hmac
import itertools
import os
import random
import shutil
import subprocess
from typing import Any, NamedTuple
from urllib.parse import quote

import pytest
from hypothesis import given, settings, strategies as st
from leaf_library import CSRC

from mlstor.storage.transfers import TRANSFER_DTYPE, zeros

SOURCES = ["http/sha256.c", "http/url.c", "http/sigv4.c", "http/rendezvous.c", "xxh64.c"]
UNSIGNED = "UNSIGNED-PAYLOAD"
EMPTY = hashlib.sha256(b"").hexdigest()
U64 = (1 << 64) - 1

# conftest.py's autouse fixture is of function scope; it only sets the environment.
SETTINGS = settings(max_examples=80)


class Sha256(ct.Structure):
    _fields_ = [("state", ct.c_uint32 * 8), ("total_bytes", ct.c_uint64), ("pending", ct.c_uint8 * 64)]


class HmacKey(ct.Structure):
    _fields_ = [("inner", Sha256), ("outer", Sha256)]


class Day(ct.Structure):
    _fields_ = [("identity", ct.c_uint64), ("day", ct.c_int64), ("date", ct.c_char * 16), ("key", HmacKey)]


class Header(ct.Structure):
    _fields_ = [("name", ct.c_char_p), ("value", ct.c_char_p)]


class RequestStruct(ct.Structure):
    _fields_ = [
        ("method", ct.c_char_p),
        ("path", ct.c_char_p),
        ("query", ct.c_char_p),
        ("host", ct.c_char_p),
        ("payload_hash", ct.c_char_p),
        ("headers", ct.POINTER(Header)),
        ("nheaders", ct.c_size_t),
        ("time_s", ct.c_int64),
    ]


class Lines(ct.Structure):
    _fields_ = [
        ("authorization", ct.c_char * 1280),
        ("date", ct.c_char * 32),
        ("content_sha256", ct.c_char * 96),
        ("token", ct.c_char_p),
    ]


class HashTable(ct.Structure):
    _fields_ = [("reset", ct.c_void_p), ("update", ct.c_void_p), ("digest", ct.c_void_p)]


class Map(ct.Structure):
    _fields_ = [
        ("id_digests", ct.POINTER(ct.c_uint64)),
        ("endpoints", ct.POINTER(ct.c_uint32)),
        ("ntargets", ct.c_size_t),
        ("uname_prefix", ct.c_char_p),
        ("uname_prefix_nbytes", ct.c_size_t),
    ]


@pytest.fixture(scope="module")
def leaf(tmp_path_factory: pytest.TempPathFactory) -> ct.CDLL:
    cc = shutil.which("cc")
    if cc is None:
        pytest.skip("no C compiler (cc) on this machine")
    path = tmp_path_factory.mktemp("http_leaf") / "libhttpleaf.so"
    command = [cc, "-std=gnu11", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror"]
    subprocess.run([*command, "-o", str(path), *(str(CSRC / name) for name in SOURCES)], check=True, timeout=120)
    library = ct.CDLL(str(path), use_errno=True)
    library.mls_url_escape.restype = library.mls_hrw_pick.restype = library.mls_hrw_place.restype = ct.c_size_t
    library.mls_url_escape.argtypes = [ct.c_void_p, ct.c_size_t, ct.c_char_p, ct.c_size_t, ct.c_bool]
    library.mls_sigv4_new.restype = ct.c_void_p
    library.mls_sigv4_free.argtypes = [ct.c_void_p]
    library.mls_sigv4_sign.argtypes = [ct.c_void_p, ct.POINTER(Day), ct.POINTER(RequestStruct), ct.POINTER(Lines)]
    library.mls_hrw_mix.restype = library.mls_hrw_digest.restype = ct.c_uint64
    library.mls_hrw_mix.argtypes = [ct.c_uint64]
    library.mls_hrw_digest.argtypes = [ct.POINTER(HashTable), ct.c_char_p, ct.c_size_t]
    library.mls_hrw_pick.argtypes = [ct.c_uint64, ct.POINTER(ct.c_uint64), ct.c_size_t]
    library.mls_hrw_place.argtypes = [
        ct.POINTER(HashTable), ct.POINTER(Map), ct.c_void_p, ct.c_size_t, ct.c_char_p, ct.c_uint64
    ]  # fmt: skip
    return library


# -- SHA-256 --------------------------------------------------------------------------------------------


@SETTINGS
@given(nbytes=st.integers(0, 400), cuts=st.lists(st.integers(0, 400), max_size=6), seed=st.integers(0, 99))
def test_sha256_in_pieces_agrees_with_hashlib(leaf: ct.CDLL, nbytes: int, cuts: list[int], seed: int) -> None:
    data = random.Random(seed).randbytes(nbytes)
    state, digest, hexadecimal = Sha256(), ct.create_string_buffer(32), ct.create_string_buffer(64)
    leaf.mls_sha256_init(ct.byref(state))
    for begin, end in itertools.pairwise([0, *sorted(min(cut, nbytes) for cut in cuts), nbytes]):
        leaf.mls_sha256_update(ct.byref(state), data[begin:end], ct.c_size_t(end - begin))
    leaf.mls_sha256_final(ct.byref(state), digest)
    leaf.mls_sha256_hex(digest, hexadecimal)
    assert hexadecimal.raw.decode() == hashlib.sha256(data).hexdigest()


def test_sha256_of_a_long_text(leaf: ct.CDLL) -> None:
    """A million letters a: the vector of FIPS 180."""
    digest = ct.create_string_buffer(32)
    leaf.mls_sha256_once(b"a" * 1_000_000, ct.c_size_t(1_000_000), digest)
    assert digest.raw.hex() == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"


@SETTINGS
@given(key=st.binary(max_size=200), message=st.binary(max_size=300))
def test_hmac_agrees_with_pythons_and_its_key_can_be_used_again(leaf: ct.CDLL, key: bytes, message: bytes) -> None:
    ready, digest = HmacKey(), ct.create_string_buffer(32)
    leaf.mls_hmac_key_init(ct.byref(ready), key, ct.c_size_t(len(key)))
    for text in (message, b"another", message):
        leaf.mls_hmac_sha256(ct.byref(ready), text, ct.c_size_t(len(text)), digest)
        assert digest.raw == hmac.digest(key, text, "sha256")


# -- URLs -----------------------------------------------------------------------------------------------


@SETTINGS
@given(data=st.binary(max_size=100), keep_slash=st.booleans(), room=st.integers(0, 320))
def test_escape_agrees_with_urllib_and_stays_within_its_room(
    leaf: ct.CDLL, data: bytes, keep_slash: bool, room: int
) -> None:
    expected = quote(data, safe="/" if keep_slash else "").encode()
    buffer = ct.create_string_buffer(b"\xff" * 400, 400)
    assert leaf.mls_url_escape(buffer, room, data, len(data), keep_slash) == len(expected)
    assert buffer.raw[room:] == b"\xff" * (400 - room)
    if room >= len(expected):
        assert buffer.raw[: len(expected)] == expected


def test_escape_of_names_that_servers_stumble_over(leaf: ct.CDLL) -> None:
    name = "a b/ü%+//c~d?e&f=g#h".encode()
    buffer = ct.create_string_buffer(100)
    nbytes = leaf.mls_url_escape(buffer, 100, name, len(name), True)
    assert buffer.raw[:nbytes] == b"a%20b/%C3%BC%25%2B//c~d%3Fe%26f%3Dg%23h"


# -- SigV4 ----------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """A request to be signed."""

    path: str = "/"
    query: str = ""
    method: str = "GET"
    host: str = "example.amazonaws.com"
    payload_hash: str = EMPTY
    headers: tuple[tuple[str, str], ...] = ()
    time: str = "20150830T123600Z"

    def time_s(self) -> int:
        there = datetime.datetime.strptime(self.time, "%Y%m%dT%H%M%SZ").replace(tzinfo=datetime.timezone.utc)
        return int(there.timestamp())


class Signer:
    """An identity, and the day's key that goes with it unless a call brings its own."""

    def __init__(
        self, leaf: ct.CDLL, access: str = "AKIDEXAMPLE", secret: str = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY",
        token: str = "", region: str = "us-east-1", service: str = "service",
    ) -> None:  # fmt: skip
        self.leaf, self.day = leaf, Day()
        strings = [text.encode() for text in (access, secret, token, region, service)]
        self.handle = leaf.mls_sigv4_new(*strings)
        if not self.handle:
            raise OSError(ct.get_errno(), os.strerror(ct.get_errno()))

    def __enter__(self) -> Signer:
        return self

    def __exit__(self, *_: object) -> None:
        self.leaf.mls_sigv4_free(self.handle)

    def try_to_sign(self, call: Call, lines: Lines, day: Day | None = None, time_s: int | None = None) -> int:
        headers = (Header * max(len(call.headers), 1))()
        for at, (name, value) in enumerate(call.headers):
            headers[at].name, headers[at].value = name.encode(), value.encode()
        request = RequestStruct(
            call.method.encode(), call.path.encode(), call.query.encode(), call.host.encode(),
            call.payload_hash.encode(), headers, len(call.headers), call.time_s() if time_s is None else time_s,
        )  # fmt: skip
        status: int = self.leaf.mls_sigv4_sign(self.handle, day or self.day, request, lines)
        return status

    def sign(self, call: Call, day: Day | None = None) -> str:
        lines = Lines()
        assert self.try_to_sign(call, lines, day) == 0
        assert lines.date.decode() == f"x-amz-date: {call.time}"
        return str(lines.authorization.decode())


# The signature test suite that AWS publishes (aws-sig-v4-test-suite), by the names of its cases.
SUITE = {
    "get-vanilla": (Call(), "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"),
    "post-vanilla": (Call(method="POST"), "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b"),
    "get-vanilla-query-order-key-case": (
        Call(query="Param1=value1&Param2=value2"),
        "b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500",
    ),
    "get-header-value-trim": (
        Call(headers=(("my-header2", ' "a   b   c"'), ("my-header1", " value1"))),
        "acc3ed3afb60bb290fc8d2dd0098b9911fcaa05412b367055dee359757a9c736",
    ),
    "get-utf8": (Call(path="/%E1%88%B4"), "8318018e0b0f223aa2bbf98705b62bb787dc9c0e678f255a891fd03141be5d85"),
    "get-space": (Call(path="/example%20space/"), "652487583200325589f1fba4c7e578f72c47cb61beeca81406b39ddec1366741"),
    "get-unreserved": (
        Call(path="/-._~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"),
        "07ef7494c76fa4850883e2b006601f940f8a34d404d0cfa977f52a65bbf5f24f",
    ),
}  # fmt: skip

# Examples of the S3 API reference: "Signature Calculations for the Authorization Header: Transferring Payload in a
# Single Chunk".
S3_HOST, S3_TIME = "examplebucket.s3.amazonaws.com", "20130524T000000Z"
S3_GUIDE = {
    "get-range": (
        Call(path="/test.txt", host=S3_HOST, time=S3_TIME, headers=(("range", "bytes=0-9"),)),
        "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41",
    ),
    "put": (
        Call(
            path="/test%24file.text", method="PUT", host=S3_HOST, time=S3_TIME,
            payload_hash=hashlib.sha256(b"Welcome to Amazon S3.").hexdigest(),
            headers=(("x-amz-storage-class", "REDUCED_REDUNDANCY"), ("date", "Fri, 24 May 2013 00:00:00 GMT")),
        ),
        "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd",
    ),
    "get-lifecycle": (
        Call(query="lifecycle=", host=S3_HOST, time=S3_TIME),
        "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543",
    ),
    "list": (
        Call(query="max-keys=2&prefix=J", host=S3_HOST, time=S3_TIME),
        "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SUITE)
def test_signatures_of_awss_suite(leaf: ct.CDLL, case: str) -> None:
    call, signature = SUITE[case]
    with Signer(leaf) as signer:
        line = signer.sign(call)
    names = ";".join(sorted([name for name, _ in call.headers] + ["host", "x-amz-date"]))
    scope = "AKIDEXAMPLE/20150830/us-east-1/service/aws4_request"
    expected = f"Authorization: AWS4-HMAC-SHA256 Credential={scope}, SignedHeaders={names}, Signature={signature}"
    assert line == expected


@pytest.mark.parametrize("case", S3_GUIDE)
def test_signatures_of_the_s3_guide(leaf: ct.CDLL, case: str) -> None:
    call, signature = S3_GUIDE[case]
    secret = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
    with Signer(leaf, "AKIAIOSFODNN7EXAMPLE", secret, service="s3") as signer:
        lines = Lines()
        assert signer.try_to_sign(call, lines) == 0
    assert lines.content_sha256.decode() == f"x-amz-content-sha256: {call.payload_hash}"
    assert lines.token is None
    assert lines.authorization.decode().endswith(f"Signature={signature}")


WORDS = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=20)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
VALUES = st.text(st.sampled_from("ab 9\t=,/\"'%~"), max_size=12)
HEADER_NAMES = ["range", "content-md5", "content-type", "a", "x-amz-checksum-mode", "x-amz-zz"]


def botocore_signature(identity: dict[str, str], call: Call, params: dict[str, str]) -> tuple[str, str]:
    """Signed headers and signature by botocore."""
    auth_module, request_module = pytest.importorskip("botocore.auth"), pytest.importorskip("botocore.awsrequest")
    credentials = pytest.importorskip("botocore.credentials").Credentials(
        identity["access"], identity["secret"], identity["token"] or None
    )
    auth = auth_module.S3SigV4Auth(credentials, identity["service"], identity["region"])
    request: Any = request_module.AWSRequest(call.method, f"http://{call.host}{call.path}", params=params)
    for name, value in call.headers:
        request.headers[name] = value
    request.headers["X-Amz-Content-SHA256"] = call.payload_hash
    request.headers["X-Amz-Date"] = request.context["timestamp"] = call.time
    if identity["token"]:
        request.headers["X-Amz-Security-Token"] = identity["token"]
    signature = auth.signature(auth.string_to_sign(request, auth.canonical_request(request)), request)
    return auth.signed_headers(auth.headers_to_sign(request)), signature


@SETTINGS
@given(
    identity=st.fixed_dictionaries(
        {
            "access": WORDS,
            "secret": st.text(st.sampled_from("aB3/+="), min_size=1, max_size=90),
            "token": st.one_of(st.just(""), st.text(st.sampled_from("aB3/+="), min_size=1, max_size=2000)),
            "region": WORDS,
            "service": st.just("s3"),
        }
    ),
    key=NAMES,
    params=st.dictionaries(NAMES, NAMES, max_size=4),
    host=st.sampled_from(["127.0.0.1:8333", "bucket.s3.eu-west-1.amazonaws.com", "[::1]:9000"]),
    method=st.sampled_from(["GET", "PUT", "HEAD", "DELETE", "POST"]),
    payload_hash=st.sampled_from([UNSIGNED, EMPTY]),
    headers=st.dictionaries(st.sampled_from(HEADER_NAMES), VALUES, max_size=5),
    time=st.datetimes(datetime.datetime(1970, 1, 1), datetime.datetime(2199, 12, 31)),
)
def test_signatures_agree_with_botocores(
    leaf: ct.CDLL, identity: dict[str, str], key: str, params: dict[str, str], host: str, method: str,
    payload_hash: str, headers: dict[str, str], time: datetime.datetime,
) -> None:  # fmt: skip
    name = key.encode()
    escaped = ct.create_string_buffer(3 * len(name) + 1)
    nbytes = leaf.mls_url_escape(escaped, len(escaped), name, len(name), True)
    pairs = sorted((quote(n, safe=""), quote(v, safe="")) for n, v in params.items())
    query = "&".join(map("=".join, pairs))
    call = Call(
        "/" + escaped.raw[:nbytes].decode(), query, method, host, payload_hash, tuple(headers.items()),
        time.strftime("%Y%m%dT%H%M%SZ"),
    )  # fmt: skip
    with Signer(leaf, **identity) as signer:
        line = signer.sign(call)
    names, signature = botocore_signature(identity, call, params)
    assert line.endswith(f"SignedHeaders={names}, Signature={signature}")


def test_a_days_key_serves_that_day_and_identity_only(leaf: ct.CDLL) -> None:
    """One cache for all: it must never give the key of yesterday, or of credentials that were renewed."""
    shared = Day()
    secrets = ["first", "second", "third"]
    times = ["20240228T235959Z", "20240229T000000Z", "20240229T235959Z", "20240301T000000Z"]
    with Signer(leaf, secret="first") as a, Signer(leaf, secret="second") as b, Signer(leaf, secret="third") as c:
        signers = dict(zip(secrets, (a, b, c), strict=True))
        for secret, time in itertools.product(secrets, times):
            signer, call = signers[secret], Call(time=time)
            assert signer.sign(call, shared) == signer.sign(call, Day())
        assert len({signer.sign(Call(time=time), shared) for signer in signers.values() for time in times}) == 12


def test_the_token_line_is_given(leaf: ct.CDLL) -> None:
    with Signer(leaf, token="some/token") as signer:
        lines = Lines()
        assert signer.try_to_sign(Call(), lines) == 0
        assert lines.token == b"x-amz-security-token: some/token"


@pytest.mark.parametrize(
    "strings",
    [
        {"access": ""}, {"access": "x" * 129}, {"access": "a\nb"}, {"secret": "a\r\n"}, {"token": "a\tb"},
        {"region": ""}, {"region": "r" * 65}, {"service": ""},
    ],
)  # fmt: skip
def test_credentials_that_would_break_a_header_are_refused(leaf: ct.CDLL, strings: dict[str, str]) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        Signer(leaf, **strings)


def test_requests_that_cannot_be_signed_are_refused(leaf: ct.CDLL) -> None:
    with Signer(leaf) as signer:
        lines = Lines()
        assert signer.try_to_sign(Call(), lines, time_s=-1) < 0
        assert signer.try_to_sign(Call(), lines, time_s=253402300800) < 0
        assert signer.try_to_sign(Call(payload_hash="0" * 65), lines) < 0
        many = tuple((f"h{at}", "v") for at in range(25))
        assert signer.try_to_sign(Call(headers=many), lines) < 0
        assert signer.try_to_sign(Call(headers=many[:24]), lines) == 0
        assert signer.try_to_sign(Call(headers=(("n" * 1200, "v"),)), lines) < 0


# -- placement ------------------------------------------------------------------------------------------


def hash_table(leaf: ct.CDLL) -> HashTable:
    functions = (leaf.mls_xxh64_reset, leaf.mls_xxh64_update, leaf.mls_xxh64_digest)
    return HashTable(*(ct.cast(function, ct.c_void_p) for function in functions))


def test_mix_is_aistores(leaf: ct.CDLL) -> None:
    """Values of AIStore's own cmn/xoshiro256."""
    assert leaf.mls_hrw_mix(0) == 1905207664160064169
    assert leaf.mls_hrw_mix(4573842) == 5026071747115404967


@SETTINGS
@given(uname=st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_uname_digest_agrees_with_xxhash(leaf: ct.CDLL, uname: str) -> None:
    xxhash = pytest.importorskip("xxhash")
    name = uname.encode()
    assert leaf.mls_hrw_digest(hash_table(leaf), name, len(name)) == xxhash.xxh64_intdigest(name, 1103515245)


@SETTINGS
@given(
    targets=st.lists(st.integers(0, U64), min_size=1, max_size=20, unique=True),
    digest=st.integers(0, U64),
    shuffler=st.randoms(use_true_random=False),
)
def test_the_greatest_weight_wins_in_whatever_order_targets_come(
    leaf: ct.CDLL, targets: list[int], digest: int, shuffler: random.Random
) -> None:
    def picked(some: list[int]) -> int:
        at: int = leaf.mls_hrw_pick(digest, (ct.c_uint64 * len(some))(*some), len(some))
        return some[at]

    winner = picked(targets)
    assert all(leaf.mls_hrw_mix(winner ^ digest) >= leaf.mls_hrw_mix(other ^ digest) for other in targets)
    shuffled = shuffler.sample(targets, len(targets))
    assert picked(shuffled) == winner
    shuffled = [target for target in shuffled if target == winner or shuffler.random() < 0.5]
    assert picked(shuffled) == winner  # a target that goes moves only what it held


def place(leaf: ct.CDLL, transfers: Any, names: bytes, targets: list[int], endpoints: list[int], prefix: bytes) -> int:
    found = Map(
        (ct.c_uint64 * len(targets))(*targets), (ct.c_uint32 * len(targets))(*endpoints), len(targets), prefix,
        len(prefix),
    )  # fmt: skip
    done: int = leaf.mls_hrw_place(hash_table(leaf), found, transfers.ctypes.data, len(transfers), names, len(names))
    return done


def test_a_batch_is_placed_as_its_names_are_one_by_one(leaf: ct.CDLL) -> None:
    xxhash = pytest.importorskip("xxhash")
    keys = [f"dir {at}/ü{at * at}".encode() for at in range(300)]
    targets, endpoints = [random.Random(at).getrandbits(64) for at in range(5)], [7, 3, 9, 0, 4]
    transfers = zeros(len(keys), TRANSFER_DTYPE)
    names = b"head" + b"".join(keys)
    transfers["key_nbytes"] = [len(key) for key in keys]
    transfers["key_start"] = 4 + transfers["key_nbytes"].cumsum() - transfers["key_nbytes"]
    transfers["tag"] = range(len(keys))
    assert place(leaf, transfers, names, targets, endpoints, b"ais/@#/bench/") == len(keys)
    for at, key in enumerate(keys):
        digest = xxhash.xxh64_intdigest(b"ais/@#/bench/" + key, 1103515245)
        winner = max(range(5), key=lambda target: leaf.mls_hrw_mix(targets[target] ^ digest))
        assert transfers["endpoint"][at] == endpoints[winner]
    assert sorted(set(transfers["endpoint"])) == sorted(endpoints)  # all have a share
    assert list(transfers["tag"]) == list(range(len(keys)))


@pytest.mark.parametrize(("start", "nbytes"), [(0, 11), (11, 0), (5, 6), (U64, 1), (U64 - 3, 8)])
def test_a_key_outside_the_names_ends_placement_there(leaf: ct.CDLL, start: int, nbytes: int) -> None:
    transfers = zeros(3, TRANSFER_DTYPE)
    transfers["endpoint"] = 99
    transfers[2]["key_start"], transfers[2]["key_nbytes"] = start, nbytes
    assert place(leaf, transfers, b"0123456789", [1], [5], b"ais/@#/b/") == 2
    assert list(transfers["endpoint"]) == [5, 5, 99]
