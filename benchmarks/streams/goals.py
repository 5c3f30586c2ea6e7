"""What streams have to reach, each with the figure that this run gave."""

from __future__ import annotations

from benchmarks.goals import Goal
from benchmarks.streams.contenders import PARTS
from benchmarks.streams.parts import Samples, key_of
from benchmarks.streams.ratios import cost, rate


def goals(samples: Samples, server: str) -> list[Goal]:
    """All rows for the runs on one server."""
    clients = {"s3": s3_goals, "ais": ais_goals}
    rows = clients[server](samples) if server in clients else []
    for part in PARTS:
        rows += part.goals(samples, server)
    return rows


def s3_goals(samples: Samples) -> list[Goal]:
    """Against the Python clients of S3."""

    def key(op: str, size: str, client: str) -> str:
        return key_of("s3", op, size, client)

    peers = ("s3torchconnector", "boto3", "obstore, threads", "obstore, asyncio")
    ours, connector = key("get", "64KiB", "mlstor"), key("get", "64KiB", "s3torchconnector")
    small = [key("get", "64KiB", f"obstore, {how}") for how in ("threads", "asyncio")]
    return [
        cost(samples, "GET 8MiB: CPU per GB / s3torchconnector", key("get", "8MiB", "mlstor"),
             [key("get", "8MiB", "s3torchconnector")], 0.5),
        cost(samples, "GET 64KiB: CPU per operation / s3torchconnector", ours, [connector], 1 / 3),
        cost(samples, "GET 64KiB: CPU per operation / obstore", ours, small, 1 / 3),
        *(
            rate(samples, f"{op.upper()} {size}: rate / best of the peers", key(op, size, "mlstor"),
                 [key(op, size, peer) for peer in peers], least)
            for op, size, least in (("get", "64KiB", 1.3), ("get", "8MiB", 1.1), ("put", "8MiB", 1.0))
        ),
    ]  # fmt: skip


def ais_goals(samples: Samples) -> list[Goal]:
    """Against aisloader."""
    rows = []
    for size, way, unit, most, least in (
        ("64KiB", "direct", "operation", 0.5, 1.3),
        ("64KiB", "by the proxy", "operation", 0.8, 1.1),
        ("8MiB", "direct", "GB", 0.8, 1.0),
    ):
        ours, theirs = key_of("ais", "get", size, f"mlstor, {way}"), key_of("ais", "get", size, "aisloader")
        rows.append(cost(samples, f"GET {size}, {way}: CPU per {unit} / aisloader", ours, [theirs], most))
        rows.append(rate(samples, f"GET {size}, {way}: rate / aisloader", ours, [theirs], least))
    return rows
