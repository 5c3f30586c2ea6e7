"""From aisloader's options to those of ``mlstor stream``, and what the latter has no option for: a `Plan`."""

from __future__ import annotations

import json
import os
import posixpath
import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlstor.aisloader.names import Loader, loader
from mlstor.aisloader.options import GIB, MIB
from mlstor.aisloader.shards import Shards, shards
from mlstor.errors import UsageError
from mlstor.storage.transfers import Digest
from mlstor.stream import options as stream_options

if TYPE_CHECKING:
    from mlstor.aisloader.flags import Given
    from mlstor.stream.options import Options

#: Where aisloader looks for a cluster, and the largest body that an engine makes of a pattern.
_LOCAL = ("", "localhost", "127.0.0.1")
_MOST_PART_BYTES = 64 * MIB
_DIGESTS = {"none": Digest.NONE, "crc32c": Digest.CRC32C, "xxhash": None, "xxhash2": None}
_RANGE_BYTES, _RANGES = 8 * MIB, 16
_ALIGN_BYTES = 4096


@dataclass
class Plan:
    """What is to be done.

    Attributes
    ----------
    options : Options
        Of the stream.
    words : list of str
        The command line of ``mlstor stream`` that these came of.
    digest : Digest or None
        Checksum of what is written, None: the store's own.
    direct_s3 : bool
        Without AIStore.
    notes : list of str
        What does not go as the user may expect.
    """

    options: Options
    words: list[str]
    loader: Loader
    bucket: str
    direct_s3: bool
    digest: Digest | None
    shards: Shards | None
    given: Given
    notes: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> Any:
        """The value of an option of aisloader."""
        return self.given[name]

    @property
    def archives(self) -> bool:
        """Whether the listing is of files in archives."""
        return bool(self["arch.list"] or (self["arch.pct"] and self["pctput"] < 100))

    @property
    def parts(self) -> int:
        """Requests that one operation may have under way."""
        return max(
            self["multipart-chunks"] if self["pctmultipart"] else 1,
            (self["mpdstream-workers"] or _RANGES) if self["pctmpdstream"] else 1,
        )

    @property
    def one_by_one(self) -> bool:
        """Whether no more operations are handed over than are to be under way."""
        return self.parts > 1 or bool(self["get-batchsize"] or self["arch.pct"])


def translate(given: Given) -> Plan:
    """What a command line of aisloader asks for.

    Raises
    ------
    UsageError
        If options exclude one another, or what they ask for can't be had here.
    """
    s3_endpoint = given["s3endpoint"] or os.environ.get("S3_ENDPOINT", "")
    _fill_in(given)
    _check(given, bool(s3_endpoint))
    bucket, provider = _bucket(given, bool(s3_endpoint))
    plan = Plan(
        options=stream_options.Options(),
        words=[],
        loader=loader(given["loaderid"], given["loadernum"], given["loaderidhashlen"], given["randomname"]),
        bucket=bucket,
        direct_s3=bool(s3_endpoint),
        digest=_DIGESTS[given["cksum-type"]],
        shards=_shards(given),
        given=given,
    )
    store = _s3_words(given, s3_endpoint) if s3_endpoint else _ais_words(given, provider)
    plan.words = [f"{'s3' if s3_endpoint else 'ais'}://{bucket}", *store, *_words(given)]
    forever = not any(word in plan.words for word in ("--duration", "--epochs"))
    plan.options = stream_options.parse([*plan.words, "--duration", "1s"] if forever else plan.words)
    if forever:
        plan.options.duration_s = None
    if given["tokenfile"]:
        plan.options.store_options["token"] = _token(given["tokenfile"])
    _note(plan)
    return plan


def _fill_in(given: Given) -> None:
    """Values that depend on what else was said."""
    least, most = given["minsize"], given["maxsize"]
    if least is None:
        least = MIB if most is None else min(MIB, most)
    if most is None:
        most = GIB if given["minsize"] is None else max(least, GIB)
    given["minsize"], given["maxsize"] = least, most
    if "duration" not in given.said and (given["totalputsize"] or given["epochs"]):
        given["duration"] = 0.0
    given["subdir"] = posixpath.normpath(given["subdir"]) if given["subdir"] else ""
    if given["seed"] == 0:
        given["seed"] = time.time_ns()


