"""The cluster map as it comes, without a cluster."""

from __future__ import annotations

import errno
import json
from typing import Any

import pytest

from mlstor.errors import UsageError
from mlstor.storage import ais, ais_map
from mlstor.storage.ais_client import find_endpoint, find_token, status_error
from mlstor.storage.ais_map import CHECKED_WRITE, Routes, parse_map
from mlstor.storage.transfers import Op


def node(name: str, port: int, flags: int = 0, **more: Any) -> dict[str, Any]:
    address = {"node_ip_addr": "10.0.0.1", "daemon_port": str(port), "direct_url": f"http://10.0.0.1:{port}"}
    return {"daemon_id": name, "public_net": address, "flags": str(flags), "id_digest": 2**64 - port, **more}


def smap(**targets: dict[str, Any]) -> bytes:
    made = {"uuid": "c", "version": "7", "tmap": targets, "pmap": {}, "proxy_si": node("p", 1)}
    return json.dumps(made).encode()


def test_targets_come_in_the_order_of_their_ids_with_all_their_addresses() -> None:
    extra = {"node_ip_addr": "10.0.1.1", "daemon_port": "3", "direct_url": "http://10.0.1.1:3"}
    cluster = parse_map(smap(t2=node("t2", 3, pub_extra=[extra]), t1=node("t1", 2)), "u")
    assert [target.id for target in cluster.targets] == ["t1", "t2"]
    assert cluster.targets[0].digest == 2**64 - 2
    assert cluster.targets[1].urls == ("http://10.0.0.1:3", "http://10.0.1.1:3")
    assert (cluster.version, cluster.proxy) == (7, "p")


@pytest.mark.parametrize(("flags", "placed"), [(0, True), (1, True), (2, True), (4, False), (8, False), (20, False)])
def test_nothing_is_placed_on_a_target_in_maintenance_or_being_decommissioned(flags: int, placed: bool) -> None:
    cluster = parse_map(smap(t1=node("t1", 2, flags)), "u")
    assert bool(cluster.targets) is placed
    assert ("t1" in cluster.away) is not placed


class Recorder:
    """Instead of a client: notes the endpoints that it is asked for."""

    endpoint, bucket, query = "http://proxy:8080", "b", "provider=aws"

    def __init__(self) -> None:
        self.made: list[tuple[str, str, bool]] = []

    def add(self, engine: object, url: str, *, key_prefix: str, query: str, follow: bool) -> int:
        self.made.append((url, query, follow))
        return len(self.made) - 1


@pytest.mark.parametrize("mutations", [False, True])
def test_each_request_goes_by_an_endpoint_that_says_what_it_needs(mutations: bool) -> None:
    cluster = parse_map(smap(t1=node("t1", 2), t2=node("t2", 3)), "u")
    client, servers = Recorder(), ["proxy"]
    routes = Routes(None, client, "", mutations, servers)  # type: ignore[arg-type]
    routes.update(cluster)
    expected = {
        Op.READ: "provider=aws",
        Op.STAT: "props=checksum%2Csize&provider=aws",
        Op.WRITE: "provider=aws&skip_vc=true",
        CHECKED_WRITE: "provider=aws",
        Op.DELETE: "provider=aws",
    }
    for request, query in expected.items():
        proxy = routes.proxy[request]
        assert client.made[proxy] == ("http://proxy:8080/v1/objects/b/", query, True)
        assert servers[routes.server[proxy]] == "proxy"
        marked = mutations and request not in (Op.READ, Op.STAT)
        (straight,) = routes.straight[request]
        for place, endpoint in enumerate(straight.tolist()):
            url = f"http://10.0.0.1:{2 + place}/v1/objects/b/"
            told = f"pid=p&{query}&utm={ais_map._AHEAD}" if marked else query
            assert client.made[endpoint] == (url, told, False)
            assert servers[routes.server[endpoint]] == f"t{place + 1}"
            assert routes.is_straight[endpoint]
            assert not routes.is_straight[proxy]


