"""The C core's leaves (pattern, digests, histogram, platform) compiled on their own and seen through ctypes.

So the tests of them need neither Cython nor the package's build.
"""

from __future__ import annotations

import ctypes as ct
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "src" / "mlstor" / "csrc"
SOURCES = ["pattern.c", "digest.c", "crc_combine.c", "xxh64.c", "histogram.c", "platform.c"]


class PatternStruct(ct.Structure):
    _fields_ = [
        ("run_id", ct.c_uint64),
        ("file_id", ct.c_uint64),
        ("checkpoint", ct.c_uint32),
        ("compressibility", ct.c_uint32),
        ("key", ct.c_uint64),
        ("live_bytes", ct.c_uint32),
    ]


class Damage(ct.Structure):
    _fields_ = [
        ("offset", ct.c_uint64),
        ("nbytes", ct.c_uint64),
        ("kind", ct.c_uint32),
        ("found_checkpoint", ct.c_uint32),
        ("found_run_id", ct.c_uint64),
        ("found_file_id", ct.c_uint64),
        ("found_offset", ct.c_uint64),
    ]


class HistogramStruct(ct.Structure):
    _fields_ = [
        ("count", ct.c_uint64 * 1856),
        ("total", ct.c_uint64),
        ("sum_ns", ct.c_uint64),
        ("min_ns", ct.c_uint64),
        ("max_ns", ct.c_uint64),
    ]


class Alignment(ct.Structure):
    _fields_ = [
        ("mem_align", ct.c_uint32),
        ("offset_align", ct.c_uint32),
        ("read_offset_align", ct.c_uint32),
        ("direct_supported", ct.c_int),
        ("blksize", ct.c_uint32),
        ("logical_block", ct.c_uint32),
        ("physical_block", ct.c_uint32),
        ("dev", ct.c_uint64),
        ("mnt_id", ct.c_uint64),
        ("fs_magic", ct.c_uint64),
        ("fs_name", ct.c_char_p),
        ("source", ct.c_char_p),
    ]


class Xxh64Struct(ct.Structure):
    _fields_ = [
        ("total_bytes", ct.c_uint64),
        ("seed", ct.c_uint64),
        ("acc", ct.c_uint64 * 4),
        ("pending", ct.c_uint8 * 32),
        ("npending", ct.c_uint32),
    ]


def compile_library(directory: Path, *, isal: bool) -> Path:
    """Build libleaf.so in `directory`, with the CRCs of ISA-L or the core's own; skips if it cannot."""
    cc = shutil.which("cc")
    if cc is None:
        pytest.skip("no C compiler (cc) on this machine")
    if isal and not any(Path(d, "isa-l", "crc.h").exists() for d in ("/usr/include", "/usr/local/include")):
        pytest.skip("libisal-dev is not installed")
    library = directory / "libleaf.so"
    command = [cc, "-std=gnu11", "-O2", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra", "-Werror"]
    command += ["-o", str(library), *(str(CSRC / name) for name in SOURCES)]
    if isal:
        command += ["-DMLS_HAVE_ISAL", "-lisal"]
    subprocess.run(command, check=True, timeout=120)
    return library


def load(path: Path) -> ct.CDLL:
    """The library with its prototypes."""
    library = ct.CDLL(str(path))
    for name in ("mls_crc32", "mls_crc32c", "mls_crc_shift", "mls_histogram_index"):
        getattr(library, name).restype = ct.c_uint32
    for name in ("mls_xxh64_digest", "mls_histogram_lower", "mls_histogram_upper"):
        getattr(library, name).restype = ct.c_uint64
    library.mls_pattern_check.restype = ct.c_size_t
    library.mls_crc32.argtypes = library.mls_crc32c.argtypes = [ct.c_uint32, ct.c_char_p, ct.c_size_t]
    library.mls_crc_shift.argtypes = [ct.c_int, ct.c_uint32, ct.c_uint64]
    library.mls_xxh64_reset.argtypes = [ct.POINTER(Xxh64Struct), ct.c_uint64]
    library.mls_xxh64_update.argtypes = [ct.POINTER(Xxh64Struct), ct.c_char_p, ct.c_size_t]
    library.mls_pattern_init.argtypes = [
        ct.POINTER(PatternStruct), ct.c_uint64, ct.c_uint32, ct.c_uint64, ct.c_uint32
    ]  # fmt: skip
    library.mls_pattern_fill.argtypes = [ct.POINTER(PatternStruct), ct.c_void_p, ct.c_uint64, ct.c_size_t]
    library.mls_pattern_check.argtypes = [
        ct.POINTER(PatternStruct), ct.c_void_p, ct.c_uint64, ct.c_size_t,
        ct.POINTER(Damage), ct.c_size_t, ct.POINTER(ct.c_size_t),
    ]  # fmt: skip
    library.mls_histogram_index.argtypes = [ct.c_uint64]
    library.mls_histogram_add.argtypes = [ct.POINTER(HistogramStruct), ct.c_uint64]
    library.mls_resident.argtypes = [ct.c_int, ct.c_uint64, ct.c_uint64, ct.POINTER(ct.c_uint64)]
    return library
