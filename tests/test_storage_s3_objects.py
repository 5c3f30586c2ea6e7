"""Objects on a real S3 server: names, ranges, checksums, listings, deletions, many at once."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import google_crc32c
import numpy as np
import pytest
from engine_support import noise
from s3_support import NAMES, bucket, forget_aws, listed, make_bucket, open_bucket, run, use_keys
from servers.weed import OWNER, Weed, signed_weed, weed  # noqa: F401

from mlstor._io import Pattern
from mlstor.storage import crc32c
from mlstor.storage.s3 import S3Store
from mlstor.storage.store import open_store
from mlstor.storage.transfers import WHOLE, Digest, Kind, Op

# SeaweedFS takes a backslash for a slash, and several slashes for one.
KEPT = [name for name in NAMES if "\\" not in name]


@pytest.fixture(scope="module", params=["anonymous", "signed"])
def server(request: pytest.FixtureRequest) -> Weed:
    found: Weed = request.getfixturevalue("weed" if request.param == "anonymous" else "signed_weed")
    return found


@pytest.fixture
def store(server: Weed) -> Iterator[S3Store]:
    with bucket(server, prefix="pre fix+%/ü") as made:
        yield made


def test_names_of_all_kinds_are_written_listed_read_and_deleted(store: S3Store) -> None:
    for name in KEPT:
        store.write(name, name.encode())
    assert listed(store) == {name: len(name.encode()) for name in KEPT}
    for name in KEPT:
        assert store.read(name) == name.encode()
        assert store.stat(name).nbytes == len(name.encode())
    store.delete([*KEPT[1:], "never there"])
    assert listed(store) == {KEPT[0]: len(KEPT[0])}
    store.delete(KEPT[:1])
    assert listed(store) == {}


def test_transfers_name_objects_as_single_calls_do(store: S3Store) -> None:
    names = [*KEPT, "double//slash", "back\\slash", "line\nfeed", "control\x01"]
    content = b"".join(name.encode() for name in names)
    sizes = [len(name.encode()) for name in names]
    places = np.cumsum(sizes) - sizes
    with store.transfers(workers=2) as transfers:
        done = run(transfers, Op.WRITE, names, content, nbytes=sizes, place=places)
        assert (done["kind"] == Kind.OK).all(), transfers.failures()
        got = bytearray(len(content))
        done = run(transfers, Op.READ, names, got, room=sizes, place=places)
        assert got == content
        assert done["object_nbytes"].tolist() == sizes
        done = run(transfers, Op.STAT, names)
        assert done["object_nbytes"].tolist() == sizes
        for name in names:
            assert store.read(name) == name.encode()
        done = run(transfers, Op.DELETE, names)
        assert (done["kind"] == Kind.OK).all()
    assert listed(store) == {}


def test_names_with_control_characters_are_deleted_one_by_one(store: S3Store) -> None:
    names = ["a\x01b", "line\nfeed", "return\rhere", "tab\there", "plain"]
    for name in names:
        store.write(name, b"x")
    assert set(listed(store)) == set(names)
    store.delete(names)
    assert listed(store) == {}


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 1), (0, None), (10, 90), (99, 1), (50, None), (100, None), (7, 0)])
def test_ranges_are_read(store: S3Store, offset: int, nbytes: int | None) -> None:
    content = noise(100)
    store.write("o", content)
    due = content[offset:] if nbytes is None else content[offset : offset + nbytes]
    assert store.read("o", offset=offset, nbytes=nbytes) == due
    into = bytearray(b"." * 120)
    assert store.read("o", into, offset, nbytes) == len(due)
    assert into == due + b"." * (120 - len(due))


def test_an_empty_object_is_one(store: S3Store) -> None:
    store.write("empty", b"")
    assert store.read("empty") == b""
    assert listed(store) == {"empty": 0}


def test_a_range_beyond_the_end_and_a_buffer_too_small_are_errors(store: S3Store) -> None:
    store.write("o", b"0123456789")
    with pytest.raises(OSError, match="not all in an object of 10 bytes"):
        store.read("o", offset=5, nbytes=6)
    with pytest.raises(ValueError, match="do not fit"):
        store.read("o", bytearray(9))
    for key in ("", "o"):
        with pytest.raises(OSError):
            store.stat(key) if not key else store.read(key, offset=-1)


def test_the_checksum_is_sent_kept_and_compared(store: S3Store) -> None:
    content = noise(5000)
    store.write("o", content)
    assert store.stat("o").checksum == ("crc32c", crc32c.to_base64(google_crc32c.value(content)))
    with store.transfers(workers=1) as transfers:
        got = bytearray(5000)
        (done,) = run(transfers, Op.READ, ["o"], got, room=5000, digest=Digest.CRC32C)
        assert done["digest_value"] == google_crc32c.value(content)
        assert done["flags"] & 2
        # one that is not of these bytes is refused by the server, and nothing is kept
        (done,) = run(
            transfers, Op.WRITE, ["wrong"], content, nbytes=5000, digest=Digest.CRC32C, flags=1, digest_value=1
        )
        assert done["kind"] == Kind.HTTP
        assert "damaged on the way" in transfers.failures()[0].message
    assert listed(store) == {"o": 5000}


def test_an_object_of_another_size_than_the_catalog_says_is_an_error(store: S3Store) -> None:
    store.write("o", noise(5000))
    with store.transfers(workers=1) as transfers:
        done = run(transfers, Op.READ, ["o", "o", "o"], object_nbytes=[5000, 4999, 5001])
    assert done["kind"].tolist() == [Kind.OK, Kind.LENGTH, Kind.LENGTH]


def test_a_pattern_is_written_and_found_again(store: S3Store) -> None:
    with store.transfers(workers=1) as transfers:
        done = run(transfers, Op.WRITE, ["a", "b"], pattern=Pattern(5), nbytes=[10_000, 50], place=[1, 2])
        assert (done["kind"] == Kind.OK).all()
        done = run(transfers, Op.READ, ["a", "b"], pattern=Pattern(5), place=[1, 2])
        assert done["damaged_blocks"].tolist() == [0, 0]
        done = run(transfers, Op.READ, ["a", "b"], pattern=Pattern(5), place=[1, 1])
        assert done["damaged_blocks"].tolist() == [0, 1]
    assert Pattern(5, file_id=1).check(store.read("a")) == []  # type: ignore[arg-type]


def test_a_deleted_object_is_missing_and_says_so(store: S3Store) -> None:
    store.write("o", b"x")
    store.delete(["o"])
    for call in (store.read, store.stat):
        with pytest.raises(FileNotFoundError, match="no such object") as caught:
            call("o")
        assert str(caught.value.filename).endswith("/o")
    with store.transfers(workers=1) as transfers:
        (done,) = run(transfers, Op.READ, ["o"])
        assert (done["kind"], done["status"]) == (Kind.HTTP, 404)
        (failure,) = transfers.failures()
        assert "no such object" in failure.message


# ---- listings ----


def fill(store: S3Store, keys: list[str]) -> None:
    with store.transfers(workers=2, in_flight=16) as transfers:
        done = run(transfers, Op.WRITE, keys, b"x", nbytes=1)
        assert (done["kind"] == Kind.OK).all()


def test_a_listing_of_several_pages_and_prefixes_is_complete(server: Weed) -> None:
    flat = [f"flat/{number:05}" for number in range(1100)]
    deep = [f"deep/{one}/{two}/leaf {three}" for one in range(3) for two in range(5) for three in range(4)]
    top = ["top", "flat-not-a-directory", "deep.x"]
    with bucket(server) as store:
        fill(store, [*flat, *deep, *top])
        assert set(listed(store)) == {*flat, *deep, *top}
        assert set(listed(store, "deep/1/")) == {key for key in deep if key.startswith("deep/1/")}
        assert set(listed(store, "flat/0001")) == {f"flat/0001{digit}" for digit in range(10)}
        assert listed(store, "absent/") == {}
        below = open_bucket(server, store.describe()["bucket"], prefix="flat")
        assert set(listed(below)) == {key.removeprefix("flat/") for key in flat}
        below.close()
        store.delete(iter([*flat, *deep, *top]))
        assert listed(store) == {}


def test_a_listing_may_be_left_early(server: Weed) -> None:
    with bucket(server) as store:
        fill(store, [f"{number % 7}/{number}" for number in range(1100)])
        pages = store.list()
        assert next(pages).keys
        pages.close()  # type: ignore[attr-defined]
        assert store.read("0/0") == b"x"


# ---- the store as such ----


def test_it_is_opened_by_url_and_pickles_without_its_keys(
    signed_weed: Weed,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forget_aws(monkeypatch)
    use_keys(monkeypatch, OWNER)
    store = open_store(f"s3://{make_bucket(signed_weed)}/dir", endpoint=signed_weed.endpoint)
    store.write("o", b"content")
    pickled = pickle.dumps(store)
    for secret in OWNER:
        assert secret.encode() not in pickled
        assert secret not in repr(store)
        assert secret not in repr(store.describe())
    again = pickle.loads(pickled)
    assert again.read("o") == b"content"
    assert again.describe() == store.describe()
    assert again.describe()["signed"] == "SigV4"
    again.close()
    store.close()
    with pytest.raises(ValueError, match="closed"):
        store.read("o")


def test_virtual_host_style_asks_the_buckets_own_host(
    signed_weed: Weed,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # *.localhost is this machine; the server takes the bucket from the path only, so the answer is its refusal
    forget_aws(monkeypatch)
    use_keys(monkeypatch, OWNER)
    endpoint = signed_weed.endpoint.replace("127.0.0.1", "localhost")
    store = open_store("s3://some-bucket", endpoint=endpoint, path_style=False, tries=1)
    assert store.describe()["addressing"] == "virtual host"
    with pytest.raises(OSError):
        store.read("o")
    store.close()


def test_many_small_objects_at_once(store: S3Store) -> None:
    keys = [f"many/{number}" for number in range(300)]
    content = noise(300 * 64)
    places = np.arange(300) * 64
    with store.transfers(workers=2, in_flight=8) as transfers:
        run(transfers, Op.WRITE, keys, content, nbytes=64, place=places, digest=Digest.CRC32C)
        got = bytearray(len(content))
        done = run(transfers, Op.READ, keys, got, place=places, room=64, nbytes=WHOLE, digest=Digest.CRC32C)
        assert got == content
        assert (done["flags"] & 2).all()
        counters = transfers.counters()
    assert counters.requests == 600
    assert counters.connections <= 16
