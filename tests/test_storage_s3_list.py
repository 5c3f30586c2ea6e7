"""Listings by several requests at once: each object once, whatever the tree looks like, and no thread left behind."""

from __future__ import annotations

import errno
import threading

import pytest
from hypothesis import given, settings, strategies as st

from mlstor.storage import s3_list, s3_xml
from mlstor.storage.s3_xml import Listing


class Bucket:
    """Lists as S3 does: in the order of the bytes, `page_keys` at a time, common prefixes counted among them."""

    def __init__(self, keys: list[str], page_keys: int = 3) -> None:
        self.keys = sorted(set(keys), key=str.encode)
        self.page_keys = page_keys
        self.requests = 0
        self.most_at_once = 0
        self.fails_at = 0
        #: pages wait until so many have been asked for at once
        self.at_once = 0
        #: but the first ones, by which the tree is explored
        self.alone = 0
        self._now = 0
        self._lock = threading.Condition()

    def page(self, prefix: str, delimiter: str, token: str) -> Listing:
        with self._lock:
            self.requests += 1
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            self._lock.notify_all()
            fails = self.requests == self.fails_at
            if self.requests > self.alone:
                assert self._lock.wait_for(lambda: self.most_at_once >= self.at_once, 20)
        try:
            if fails:
                raise PermissionError(errno.EACCES, "no more", "s3://bucket")
            return self._page(prefix, delimiter, token)
        finally:
            with self._lock:
                self._now -= 1

    def _page(self, prefix: str, delimiter: str, token: str) -> Listing:
        entries: dict[str, bool] = {}
        for key in self.keys:
            if key.startswith(prefix):
                end = key.find(delimiter, len(prefix)) if delimiter else -1
                entries[key if end < 0 else key[: end + 1]] = end >= 0
        names = [name for name in entries if name.encode() > token.encode()]
        taken = names[: self.page_keys]
        keys = [name for name in taken if not entries[name]]
        prefixes = [name for name in taken if entries[name]]
        return Listing(keys, [len(key) for key in keys], prefixes, taken[-1] if len(names) > len(taken) else "")


def keys_of(bucket: Bucket, prefix: str = "", threads: int = 4) -> list[str]:
    found = [key for listing in s3_list.pages(bucket.page, prefix, threads) for key in listing.keys]
    assert not [thread for thread in threading.enumerate() if thread.name == "mlstor-list"]
    return sorted(found, key=str.encode)


@given(
    st.lists(st.text(alphabet="ab/é", min_size=1, max_size=6), max_size=40),
    st.text(alphabet="ab/", max_size=2),
    st.integers(1, 5),
)
@settings(max_examples=60)
def test_each_object_comes_once(keys: list[str], prefix: str, page_keys: int) -> None:
    bucket = Bucket(keys, page_keys)
    assert keys_of(bucket, prefix) == [key for key in bucket.keys if key.startswith(prefix)]


def test_a_small_listing_is_one_request() -> None:
    bucket = Bucket([f"{number % 3}/{number}" for number in range(30)], page_keys=1000)
    assert len(keys_of(bucket)) == 30
    assert bucket.requests == 1


def test_a_listing_is_divided_among_threads() -> None:
    bucket = Bucket([f"{number % 8}/{number:04}" for number in range(800)], page_keys=20)
    bucket.alone, bucket.at_once = 2, 8
    assert len(keys_of(bucket, threads=8)) == 800
    assert bucket.most_at_once == 8


def test_one_directory_in_a_deep_chain_is_followed_down() -> None:
    bucket = Bucket([f"a/b/c/{number % 5}/{number:03}" for number in range(200)], page_keys=20)
    # flat and by prefix at each of a/, a/b/, a/b/c/ and at the top
    bucket.alone, bucket.at_once = 8, 4
    assert len(keys_of(bucket)) == 200
    assert bucket.most_at_once == 4


def test_many_tiny_directories_are_not_asked_for_one_by_one() -> None:
    count = 5000
    bucket = Bucket([f"{number:04}/only" for number in range(count)], page_keys=1000)
    assert len(keys_of(bucket)) == count
    assert bucket.requests <= count // 1000 + 2


def test_a_prefix_that_names_itself_is_not_followed_for_ever() -> None:
    bucket = Bucket([f"x/{number}" for number in range(10)])
    page = bucket.page

    def strange(prefix: str, delimiter: str, token: str) -> Listing:
        found = page(prefix, delimiter, token)
        return found._replace(prefixes=[prefix], token="") if delimiter else found

    bucket.page = strange  # type: ignore[method-assign]
    assert len(keys_of(bucket, "x/")) == 10


@pytest.mark.parametrize("fails_at", [1, 2, 5, 9])
def test_an_error_in_any_request_ends_the_listing(fails_at: int) -> None:
    bucket = Bucket([f"{number % 8}/{number:04}" for number in range(800)], page_keys=20)
    bucket.fails_at = fails_at
    with pytest.raises(PermissionError, match="no more"):
        keys_of(bucket)
    assert not [thread for thread in threading.enumerate() if thread.name == "mlstor-list"]


def test_leaving_early_ends_the_threads() -> None:
    bucket = Bucket([f"{number % 8}/{number:04}" for number in range(4000)], page_keys=2)
    pages = s3_list.pages(bucket.page, "", 4)
    next(pages)
    pages.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name == "mlstor-list"]
    assert bucket.requests < 500  # a bounded number of pages waited for the caller


# ---- the XML ----


def test_keys_are_unescaped_only_where_the_server_says_that_it_escaped_them() -> None:
    xml = (
        '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{}<IsTruncated>true</IsTruncated>'
        "<NextContinuationToken>t+%</NextContinuationToken>"
        "<Contents><Key>a+b%2Bc</Key><Size>5</Size></Contents>"
        "<CommonPrefixes><Prefix>p+%2F/</Prefix></CommonPrefixes></ListBucketResult>"
    )
    plain = s3_xml.listing(xml.format("").encode())
    assert plain == Listing(["a+b%2Bc"], [5], ["p+%2F/"], "t+%")
    escaped = s3_xml.listing(xml.format("<EncodingType>url</EncodingType>").encode())
    assert escaped == Listing(["a b+c"], [5], ["p //"], "t+%")


def test_a_document_type_in_another_encoding_is_refused_too() -> None:
    text = '<?xml version="1.0" encoding="utf-16"?><!DOCTYPE a [<!ENTITY b "c">]><ListBucketResult/>'
    for body in (text.encode("utf-16"), text.encode("utf-16-le"), text.encode()):
        with pytest.raises(OSError):
            s3_xml.listing(body)


@given(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=3))
@settings(max_examples=40)
def test_keys_survive_the_xml_of_a_deletion(keys: list[str]) -> None:
    from xml.etree import ElementTree

    keys = [key for key in keys if s3_xml.is_expressible(key)]
    root = ElementTree.fromstring(s3_xml.deletion(keys))
    found = [element.text for element in root.iter() if element.tag.endswith("Key")]
    assert found == keys
