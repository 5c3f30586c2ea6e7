"""Every option of aisloader 2.25, and of those before it: what becomes of it here, or why nothing does.

The table is data for three readers: the parser, `-usage`, and docs/aisloader.md, which a test holds against it.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

FlagKind = Literal["bool", "count", "size", "text", "duration"]


class Flag(NamedTuple):
    """An option: name, how its value is read, default, and what becomes of it (of a refused one: what to do)."""

    name: str
    kind: FlagKind
    default: Any
    becomes: str


MIB, GIB = 1 << 20, 1 << 30

FLAGS = (
    # -- about the program --
    Flag("usage", "bool", False, "prints this table"),
    Flag("version", "bool", False, "prints mlstor's version"),
    Flag("quiet", "bool", False, "leaves out what the options became"),
    Flag("timeout", "duration", 600.0, "`-o patience_s=`: how long a request is repeated while its server is silent"),
    # -- the cluster --
    Flag("ip", "text", "localhost", "`--endpoint http://IP:PORT`; `AIS_ENDPOINT` goes before the default"),
    Flag("port", "text", "8080", "see `-ip`"),
    Flag("randomproxy", "bool", False, "a proxy of the cluster map, drawn once per process and not per request"),
    Flag("tokenfile", "text", "", "the token in it; else AIStore's environment and files, as for `mlstor stream`"),
    Flag("s3endpoint", "text", "", "`s3://BUCKET --endpoint URL`: S3 without AIStore; also from `S3_ENDPOINT`"),
    Flag("s3profile", "text", "", "`-o profile=NAME`"),
    Flag("s3-use-path-style", "bool", False, "`-o path_style=yes`; else as the endpoint needs it"),
    # -- the bucket --
    Flag(
        "bucket", "text", "", "`ais://BUCKET`, or `s3://BUCKET` with `-s3endpoint`; none: a new one with a drawn name"
    ),
    Flag("provider", "text", "ais", "`-o provider=`"),
    # -- the work --
    Flag("duration", "duration", 60.0, "`--duration`; 0 with another limit, or `-stoppable`: no limit of time"),
    Flag("numworkers", "count", 10, "`--workers` x `--in-flight` that give just as many under way"),
    Flag("pctput", "count", 0, "`--put`; the rest is `--get`"),
    Flag("pctupdate", "count", 0, "so many percent of the GETs are followed by a PUT of the same name and size"),
    Flag("epochs", "count", 0, "`--epochs`, `--epoch-scope client`; ends exactly, failed GETs not repeated"),
    Flag("perm-shuffle-max", "count", 100_000, "nothing: every order is a keyed permutation, at any number of names"),
    Flag("maxputs", "count", 0, "ends the run with that PUT, over all processes"),
    Flag("totalputsize", "size", 0, "ends the run with the PUT that reaches it, over all processes; not at a tick"),
    Flag("seed", "count", 0, "`--seed`; 0: from the clock. Governs sizes and the mix, too, each independently"),
    Flag("readertype", "text", "sg", "`sg` and `rand`: bytes are made in memory before the clock starts"),
    # -- sizes and checksums --
    Flag("minsize", "size", None, "`--min-size`"),
    Flag("maxsize", "size", None, "`--max-size`"),
    Flag("cksum-type", "text", "xxhash", "`none`: `--no-checksum`; `crc32c`; `xxhash` and `xxhash2`: the bucket's own"),
    Flag("verifyhash", "bool", False, "`--verify checksum`"),
    # -- archives --
    Flag("arch.pct", "count", 0, "so many percent of the PUTs are shards; counted with the bytes that are really sent"),
    Flag("arch.format", "text", ".tar", "`.tar`, `.tgz`, `.tar.gz`, `.zip`, `.tar.lz4`"),
    Flag("arch.num-files", "count", 0, "files per shard; 0: as many as the object's size holds"),
    Flag("arch.minsize", "size", 0, "of the files in a shard (1 KiB to 1 MiB if neither is given)"),
    Flag("arch.maxsize", "size", 0, "see `-arch.minsize`"),
    Flag("arch.prefix", "text", "", "directory of the files in a shard"),
    Flag("arch.list", "bool", False, "GETs read the files in the archives (`?archpath=`); the archives are left out"),
    # -- names --
    Flag("subdir", "text", "", "GET: what names begin with, with `-s3endpoint` too; PUT: the directory of new names"),
    Flag("num-subdirs", "count", 0, "the same names: `%05x` of the counter modulo N"),
    Flag("randomname", "bool", True, "32 drawn characters; ignored with `-loadernum`"),
    Flag("filelist", "text", "", "`--list-file`; names may hold spaces, sizes may follow a tab"),
    Flag("skiplist", "bool", False, "nothing: a run that only writes never lists"),
    # -- reads --
    Flag("readoff", "size", 0, "`--read-offset`; without `-readlen` ignored, as aisloader does"),
    Flag("readlen", "size", 0, "`--read-bytes --range fixed`"),
    Flag("get-batchsize", "count", 0, "each GET is a GetBatch of so many objects; epochs are counted for it, too"),
    Flag("cont-on-err", "bool", False, "GetBatch goes on without members that are missing"),
    Flag("latest", "bool", False, "`?latest-ver=true` with each GET"),
    Flag("cached", "bool", False, "lists what the cluster holds of a remote bucket"),
    Flag("evict-batchsize", "count", 1000, "nothing: the clean-up sends single DELETEs, many at once"),
    # -- in parts --
    Flag("multipart-chunks", "count", 0, "parts of a PUT in parts, each a multiple of 4 KiB and 64 MiB at most"),
    Flag("pctmultipart", "count", 0, "so many percent of the PUTs go in parts"),
    Flag("pctmpdstream", "count", 0, "so many percent of the GETs are made of parallel ranges"),
    Flag("mpdstream-workers", "count", 0, "ranges under way per worker (16)"),
    Flag("mpdstream-chunk-size", "count", 0, "of the ranges, bytes without a suffix, a multiple of 4096 (8 MiB)"),
    # -- a fleet --
    Flag("loaderid", "text", "0", "the same names as aisloader's; under mpirun all processes are one loader"),
    Flag("loadernum", "count", 0, "see `-loaderid`; `-loaderid` must be less"),
    Flag("loaderidhashlen", "count", 0, "see `-loaderid`"),
    Flag("getloaderid", "bool", False, "prints it"),
    # -- figures --
    Flag("statsinterval", "count", 10, "seconds between lines of the table; with several processes the end only"),
    Flag("stats-output", "text", "", "file of the table or of the JSON; else they go to standard output alone"),
    Flag("json", "bool", False, "the same elements, PUTs in parts and parallel GETs among them"),
    # -- the rest --
    Flag("cleanup", "bool", None, "removes what the run has written, and a bucket that it has made; nothing else"),
    Flag("stoppable", "bool", False, "nothing: Ctrl-C always ends with the figures so far, and with the clean-up"),
    Flag("dry-run", "bool", False, "prints what would be done; makes no bucket"),
    # -- of former versions --
    Flag("uniquegets", "bool", True, "`false`: `--order replacement`"),
    Flag("check-statsd", "bool", False, "nothing: there is no StatsD to ask"),
    # -- mlstor's own --
    Flag("direct", "bool", False, "mlstor's own: `-o via_proxy=no`, reads go straight to the targets"),
    Flag("results", "text", "", "mlstor's own: `--results`, where the record goes"),
)
"""What is taken. Defaults are aisloader's."""

