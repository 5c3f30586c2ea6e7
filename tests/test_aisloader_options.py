"""Every option of aisloader is translated or refused; nothing is unlisted, and docs/aisloader.md says the same."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from servers import aistore

from mlstor.aisloader import flags
from mlstor.aisloader.options import ALIASES, FLAGS, REFUSED, rows, usage
from mlstor.aisloader.translate import Plan, translate
from mlstor.errors import UsageError
from mlstor.storage.transfers import Digest

# Options of aisloader 2.25 (AIStore 5.0), as its own -usage lists them.
OPTIONS = """
arch.format arch.list arch.maxsize arch.minsize arch.num-files arch.pct arch.prefix bprops bucket cached cksum-type
cleanup cont-on-err dry-run duration epochs etl etl-spec evict-batchsize filelist get-batchsize getloaderid ip json
latest list-dirs loaderid loaderidhashlen loadernum maxputs maxsize minsize mpdstream-chunk-size mpdstream-workers
multipart-chunks nbi num-subdirs numworkers pctmpdstream pctmultipart pctput pctupdate perm-shuffle-max port provider
quiet randomname randomproxy readertype readlen readoff s3-use-path-style s3endpoint s3profile seed skiplist
stats-output statsdip statsdport statsinterval stoppable subdir timeout tmpdir tokenfile totalputsize
trace-http usage verifyhash version
"""
FORMER = """
uniquegets getconfig putshards batchsize check-statsd statsdprobe objNamePrefix arch.use continue-on-err
"""
PROBE = "test-probe StatsD server prior to benchmarks"
OWN = ("direct", "results")
READ = ["-bucket=ais://b", "-cleanup=false"]
WRITE = [*READ, "-pctput=100"]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AIS_ENDPOINT", "S3_ENDPOINT", "AIS_CRT", "AIS_CRT_KEY"):
        monkeypatch.delenv(name, raising=False)


def plan_of(*argv: str) -> Plan:
    return translate(flags.parse(list(argv)))


def test_every_option_is_taken_or_refused_and_none_is_unlisted() -> None:
    listed = {flag.name for flag in FLAGS} | REFUSED.keys() | ALIASES.keys()
    assert listed == {*OPTIONS.split(), *FORMER.split(), *OWN, PROBE}
    assert not {flag.name for flag in FLAGS} & REFUSED.keys()
    assert set(ALIASES.values()) <= {flag.name for flag in FLAGS}


def test_the_program_itself_has_no_other_options() -> None:
    program = aistore.program("aisloader")
    said = subprocess.run([program, "-usage"], capture_output=True, text=True, check=False).stderr
    names = {line.split(" ")[2].removeprefix("-") for line in said.splitlines() if line.startswith("  -")}
    assert names - {PROBE.split()[0]} == set(OPTIONS.split())


def test_the_page_has_the_table_of_the_code() -> None:
    page = (Path(__file__).parents[1] / "docs" / "aisloader.md").read_text()
    found = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in page.splitlines() if "| `-" in line]
    assert found == rows()


def test_usage_names_every_option() -> None:
    assert {f"-{name}" for name in [*(flag.name for flag in FLAGS), *REFUSED]} <= set(usage().split())


# Of each option that is taken: a value, and what must come of it.
BECOMES: dict[str, tuple[list[str], Callable[[Plan], Any], Any]] = {
    "quiet": ([*READ, "-quiet"], lambda p: p["quiet"], True),
    "timeout": ([*READ, "-timeout=2m"], lambda p: p.options.store_options["patience_s"], 120),
    "ip": ([*READ, "-ip=h"], lambda p: p.options.endpoint, "http://h:8080"),
    "port": ([*READ, "-port=51080"], lambda p: p.options.endpoint, "http://localhost:51080"),
    "randomproxy": ([*READ, "-randomproxy"], lambda p: p["randomproxy"], True),
    "s3endpoint": (
        ["-bucket=s3://b", "-s3endpoint=http://s"],
        lambda p: p.words[:3],
        ["s3://b", "--endpoint", "http://s"],
    ),
    "s3profile": (
        ["-bucket=s3://b", "-s3endpoint=http://s", "-s3profile=p"],
        lambda p: p.options.store_options["profile"],
        "p",
    ),
    "s3-use-path-style": (
        ["-bucket=s3://b", "-s3endpoint=http://s", "-s3-use-path-style"],
        lambda p: p.options.store_options["path_style"],
        True,
    ),
    "bucket": (READ, lambda p: p.options.urls, ["ais://b"]),
    "provider": ([*READ, "-bucket=b", "-provider=gcp"], lambda p: p.options.store_options["provider"], "gcp"),
    "duration": ([*READ, "-duration=1h30m"], lambda p: p.options.duration_s, 5400.0),
    "numworkers": ([*READ, "-numworkers=12"], lambda p: (p.options.workers or 0) * (p.options.in_flight or 0), 12),
    "pctput": ([*READ, "-pctput=30"], lambda p: (p.options.put, p.options.get), (30.0, 70.0)),
    "pctupdate": ([*READ, "-pctupdate=30"], lambda p: p["pctupdate"], 30),
    "epochs": ([*READ, "-epochs=3"], lambda p: (p.options.epochs, p.options.duration_s), (3, None)),
    "perm-shuffle-max": ([*READ, "-perm-shuffle-max=5"], lambda p: p.options.order, "permutation"),
    "maxputs": ([*WRITE, "-maxputs=7"], lambda p: p["maxputs"], 7),
    "totalputsize": (
        [*WRITE, "-totalputsize=1GB"],
        lambda p: (p["totalputsize"], p.options.duration_s),
        (1 << 30, None),
    ),
    "seed": ([*READ, "-seed=5"], lambda p: p.options.seed, 5),
    "readertype": ([*WRITE, "-readertype=rand"], lambda p: p.options.put, 100.0),
    "minsize": ([*WRITE, "-minsize=2G"], lambda p: (p.options.min_nbytes, p.options.max_nbytes), (2 << 30, 2 << 30)),
    "maxsize": ([*WRITE, "-maxsize=4KB"], lambda p: (p.options.min_nbytes, p.options.max_nbytes), (4096, 4096)),
    "cksum-type": ([*WRITE, "-cksum-type=crc32c"], lambda p: p.digest, Digest.CRC32C),
    "verifyhash": ([*READ, "-verifyhash"], lambda p: p.options.verify, "checksum"),
    "arch.pct": ([*WRITE, "-arch.pct=40"], lambda p: p.shards is not None, True),
    "arch.format": ([*WRITE, "-arch.pct=40", "-arch.format=zip"], lambda p: p.shards and p.shards.format, ".zip"),
    "arch.num-files": ([*WRITE, "-arch.pct=40", "-arch.num-files=3"], lambda p: p.shards and p.shards.count, 3),
    "arch.minsize": ([*WRITE, "-arch.pct=1", "-arch.minsize=3K"], lambda p: p.shards and p.shards.most_bytes, 3072),
    "arch.maxsize": ([*WRITE, "-arch.pct=1", "-arch.maxsize=3K"], lambda p: p.shards and p.shards.least_bytes, 0),
    "arch.prefix": ([*WRITE, "-arch.pct=1", "-arch.prefix=a/b"], lambda p: p.shards and p.shards.prefix, "a/b"),
    "arch.list": ([*READ, "-arch.list"], lambda p: p.archives, True),
    "subdir": ([*READ, "-subdir=a//b/"], lambda p: p["subdir"], "a/b"),
    "num-subdirs": ([*WRITE, "-num-subdirs=9"], lambda p: p.options.prefix_dirs, 9),
    "randomname": ([*WRITE, "-randomname=false"], lambda p: p.loader.random, False),
    "filelist": ([*READ, "-filelist=/l"], lambda p: p.options.list_file, "/l"),
    "skiplist": ([*WRITE, "-skiplist"], lambda p: p.options.get, 0.0),
    "readoff": ([*READ, "-readlen=1K", "-readoff=2K"], lambda p: p.options.read_offset, 2048),
    "readlen": ([*READ, "-readlen=1K"], lambda p: (p.options.read_nbytes, p.options.range), (1024, "fixed")),
    "get-batchsize": ([*READ, "-get-batchsize=64"], lambda p: p.one_by_one, True),
    "cont-on-err": ([*READ, "-get-batchsize=64", "-cont-on-err"], lambda p: p["cont-on-err"], True),
    "latest": ([*READ, "-latest"], lambda p: p["latest"], True),
    "cached": ([*READ, "-cached"], lambda p: p["cached"], True),
    "evict-batchsize": ([*READ, "-evict-batchsize=5"], lambda p: p["evict-batchsize"], 5),
    "multipart-chunks": ([*WRITE, "-multipart-chunks=16", "-pctmultipart=5"], lambda p: p.parts, 16),
    "pctmultipart": ([*WRITE, "-multipart-chunks=16", "-pctmultipart=5"], lambda p: p.one_by_one, True),
    "pctmpdstream": ([*READ, "-pctmpdstream=50"], lambda p: p.parts, 16),
    "mpdstream-workers": ([*READ, "-pctmpdstream=50", "-mpdstream-workers=3"], lambda p: p.parts, 3),
    "mpdstream-chunk-size": (
        [*READ, "-pctmpdstream=50", "-mpdstream-chunk-size=8192"],
        lambda p: p["mpdstream-chunk-size"],
        8192,
    ),
    "loaderid": ([*WRITE, "-loaderid=3", "-loadernum=20"], lambda p: p.loader.id, 3),
    "loadernum": ([*WRITE, "-loaderid=3", "-loadernum=20"], lambda p: p.loader.bits, 8),
    "loaderidhashlen": ([*WRITE, "-loaderid=loaderstring", "-loaderidhashlen=8"], lambda p: p.loader.id, 0xDB),
    "statsinterval": ([*READ, "-statsinterval=0"], lambda p: p["statsinterval"], 0),
    "stats-output": ([*READ, "-stats-output=f"], lambda p: p["stats-output"], "f"),
    "json": ([*READ, "-json"], lambda p: p["json"], True),
    "cleanup": (["-bucket=ais://b", "-cleanup"], lambda p: p.options.cleanup, True),
    "stoppable": ([*READ, "-stoppable", "-duration=0"], lambda p: p.options.duration_s, None),
    "uniquegets": ([*READ, "-uniquegets=false"], lambda p: p.options.order, "replacement"),
    "check-statsd": ([*READ, "-check-statsd"], lambda p: len(p.notes), 1),
    "direct": ([*READ, "-direct"], lambda p: p.options.store_options["via_proxy"], False),
    "results": ([*READ, "-results=r"], lambda p: p.options.results_dir, "r"),
}
# These end before there is a plan, or need a file: tested by themselves.
APART = {"usage", "version", "getloaderid", "dry-run", "tokenfile"}


def test_each_option_that_is_taken_has_its_example() -> None:
    assert BECOMES.keys() | APART == {flag.name for flag in FLAGS}


@pytest.mark.parametrize("name", BECOMES)
def test_an_option_becomes(name: str) -> None:
    argv, of_plan, wanted = BECOMES[name]
    assert of_plan(plan_of(*argv)) == wanted


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_option_says_why_and_may_be_given_as_off(name: str) -> None:
    value = "true" if REFUSED[name].kind == "bool" else "x"
    with pytest.raises(UsageError, match=re.escape(f"-{name}: {REFUSED[name].becomes}")):
        plan_of(*READ, f"-{name}={value}")
    off = "false" if REFUSED[name].kind == "bool" else ""
    assert plan_of(*READ, f"-{name}={off}").bucket == "b"


def test_the_2020_to_2023_chart_is_understood() -> None:
    command = """
    -bucket=ais://b -duration=30m -pctput=0 -cleanup=false -numworkers=50 -uniquegets=true -readlen=0 -readoff=0
    -minsize=1G -maxsize=1G -maxputs=0 -putshards=0 -seed=77 -ip=h -port=51080 -readertype=sg -statsinterval=60
    -check-statsd -batchsize=100
    """
    plan = plan_of(*command.split())
    assert plan.options.duration_s == 1800
    assert (plan.options.seed, plan.options.order, plan.options.epoch_scope) == (77, "permutation", "client")
    assert plan["evict-batchsize"] == 100


def test_go_takes_one_or_two_dashes_and_values_in_the_same_or_the_next_word() -> None:
    given = flags.parse(["--pctput=30", "-numworkers", "5", "--quiet", "-cleanup=F", "-maxputs", "0x10"])
    assert (given["pctput"], given["numworkers"], given["quiet"], given["cleanup"], given["maxputs"]) == (
        30,
        5,
        True,
        False,
        16,
    )
    with pytest.raises(UsageError, match="write values as"):
        flags.parse(["-cleanup", "false"])
    with pytest.raises(UsageError, match="did you mean -pctput"):
        flags.parse(["-pcput=1"])
    with pytest.raises(UsageError, match="-epochs needs a value"):
        flags.parse(["-epochs"])


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1", 1),
        ("1K", 1024),
        ("1KB", 1024),
        ("1KiB", 1024),
        ("1.5m", 3 << 19),
        ("2GB", 2 << 30),
        ("1TiB", 1 << 40),
        ("16B", 16),
    ],
)
def test_sizes_are_powers_of_1024(text: str, nbytes: int) -> None:
    assert flags.size(text) == nbytes


@pytest.mark.parametrize("text", ["1X", "K", "1.3", "-1"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="-minsize="):
        flags.parse([*READ, f"-minsize={text}"])


@pytest.mark.parametrize(("text", "seconds"), [("0", 0), ("10s", 10), ("1h30m", 5400), ("1.5h", 5400), ("100ms", 0.1)])
def test_durations_are_go_s(text: str, seconds: float) -> None:
    assert flags.duration(text) == pytest.approx(seconds)
    with pytest.raises(UsageError, match="-duration=10: write a duration"):
        flags.parse(["-duration=10"])


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["-bucket=ais://b"], "say -cleanup="),
        ([*READ, "-pctput=101"], "is a percentage"),
        ([*READ, "-minsize=2M", "-maxsize=1M"], "exchange them"),
        ([*READ, "-skiplist"], "give -pctput=100"),
        ([*READ, "-pctmpdstream=10", "-pctput=10"], "exclude one another"),
        ([*READ, "-pctmpdstream=10", "-get-batchsize=10"], "exclude one another"),
        ([*READ, "-get-batchsize=10", "-readlen=1K"], "exclude one another"),
        ([*READ, "-get-batchsize=10", "-verifyhash"], "exclude one another"),
        ([*READ, "-get-batchsize=1001"], "give 1 to 1000"),
        ([*READ, "-readlen=1K", "-verifyhash"], "whole object"),
        ([*WRITE, "-arch.pct=1", "-pctmultipart=1", "-multipart-chunks=99"], "exclude one another"),
        ([*WRITE, "-multipart-chunks=2", "-pctmultipart=1"], "give 16 or more"),
        ([*WRITE, "-cksum-type=md5"], "mlstor computes"),
        ([*WRITE, "-readertype=tar"], "-arch.pct"),
        ([*WRITE, "-readertype=file"], "leave it out"),
        ([*WRITE, "-arch.pct=1", "-arch.format=.rar"], "AIStore reads"),
        ([*WRITE, "-loadernum=3", "-loaderidhashlen=3"], "give one"),
        ([*WRITE, "-loadernum=3", "-loaderid=3"], "not less than"),
        ([*WRITE, "-loaderid=x"], "is no number"),
        ([*READ, "-duration=0"], "does nothing"),
        ([*READ, "-bucket=ais://b/x"], "-subdir"),
        ([*READ, "-bucket=s3://b", "-provider=gcp"], "two providers"),
        (["-cleanup=false"], "name one with -bucket"),
        (["-bucket=s3://b", "-s3endpoint=http://s", "-get-batchsize=4"], "no AIStore"),
        (["-bucket=s3://b", "-s3endpoint=http://s", "-randomproxy"], "no AIStore"),
        (["-bucket=s3://b", "-s3endpoint=http://s", "-pctmultipart=9", "-multipart-chunks=99"], "no small parts"),
        (["-bucket=ais://b", "-s3endpoint=http://s"], "reads s3:// buckets"),
        ([*READ, "-s3-use-path-style"], "goes with -s3endpoint"),
        ([*READ, "-tokenfile=/nonexistent"], "not a token file"),
    ],
)  # fmt: skip
def test_options_that_exclude_one_another_are_refused(argv: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=re.escape(says)):
        plan_of(*argv)


def test_the_environment_names_the_cluster_as_for_aisloader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIS_ENDPOINT", "https://gateway:51080")
    monkeypatch.setenv("AIS_CLIENT_CA", "/ca.pem")
    options = plan_of(*READ).options.store_options
    assert (options["endpoint"], options["ca_file"]) == ("https://gateway:51080", "/ca.pem")
    assert "insecure" not in options
    monkeypatch.setenv("AIS_SKIP_VERIFY_CRT", "true")
    assert plan_of(*READ).options.store_options["insecure"] is True
    with pytest.raises(UsageError, match="two clusters"):
        plan_of(*READ, "-ip=other")


def test_a_token_file_is_read_and_shown_nowhere(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text('{"token": "sesame"}')
    plan = plan_of(*READ, f"-tokenfile={path}")
    assert plan.options.store_options["token"] == "sesame"
    assert "sesame" not in " ".join([*plan.words, *plan.notes])


def test_mixed_reads_are_drawn_and_those_of_epochs_permuted() -> None:
    assert plan_of(*READ, "-pctput=30").options.order == "replacement"
    assert plan_of(*READ, "-pctput=30", "-epochs=2").options.order == "permutation"