def _check(given: Given, s3: bool) -> None:
    """The exclusions of aisloader's own that still have a reason, and those that come of the stream."""

    def refuse(first: str, second: str, why: str) -> None:
        raise UsageError(f"-{first} and -{second} exclude one another: {why}")

    for name in ("pctput", "pctupdate", "pctmultipart", "pctmpdstream", "arch.pct"):
        if given[name] > 100:
            raise UsageError(f"-{name}={given[name]} is a percentage: give 0 to 100")
    if given["maxsize"] < given["minsize"]:
        raise UsageError(f"-minsize={given['minsize']} is above -maxsize={given['maxsize']}: exchange them")
    if not given["numworkers"]:
        raise UsageError("-numworkers=0 leaves nobody to work: give 1 or more")
    if given["pctput"] and not given["minsize"]:
        raise UsageError("-minsize=0: aisloader writes no empty objects; give 1 or more")
    if given["num-subdirs"] >= 100_000:
        raise UsageError(f"-num-subdirs={given['num-subdirs']}: give less than 100000")
    if given["subdir"].startswith(("/", "..")):
        raise UsageError(f"-subdir={given['subdir']}: names begin without / and ..")
    if given["bucket"] and given["cleanup"] is None and not s3:
        raise UsageError("say -cleanup=true or -cleanup=false: whether what the run has written is removed at its end")
    if given["skiplist"] and given["pctput"] < 100 and not given["filelist"]:
        refuse("skiplist", f"pctput={given['pctput']}", "reads need the names; give -pctput=100")
    if given["pctmpdstream"]:
        for name in ("pctput", "get-batchsize", "readlen", "arch.list"):
            if given[name]:
                refuse("pctmpdstream", name, "parallel ranges are of whole objects that are there")
    if given["get-batchsize"]:
        if given["get-batchsize"] > 1000:
            raise UsageError(f"-get-batchsize={given['get-batchsize']}: give 1 to 1000")
        for name in ("readlen", "readoff", "verifyhash", "latest"):
            if given[name]:
                refuse("get-batchsize", name, "GetBatch reads whole objects as they are")
        if given["pctupdate"]:
            refuse("get-batchsize", "pctupdate", "updates follow GETs of one object")
    if given["readlen"]:
        for name, why in (("verifyhash", "the checksum is of the whole object"), ("arch.list", "files come whole")):
            if given[name]:
                refuse("readlen", name, why)
    if given["arch.pct"] and given["pctmultipart"]:
        refuse("arch.pct", "pctmultipart", "shards are written whole")
    if given["pctupdate"] and (given["arch.list"] or (given["arch.pct"] and given["pctput"] < 100)):
        refuse("pctupdate", "arch.list", "a file in an archive can't be written")
    if given["mpdstream-chunk-size"] % _ALIGN_BYTES:
        raise UsageError(f"-mpdstream-chunk-size={given['mpdstream-chunk-size']}: give a multiple of {_ALIGN_BYTES}")
    if given["pctmultipart"] and given["maxsize"] > given["multipart-chunks"] * _MOST_PART_BYTES > 0:
        raise UsageError(
            f"-multipart-chunks={given['multipart-chunks']}: a part of {given['maxsize']} bytes has more "
            f"than 64 MiB; give {-(-given['maxsize'] // _MOST_PART_BYTES)} or more, or a smaller -maxsize"
        )
    if given["cksum-type"] not in _DIGESTS:
        raise UsageError(f"-cksum-type={given['cksum-type']}: mlstor computes {', '.join(_DIGESTS)}")
    if given["readertype"] not in ("sg", "rand"):
        word = given["readertype"]
        advice = "for shards give -arch.pct" if word == "tar" else "payload is always made in memory: leave it out"
        raise UsageError(f"-readertype={word}: {advice}")
    if s3:
        for name in (
            "ip",
            "port",
            "randomproxy",
            "arch.pct",
            "arch.list",
            "get-batchsize",
            "cached",
            "latest",
            "direct",
        ):
            if given[name] and name in given.said:
                refuse("s3endpoint", name, "there is no AIStore then")
        if given["pctmultipart"]:
            refuse("s3endpoint", "pctmultipart", "S3 takes no small parts; what is large goes in parts anyway")
    elif given["s3-use-path-style"]:
        raise UsageError("-s3-use-path-style goes with -s3endpoint")
    if not (given["duration"] or given["totalputsize"] or given["epochs"] or given["stoppable"] or given["maxputs"]):
        advice = "; to remove a bucket use `ais bucket rm`" if given["cleanup"] else ""
        raise UsageError(f"-duration=0 without -epochs, -totalputsize, -maxputs or -stoppable does nothing{advice}")


def _bucket(given: Given, s3: bool) -> tuple[str, str]:
    """The bucket's name and its provider."""
    named, provider = given["bucket"], given["provider"]
    scheme, separator, rest = named.partition("://")
    if separator:
        of_scheme = {"s3": "aws", "gs": "gcp", "az": "azure", "oc": "oci"}.get(scheme, scheme)
        if "provider" in given.said and provider not in (of_scheme, "ais"):
            raise UsageError(f"-provider={provider} and -bucket={named} name two providers: leave one out")
        named, provider = rest.rstrip("/"), of_scheme
        if "/" in named and not named.startswith(("@", "#")):
            raise UsageError(
                f"-bucket={given['bucket']} names more than a bucket: give what names begin with as -subdir"
            )
    if s3 and separator and provider != "aws":
        raise UsageError(f"-s3endpoint reads s3:// buckets, not {given['bucket']}")
    if not named:
        if s3 or given["pctput"] < 100:
            raise UsageError("a new bucket has nothing to read: name one with -bucket, or give -pctput=100")
        named = f"mlstor-{secrets.token_hex(4)}"
        if given["cleanup"] is None:
            given["cleanup"] = False
    return named, provider