_STATSD = "mlstor sends nothing to StatsD; take the table, -json, or the record's histograms"
_ETL = "mlstor does not transform objects: leave it out, and measure the transform with aisloader"

REFUSED = {
    flag.name: flag
    for flag in (
        Flag("bprops", "text", "", "mlstor changes no bucket's properties: set them with `ais bucket props set`"),
        Flag("tmpdir", "text", "", "payload never comes from files; `mlstor copy` sends files"),
        Flag("list-dirs", "bool", False, "virtual directories are no objects that can be read: leave it out"),
        Flag("nbi", "bool", False, "an inventory is not read: leave it out to list, or name the objects in -filelist"),
        Flag("etl", "text", "", _ETL),
        Flag("etl-spec", "text", "", _ETL),
        Flag("statsdip", "text", "", _STATSD),
        Flag("statsdport", "text", "", _STATSD),
        Flag("trace-http", "bool", False, "the record always has time to first byte and redirects apart, at no cost"),
        Flag("getconfig", "bool", False, "mlstor measures objects, not the proxies' configuration: leave it out"),
        Flag("objNamePrefix", "text", "", "aisloader has no such option any more: use -subdir"),
        Flag("arch.use", "bool", False, "aisloader has no such option any more: use -arch.pct or -arch.list"),
    )
}
"""What is refused, with the reason; each may be given as what it is by default."""

ALIASES = {
    "putshards": "num-subdirs",
    "batchsize": "evict-batchsize",
    "continue-on-err": "cont-on-err",
    "statsdprobe": "check-statsd",
    "test-probe StatsD server prior to benchmarks": "check-statsd",
}
"""Former spellings. The last one is what a slip in aisloader's source made of ``-statsdprobe``."""


def rows() -> list[tuple[str, str, str]]:
    """Option, default and what becomes of it: the lines of docs/aisloader.md."""
    taken = [(f"`-{flag.name}`", _default(flag), flag.becomes) for flag in FLAGS]
    former = [(f"`-{name}`", "", f"`-{today}`") for name, today in ALIASES.items()]
    return [*taken, *former, *((f"`-{name}`", "", f"refused: {flag.becomes}") for name, flag in REFUSED.items())]


def _default(flag: Flag) -> str:
    if flag.name in ("minsize", "maxsize"):
        return "1 MiB" if flag.name == "minsize" else "1 GiB"
    if flag.default is None:
        return "must be said"
    if isinstance(flag.default, bool):
        return "true" if flag.default else "false"
    if flag.kind == "duration":
        return f"{flag.default / 60:g}m"
    return str(flag.default)


def usage() -> str:
    """The options, one a line."""
    width = max(len(flag.name) for flag in FLAGS) + 1
    lines = [f"  {'-' + flag.name:<{width}}  {flag.becomes}" for flag in FLAGS]
    refused = [f"  {'-' + name:<{width}}  {flag.becomes}" for name, flag in REFUSED.items()]
    return "\n".join(
        [
            "usage: mlstor aisloader -bucket=ais://BUCKET -cleanup=false [OPTION]...",
            "",
            "aisloader's options, and what of `mlstor stream` each becomes:",
            *lines,
            "",
            "Options that are refused:",
            *refused,
            "",
            "Values as -x=v or -x v; K, KB and KiB are all 1024. docs/aisloader.md says more.",
        ]
    )
