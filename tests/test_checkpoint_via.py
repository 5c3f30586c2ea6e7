"""``mlstor checkpoint --via``: each way writes, reads, verifies and is removed; what does not fit is refused."""

from __future__ import annotations

import errno
import gc
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import s3_support
from checkpoint_support import SCALE, Bench, Ran

pytest.importorskip("torch")
import torch
from servers.weed import Weed, weed

from mlstor._io import Pattern
from mlstor.checkpoint.layout import Layout
from mlstor.checkpoint.models import get
from mlstor.checkpoint.phase import Chain
from mlstor.checkpoint.via import route_of
from mlstor.checkpoint.via_carrier import ViaCarrier, ViaJob, bytes_of, specs_of
from mlstor.results.phase import PathTaken

__all__ = ["weed"]


def checked(ran: Ran, way: str) -> None:
    assert ran.code == 0, ran.err
    work = ran.record.workload
    assert work.via == way
    assert work.via_version is not None
    assert way in work.via_version or way == "dcp"
    assert f"torch {importlib.metadata.version('torch')}" in work.via_version
    assert f"via {work.via_version}" in " ".join(ran.out.split())
    write, read = ran.record.phases
    assert write.nbytes == read.nbytes == work.nbytes > 0
    assert read.verification.verified_nbytes == work.nbytes
    assert not read.verification.damaged_blocks


@pytest.mark.parametrize("way", ["torch", "dcp", "safetensors", "mlstor"])
def test_a_way_through_a_directory_is_measured_and_verified(bench: Bench, way: str) -> None:
    if way == "safetensors":
        pytest.importorskip("safetensors")
    ran = bench("--ranks", "2", "--via", way)
    checked(ran, way)
    assert ran.record.phases[1].cached.verdict in ("no", "yes")  # yes: the tests' directory lies in memory
    assert not os.listdir(bench.target)


