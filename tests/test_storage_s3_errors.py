"""What a user is told when S3 refuses: which credentials, which bucket, what to try; and no key in any of it."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from s3_support import forget_aws, listed, make_bucket, open_bucket, run, use_keys
from servers.weed import OWNER, PUBLIC, READABLE, READER, Keys, Weed, signed_weed  # noqa: F401

from mlstor._io import Pattern
from mlstor.errors import UsageError
from mlstor.storage import s3
from mlstor.storage.s3 import S3Store
from mlstor.storage.transfers import Digest, Kind, Op

CALLS: dict[str, Callable[[S3Store], Any]] = {
    "list": listed,
    "stat": lambda store: store.stat("k"),
    "read": lambda store: store.read("k"),
    "write": lambda store: store.write("new", b"x"),
    "write in parts": lambda store: store.write("new", bytes(17 << 20)),
    "delete": lambda store: store.delete(["k", "j"]),
    "delete one": lambda store: store.delete(["k"]),
}


@pytest.fixture(scope="module")
def server(signed_weed: Weed) -> Weed:  # noqa: F811
    for name in (READABLE, PUBLIC):
        make_bucket(signed_weed, name)
        store = open_bucket(signed_weed, name)
        store.write("k", b"content")
        store.close()
    return signed_weed


def refused(store: S3Store, call: str, *keys: Keys) -> OSError:
    """The error of a call; none of `keys` may show in it, nor in what the store says of itself."""
    try:
        with pytest.raises(OSError) as caught:
            CALLS[call](store)
    finally:
        store.close()
    error = caught.value
    assert error.__cause__ is None
    texts = [str(error), repr(error), str(vars(error)), repr(store.describe())]
    for secret in (text for pair in keys for text in pair):
        assert not any(secret in text for text in texts)
    assert not any("Signature=" in text or "Credential=" in text for text in texts)
    return error


@pytest.mark.parametrize("call", CALLS)
def test_a_wrong_secret_is_refused_and_said_to_be_wrong(server: Weed, call: str) -> None:
    wrong = Keys(OWNER.access_key, "another-secret")
    error = refused(open_bucket(server, READABLE, wrong), call, wrong)
    assert isinstance(error, PermissionError)
    assert "the secret key from the environment (AWS_ACCESS_KEY_ID) does not belong to its access key" in str(error)
    assert vars(error)["code"] == "SignatureDoesNotMatch"
    store = open_bucket(server, READABLE)  # with the right one nothing was changed
    assert listed(store) == {"k": 7}
    store.close()


@pytest.mark.parametrize("call", CALLS)
def test_an_access_key_that_the_server_does_not_know_is_said_to_be_unknown(server: Weed, call: str) -> None:
    unknown = Keys("UNKNOWNKEYID", "unknown-secret")
    error = refused(open_bucket(server, READABLE, unknown), call, unknown)
    assert isinstance(error, PermissionError)
    assert f"{server.endpoint} does not know the access key from the environment" in str(error)


@pytest.mark.parametrize("call", CALLS)
def test_credentials_that_may_not_do_it_are_named(server: Weed, call: str) -> None:
    error = refused(open_bucket(server, PUBLIC, READER), call, READER)
    assert isinstance(error, PermissionError)
    assert "the credentials from the environment (AWS_ACCESS_KEY_ID) are not allowed to do this in 'public'" in str(
        error
    )


@pytest.mark.parametrize("call", CALLS)
def test_an_anonymous_request_that_is_refused_asks_for_credentials(server: Weed, call: str) -> None:
    error = refused(open_bucket(server, READABLE, None), call)
    assert isinstance(error, PermissionError)
    assert "give credentials" in str(error)


def test_an_anonymous_reader_reads_what_is_public(server: Weed) -> None:
    store = open_bucket(server, PUBLIC, None)
    assert (store.read("k"), listed(store)) == (b"content", {"k": 7})
    assert store.describe()["signed"] == "anonymous"
    store.close()
    store = open_bucket(server, READABLE, READER)
    assert (store.read("k"), listed(store)) == (b"content", {"k": 7})
    store.close()


# A deletion of several is answered by SeaweedFS as if they had been there.
@pytest.mark.parametrize("call", [call for call in CALLS if call != "delete"])
def test_a_missing_bucket_is_named_with_its_endpoint(server: Weed, call: str) -> None:
    error = refused(open_bucket(server, "no-such-bucket"), call)
    assert isinstance(error, FileNotFoundError)
    assert f"there is no bucket 'no-such-bucket' at {server.endpoint}" in str(error)


def test_transfers_that_are_refused_say_the_same(server: Weed) -> None:
    wrong = Keys(OWNER.access_key, "another-secret")
    store = open_bucket(server, READABLE, wrong)
    with store.transfers(workers=1) as transfers:
        done = run(transfers, Op.WRITE, ["a", "b"], pattern=Pattern(1), nbytes=[10, 17 << 20], place=[1, 2])
        assert done["kind"].tolist() == [Kind.HTTP] * 2
        assert done["status"].tolist() == [403] * 2
        failures = transfers.failures()
    store.close()
    assert sorted(failure.tag for failure in failures) == [0, 1]
    for failure in failures:
        assert failure.message.startswith("the secret key from the environment (AWS_ACCESS_KEY_ID) does not belong")
        assert wrong.secret_key not in repr(failure)


# ---- what a real server does not do when it is asked to ----


class Scripted:
    """An HTTP server that gives the answers it was told, by method, to every request."""

    def __init__(self) -> None:
        self.answers: dict[str, list[tuple[int, str]]] = {}
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        scripted = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                headers = {name.lower(): value for name, value in self.headers.items()}
                scripted.seen.append((self.command, self.path, headers))
                answers = scripted.answers[self.command]
                status, text = answers.pop(0) if len(answers) > 1 else answers[0]
                body = text.encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("ETag", '"0123456789abcdef0123456789abcdef"')
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _answer

            def log_message(self, *arguments: Any) -> None:
                """Keep the test's output."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    server = Scripted()
    yield server
    server.close()


