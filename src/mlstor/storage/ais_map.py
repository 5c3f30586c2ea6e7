"""AIStore's cluster map: which targets there are, and how an engine reaches them and the proxy."""

from __future__ import annotations

import errno
import json
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy

from mlstor.storage.transfers import Op

if TYPE_CHECKING:
    from mlstor._http import HttpEngine
    from mlstor.storage.ais_client import AisClient

# core/meta/smap.go: SnodeMaint, SnodeDecomm. Objects are not placed on such a target.
_AWAY = 1 << 2 | 1 << 3

#: Requests differ in their queries, so that each way has an endpoint per `Op`, and this one besides: a WRITE that
#: carries a checksum. The others have skip_vc=true, with which AIStore neither loads the old object's metadata nor
#: compares a checksum (ais/tgtobj.go: putOI.write).
CHECKED_WRITE = len(Op)
_REQUESTS = CHECKED_WRITE + 1
_SAYS: dict[int, tuple[str, ...]] = {Op.WRITE: ("skip_vc=true",), Op.STAT: ("props=checksum%2Csize",)}

# A target takes a PUT or DELETE if it carries what a proxy's redirect carries: the proxy's id and a time in ns to base
# 36 (ais/target.go: _verifyUnsigned). The time is only used for the cluster's own mean of redirects; one that lies far
# ahead stays out of it (ais/htrun.go: ptLatency). This one is in the year 2115.
_AHEAD = "yz0000000000"


class Target(NamedTuple):
    """A node that holds objects."""

    id: str
    #: what rendezvous hashing takes of it
    digest: int
    #: its addresses for clients, the first of them the main one
    urls: tuple[str, ...]
    host: str


class ClusterMap(NamedTuple):
    """Who takes part in a cluster. `targets` are those that objects are placed on, in the order of their ids."""

    cluster: str
    version: int
    targets: tuple[Target, ...]
    #: ids of targets that are in maintenance or being decommissioned
    away: frozenset[str]
    proxy: str

    def hosts(self) -> dict[str, str]:
        return {target.id: target.host for target in self.targets}


def parse_map(body: bytes, url: str) -> ClusterMap:
    """The map from its JSON (core/meta/smap.go, snode_wire.go).

    Raises
    ------
    OSError
        EPROTO if this is no cluster map: something else answers at `url`.
    """
    try:
        read = json.loads(body)
        nodes = sorted((read["tmap"] or {}).items())
        return ClusterMap(
            str(read["uuid"]),
            int(read["version"]),
            tuple(_target(name, node) for name, node in nodes if not int(node["flags"]) & _AWAY),
            frozenset(name for name, node in nodes if int(node["flags"]) & _AWAY),
            str(read["proxy_si"]["daemon_id"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OSError(errno.EPROTO, f"no AIStore cluster map ({error!r}): is this a proxy of AIStore?", url) from None


def _target(name: str, node: dict[str, Any]) -> Target:
    networks = [node["public_net"], *(node.get("pub_extra") or ())]
    urls = tuple(str(network["direct_url"]) for network in networks)
    return Target(name, int(node["id_digest"]), urls, str(node["public_net"]["node_ip_addr"]))


class Routes:
    """The endpoints of one engine: those of the proxy, and of each address of each target.

    The targets' are there even if nothing goes to them directly, since after a redirect the engine names the endpoint
    that it led to. An endpoint is made once and kept: transfers of an older map may still be on their way to it.

    Parameters
    ----------
    engine
        Whose endpoints they are.
    client
        Says bucket, provider and token.
    key_prefix
        Goes before each key.
    mutations
        Whether endpoints of targets carry what they take a WRITE and a DELETE for.
    servers
        Names of who serves, the proxy first; targets that are met are added.
    """

    def __init__(
        self, engine: HttpEngine, client: AisClient, key_prefix: str, mutations: bool, servers: list[str]
    ) -> None:
        self._engine = engine
        self._client = client
        self._key_prefix = key_prefix
        self._mutations = mutations
        self._servers = servers
        self._made: dict[tuple[str, str], list[int]] = {}
        self._served: list[int] = []
        self._straight: list[bool] = []
        #: by request
        self.proxy = self._endpoints("", "")

    def update(self, cluster: ClusterMap) -> None:
        """Take the targets of `cluster`. All arrays go by their places in it."""
        targets = cluster.targets
        for target in targets:
            if target.id not in self._servers:
                self._servers.append(target.id)
        straight = [[self._endpoints(target.id, url, cluster.proxy) for url in target.urls] for target in targets]
        most = max(map(len, straight), default=1)
        # Any: before Python 3.12 numpy's arrays are no Buffer to the type checker
        self.digests: Any = numpy.array([target.digest for target in targets], numpy.uint64)
        #: by request, then a number: endpoints of the targets, one of its addresses for each
        self.straight: list[list[Any]] = [
            [numpy.array([ways[turn % len(ways)][request] for ways in straight], numpy.uint32) for turn in range(most)]
            for request in range(_REQUESTS)
        ]
        #: by endpoint: who serves, as an index of the servers; and whether it is a target's own
        self.server: Any = numpy.array(self._served, numpy.uint32)
        self.is_straight = list(self._straight)

    def _endpoints(self, target: str, url: str, proxy: str = "") -> list[int]:
        """One per request, at `url` or, if that is "", at the proxy."""
        if made := self._made.get((target, url)):
            return made
        marks = [f"pid={proxy}", f"utm={_AHEAD}"] if url and self._mutations else []
        made = []
        for request in range(_REQUESTS):
            query = [*_SAYS.get(request, ()), *([] if request in (Op.READ, Op.STAT) else marks)]
            endpoint = self._client.add(
                self._engine,
                f"{url or self._client.endpoint}/v1/objects/{self._client.bucket}/",
                key_prefix=self._key_prefix,
                query="&".join(sorted([*query, *filter(None, [self._client.query])])),
                follow=not url,
            )
            made.append(endpoint)
            self._served += [0] * (endpoint + 1 - len(self._served))
            self._straight += [False] * (endpoint + 1 - len(self._straight))
            self._served[endpoint] = self._servers.index(target) if target else 0
            self._straight[endpoint] = bool(url)
        self._made[target, url] = made
        return made
