"""What limited a stream beside the client: its network, and whether the servers' memory answered for their disks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from mlstor.results.client import measured_ns, percent, whole_host
from mlstor.results.stream import Network, ServerCache, StreamReport

Word = Literal["yes", "no", "unknown"]

LINE_PERCENT = 90
"""Share of the line rate from which on a network has no room left. The kernel's counters can't reach it: of a full
frame at an MTU of 1500 they count 1514 of the 1538 bytes' time that it takes on the wire.
"""
NETWORK_RULE = (
    f"The network is the limit if on any host the network devices received or sent >= {LINE_PERCENT} % of (measured "
    "time x the sum of their line rates in one direction); unknown if that is not so and a host doesn't show both. "
    "Loopback is not counted."
)

CACHE_FACTOR = 3
"""As in MLPerf Storage's rule 4.3.1 for clients: of a working set of three times the memory, read once in random order,
at most a third can come from memory.
"""
CACHE_RULE = (
    f"The servers' memory is exceeded if the distinct objects that are read have >= {CACHE_FACTOR} x the bytes of all "
    "servers' memory; else it may have answered for their disks (possible); unknown if that memory is not known."
)


def server_cache(working_set_bytes: int, server_memory_bytes: int | None, memory_source: str = "") -> ServerCache:
    """The verdict by `CACHE_RULE`.

    Parameters
    ----------
    working_set_bytes
        Of the distinct objects that the phase reads.
    server_memory_bytes
        Memory of all servers together; None where it is not known.
    memory_source
        Who said so: AIStore's sysinfo, ``--server-memory``.
    """
    verdict: Literal["exceeded", "possible", "unknown"] = "unknown"
    if server_memory_bytes is not None:
        verdict = "exceeded" if working_set_bytes >= CACHE_FACTOR * server_memory_bytes else "possible"
    return ServerCache(
        verdict=verdict,
        working_set_bytes=working_set_bytes,
        server_memory_bytes=server_memory_bytes,
        memory_source=memory_source,
        rule=CACHE_RULE,
    )


def distinct_nbytes(read_nbytes: int, all_nbytes: int, draws_of: int | None = None, clients: int = 1) -> int:
    """Bytes of the distinct objects that were read: all that was, up to one pass; where chance decides, as expected.

    Parameters
    ----------
    read_nbytes, all_nbytes
        That were read, and of all objects, bytes.
    draws_of
        Objects that were drawn from with replacement; None without replacement. Each is left out by k draws of n with
        the probability (1 - 1/n)^k.
    clients
        That made passes of their own, independently of one another: 1/clients of the bytes each.
    """
    passes = read_nbytes / all_nbytes
    if draws_of is not None:
        left_out = math.pow(1 - 1 / draws_of, draws_of * passes)
    else:
        left_out = math.pow(1 - min(1.0, passes / clients), clients)
    return min(read_nbytes, all_nbytes, round(all_nbytes * (1 - left_out)))


def judge_network(reports: Sequence[StreamReport]) -> Network:
    """The verdict on the clients' network by `NETWORK_RULE`."""
    hosts = {report.host for report in reports}
    received = whole_host([(r.host, r.nic_received_bytes) for r in reports], hosts)
    sent = whole_host([(r.host, r.nic_sent_bytes) for r in reports], hosts)
    limited, reason = _network_verdict(reports, hosts)
    return Network(
        limited=limited,
        reason=reason,
        rule=NETWORK_RULE,
        received_bytes="unknown" if received is None else received,
        sent_bytes="unknown" if sent is None else sent,
    )


def _network_verdict(reports: Sequence[StreamReport], hosts: set[int]) -> tuple[Word, str]:
    longest_ns: dict[int, int] = {}
    for report in reports:
        longest_ns[report.host] = max(longest_ns.get(report.host, 0), measured_ns(report))
    busiest = (-1, "")
    known: set[int] = set()
    for report in reports:
        host, rate, time_ns = report.host, report.nic_line_bits_per_s, longest_ns[report.host]
        received, sent = report.nic_received_bytes, report.nic_sent_bytes
        if not rate or not time_ns or received is None or sent is None:
            continue
        known.add(host)
        nbytes, word = max((received, "received"), (sent, "sent"))
        share = percent(8 * nbytes * 10**9, rate * time_ns)
        busiest = max(busiest, (share, f"host {host} {word} {share} % of its line rate of {rate / 1e9:g} Gbit/s"))
    share, reason = busiest
    if len(known) > 1:
        reason += ", the most of any host"
    if share >= LINE_PERCENT:
        return "yes", reason
    if hosts and known == hosts:
        return "no", reason
    return "unknown", "a host doesn't show its line rate or traffic" + (f"; {reason}" if reason else "")
