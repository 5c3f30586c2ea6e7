"""`mlstor doctor [PATH]`: what was built in, what the kernel grants, and what I/O on PATH can be.

The native core does the probing, by real set-ups, writes and reads; this module names causes and prints.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import importlib.util
import os
import re
import resource
from collections.abc import Iterator, Mapping
from typing import Any

from mlstor.errors import UsageError
from mlstor.units import format_both, format_gib

SECCOMP_FILTER = 2  # "Seccomp:" in /proc/self/status: 0 off, 1 strict, 2 filter (proc(5))

_WITHOUT_REGISTRATION = "pages are then pinned at each transfer; a greater memory lock limit (ulimit -l) allows it"

_ALIGNMENT_SOURCES = {
    "statx": "as statx says",
    "xfs": "as XFS says",
    "sysfs": "the device's block size: statx says nothing",
    "page": "a page: neither statx nor the device says anything",
}

CAUSES = {
    "build": "mlstor was built without liburing; install liburing-dev and install mlstor again",
    "kernel": "this kernel has no io_uring (Linux 5.1 with CONFIG_IO_URING)",
    "sysctl": "the sysctl kernel.io_uring_disabled forbids it; an administrator can set it to 0",
    "seccomp": "a seccomp filter forbids it, as the default profiles of container runtimes do; "
    "run with one that allows io_uring_setup, io_uring_enter and io_uring_register",
    "memory": "the memory lock limit is too low for a ring; raise RLIMIT_MEMLOCK (ulimit -l)",
    "other": "neither the sysctl nor a seccomp filter explains it; a security module may forbid it",
}


def refusal_cause(error: int, io_uring_disabled: int | None, seccomp_mode: int) -> str:
    """Why io_uring_setup failed: ``kernel``, ``sysctl``, ``seccomp``, ``memory`` or ``other``.

    Parameters
    ----------
    error
        errno of io_uring_setup.
    io_uring_disabled
        The sysctl kernel.io_uring_disabled, None where the kernel has none (before Linux 6.6).
    seccomp_mode
        "Seccomp:" of /proc/self/status; see `seccomp_mode`.
    """
    if error == errno.ENOMEM:
        return "memory"
    # The sysctl speaks first: the kernel looks at it for each io_uring_setup that a filter has let through,
    # and only it gives EPERM for certain. A filter may be set to answer EPERM or ENOSYS.
    if error == errno.EPERM and io_uring_disabled:
        return "sysctl"
    if error in (errno.EPERM, errno.EACCES, errno.ENOSYS) and seccomp_mode == SECCOMP_FILTER:
        return "seccomp"
    return "kernel" if error == errno.ENOSYS else "other"


def seccomp_mode(status: str) -> int:
    """The seccomp mode in the text of /proc/PID/status: 0 off, 1 strict, 2 filter; 0 if it isn't there."""
    found = re.search(r"^Seccomp:\s*(\d+)", status, re.MULTILINE)
    return int(found[1]) if found else 0


def main(argv: list[str]) -> int:
    """Run the verb; returns 0, whatever was found: the findings are the answer."""
    parser = argparse.ArgumentParser(
        prog="mlstor doctor",
        description="Show what was built in, what the kernel grants and, for PATH, what I/O there can be. "
        "PATH is tried with a temporary file of at most a few MiB.",
    )
    parser.add_argument("path", nargs="?", metavar="PATH", help="a directory, or a file in it")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    report = examine(options.path)
    if options.json:
        import json

        print(json.dumps(report, indent=2, sort_keys=True))
    else:
        print("\n".join(lines(report)))
    return 0