def _ais_words(given: Given, provider: str) -> list[str]:
    endpoint = f"http://{given['ip']}:{given['port']}"
    if from_environment := os.environ.get("AIS_ENDPOINT", ""):
        if given["ip"] not in _LOCAL:
            raise UsageError(f"AIS_ENDPOINT={from_environment} and -ip={given['ip']} name two clusters: leave one out")
        endpoint = from_environment if "://" in from_environment else f"http://{from_environment}"
    words = ["--endpoint", endpoint, "-o", f"via_proxy={'no' if given['direct'] else 'yes'}"]
    words += ["-o", f"provider={provider}"] if provider != "ais" else []
    words += ["-o", f"patience_s={round(given['timeout'])}"] if "timeout" in given.said else []
    if endpoint.startswith("https://"):
        if os.environ.get("AIS_CRT") or os.environ.get("AIS_CRT_KEY"):
            raise UsageError("AIS_CRT and AIS_CRT_KEY: mlstor shows no certificate of its own; use a token")
        if ca_file := os.environ.get("AIS_CLIENT_CA", ""):
            words += ["-o", f"ca_file={ca_file}"]
        if os.environ.get("AIS_SKIP_VERIFY_CRT", "").lower() in ("1", "true", "yes", "on", "y"):
            words += ["-o", "insecure=yes"]
    return words


def _s3_words(given: Given, endpoint: str) -> list[str]:
    words = ["--endpoint", endpoint]
    words += ["-o", f"profile={given['s3profile']}"] if given["s3profile"] else []
    return words + (["-o", "path_style=yes"] if given["s3-use-path-style"] else [])


def _words(given: Given) -> list[str]:
    """The options of ``mlstor stream`` for the work itself."""
    puts, epochs = given["pctput"], given["epochs"]
    drawn = not given["uniquegets"] or (puts and not epochs)
    words = ["--put", str(puts), "--get", str(100 - puts), "--seed", str(given["seed"]), "--no-live"]
    workers, in_flight = _under_way(given["numworkers"])
    words += ["--workers", str(workers), "--in-flight", str(in_flight)]
    if puts:
        words += ["--min-size", str(given["minsize"]), "--max-size", str(given["maxsize"])]
        words += ["--prefix-dirs", str(given["num-subdirs"])] if given["num-subdirs"] else []
        words += ["--no-checksum"] if given["cksum-type"] == "none" else []
    if puts < 100:
        words += ["--order", "replacement" if drawn else "permutation", "--epoch-scope", "client"]
        words += ["--epochs", str(epochs)] if epochs else []
        words += ["--list-file", given["filelist"]] if given["filelist"] else []
        words += ["--verify", "checksum"] if given["verifyhash"] else []
        if given["readlen"]:
            words += ["--read-bytes", str(given["readlen"]), "--read-offset", str(given["readoff"])]
    words += ["--duration", f"{given['duration']:.9f}s"] if given["duration"] else []
    words += ["--cleanup"] if given["cleanup"] else []
    return words + (["--results", given["results"]] if given["results"] else [])


def _under_way(numworkers: int) -> tuple[int, int]:
    """Threads, and transfers under way in each, that are `numworkers` together."""
    cores = len(os.sched_getaffinity(0))
    threads = next(count for count in range(min(cores, numworkers), 0, -1) if numworkers % count == 0)
    return threads, numworkers // threads


def _shards(given: Given) -> Shards | None:
    if not given["arch.pct"]:
        return None
    return shards(
        given["arch.format"],
        given["arch.num-files"],
        given["arch.minsize"],
        given["arch.maxsize"],
        given["arch.prefix"],
        given["seed"],
        given["maxsize"],
    )


def _token(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return str(json.load(file)["token"])
    except (OSError, ValueError, KeyError, TypeError):
        # not the exception's own text: it may quote the file
        raise UsageError(f"-tokenfile={path} is not a token file as `ais auth login` writes it") from None


def _note(plan: Plan) -> None:
    given, notes = plan.given, plan.notes
    if given["readoff"] and not given["readlen"]:
        notes.append("-readoff without -readlen is ignored, as aisloader does")
    if bool(given["multipart-chunks"]) != bool(given["pctmultipart"]):
        notes.append("-multipart-chunks and -pctmultipart mean nothing without one another")
    if (
        given["pctput"]
        and given["maxsize"] > _MOST_PART_BYTES
        and given["pctmultipart"] < 100
        and not given["arch.pct"]
    ):
        notes.append("PUTs of more than 64 MiB go in parts, and count as PUT")
    if plan.direct_s3 and "timeout" in given.said:
        notes.append("-timeout is about AIStore; an S3 request is given up after 30 s without a byte")
    if given["check-statsd"]:
        notes.append("-check-statsd: mlstor sends nothing to StatsD")
    if given["pctput"] and not plan.direct_s3 and given["cleanup"]:
        notes.append("-cleanup removes what this run writes, and a bucket that it makes; what was there before stays")
