"""Traffic counters, on recorded trees: what is there is added up, what is not is None."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlstor import traffic
from mlstor.results.stream import StreamReport


def put(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_network_devices_and_infiniband_ports_are_added_up_and_loopback_is_not(tmp_path: Path) -> None:
    put(tmp_path, "sys/class/net/lo/statistics/rx_bytes", "999\n")
    put(tmp_path, "sys/class/net/eth0/statistics/rx_bytes", "100\n")
    put(tmp_path, "sys/class/net/eth0/statistics/tx_bytes", "20\n")
    put(tmp_path, "sys/class/infiniband/mlx5_0/ports/1/counters/port_rcv_data", "5\n")
    put(tmp_path, "sys/class/infiniband/mlx5_0/ports/1/counters/port_xmit_data", "1\n")
    assert traffic.nic_bytes(str(tmp_path)) == 100 + 20 + 4 * 6


def test_a_machine_without_network_devices_shows_nothing(tmp_path: Path) -> None:
    put(tmp_path, "sys/class/net/lo/statistics/rx_bytes", "999\n")
    assert traffic.nic_bytes(str(tmp_path)) is None


def test_memory_counters_of_all_sockets_are_added_up(tmp_path: Path) -> None:
    put(tmp_path, "sys/fs/resctrl/mon_data/mon_L3_00/mbm_total_bytes", "1000\n")
    put(tmp_path, "sys/fs/resctrl/mon_data/mon_L3_01/mbm_total_bytes", "500\n")
    assert traffic.memory_bytes(str(tmp_path)) == 1500


def test_memory_traffic_is_unknown_without_resctrl_and_where_a_counter_is_unavailable(tmp_path: Path) -> None:
    assert traffic.memory_bytes(str(tmp_path)) is None
    put(tmp_path, "sys/fs/resctrl/mon_data/mon_L3_00/mbm_total_bytes", "1000\n")
    put(tmp_path, "sys/fs/resctrl/mon_data/mon_L3_01/mbm_total_bytes", "Unavailable\n")
    assert traffic.memory_bytes(str(tmp_path)) is None


def link(root: Path, name: str, target: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (root / target).mkdir(parents=True, exist_ok=True)
    path.symlink_to(root / target)


def device(root: Path, name: str, received: int, sent: int, speed: int | None = None, hardware: str = "") -> None:
    """A network device; of real hardware if it is named."""
    base = f"sys/class/net/{name}"
    put(root, f"{base}/statistics/rx_bytes", f"{received}\n")
    put(root, f"{base}/statistics/tx_bytes", f"{sent}\n")
    put(root, f"{base}/type", "1\n")
    if speed is not None:
        put(root, f"{base}/speed", f"{speed}\n")
    if hardware and not (root / base / "device").exists():
        link(root, f"{base}/device", f"sys/devices/{hardware}")


def port(root: Path, name: str, received_words: int, sent_words: int, rate: str, hardware: str = "pci1") -> None:
    base = f"sys/class/infiniband/{name}/ports/1"
    put(root, f"{base}/counters/port_rcv_data", f"{received_words}\n")
    put(root, f"{base}/counters/port_xmit_data", f"{sent_words}\n")
    put(root, f"{base}/rate", f"{rate}\n")
    if not (root / f"sys/class/infiniband/{name}/device").exists():
        link(root, f"sys/class/infiniband/{name}/device", f"sys/devices/{hardware}")


def test_each_direction_and_the_line_rate_are_those_of_the_devices_in_use(tmp_path: Path) -> None:
    device(tmp_path, "lo", 10**9, 10**9)
    device(tmp_path, "eth0", 100, 20, 25_000, "pci0")
    device(tmp_path, "eth1", 0, 0, 1_000, "pci1")
    network = traffic.Network(True, str(tmp_path))
    device(tmp_path, "lo", 10**10, 10**10)
    device(tmp_path, "eth0", 5_000_100, 1_000_020, 25_000, "pci0")
    device(tmp_path, "eth1", 9_000, 300, 1_000, "pci1")  # chatter
    assert network.since() == traffic.Line(5_000_000, 1_000_000, 25 * 10**9)
    device(tmp_path, "eth1", 4_000_000, 300, 1_000, "pci1")
    assert network.since() == traffic.Line(9_000_000, 1_000_300, 26 * 10**9)


@pytest.mark.parametrize("speed", [None, -1, 0])
def test_a_device_that_does_not_know_its_speed_makes_the_rate_unknown(tmp_path: Path, speed: int | None) -> None:
    device(tmp_path, "eth0", 0, 0, speed, "virtio0")
    network = traffic.Network(True, str(tmp_path))
    device(tmp_path, "eth0", 7, 8, speed, "virtio0")
    assert network.since() == traffic.Line(7, 8, None)


def test_a_containers_virtual_device_counts_bytes_and_its_speed_is_not_believed(tmp_path: Path) -> None:
    device(tmp_path, "eth0", 1, 2, 10_000)
    assert traffic.lines(str(tmp_path)) == {"eth0": traffic.Line(1, 2, None)}


def test_a_bond_and_a_vlan_are_not_counted_beside_the_devices_below(tmp_path: Path) -> None:
    for name in ("eth0", "eth1"):
        device(tmp_path, name, 10, 20, 1_000, f"pci-{name}")
    device(tmp_path, "bond0", 20, 40, 2_000)
    device(tmp_path, "bond0.7", 20, 40, 2_000)
    device(tmp_path, "veth12", 5, 5, 10_000)
    for above, below in (("bond0", "eth0"), ("bond0", "eth1"), ("bond0.7", "bond0")):
        link(tmp_path, f"sys/class/net/{above}/lower_{below}", f"sys/class/net/{below}")
    assert traffic.lines(str(tmp_path)) == {name: traffic.Line(10, 20, 10**9) for name in ("eth0", "eth1")}


def test_an_infiniband_port_is_a_line_and_ip_over_it_is_not_another(tmp_path: Path) -> None:
    port(tmp_path, "mlx5_0", 1000, 500, "200 Gb/sec (4X HDR)")
    device(tmp_path, "ib0", 4000, 2000, 200_000, "pci1")
    put(tmp_path, "sys/class/net/ib0/type", "32\n")
    assert traffic.lines(str(tmp_path)) == {"mlx5_0/1": traffic.Line(4000, 2000, 200 * 10**9)}


def test_rdma_over_ethernet_shares_its_devices_line(tmp_path: Path) -> None:
    device(tmp_path, "eth0", 100, 10, 100_000, "pci1")
    put(tmp_path, "sys/class/net/eth0/dev_port", "0\n")
    port(tmp_path, "mlx5_0", 1000, 500, "100 Gb/sec (4X EDR)")
    assert traffic.lines(str(tmp_path)) == {"eth0": traffic.Line(4100, 2010, 100 * 10**9)}


def test_a_port_without_a_rate_and_one_without_counters(tmp_path: Path) -> None:
    port(tmp_path, "mlx5_0", 1, 1, "unknown")
    put(tmp_path, "sys/class/infiniband/mlx5_1/ports/1/rate", "100 Gb/sec (4X EDR)\n")
    assert traffic.lines(str(tmp_path)) == {"mlx5_0/1": traffic.Line(4, 4, None)}


def test_nothing_is_told_by_who_does_not_look_and_where_nothing_is_shown(tmp_path: Path) -> None:
    report = stream_report()
    traffic.Network(True, str(tmp_path)).read(report)
    device(tmp_path, "eth0", 1, 1, 1000, "pci0")
    traffic.Network(False, str(tmp_path)).read(report)
    assert (report.nic_received_bytes, report.nic_sent_bytes, report.nic_line_bits_per_s) == (None, None, None)
    network = traffic.Network(True, str(tmp_path))
    device(tmp_path, "eth0", 11, 6, 1000, "pci0")
    network.read(report)
    assert (report.nic_received_bytes, report.nic_sent_bytes, report.nic_line_bits_per_s) == (10, 5, 10**9)


def test_a_device_that_counts_anew_or_has_gone_is_left_out_and_then_no_rate_is_known(tmp_path: Path) -> None:
    device(tmp_path, "eth0", 1000, 1000, 1000, "pci0")
    device(tmp_path, "eth1", 1000, 1000, 1000, "pci1")
    network = traffic.Network(True, str(tmp_path))
    device(tmp_path, "eth0", 5, 5, 1000, "pci0")
    device(tmp_path, "eth1", 3000, 2000, 1000, "pci1")
    assert network.since() == traffic.Line(2000, 1000, None)


def stream_report() -> StreamReport:
    return StreamReport(number=0, name="stream", process=0, host=0, barrier_unix_ns=0, ranks=[])
