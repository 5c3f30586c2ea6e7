"""``mlstor aisloader`` against a real AIStore, and beside the real aisloader where there is one."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from ais_support import bucket
from s3_support import forget_aws, make_bucket, open_bucket, use_keys
from servers import aistore as servers
from servers.aistore import Cluster, aistore  # noqa: F401
from servers.weed import OWNER, Weed, signed_weed  # noqa: F401

from mlstor import cli
from mlstor.results.record import StreamRecord, load_any
from mlstor.storage import ais

ENVIRONMENT = ("AIS_ENDPOINT", "S3_ENDPOINT")
NAME = re.compile(r"ais://([^/]+)/")


class Ran(NamedTuple):
    code: int
    out: str
    err: str
    record: StreamRecord | None

    def ops(self) -> dict[str, tuple[int, int]]:
        """Count and bytes of each operation."""
        assert self.record is not None
        return {name: (one.count, one.nbytes) for name, one in self.record.phases[-1].ops.items()}


Loader = Callable[..., Ran]


@pytest.fixture(scope="module")
def cluster(aistore: Cluster) -> Cluster:  # noqa: F811
    return aistore


@pytest.fixture
def load(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loader:
    """Runs the verb in this process; a run that is to succeed."""
    monkeypatch.setenv("AIS_ENDPOINT", cluster.endpoint)
    monkeypatch.delenv("S3_ENDPOINT", raising=False)
    results = tmp_path / "results"

    def run(*options: str, code: int = 0) -> Ran:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            ended = cli.main(["aisloader", f"-results={results}", "-statsinterval=0", *options])
        assert ended == code, err.getvalue() + out.getvalue()
        records = sorted(results.glob("*/record.json"), key=lambda path: path.stat().st_mtime_ns)
        found = load_any(records[-1]) if records else None
        assert found is None or isinstance(found, StreamRecord)
        return Ran(ended, out.getvalue(), err.getvalue(), found)

    return run


@pytest.fixture
def theirs(cluster: Cluster, tmp_path: Path) -> Callable[..., str]:
    """Runs aisloader itself; skips where there is none."""
    program = servers.program("aisloader")

    def run(*options: str) -> str:
        environment = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
        done = subprocess.run(
            [program, "-quiet", "-statsinterval=0", *options],
            env={**environment, "AIS_ENDPOINT": cluster.endpoint},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr + done.stdout
        assert "failed" not in done.stderr, done.stderr
        return done.stdout

    return run


def of(store: ais.AisStore) -> str:
    """A store's bucket as an option."""
    found = NAME.match(store.url)
    assert found
    return f"-bucket=ais://{found[1]}"


def names_in(store: ais.AisStore) -> dict[str, int]:
    return {key: size for page in store.list() for key, size in zip(*page, strict=True)}


def last(path: Path) -> dict[str, Any]:
    element: dict[str, Any] = json.loads(path.read_text())[-1]
    return element


def test_aisloader_reads_and_verifies_what_was_written(
    cluster: Cluster, load: Loader, theirs: Callable[..., str]
) -> None:
    with bucket(cluster) as store:
        options = "-pctput=100 -maxputs=30 -minsize=1K -maxsize=9K -subdir=d -num-subdirs=7 -loaderid=11 -loadernum=20"
        load(of(store), "-cleanup=false", *options.split())
        names = names_in(store)
        assert sorted(names) == sorted(f"d/{(i + 1) % 7:05x}/{(i << 8) | 11:x}" for i in range(30))
        assert all(1024 <= size <= 9 * 1024 for size in names.values())
        theirs(of(store), "-cleanup=false", "-epochs=2", "-verifyhash", "-json", "-stats-output=theirs.json")