@pytest.mark.parametrize("way", ["s3torchconnector", "mlstor"])
def test_a_way_through_s3_is_measured_and_verified(
    tmp_path: Path, weed: Weed, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "s3torchconnector":
        pytest.importorskip("s3torchconnector")
    s3_support.forget_aws(monkeypatch)
    with s3_support.bucket(weed, "ckpt") as store:
        reach = ("--endpoint", weed.endpoint, "-o", "anonymous=yes")
        ran = Bench(tmp_path).run("--ranks", "1", "--via", way, *reach, store.url.rstrip("/"))
        checked(ran, way)
        assert not s3_support.listed(store)


@pytest.mark.parametrize(("way", "code"), [("torch", 3), ("mlstor", 3)])
def test_damage_that_the_way_lets_through_or_finds_itself_is_told(
    bench: Bench, way: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlstor.checkpoint import via

    made: Any = {"torch": via.Torch, "mlstor": via.Mlstor}[way]
    save = made.save

    def save_and_damage(route: Any, state: Any, path: str) -> None:
        save(route, state, path)
        if "layer" in os.path.basename(path):
            return
        data = bytearray(Path(path).read_bytes())
        data[len(data) // 2] ^= 1  # amidst the only large tensor's data
        Path(path).write_bytes(data)

    monkeypatch.setattr(made, "save", save_and_damage)
    ran = bench.run("--ranks", "1", "--via", way, bench.target)
    assert ran.code == code
    assert "damage" in ran.err.lower() or "not what was written" in ran.err


@pytest.mark.parametrize("way", ["torch", "dcp", "safetensors", "mlstor"])
def test_a_full_disk_is_told_in_a_sentence_whatever_the_way_raises(
    bench: Bench, way: str, tmpfs_mount: Callable[[int], Path]
) -> None:
    layout = Layout(get("llama3-8b"), scale=Fraction(SCALE))
    specs = specs_of(layout, 0, 1)
    target = tmpfs_mount(64 << 10)  # a file of 180 KB
    carrier = ViaCarrier(route_of(way, str(target), {}), "write", PathTaken(backend=way, direct="no", fs_type="tmpfs"))
    job = ViaJob(str(target / "file"), 183_800, specs, Pattern(1), "write")
    carrier.submit([job], Chain(0, 1, [[job]]))
    with pytest.raises(OSError, match="file") as raised:
        list(carrier.reap(60))
    carrier.close()
    code, said = raised.value.errno, str(raised.value)
    del raised  # with the frames that have torch's file open
    gc.collect()
    assert code in (errno.ENOSPC, errno.EIO)
    assert str(target) in said
    assert "\n" not in said


def test_tensors_of_another_size_or_type_are_damage(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlstor.checkpoint import via

    load = via.Torch.load

    def loses_the_end(route: Any, path: str, specs: Any) -> Any:
        return {name: tensor[:-1] for name, tensor in load(route, path, specs).items()}

    monkeypatch.setattr(via.Torch, "load", loses_the_end)
    ran = bench.run("--ranks", "1", "--via", "torch", bench.target)
    assert ran.code == 3
    assert "another shape" in ran.err


ONCE = """
import sys
import torch
from mlstor.checkpoint.via import Spec, route_of

scratch = sys.argv[1]
specs = {"a": Spec(300_000, "float32", 0)}
late = {}
for name in ("mlstor", "safetensors", "dcp", "torch"):
    route = route_of(name, scratch, {})
    route.prepare(scratch)
    before = set(sys.modules)
    route.save({"a": torch.ones(300_000)}, f"{scratch}/{name}")
    route.load(f"{scratch}/{name}", specs)
    new = [one for one in set(sys.modules) - before if one.split(".")[0] in ("torch", "mlstor", "safetensors")]
    if new:
        late[name] = new
assert not late, late
"""


def test_what_a_way_imports_is_no_part_of_a_phase(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    subprocess.run([sys.executable, "-c", ONCE, str(tmp_path)], check=True, timeout=60)


def test_the_plan_has_the_memory_of_the_way(bench: Bench) -> None:
    told = [
        json.loads(bench.run("--plan", "--json", *more, bench.target).out)["memory_bytes_per_process"]
        for more in ((), ("--via", "torch"))
    ]
    layout = Layout(get("llama3-8b"), scale=Fraction(SCALE))
    assert told[1] >= 2 * layout.rank_nbytes(0) + (200 << 20)
    assert told[1] != told[0]


def test_what_a_run_kept_is_cleaned_directories_of_dcp_too(bench: Bench) -> None:
    bench("--ranks", "1", "--via", "dcp", "--keep", "--run-id", "one")
    assert any(name.endswith(".metadata") for name in bench.files())
    assert bench.command("clean", "one", bench.target).code == 0
    assert not os.listdir(bench.target)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--via", "torch", "s3://bucket/ckpt"), "for directories, not for s3"),
        (("--via", "s3torchconnector", "HERE"), "try --via torch or dcp or safetensors or mlstor"),
        (("--via", "torch", "--profile", "mlperf", "HERE"), "leave it out, or --via"),
        (("--via", "torch", "--block", "1MiB", "--direct", "off", "HERE"), "leave out --direct, --block"),
        (("--via", "torch", "--writes", "0", "--run-id", "one", "HERE"), "give --writes"),
        (("--via", "pickle", "HERE"), "invalid choice"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(bench: Bench, options: tuple[str, ...], words: str) -> None:
    ran = bench.run(*(bench.target if word == "HERE" else word for word in options))
    assert ran.code == 2
    assert words in ran.sentence


def test_a_missing_package_is_said_with_how_to_get_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    ran = bench.run("--via", "safetensors", bench.target)
    assert ran.code == 2
    assert "`pip install safetensors`" in ran.sentence


@pytest.mark.parametrize("name", ["llama3-8b", "opt-175b-full"])
def test_the_tensors_of_a_layout_are_its_files_bytes(name: str) -> None:
    layout = Layout(get(name), scale=Fraction(SCALE))
    for rank in (0, layout.nranks - 1):
        sizes = [sum(n * size for n, size in tensors) for tensors in layout.tensors(rank)]
        assert sizes == [file.nbytes for file in layout.files(rank)]


def test_a_tensor_s_bytes_are_its_own_memory() -> None:
    tensor = torch.zeros(3, dtype=torch.bfloat16)
    bytes_of(tensor)[1] = 0x40
    assert tensor.tolist() == [2.0, 0.0, 0.0]
