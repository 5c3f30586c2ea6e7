"""Builds the native core: an extension for files from Cython and csrc/, with liburing and ISA-L where they are found,
and one for object stores from csrc/http/ where libcurl is.

Environment: MLSTOR_WITHOUT=liburing,isal,libcurl builds without them; MLSTOR_SANITIZE=address,undefined (or thread)
builds with the compiler's sanitizers.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

PACKAGE = Path("src/mlstor")


@dataclass(frozen=True)
class Library:
    """An optional C library: its pkg-config name, the macros' stem, and what is lost without it."""

    name: str
    package: str
    macro: str
    debian: str
    lost: str
    oldest: str = ""


LIBRARIES = (
    Library(
        "liburing", "liburing", "LIBURING", "liburing-dev",
        "All I/O will go through threads of pread and pwrite, even where the kernel has io_uring", oldest="2.3",
    ),
    Library(
        "isal", "libisal", "ISAL", "libisal-dev",
        "CRC-32 and CRC-32C will come from tables: checksums cost several times the CPU",
    ),
)  # fmt: skip
LIBCURL = Library(
    "libcurl", "libcurl", "LIBCURL", "libcurl4-openssl-dev",
    "There will be no s3:// and no ais://: streams, copies and checkpoints know only files",
)  # fmt: skip


@dataclass
class Flags:
    """What the optional libraries add to the compiler's and the linker's command lines."""

    macros: list[tuple[str, str | None]] = field(default_factory=list)
    compile: list[str] = field(default_factory=list)
    objects: list[str] = field(default_factory=list)
    link: list[str] = field(default_factory=list)


def pkg_config(*arguments: str) -> str | None:
    """Answer of pkg-config, or None if there is no such package or no pkg-config."""
    command = [*shlex.split(os.environ.get("PKG_CONFIG", "pkg-config")), *arguments]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


def links_into_a_shared_object(archive: Path) -> bool:
    """Whether `archive` holds position-independent code; a distribution may build its archives without."""
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    with tempfile.TemporaryDirectory() as directory:
        command = [
            *compiler, "-shared", "-o", f"{directory}/probe.so", "-Wl,--whole-archive", str(archive),
            "-Wl,--no-whole-archive", "-pthread",
        ]  # fmt: skip
        return subprocess.run(command, check=False, capture_output=True).returncode == 0


def warn_loudly(library: Library, why: str) -> None:
    """Say on stderr that the build goes on without `library`, what that costs and how to get it."""
    bar = "*" * 100
    print(
        f"\n{bar}\n* mlstor is being built WITHOUT {library.name}: {why}.\n* {library.lost}.\n"
        f"* To change that: apt-get install pkg-config {library.debian}, then install mlstor again.\n{bar}\n",
        file=sys.stderr,
        flush=True,
    )


def add_library(flags: Flags, library: Library, without: set[str], static: bool = True) -> None:
    """Add `library` to `flags`: by its static archive if `static` and that can be linked, else shared, else not at all.

    libcurl is always shared: the system's is the one with the system's certificates and security fixes.
    """
    if library.name in without:
        return warn_loudly(library, "MLSTOR_WITHOUT asks for that")
    version = pkg_config("--modversion", library.package)
    if version is None:
        return warn_loudly(library, f"pkg-config does not know {library.package}")
    if library.oldest and pkg_config(f"--atleast-version={library.oldest}", library.package) is None:
        return warn_loudly(library, f"{version} is installed, and {library.oldest} or newer is needed")
    flags.macros += [
        (f"MLS_HAVE_{library.macro}", "1"),
        (f"MLS_{library.macro}_VERSION", f'"{version}"'),
    ]
    flags.compile += shlex.split(pkg_config("--cflags", library.package) or "")
    archive = Path(pkg_config("--variable=libdir", library.package) or "", f"{library.package}.a")
    if static and archive.is_file() and links_into_a_shared_object(archive):
        flags.objects.append(str(archive))
    else:
        flags.link += shlex.split(pkg_config("--libs", library.package) or "")
    return None


def sanitizer_flags() -> list[str]:
    """Compiler and linker flags for MLSTOR_SANITIZE."""
    wanted = os.environ.get("MLSTOR_SANITIZE", "")
    if not wanted:
        return []
    if unknown := set(wanted.split(",")) - {"address", "thread", "undefined"}:
        raise SystemExit(f"setup.py: MLSTOR_SANITIZE takes address, thread and undefined, not {', '.join(unknown)}")
    return [f"-fsanitize={wanted}", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined", "-g", "-O1"]


def left_out() -> set[str]:
    """Libraries that MLSTOR_WITHOUT names."""
    known = {library.name for library in (*LIBRARIES, LIBCURL)}
    named = set(filter(None, os.environ.get("MLSTOR_WITHOUT", "").split(",")))
    if unknown := named - known:
        raise SystemExit(f"setup.py: MLSTOR_WITHOUT takes {', '.join(sorted(known))}, not {', '.join(unknown)}")
    return named


def module(name: str, sources: list[Path], headers: list[Path], flags: Flags) -> Extension:
    """An extension module with the flags that all have."""
    sanitize = sanitizer_flags()
    return Extension(
        name,
        sources=[str(path) for path in sources],
        depends=[str(path) for path in headers],
        include_dirs=[str(PACKAGE / "csrc")],
        define_macros=flags.macros,
        extra_compile_args=[
            "-O3",
            "-std=gnu11",
            "-pthread",
            "-fvisibility=hidden",
            *flags.compile,
            *sanitize,
        ],
        extra_objects=flags.objects,
        # An archive's symbols stay inside: torch and others may bring a liburing of their own.
        extra_link_args=["-pthread", "-Wl,--exclude-libs,ALL", *flags.link, *sanitize],
    )


def headers_of(directory: Path) -> list[Path]:
    """What a module depends on besides its sources."""
    return [*sorted(directory.glob("*.h")), *sorted(PACKAGE.glob("*.px[di]"))]


def extension() -> Extension:
    """mlstor._io: files."""
    flags = Flags()
    for library in LIBRARIES:
        add_library(flags, library, left_out())
    core = PACKAGE / "csrc"
    return module("mlstor._io", [PACKAGE / "_io.pyx", *sorted(core.glob("*.c"))], headers_of(core), flags)


def http_extension() -> Extension | None:
    """mlstor._http: object stores; None without libcurl."""
    flags = Flags()
    add_library(flags, LIBCURL, left_out(), static=False)
    if not flags.macros:
        return None
    core = PACKAGE / "csrc"
    sources = [PACKAGE / "_http.pyx", *sorted((core / "http").glob("*.c"))]
    return module("mlstor._http", sources, [*headers_of(core), *headers_of(core / "http")], flags)


class BuildExtension(build_ext):
    """Builds again when flags have changed too, as with another MLSTOR_WITHOUT: times of files don't show that."""

    def build_extension(self, ext: Extension) -> None:
        flags = repr((ext.define_macros, ext.extra_compile_args, ext.extra_objects, ext.extra_link_args))
        stamp = Path(self.build_temp, f"{ext.name}.flags")
        self.force = bool(self.force) or not stamp.is_file() or stamp.read_text() != flags
        super().build_extension(ext)
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(flags)


if __name__ == "__main__":
    setup(
        cmdclass={"build_ext": BuildExtension},
        ext_modules=cythonize(
            [built for built in (extension(), http_extension()) if built],
            compiler_directives={"language_level": "3"},
            build_dir="build/cython",
            include_path=["src"],
        ),
    )
