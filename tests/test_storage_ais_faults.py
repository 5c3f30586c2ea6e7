"""AIStore clusters that change under a run: a target dies and comes back, or direct access is forbidden."""

from __future__ import annotations

import threading
import time
import urllib.error
from collections.abc import Iterator

import pytest
from ais_support import ask_target, batch, bucket, carry_out, read_all, write_all
from servers.aistore import Cluster, aistore, running  # noqa: F401

from mlstor.errors import UsageError
from mlstor.storage import ais
from mlstor.storage.transfers import COMPLETION_DTYPE, Kind, Op, zeros


@pytest.fixture(scope="module")
def cluster(aistore: Cluster) -> Cluster:  # noqa: F811
    return aistore


def direct_access(cluster: Cluster, allowed: bool) -> None:
    """Protection of requests inside the cluster forbids direct access, whether it is carried out already or not."""
    value = {"auth": {"intra_cluster": {"request_auth": not allowed}}}
    deadline = time.monotonic() + 60
    while True:
        try:
            cluster.call("PUT", "/v1/cluster", {"action": "set-config", "value": value})
            break
        except urllib.error.HTTPError as error:
            # a cluster that has just come up takes buckets before it takes changes
            if error.code != 503 or time.monotonic() > deadline:
                raise
            time.sleep(0.5)
    # until the targets have it
    name = "direct-access"
    cluster.call("POST", f"/v1/buckets/{name}", {"action": "create-bck"})
    wanted = 404 if allowed else 403
    while any(ask_target(target.url, name, "none") != wanted for target in cluster.targets):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    cluster.call("DELETE", f"/v1/buckets/{name}", {"action": "destroy-bck"})


@pytest.fixture
def forbidding(cluster: Cluster) -> Iterator[Cluster]:
    direct_access(cluster, False)
    try:
        yield cluster
    finally:
        direct_access(cluster, True)


def test_where_direct_access_is_forbidden_all_goes_by_the_proxy(forbidding: Cluster) -> None:
    with bucket(forbidding, direct_writes=True) as store:
        told = store.describe()
        assert (told["reads"], told["writes"]) == ("proxy", "proxy")
        assert "403" in told["direct_refused"]
        store.write("o", b"content")
        assert store.read("o") == b"content"
        with pytest.raises(UsageError, match="via_proxy"):
            ais.open(store.url, endpoint=forbidding.endpoint, via_proxy=False)


def test_direct_access_that_is_forbidden_in_mid_run_is_left(cluster: Cluster) -> None:
    keys = [f"o{number}" for number in range(40)]
    with bucket(cluster) as store, store.transfers(workers=1) as transfers:
        write_all(transfers, keys, [key.encode() for key in keys])
        direct_access(cluster, False)
        try:
            done, got = read_all(transfers, keys, 20)
            assert got == [key.encode() for key in keys]
            assert (done["first_status"][done["attempts"] > 1] == 403).all()
            assert (done["attempts"] > 1).any()
            assert transfers.failures() == []
            told = store.describe()
            assert (told["reads"], told["handed_to_proxy"]) == ("proxy", (done["attempts"] > 1).sum())
            assert "403" in told["direct_lost"]
            again, _ = read_all(transfers, keys, 20)
            assert (again["attempts"] == 1).all()
            assert (again["redirect_ns"] > 0).all()
        finally:
            direct_access(cluster, True)


def test_an_object_that_a_target_has_not_is_asked_of_the_proxy(cluster: Cluster) -> None:
    """As after a change of the map: transfers believe that there is one target, and the object is on the other."""
    keys = [f"o{number}" for number in range(30)]
    with bucket(cluster) as store:
        with store.transfers(workers=1) as transfers:
            write_all(transfers, keys, [key.encode() for key in keys])
        old = store.cluster._replace(targets=store.cluster.targets[:1], version=1)
        store.cluster = old
        with store.transfers(workers=1) as transfers:
            done, got = read_all(transfers, keys, 20)
            assert got == [key.encode() for key in keys]
            moved = done["attempts"] > 1
            assert 0 < moved.sum() < len(keys)
            assert (done["first_status"][moved] == 404).all()
            assert (done["first_kind"][moved] == Kind.HTTP).all()
            assert (done["redirect_ns"][moved] > 0).all()
            assert transfers.failures() == []
            assert transfers.counters().retries == moved.sum()
            # the map is not asked for more than once a second
            time.sleep(1.1)
            read_all(transfers, keys, 20)
            assert store.cluster.version > 1
            now, _ = read_all(transfers, keys, 20)
            assert (now["attempts"] == 1).all()


