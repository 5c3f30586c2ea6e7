"""What this host's memory and network have moved, as far as the machine shows it. None: it does not."""

from __future__ import annotations

from pathlib import Path

# InfiniBand counts words of four bytes: IBA 1.3, 16.1.3.5 (PortXmitData, PortRcvData).
_IB_WORD_NBYTES = 4


def memory_bytes(root: str = "/") -> int | None:
    """Bytes between memory and caches since boot, by resctrl's counters (``mbm_total_bytes``) of all sockets.

    Shown where the processor counts them and ``/sys/fs/resctrl`` is mounted. Counters wrap; a difference is only of use
    over minutes.
    """
    counters = sorted(Path(root, "sys/fs/resctrl/mon_data").glob("mon_L3_*/mbm_total_bytes"))
    values = [_number(path) for path in counters]
    return sum(value for value in values if value is not None) if values and None not in values else None


def nic_bytes(root: str = "/") -> int | None:
    """Bytes sent and received since boot by all network devices but loopback, and by InfiniBand ports, which the former
    do not count for RDMA.
    """
    base = Path(root, "sys/class")
    values = [
        _number(device / "statistics" / counter)
        for device in sorted(base.glob("net/*"))
        if device.name != "lo"
        for counter in ("rx_bytes", "tx_bytes")
    ]
    values += [
        None if words is None else words * _IB_WORD_NBYTES
        for port in sorted(base.glob("infiniband/*/ports/*"))
        for words in (_number(port / "counters" / name) for name in ("port_rcv_data", "port_xmit_data"))
    ]
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "Unavailable" is what resctrl says of a counter that it can't read now
        return None
