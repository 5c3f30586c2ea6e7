"""``mlstor verify FILE_OR_DIR...``: reads checkpoints through and compares them with their checksums."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any, NoReturn

from mlstor.errors import CorruptionError, UsageError
from mlstor.storage.arguments import add_store_options, store_options
from mlstor.storage.store import open_store, scheme_of
from mlstor.units import format_gb

if TYPE_CHECKING:
    from mlstor.formats.finding import Finding

#: From the least to the worst: a file is as its worst part.
_ORDER = ("ok", "unverified", "error", "damaged")
_EXIT_CODES = {"ok": 0, "unverified": 0, "error": 1, "damaged": CorruptionError.exit_code}
#: Lines about one file at most.
_MOST_LINES = 20


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; write it as mlstor verify FILE_OR_DIR...")


def main(argv: list[str]) -> int:
    """Verify what is named; the exit code is 0 if nothing was found wrong, 1 for I/O errors, 3 for damage.

    Raises
    ------
    UsageError
        If a directory has no checkpoint in it.
    """
    parser = _Parser(
        prog="mlstor verify",
        description="Read checkpoints through and compare them with their checksums, without loading or unpickling: "
        "files of torch.save, mlstor and safetensors, and distributed checkpoints. Exit code 0: nothing is wrong "
        "(files without checksums are named); 1: something could not be read; 3: damage.",
    )
    parser.add_argument(
        "paths",
        metavar="FILE_OR_DIR",
        nargs="+",
        help="a file, a directory (with all below it), or their URL: s3://BUCKET/KEY, ais://BUCKET/PREFIX",
    )
    add_store_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    given = parser.parse_intermixed_args(argv)
    files = _files(given.paths, store_options(given))
    reports = []
    for report in files:
        reports.append(report)
        if not given.json:
            _print(report)
    worst = max((report["status"] for report in reports), key=_ORDER.index)
    if given.json:
        print(json.dumps({"status": worst, "files": reports}, indent=2))
    else:
        counts = Counter(report["status"] for report in reports)
        told = ", ".join(f"{counts[status]} {status}" for status in _ORDER if counts[status])
        print(f"{len(reports)} files, {format_gb(sum(report['nbytes'] for report in reports))}: {told}")
    return _EXIT_CODES[worst]


def _files(paths: list[str], options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A report for each file that is a checkpoint or a part of one."""
    for path in paths:
        found = 0
        for name, findings in groupby(_findings(path, options), key=lambda finding: finding.name):
            found += 1
            yield _report(name, findings)
        if not found:
            from mlstor.formats.scrub import SUFFIXES

            raise UsageError(
                f"{path} holds no checkpoint: looked for .metadata of a distributed one, and for files ending with "
                f"{', '.join(SUFFIXES)}; name other files one by one"
            )


def _findings(path: str, options: dict[str, Any]) -> Iterator[Finding]:
    from mlstor.blob.target import open_blob, open_directory
    from mlstor.formats.scrub import scrub, scrub_directory

    local = scheme_of(path) == "file"
    directories = _directories(path, options) if not local or os.path.isdir(_local(path)) else {}
    if not directories:
        # A file, or an object: also one that isn't there, which is then the finding.
        yield from scrub(open_blob(path, **({} if local else options)))
    for directory, names in sorted(directories.items()):
        yield from scrub_directory(open_directory(directory, **({} if local else options)), names)


def _local(path: str) -> str:
    from mlstor.storage.posix import path_of

    return path_of(path) if "://" in path else path


def _directories(path: str, options: dict[str, Any]) -> dict[str, list[str]]:
    """The names in a directory and in those below it, each by its path or URL."""
    found: dict[str, list[str]] = {}
    if scheme_of(path) == "file":
        for directory, _, names in os.walk(_local(path), onerror=_raise):
            found[directory] = names
        return found
    store = open_store(path, **options)
    try:
        for page in store.list():
            for key in page.keys:
                parent, _, name = key.rpartition("/")
                found.setdefault(f"{path.rstrip('/')}/{parent}".rstrip("/"), []).append(name)
    finally:
        store.close()
    return found


def _raise(error: OSError) -> NoReturn:
    raise error


def _report(name: str, findings: Iterator[Finding]) -> dict[str, Any]:
    """What is said of a file: its worst status, and everything that is not ok."""
    parts = verified_bytes = nbytes = 0
    status = "ok"
    said = []
    for finding in findings:
        parts += 1
        nbytes += finding.nbytes
        if finding.status == "ok":
            verified_bytes += finding.nbytes
        else:
            said.append({key: value for key, value in finding._asdict().items() if key != "name"})
        status = max(status, finding.status, key=_ORDER.index)
    return {
        "name": name,
        "status": status,
        "parts": parts,
        "nbytes": nbytes,
        "verified_nbytes": verified_bytes,
        "findings": said,
    }


def _print(report: dict[str, Any]) -> None:
    status, name = report["status"], report["name"]
    print(f"{status:<10}  {name}  ({report['parts']} parts, {format_gb(report['nbytes'])})")
    lines = [_line(finding) for finding in report["findings"] if finding["status"] != "unverified"]
    reasons = Counter(finding["why"] for finding in report["findings"] if finding["status"] == "unverified")
    lines += [
        f"{count} parts unverified: {why}" if count > 1 else f"unverified: {why}" for why, count in reasons.items()
    ]
    for line in lines[:_MOST_LINES]:
        print(f"{'':<12}{line}")
    if len(lines) > _MOST_LINES:
        print(f"{'':<12}and {len(lines) - _MOST_LINES} more; --json shows all")


def _line(finding: dict[str, Any]) -> str:
    where = []
    if finding["tensor"]:
        where.append(f"tensor {finding['tensor']}")
    if finding["record"]:
        where.append(f"record {finding['record']}")
    if where:
        where.append(f"bytes {finding['offset']} to {finding['offset'] + finding['nbytes']}")
    return f"{', '.join(where)}: {finding['why']}" if where else finding["why"]
