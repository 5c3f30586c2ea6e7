"""Traffic counters, on recorded trees: what is there is added up, what is not is None."""

from __future__ import annotations

from pathlib import Path

from mlstor import traffic


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