def examine(path: str | None = None) -> dict[str, Any]:
    """The findings as plain data: ``build``, ``kernel``, ``host``, ``settings``, and ``path`` and ``mount``.

    ``mount`` is None where /proc doesn't show it; its ``device`` is None where no block device is under it.

    Raises
    ------
    UsageError
        If `path` doesn't exist.
    OSError
        If it can't even be opened.
    """
    directory = None if path is None else _directory(path)
    from mlstor import _io, host
    from mlstor.settings import Settings

    settings = Settings.resolve()
    report: dict[str, Any] = {
        "build": {**_io.build_info(), **_http_build_info()},
        "kernel": kernel_findings({**_io.probe(), **limits()}),
        "host": dataclasses.asdict(host.describe()),
    }
    if directory is not None:
        settings = settings.for_target(directory)
        report["mount"] = _mount(directory)
        report["path"] = {"directory": directory, **_probe(directory)}
    report["settings"] = settings.describe()
    return report


def _http_build_info() -> Mapping[str, str | None]:
    """What the part for object stores was built with; None for libcurl where it was left out."""
    if importlib.util.find_spec("mlstor._http") is None:
        return {"libcurl": None}
    try:
        from mlstor import _http
    except ImportError as error:
        return {"libcurl": f"built in, but it can't be loaded: {error}"}
    return _http.build_info()


def limits() -> dict[str, int | None]:
    """What may forbid a ring or its registration.

    ``io_uring_disabled``, the sysctl of that name, is None where the kernel has none (before Linux 6.6);
    ``memlock_limit_bytes``, this process's RLIMIT_MEMLOCK, is None if there is no limit.
    """
    try:
        with open("/proc/sys/kernel/io_uring_disabled", encoding="ascii") as file:
            disabled = int(file.read())
    except FileNotFoundError:
        disabled = None
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return {"io_uring_disabled": disabled, "memlock_limit_bytes": None if soft == resource.RLIM_INFINITY else soft}