def error_xml(code: str, message: str = "said by the test", more: str = "") -> str:
    return f"<Error><Code>{code}</Code><Message>{message}</Message>{more}</Error>"


def signed(scripted: Scripted, **options: Any) -> S3Store:
    with pytest.MonkeyPatch.context() as patch:
        forget_aws(patch)
        use_keys(patch, OWNER, "a-session-token")
        return s3.open("s3://bucket", endpoint=scripted.endpoint, tries=2, **options)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("status", "xml", "number", "text"),
    [
        (400, error_xml("ExpiredToken"), PermissionError, "have expired: get new ones"),
        (400, error_xml("InvalidToken"), PermissionError, "session token from the environment"),
        (403, error_xml("RequestTimeTooSkewed"), PermissionError, "clock differs"),
        (
            301,
            error_xml("PermanentRedirect", more="<Region>eu-west-3</Region>"),
            OSError,
            "is in another region: name that one",
        ),
        (507, error_xml("InsufficientStorage"), OSError, "the store is full"),
        (503, error_xml("SlowDown"), BlockingIOError, "asks for fewer requests"),
        (418, error_xml("Teapot", "short and stout"), OSError, "418 Teapot: short and stout"),
        (502, "<html>bad gateway</html>", OSError, "502"),
    ],
)
def test_other_refusals_have_their_sentences(
    scripted: Scripted, status: int, xml: str, number: type[OSError], text: str
) -> None:
    scripted.answers = {method: [(status, xml)] for method in ("GET", "PUT", "POST", "HEAD", "DELETE")}
    for call in ("list", "read", "write", "write in parts"):
        error = refused(signed(scripted), call, OWNER, Keys("a-session-token", "a-session-token"))
        assert isinstance(error, number)
        assert text in str(error)
    if "eu-west-3" in xml:
        assert "(it is in eu-west-3)" in str(refused(signed(scripted), "list"))
    assert all(headers["x-amz-security-token"] == "a-session-token" for _, _, headers in scripted.seen)


def test_no_secret_is_in_what_is_sent_in_the_clear(scripted: Scripted) -> None:
    scripted.answers = {"GET": [(200, "<ListBucketResult/>")]}
    store = signed(scripted)
    list(store.list())
    store.close()
    ((_, path, headers),) = scripted.seen
    assert OWNER.secret_key not in path + repr(headers)
    assert "X-Amz-Signature" not in path  # no presigned URL, which would show in logs
    assert headers["authorization"].startswith(f"AWS4-HMAC-SHA256 Credential={OWNER.access_key}/")


BEGUN = "<InitiateMultipartUploadResult><UploadId>id 1</UploadId></InitiateMultipartUploadResult>"
COMPLETED = "<CompleteMultipartUploadResult><ETag>&quot;whole-2&quot;</ETag></CompleteMultipartUploadResult>"


def test_an_error_inside_a_good_answer_to_complete_is_an_error(scripted: Scripted) -> None:
    scripted.answers = {
        "POST": [(200, BEGUN), (200, error_xml("InvalidPart", "a part is missing"))],
        "PUT": [(200, "")],
        "DELETE": [(204, "")],
    }
    store = signed(scripted)
    with pytest.raises(OSError, match="InvalidPart: a part is missing"):
        store.write("large", bytes(17 << 20))
    store.close()
    assert [path for method, path, _ in scripted.seen if method == "DELETE"] == ["/bucket/large?uploadId=id%201"]


def test_a_passing_error_inside_it_is_tried_again(scripted: Scripted) -> None:
    scripted.answers = {
        "POST": [(200, BEGUN), (200, error_xml("InternalError")), (200, COMPLETED)],
        "PUT": [(200, "")],
    }
    store = signed(scripted)
    store.write("large", bytes(17 << 20))
    store.close()