def test_what_aisloader_has_written_is_read_and_both_say_the_same(
    cluster: Cluster, load: Loader, theirs: Callable[..., str], tmp_path: Path
) -> None:
    with bucket(cluster) as store:
        put = "-cleanup=false -pctput=100 -maxputs=25 -minsize=2K -maxsize=2K -json -stats-output=put.json"
        theirs(of(store), *put.split(), "-loaderid=x", "-loaderidhashlen=8")
        before = names_in(store)
        # the same loader gives the same names
        load(
            of(store),
            *put.replace("put.json", str(tmp_path / "mine.json")).split(),
            "-loaderid=x",
            "-loaderidhashlen=8",
        )
        assert names_in(store) == before
        their_put, my_put = last(tmp_path / "put.json"), last(tmp_path / "mine.json")
        assert [my_put["put"][name] for name in ("count", "bytes", "errors")] == ["25", str(25 * 2048), 0]
        assert [their_put["put"][name] for name in ("count", "bytes", "errors")] == ["25", str(25 * 2048), 0]
        assert {name: {key: type(value) for key, value in part.items()} for name, part in my_put.items()} == {
            name: {key: type(value) for key, value in part.items()} for name, part in their_put.items()
        }
        ran = load(of(store), "-cleanup=false", "-epochs=2", "-verifyhash")
        assert ran.ops() == {"get": (50, 50 * 2048)}
        assert re.search(r"GET +50 +\t100\.0KiB", ran.out)