def kernel_findings(probed: Mapping[str, Any]) -> dict[str, Any]:
    """`probed`, with the cause where io_uring was refused."""
    findings = dict(probed)
    if findings["io_uring"]:
        findings["refusal"] = None
    elif not findings["errno"]:
        findings["refusal"] = "build"  # never asked the kernel
    else:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            mode = seccomp_mode(file.read())
        findings["refusal"] = refusal_cause(findings["errno"], findings["io_uring_disabled"], mode)
    return findings


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The report as aligned text."""
    from mlstor import __version__

    yield f"mlstor {__version__}"
    for title, section in (
        ("Built in", _build_lines(report["build"])),
        ("Kernel", _kernel_lines(report["kernel"])),
        ("Host", _host_lines(report["host"])),
        ("Path", _path_lines(report["path"], report["mount"]) if "path" in report else ()),
        ("Settings", _settings_lines(report["settings"])),
    ):
        rows = list(section)
        if rows:
            width = max(len(name) for name, _ in rows)
            yield f"\n{title}"
            yield from (f"  {name:<{width}}  {value}" for name, value in rows)


def _build_lines(build: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    absent = {
        "liburing": "absent: I/O goes through threads (install liburing-dev, then mlstor again)",
        "isal": "absent: CRCs come from tables (install libisal-dev, then mlstor again)",
        "libcurl": "absent: no s3:// and no ais:// (install libcurl4-openssl-dev, then mlstor again)",
    }
    for name, value in build.items():
        yield name, absent.get(name, "no") if value is None else str(value)


def _kernel_lines(kernel: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if kernel["io_uring"]:
        yield "io_uring", "granted"
        yield "ring flags", ", ".join(kernel["ring_flags"]) or "none"
        yield "features", f"{kernel['features']:#x}"
        yield "ring fd registered", _yes(kernel["ring_fd_registered"])
        granted = kernel["registration"] == "granted"
        yield "64 MiB registered", "yes" if granted else f"{kernel['registration']}; {_WITHOUT_REGISTRATION}"
    else:
        error = kernel["errno"]
        said = f"{errno.errorcode.get(error, error)}: " if error else ""
        yield "io_uring", f"refused ({kernel['refusal']}): {said}{CAUSES[kernel['refusal']]}"
        yield "instead", "threads of pread and pwrite"
    disabled = kernel["io_uring_disabled"]
    yield "kernel.io_uring_disabled", "no such sysctl" if disabled is None else str(disabled)
    memlock = kernel["memlock_limit_bytes"]
    yield "memory lock limit", "unlimited" if memlock is None else format_gib(memlock)


def _host_lines(host: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "kernel", f"{host['kernel']} ({host['machine']})"
    allowed = "" if host["cores_allowed"] is None else f" of the {host['cores_allowed']} allowed here"
    yield "cores", f"{host['affinity_cores']} ({host['affinity']}){allowed}"
    if (nbytes := host["memory_total_bytes"]) is not None:
        yield "memory", format_both(nbytes)
    if (nbytes := host["cgroup"]["memory_limit_bytes"]) is not None:
        yield "memory limit", f"{format_both(nbytes)}, cgroup v{host['cgroup']['memory_version']}"


def _path_lines(path: Mapping[str, Any], mount: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    yield "directory", path["directory"]
    if mount is None:
        yield "file system", f"{path['fs_type']} (its mount is not shown in /proc/self/mountinfo)"
    else:
        yield "file system", f"{mount['fs_type']} on {mount['mount_point']}"
        yield "mount options", f"{mount['options']}; file system: {mount['super_options']}"
        yield "source", mount["source"]
        yield "device", _device_text(mount["device"])
    yield "O_DIRECT write", str(path["direct_write"])
    yield "O_DIRECT read", str(path["direct_read"])
    source = _ALIGNMENT_SOURCES[path["alignment_source"]]
    if path["dio_reported"] == "no":
        source = "which is of no use without O_DIRECT"
    yield (
        "alignment",
        (
            f"memory {path['mem_align']} bytes, offset {path['offset_align']} to write and {path['read_offset_align']} "
            f"to read: {source}"
        ),
    )
    yield "preferred I/O size", f"{path['st_blksize']} bytes (st_blksize)"


def _device_text(device: Mapping[str, Any] | None) -> str:
    if device is None:
        return "no block device"
    rotational = {True: "rotating", False: "not rotating", None: None}[device["rotational"]]
    blocks = None
    if device["logical_block_bytes"] is not None:
        blocks = f"blocks of {device['logical_block_bytes']} bytes"
        if device["physical_block_bytes"] not in (None, device["logical_block_bytes"]):
            blocks += f" ({device['physical_block_bytes']} physical)"
    cache = device["write_cache"] and f"write cache: {device['write_cache']}"
    backing = device["backing_file"] and f"loop on {device['backing_file']}"
    over = ", ".join(member["name"] for member in device["members"])
    facts = (device["model"], device["level"], rotational, blocks, cache, backing, over and f"over {over}")
    return ", ".join((device["name"], *(fact for fact in facts if fact)))


def _settings_lines(settings: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    for name, setting in settings.items():
        value = setting["value"]
        if name.endswith("_bytes") and value is not None:
            value = format_gib(value)
        yield name, f"{'none' if value is None else value}  ({setting['source']})"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _mount(directory: str) -> dict[str, Any] | None:
    """The mount of `directory` as plain data, with the block device under it."""
    from mlstor import mounts

    mount = mounts.mount_of(directory)
    if mount is None:
        return None
    device = mounts.device_of(mount)
    facts = dataclasses.asdict(mount)
    return {**facts, "number": mount.device, "device": None if device is None else dataclasses.asdict(device)}


def _probe(directory: str) -> dict[str, Any]:
    """What a real write and read there gave; where a file can't be written, why, and what is known without."""
    from mlstor import _io

    try:
        return dict(_io.probe_path(directory))
    except OSError as error:
        untried = f"not known: {error.strerror}"
        return {**_io.alignment(directory), "direct_write": untried, "direct_read": untried}


def _directory(path: str) -> str:
    if not os.path.exists(path):
        raise UsageError(f"{path} does not exist; name a directory, or make it with mkdir -p")
    return os.path.abspath(path if os.path.isdir(path) else os.path.dirname(path) or ".")