def test_a_lost_answer_to_complete_is_no_error_if_the_object_is_there(scripted: Scripted) -> None:
    # MD5 of three times the ETag that this server gives, as S3 names an object of three parts
    import hashlib

    etag = hashlib.md5(bytes.fromhex("0123456789abcdef0123456789abcdef") * 3).hexdigest() + "-3"
    scripted.answers = {
        "POST": [(200, BEGUN), (404, error_xml("NoSuchUpload"))],
        "PUT": [(200, "")],
        "HEAD": [(200, "")],
        "DELETE": [(204, "")],
    }
    store = signed(scripted)
    with pytest.raises(FileNotFoundError, match="multipart upload is gone"):
        store.write("large", bytes(17 << 20))  # another object's ETag
    client = store._here().client
    stat = client.stat
    client.stat = lambda key: stat(key)._replace(etag=etag)  # type: ignore[method-assign]
    scripted.answers["POST"] = [(200, BEGUN), (404, error_xml("NoSuchUpload"))]
    store.write("large", bytes(17 << 20))
    store.close()


@pytest.mark.parametrize(
    ("xml", "text"),
    [
        ('<!DOCTYPE a [<!ENTITY b "c">]><ListBucketResult/>', "document type"),
        ("<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>", "no token"),
        ("<html><body>hello</body></html>", "<html>"),
        ("not xml", "is the endpoint one of S3"),
        ("<ListBucketResult><Contents><Key>a</Key></Contents></ListBucketResult>", "lists an object of"),
        ("", "is the endpoint one of S3"),
    ],
)
def test_a_listing_that_is_none_is_an_error(scripted: Scripted, xml: str, text: str) -> None:
    scripted.answers = {"GET": [(200, xml)]}
    error = refused(signed(scripted), "list")
    assert text in str(error)


def test_deletions_that_failed_are_errors(scripted: Scripted) -> None:
    failed = "<Error><Key>a</Key><Code>AccessDenied</Code><Message>no</Message></Error>"
    gone = "<Error><Key>b</Key><Code>NoSuchKey</Code><Message>gone</Message></Error>"
    scripted.answers = {"POST": [(200, f"<DeleteResult>{gone}</DeleteResult>")]}
    store = signed(scripted)
    store.delete(["a", "b"])  # what isn't there is no error
    scripted.answers = {"POST": [(200, f"<DeleteResult>{failed}{failed}{gone}</DeleteResult>")]}
    with pytest.raises(PermissionError, match=r"not allowed.*\(and 1 more objects\)"):
        store.delete(["a", "b"])
    # a server that can't delete many at once is asked for each
    scripted.answers = {"POST": [(501, error_xml("NotImplemented"))], "DELETE": [(204, "")]}
    store.delete(["a", "b"])
    assert [path for method, path, _ in scripted.seen if method == "DELETE"] == ["/bucket/a", "/bucket/b"]
    store.close()


def test_a_deletion_of_no_key_does_not_delete_the_bucket(scripted: Scripted) -> None:
    store = signed(scripted)
    for keys in ([""], ["a", ""]):
        with pytest.raises(OSError, match="key that is not empty"):
            store.delete(keys)
    assert scripted.seen == []
    store.close()


def test_a_server_that_is_not_there_is_a_connection_error(scripted: Scripted) -> None:
    scripted.answers = {}
    store = signed(scripted)
    scripted.close()
    try:
        for call in CALLS.values():
            with pytest.raises(ConnectionError):
                call(store)
    finally:
        store.close()
        scripted.close = lambda: None  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"part_bytes": 1 << 20}, "part_bytes"),
        ({"part_bytes": (5 << 20) + 1}, "multiple of 4096"),
        ({"part_threshold_bytes": 4096}, "part_threshold_bytes"),
        ({"tries": 0}, "tries"),
        ({"profile": "p"}, "give one of both"),
        ({"client": "boto"}, "client is mlstor or s3torchconnector"),
        ({"client": "s3torchconnector", "insecure": True}, "has no such options"),
        ({"ca_file": "/nonexistent/ca.pem"}, "ca.pem"),
    ],
)
def test_options_that_do_not_fit_are_said(options: dict[str, Any], text: str) -> None:
    with pytest.raises((UsageError, FileNotFoundError), match=text):
        s3.open("s3://bucket", endpoint="http://127.0.0.1:1", anonymous=True, **options).transfers()


def test_renewed_keys_are_used_in_the_middle_of_a_run(server: Weed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first keys are wrong: only a signature with the second ones is accepted by the server."""
    from mlstor.storage import credentials

    class Source:
        name = "a test"
        renewable = True
        keys = Keys(OWNER.access_key, "expired")

        def current(self) -> credentials.Credentials:
            return credentials.Credentials(*self.keys)

    source = Source()
    monkeypatch.setattr(credentials, "find", lambda profile=None: source)
    store = s3.open(f"s3://{READABLE}", endpoint=server.endpoint)
    assert isinstance(store, S3Store)
    with store.transfers(workers=1) as transfers:
        (done,) = run(transfers, Op.READ, ["k"], digest=Digest.CRC32C)
        assert done["status"] == 403
        source.keys = OWNER
        signer = store._here().signer
        assert signer
        signer.renew()
        (done,) = run(transfers, Op.READ, ["k"], digest=Digest.CRC32C)
        assert done["kind"] == Kind.OK
    assert store.read("k") == b"content"
    store.close()
