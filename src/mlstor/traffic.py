"""What this host's memory and network have moved, as far as the machine shows it. None: it does not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mlstor.results.stream import StreamReport

# InfiniBand counts words of four bytes: IBA 1.3, 16.1.3.5 (PortXmitData, PortRcvData).
_IB_WORD_NBYTES = 4
_ARPHRD_INFINIBAND = 32  # linux/if_arp.h: IPoIB, whose bytes the port counts too
_IN_USE = 100
"""A line that moved less than a hundredth of what the busiest one moved is there for something else."""


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


class Line(NamedTuple):
    """What one line has moved since boot, and its rate in one direction in bits per second, None where that is not
    shown: by virtual devices, and by virtual machines that don't know it.
    """

    received_bytes: int
    sent_bytes: int
    bits_per_s: int | None


def lines(root: str = "/") -> dict[str, Line]:
    """The lines of this host by name, as far as their counters are shown; without loopback.

    Devices on top of others (bonds, VLANs, bridges) are left out, for those below count the same bytes; so are virtual
    ones where there are physical ones, and those for IP over InfiniBand, whose port counts it. A port that carries RDMA
    over Ethernet is one line with its network device: bytes of both, one rate.
    """
    base = Path(root, "sys/class")
    found: dict[str, Line] = {}
    by_port: dict[tuple[str, int], str] = {}
    for device in _devices(base / "net"):
        moved = _moved(device / "statistics", "rx_bytes", "tx_bytes", 1)
        if moved is None:
            continue
        found[device.name] = Line(*moved, _ethernet_rate(device))
        if (device / "device").exists():
            by_port[str((device / "device").resolve()), _number(device / "dev_port") or 0] = device.name
    for port in sorted(base.glob("infiniband/*/ports/*")):
        moved = _moved(port / "counters", "port_rcv_data", "port_xmit_data", _IB_WORD_NBYTES)
        if moved is None:
            continue
        hardware = port.parent.parent / "device"
        name = by_port.get((str(hardware.resolve()), int(port.name) - 1)) if hardware.exists() else None
        if name is None:
            found[f"{port.parent.parent.name}/{port.name}"] = Line(*moved, _infiniband_rate(port))
        else:
            below = found[name]
            rate = below.bits_per_s or _infiniband_rate(port)
            found[name] = Line(below.received_bytes + moved[0], below.sent_bytes + moved[1], rate)
    return found


def _devices(net: Path) -> list[Path]:
    devices = [
        device
        for device in sorted(net.glob("*"))
        if device.name != "lo"
        and (device / "statistics").is_dir()
        and not any(device.glob("lower_*"))
        and _number(device / "type") != _ARPHRD_INFINIBAND
    ]
    physical = [device for device in devices if (device / "device").exists()]
    return physical or devices


def _moved(counters: Path, received: str, sent: str, unit_nbytes: int) -> tuple[int, int] | None:
    values = _number(counters / received), _number(counters / sent)
    return None if values[0] is None or values[1] is None else (values[0] * unit_nbytes, values[1] * unit_nbytes)


def _ethernet_rate(device: Path) -> int | None:
    """``speed`` has Mbit/s, -1 or nothing where it is not known; that of a virtual device is made up (veth: 10000)."""
    speed = _number(device / "speed") if (device / "device").exists() else None
    return speed * 10**6 if speed is not None and speed > 0 else None


def _infiniband_rate(port: Path) -> int | None:
    """``rate`` is as ``200 Gb/sec (4X HDR)``."""
    try:
        match = re.match(r"([0-9.]+) Gb/sec", (port / "rate").read_text())
    except (OSError, ValueError):
        return None
    return round(float(match[1]) * 1e9) or None if match else None


class Network:
    """What the host's lines move from now on.

    Parameters
    ----------
    of_host
        Whether this process looks; one of each host does.
    """

    def __init__(self, of_host: bool, root: str = "/") -> None:
        self._root = root
        self._before = lines(root) if of_host else {}

    def since(self) -> Line | None:
        """Bytes of the lines in use, and the sum of their rates if all of these are shown; None if nothing is shown.

        In use is what moved at least a hundredth of what the busiest line did. A line that has come, gone or begun to
        count anew in the meantime is left out, and then no rate is known.
        """
        after = lines(self._root) if self._before else {}
        moved = {
            name: Line(
                after[name].received_bytes - line.received_bytes,
                after[name].sent_bytes - line.sent_bytes,
                after[name].bits_per_s,
            )
            for name, line in self._before.items()
            if name in after
        }
        steady = [line for line in moved.values() if line.received_bytes >= 0 and line.sent_bytes >= 0]
        if not steady:
            return None
        most = max(line.received_bytes + line.sent_bytes for line in steady)
        used = [line for line in steady if _IN_USE * (line.received_bytes + line.sent_bytes) >= most]
        rates = [line.bits_per_s for line in used]
        whole = len(steady) == len(self._before) == len(after)
        return Line(
            sum(line.received_bytes for line in used),
            sum(line.sent_bytes for line in used),
            sum(rate for rate in rates if rate is not None) if whole and None not in rates else None,
        )

    def read(self, into: StreamReport) -> None:
        """Write what was moved since the start into a report."""
        moved = self.since()
        if moved is not None:
            into.nic_received_bytes, into.nic_sent_bytes = moved.received_bytes, moved.sent_bytes
            into.nic_line_bits_per_s = moved.bits_per_s


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "Unavailable" is what resctrl says of a counter that it can't read now
        return None