def test_a_target_of_two_addresses_is_reached_by_both_and_a_new_map_makes_only_what_is_new() -> None:
    extra = {"node_ip_addr": "10.0.1.1", "daemon_port": "3", "direct_url": "http://10.0.1.1:3"}
    first = parse_map(smap(t1=node("t1", 2), t2=node("t2", 3, pub_extra=[extra])), "u")
    client = Recorder()
    routes = Routes(None, client, "", False, ["proxy"])  # type: ignore[arg-type]
    routes.update(first)
    urls = [[client.made[endpoint][0] for endpoint in ways] for ways in routes.straight[Op.READ]]
    assert urls == [
        ["http://10.0.0.1:2/v1/objects/b/", "http://10.0.0.1:3/v1/objects/b/"],
        ["http://10.0.0.1:2/v1/objects/b/", "http://10.0.1.1:3/v1/objects/b/"],
    ]
    count = len(client.made)
    old = routes.server.tolist()
    routes.update(parse_map(smap(t0=node("t0", 9), t2=node("t2", 3)), "u"))
    assert len(client.made) == count + CHECKED_WRITE + 1
    assert routes.server.tolist()[:count] == old
    assert [client.made[way][0] for way in routes.straight[Op.READ][0]] == [
        "http://10.0.0.1:9/v1/objects/b/",
        "http://10.0.0.1:3/v1/objects/b/",
    ]


@pytest.mark.parametrize("body", [b"", b"<html>", b"{}", b"[]", b'{"tmap": 3}'])
def test_what_is_no_map_is_refused_with_its_url(body: bytes) -> None:
    with pytest.raises(OSError, match="AIStore") as caught:
        parse_map(body, "http://elsewhere")
    assert (caught.value.errno, caught.value.filename) == (errno.EPROTO, "http://elsewhere")


@pytest.mark.parametrize("url", ["ais://", "ais:///x", "s3://b", "ais://@other/b", "ais://#ns/b"])
def test_a_url_without_a_bucket_of_this_cluster_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="ais://BUCKET"):
        ais.open(url)


def test_options_that_make_no_sense_are_refused() -> None:
    for option in ({"provider": "ftp"}, {"part_bytes": 5}, {"part_threshold_bytes": 1 << 40}, {"endpoint": "x:80"}):
        with pytest.raises(UsageError):
            ais.open("ais://b", **option)


def test_the_endpoint_is_found_where_aistore_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIS_ENDPOINT", "http://from-env:1/")
    assert find_endpoint("http://given:2") == "http://given:2"
    assert find_endpoint(None) == "http://from-env:1"
    monkeypatch.delenv("AIS_ENDPOINT")
    assert find_endpoint(None) == "http://localhost:8080"


def test_the_token_is_found_where_aistore_looks_and_never_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    for name in ("AIS_AUTHN_TOKEN", "AIS_AUTHN_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    assert find_token(None) == ""
    path = home / ".config/ais/cli/auth.token"
    path.parent.mkdir(parents=True)
    path.write_text('{"token": "of-the-cli"}')
    assert find_token(None) == "of-the-cli"
    named = home / "token"
    monkeypatch.setenv("AIS_AUTHN_TOKEN_FILE", str(named))
    with pytest.raises(UsageError, match="does not exist"):
        find_token(None)
    named.write_text("secret-not-json")
    with pytest.raises(UsageError) as caught:
        find_token(None)
    assert "secret" not in str(caught.value)
    named.write_text('{"token": "of-the-file"}')
    assert find_token(None) == "of-the-file"
    monkeypatch.setenv("AIS_AUTHN_TOKEN", "of-the-variable")
    assert find_token(None) == "of-the-variable"
    assert find_token("given") == "given"


def test_a_refused_token_says_what_to_look_at() -> None:
    assert "AIS_AUTHN_TOKEN" in str(status_error(401, "no", "u", token=False))
    assert "expired" in str(status_error(403, "no", "u", token=True))
    assert isinstance(status_error(404, "no", "u", token=False), FileNotFoundError)
