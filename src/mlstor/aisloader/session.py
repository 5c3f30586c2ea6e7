"""The session of aisloader's options: the bucket, and the names of what is read and written."""

from __future__ import annotations

import json
import secrets
from typing import TYPE_CHECKING, Any, cast

from mlstor.agreement import agreed
from mlstor.aisloader.lists import Listed
from mlstor.aisloader.names import Names
from mlstor.errors import UsageError
from mlstor.storage.ais_client import AisClient, find_endpoint, find_token
from mlstor.stream import listing
from mlstor.stream.manifest import Manifest
from mlstor.stream.session import Session
from mlstor.stream.sizes import Sizes

if TYPE_CHECKING:
    from mlstor.aisloader.translate import Plan
    from mlstor.world import World


class _Written(Manifest, kw_only=True):
    """What this run writes, for the stream's workload; nothing is put beside the objects."""

    names: Any

    def objects(self, count: int = 0) -> Names:  # type: ignore[override]  # has no end, and needs none
        return cast(Names, self.names)


class LoaderSession(Session):
    """A session whose bucket may have to be made, and whose names are aisloader's.

    Attributes
    ----------
    made_bucket : bool
        Whether this run made it.
    run_key : int
        Of the bytes that it writes.
    """

    def __init__(self, world: World, plan: Plan, command: list[str]) -> None:
        self.plan = plan
        self.client: AisClient | None = None
        self.made_bucket = False
        if plan["randomproxy"]:
            plan.options.store_options["endpoint"] = self.draw_proxy(world)
        super().__init__(world, plan.options, command)
        if not plan.direct_s3:
            self.client = client_of(plan)
        self.run_key = int(world.bcast(str(secrets.randbits(64)).encode()).decode())

    def draw_proxy(self, world: World) -> str:
        """The URL of a proxy of the cluster, drawn by each process for itself."""

        def draw() -> str:
            client = client_of(self.plan)
            try:
                proxies = json.loads(client.map())["pmap"].values()
            except OSError as error:
                raise UsageError(f"{error.filename or client.endpoint}: {error.strerror or error}") from None
            finally:
                client.close()
            return str(secrets.choice([one["public_net"]["direct_url"] for one in proxies]))

        return agreed(world, draw)

    def close(self) -> None:
        """Both ways to the store."""
        if self.client is not None:
            self.client.close()
        self.store.close()

    def begin(self) -> None:
        """See `Session.begin`: the bucket, and the names of what is in it."""
        self._make_bucket()
        if self.options.get:
            self._list()
        if self.writes:
            self.written = _Written(
                run_id=self.run_id,
                run_key=self.run_key,
                seed=self.options.seed,
                sizes=self.sizes,
                dirs=self.options.prefix_dirs,
                compressibility=0,
                names=self.names(),
            )

    def names(self) -> Names:
        """What this run writes."""
        plan = self.plan
        return Names(
            plan.loader,
            Sizes(self.sizes, self.options.seed),
            self.options.seed,
            subdir=plan["subdir"],
            dirs=plan["num-subdirs"],
            shard_percent=plan["arch.pct"],
            extension=plan.shards.format if plan.shards is not None else "",
        )

    def _make_bucket(self) -> None:
        said = self.world.bcast(json.dumps(self._is_missing() if self.world.rank == 0 else None).encode())
        missing = json.loads(said)
        if not missing:
            return
        if self.options.get:
            raise UsageError(f"there is no bucket {self.plan.bucket}, so nothing to read: give -pctput=100 to make it")
        if self.world.rank == 0:
            self.client_.create(exist_ok=True)
        self.made_bucket = True
        self.world.barrier("bucket")

    @property
    def client_(self) -> AisClient:
        """The cluster's, where there is one."""
        assert self.client is not None
        return self.client

    def _is_missing(self) -> bool:
        return self.client is not None and is_missing(self.client)

    def _list(self) -> None:
        plan, world = self.plan, self.world
        store: Any = Listed(self.store, self.client, plan.archives, plan["cached"])
        archived = plan.archives and not plan["filelist"]
        samples = 0 if archived else listing.SAMPLES  # files in archives can't be looked up alone
        prefix = "" if plan["filelist"] else plan["subdir"]
        found = listing.shared(store, world, prefix=prefix, list_file=self.options.list_file, samples=samples)
        self.objects, self.source = found.catalog, "file" if self.options.list_file else "listing"
        self.listing_s = found.seconds
        if self.objects.total_bytes is None and (plan["readlen"] or plan["pctupdate"] or plan["pctmpdstream"]):
            catalog = found.catalog
            self.objects = self.agreed(lambda: listing.sized(self.store, catalog))
        if plan["get-batchsize"] > len(self.objects):
            raise UsageError(
                f"-get-batchsize={plan['get-batchsize']}: there are {len(self.objects)} objects; give less"
            )


def client_of(plan: Plan) -> AisClient:
    """A way to the cluster for what `Store` has no name for."""
    given = plan.options.store_options
    return AisClient(
        find_endpoint(given.get("endpoint")),
        plan.bucket,
        provider=given.get("provider", "ais"),
        token=find_token(given.get("token")),
        ca_file=given.get("ca_file"),
        insecure=given.get("insecure", False),
    )


def is_missing(client: AisClient) -> bool:
    """Whether the bucket is not there."""
    try:
        client.checksum_type()
    except FileNotFoundError:
        return True
    return False