@pytest.mark.slow
def test_a_run_goes_on_while_a_target_is_killed_and_comes_back(cluster: Cluster) -> None:
    keys = [f"o{number}" for number in range(300)]
    with bucket(cluster) as store, store.transfers(workers=2, in_flight=8) as transfers:
        write_all(transfers, keys, [key.encode() for key in keys])
        victim = cluster.targets[0]
        restarted = threading.Event()

        def restart() -> None:
            time.sleep(6)
            victim.start()
            restarted.set()

        victim.kill()
        thread = threading.Thread(target=restart)
        thread.start()
        try:
            done, got = read_all(transfers, keys, 20)
        finally:
            thread.join()
            cluster.wait()
        assert got == [key.encode() for key in keys]
        assert transfers.failures() == []
        again = done["attempts"] > 1
        assert 0 < again.sum() < len(keys)
        assert (done["first_kind"][again] != Kind.OK).all()
        # nothing of it is hidden: these took as long as the target was away
        took_s = (done["end_ns"] - done["start_ns"]) / 1e9
        assert took_s[again].max() > 2
        assert transfers.counters().retries >= again.sum()
        assert store.describe()["handed_to_proxy"] > 0


@pytest.mark.slow
def test_a_target_that_stays_away_fails_its_transfers_when_patience_ends(cluster: Cluster) -> None:
    keys = [f"o{number}" for number in range(40)]
    with bucket(cluster, patience_s=2.0, tries=2) as store, store.transfers(workers=2) as transfers:
        write_all(transfers, keys, [b"x"] * 40)
        victim = cluster.targets[1]
        victim.kill()
        try:
            begun = time.monotonic()
            done, _ = read_all(transfers, keys, 20)
            assert time.monotonic() - begun < 30
        finally:
            victim.start()
            cluster.wait()
        failed = done["kind"] != Kind.OK
        assert 0 < failed.sum() < len(keys)
        failures = transfers.failures()
        assert {failure.tag for failure in failures} == set(done["tag"][failed].tolist())
        assert all(failure.url and failure.message for failure in failures)


@pytest.mark.slow
def test_cancel_ends_what_waits_for_a_target_at_once(cluster: Cluster) -> None:
    keys = [f"o{number}" for number in range(40)]
    with bucket(cluster) as store, store.transfers(workers=1) as transfers:
        write_all(transfers, keys, [b"x"] * 40)
        victim = cluster.targets[0]
        victim.kill()
        try:
            made, names = batch(Op.READ, keys)
            transfers.submit(made, names)
            done = zeros(len(keys), COMPLETION_DTYPE)
            count = transfers.reap(done, len(keys), 3.0)
            assert count < len(keys)
            begun = time.monotonic()
            transfers.cancel()
            while count < len(keys):
                count += transfers.reap(done[count:], 1, 5.0)
            assert time.monotonic() - begun < 20
            assert set(done["kind"].tolist()) >= {Kind.OK, Kind.CANCELLED}
        finally:
            victim.start()
            cluster.wait()
        assert (carry_out(transfers, made, names)["kind"] == Kind.OK).all()


@pytest.mark.slow
def test_a_cluster_of_its_own_is_made_and_ended(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The fixture itself: another cluster beside the shared one, with one target."""
    with running(tmp_path_factory.mktemp("small"), ntargets=1) as small:
        with bucket(small) as store:
            store.write("o", b"x")
            assert len(store.cluster.targets) == 1
        url = small.endpoint
    with pytest.raises(OSError):
        ais.open("ais://b", endpoint=url, tries=1)