@pytest.mark.parametrize("format", [".tar", ".tgz", ".zip", ".tar.lz4"])
def test_shards_are_archives_whose_files_both_tools_read(
    cluster: Cluster, load: Loader, theirs: Callable[..., str], format: str
) -> None:
    with bucket(cluster) as store:
        options = (
            f"-pctput=100 -maxputs=12 -minsize=20K -maxsize=30K -arch.pct=50 -arch.format={format} -arch.maxsize=9K"
        )
        ran = load(of(store), "-cleanup=false", *options.split(), "-arch.minsize=1K", "-seed=4")
        shards = [name for name in names_in(store) if name.endswith(format)]
        plain = 12 - len(shards)
        assert 0 < len(shards) < 12
        assert (ran.ops()["put-shard"][0], ran.ops()["put"][0]) == (len(shards), plain)
        assert ran.ops()["put-shard"][1] == sum(names_in(store)[name] for name in shards)
        read = load(of(store), "-cleanup=false", "-epochs=1", "-arch.list")
        count, nbytes = read.ops()["get-archived"]
        assert read.ops()["get"][0] == plain
        batched = load(of(store), "-cleanup=false", "-epochs=1", "-arch.list", "-get-batchsize=7")
        assert batched.ops()["batch"] == (-(-(count + plain) // 7), nbytes + read.ops()["get"][1])
        theirs(of(store), "-cleanup=false", "-epochs=1", "-arch.list")


def test_a_get_batch_is_one_operation_and_epochs_are_counted(cluster: Cluster, load: Loader) -> None:
    with bucket(cluster) as store:
        for number in range(20):
            store.write(f"o {number}", bytes(1000))
        ran = load(of(store), "-cleanup=false", "-epochs=3", "-get-batchsize=16", "-numworkers=2", "-json")
        assert ran.ops() == {"batch": (4, 60_000)}
        assert json.loads(ran.out)[-1]["get_batch"]["count"] == "4"


def test_updates_write_what_was_read_again_with_its_size(cluster: Cluster, load: Loader) -> None:
    with bucket(cluster) as store:
        for number in range(30):
            store.write(f"o{number}", b"x" * (1000 + number))
        before = names_in(store)
        ran = load(of(store), "-cleanup=false", "-epochs=2", "-pctupdate=100", "-seed=3")
        assert ran.ops()["get"][0] == ran.ops()["put"][0] == 60
        assert names_in(store) == before
        assert b"xxxx" not in bytes(store.read("o3"))
        half = load(of(store), "-cleanup=false", "-epochs=2", "-pctupdate=50", "-seed=3").ops()
        assert 0 < half["put"][0] < 60
        assert ran.record is not None
        assert ran.record.workload.update_ppm == 1_000_000  # type: ignore[union-attr]


def test_parts_and_parallel_ranges_are_operations_of_their_own(
    cluster: Cluster, load: Loader, theirs: Callable[..., str]
) -> None:
    with bucket(cluster) as store:
        options = "-pctput=100 -maxputs=20 -minsize=50K -maxsize=200K -multipart-chunks=4 -pctmultipart=50 -seed=2"
        ran = load(of(store), "-cleanup=false", *options.split())
        sizes = names_in(store)
        counts = {name: count for name, (count, _) in ran.ops().items()}
        assert counts["put"] + counts["put-parts"] == 20
        assert min(counts.values()) > 0
        assert sum(nbytes for _, nbytes in ran.ops().values()) == sum(sizes.values())
        assert re.search(rf"MPU +{counts['put-parts']} ", ran.out)
        theirs(of(store), "-cleanup=false", "-epochs=1", "-verifyhash")
        read = load(
            of(store), "-cleanup=false", "-epochs=2", "-pctmpdstream=50", "-mpdstream-chunk-size=16384", "-seed=2"
        )
        found = read.ops()
        assert found["get"][0] + found["get-parallel"][0] == 40
        assert found["get"][1] + found["get-parallel"][1] == 2 * sum(sizes.values())
        assert found["get-parallel"][0] > 0


def test_a_mix_ends_with_the_put_that_reaches_its_bytes(cluster: Cluster, load: Loader) -> None:
    with bucket(cluster) as store:
        for number in range(5):
            store.write(f"o{number}", bytes(100))
        ran = load(of(store), "-cleanup=false", "-pctput=40", "-totalputsize=100K", "-minsize=3K", "-maxsize=3K")
        assert ran.ops()["put"] == (34, 34 * 3072)
        assert ran.ops()["get"][0] > 10


def test_a_list_of_names_and_a_range(cluster: Cluster, load: Loader, tmp_path: Path) -> None:
    with bucket(cluster) as store:
        for number in range(9):
            store.write(f"o {number}", bytes(5000))
        (tmp_path / "list").write_text("".join(f"o {number}\n" for number in range(4)))
        ran = load(
            of(store), "-cleanup=false", "-epochs=2", f"-filelist={tmp_path / 'list'}", "-readlen=1K", "-readoff=2K"
        )
        assert ran.ops() == {"get-range": (8, 8 * 1024)}


def test_the_listing_begins_with_the_subdir_and_latest_asks_for_it(cluster: Cluster, load: Loader) -> None:
    with bucket(cluster) as store:
        for name in ("ab/x", "ac/y", "b/z"):
            store.write(name, bytes(10))
        assert load(of(store), "-cleanup=false", "-epochs=1", "-subdir=a", "-latest", "-direct").ops() == {
            "get": (2, 20)
        }


def test_cleanup_leaves_what_was_there_before(cluster: Cluster, load: Loader) -> None:
    with bucket(cluster) as store:
        store.write("mine", b"kept")
        load(of(store), "-cleanup=true", "-pctput=50", "-maxputs=10", "-minsize=1K", "-maxsize=1K", "-loadernum=2")
        assert names_in(store) == {"mine": 4}


def test_a_bucket_that_the_run_made_goes_with_it(cluster: Cluster, load: Loader) -> None:
    ran = load("-bucket=ais://made-here", "-cleanup", "-pctput=100", "-maxputs=3", "-minsize=1K", "-maxsize=1K")
    assert "bucket made-here, which this run had made" in ran.err
    with ais.open("ais://made-here", endpoint=cluster.endpoint) as store, pytest.raises(FileNotFoundError):
        names_in(store)


def test_a_dry_run_makes_nothing(cluster: Cluster, load: Loader, tmp_path: Path) -> None:
    ran = load("-bucket=ais://never-made", "-cleanup=false", "-pctput=100", "-dry-run")
    assert "bucket never-made would be made" in ran.out
    assert '"# workers": 10' in ran.out
    assert not (tmp_path / "results").exists()
    with ais.open("ais://never-made", endpoint=cluster.endpoint) as store, pytest.raises(FileNotFoundError):
        names_in(store)


def test_what_is_not_there_is_one_sentence(cluster: Cluster, load: Loader) -> None:
    assert "there is no bucket none" in load("-bucket=ais://none", "-cleanup=false", code=2).err
    with bucket(cluster) as store:
        assert "has no object that begins with 'x'" in load(of(store), "-cleanup=false", "-subdir=x", code=2).err
        store.write("one", b"1")
        assert "there are 1 objects" in load(of(store), "-cleanup=false", "-get-batchsize=2", code=2).err


def test_a_list_with_a_name_that_is_not_there_is_refused(cluster: Cluster, load: Loader, tmp_path: Path) -> None:
    with bucket(cluster) as store:
        store.write("there", bytes(100))
        (tmp_path / "list").write_text("there\nnot there\n")
        ran = load(of(store), "-cleanup=false", "-epochs=1", f"-filelist={tmp_path / 'list'}", code=2)
        assert "not%20there" in ran.err


def test_a_proxy_is_drawn_from_the_map(cluster: Cluster, load: Loader) -> None:
    with bucket(cluster) as store:
        store.write("o", bytes(100))
        assert load(of(store), "-cleanup=false", "-epochs=1", "-randomproxy").ops() == {"get": (1, 100)}


def test_intervals_add_up_and_ctrl_c_ends_with_the_figures(cluster: Cluster, load: Loader, tmp_path: Path) -> None:
    with bucket(cluster) as store:
        for number in range(20):
            store.write(f"o{number}", bytes(1000))
        timer = threading.Timer(4.0, lambda: os.kill(os.getpid(), signal.SIGINT))
        timer.start()
        path = tmp_path / "stats.json"
        load(
            of(store), "-cleanup=false", "-duration=60s", "-json", f"-stats-output={path}", "-statsinterval=1", code=130
        )
        timer.cancel()
        elements = json.loads(path.read_text())
        assert len(elements) >= 3
        counts = [int(element["get"]["count"]) for element in elements]
        assert 0 < sum(counts[:-1]) <= counts[-1]
        assert all(element["get"]["min_latency"] > 0 for element in elements)


def test_several_processes_are_one_loader(cluster: Cluster, load: Loader, tmp_path: Path) -> None:
    import launchers

    with bucket(cluster) as store:
        mpi = launchers.find("openmpi")
        words = [*mpi.mpirun, *mpi.unbound, "-x", "AIS_ENDPOINT", "-n", "2", mpi.python, "-m", "mlstor", "aisloader"]
        options = (
            f"{of(store)} -cleanup=false -pctput=100 -maxputs=21 -maxsize=2K -loadernum=3 -results={tmp_path / 'r'}"
        )
        done = launchers.run([*words, *options.split()], tmp_path)
        assert done.returncode == 0, done.stderr
        assert sorted(names_in(store), key=lambda name: int(name, 16)) == [f"{i << 4:x}" for i in range(21)]


def test_s3_without_aistore(signed_weed: Weed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    forget_aws(monkeypatch)
    use_keys(monkeypatch, OWNER)
    monkeypatch.delenv("AIS_ENDPOINT", raising=False)
    monkeypatch.setenv("S3_ENDPOINT", signed_weed.endpoint)
    name = make_bucket(signed_weed)
    common = ["aisloader", f"-bucket=s3://{name}", f"-results={tmp_path}", "-subdir=in", "-json", "-quiet"]
    for options in ("-pctput=100 -maxputs=9 -maxsize=2K -loadernum=4", "-epochs=2 -verifyhash -pctupdate=50 -seed=1"):
        out = io.StringIO()
        with redirect_stdout(out):
            assert cli.main([*common, *options.split()]) == 0
    assert json.loads(out.getvalue())[-1]["get"]["count"] == "18"
    with redirect_stdout(io.StringIO()):
        assert cli.main([*common, "-pctput=100", "-maxputs=4", "-maxsize=2K", "-cleanup=true"]) == 0
    store = open_bucket(signed_weed, name)
    assert sorted(key for page in store.list() for key in page.keys) == sorted(f"in/{i << 4:x}" for i in range(9))
    store.close()


def test_help_and_version_need_no_cluster() -> None:
    for word, says in (("-usage", "-pctmpdstream"), ("version", "2.25")):
        done = subprocess.run(
            [sys.executable, "-m", "mlstor", "aisloader", word], capture_output=True, text=True, check=True
        )
        assert says in done.stdout
