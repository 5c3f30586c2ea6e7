# cython: language_level=3str, binding=True, embedsignature=True, cdivision=True
"""The native core as Python sees it: engines, requests, aligned buffers, patterns, the page cache.

Arguments are checked once, here; what follows runs in the core's threads without the GIL. Errors of the storage are
`OSError`.
"""

import atexit
import errno
import os
import sys
import weakref
from _thread import allocate_lock, get_ident
from operator import index

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from cpython.pycapsule cimport PyCapsule_New
from libc.stdint cimport UINT64_MAX, int64_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from posix.types cimport pid_t
from posix.unistd cimport getpid, usleep
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, madvise, mmap, munmap

from mlstor._core cimport *

from mlstor.errors import short_error, storage_error
from mlstor.operations import DURABLE, Counters, Damage, Extent, Histogram, Late, ReadFile, Result, WriteFile
from mlstor.settings import Settings

cdef extern from "<sys/mman.h>" nogil:
    enum: MADV_HUGEPAGE

cdef size_t HUGE_PAGE_BYTES = 2 << 20
# In flight per worker at first with an automatic depth: what generates and checks data then works in the caches.
cdef uint64_t WINDOW_BYTES = 2 << 20
cdef int64_t TICK_NS = 100_000_000  # how long a wait lasts before signals are looked at
cdef dict MODES = {"auto": MLS_MODE_AUTO, "require": MLS_MODE_REQUIRE, "off": MLS_MODE_OFF}
cdef dict BACKENDS = {"auto": MLS_BACKEND_AUTO, "io_uring": MLS_BACKEND_URING, "threads": MLS_BACKEND_THREADS}
cdef dict DIGESTS = {None: MLS_DIGEST_NONE, "crc32": MLS_DIGEST_CRC32, "crc32c": MLS_DIGEST_CRC32C,
                     "xxh64": MLS_DIGEST_XXH64, "crc32+crc32c": MLS_DIGEST_CRC32_CRC32C}
cdef dict PATHS = {MLS_PATH_BUFFERED: "no", MLS_PATH_DIRECT: "yes", MLS_PATH_UNVERIFIED: "unverified"}
cdef object MOST_FILE_BYTES = (1 << 63) - (1 << 31)  # off_t, less what rounding up to a block adds
TIMINGS = ("read", "write", "sync", "open", "commit")

# Requests and files with transfers under way: nothing in flight outlives its buffer, whatever the caller drops.
cdef dict in_flight = {}
_engines = weakref.WeakSet()


include "_memory.pxi"
include "_digest.pxi"
include "_request.pxi"
include "_engine.pxi"
include "_ranges.pxi"
include "_files.pxi"
include "_range_set.pxi"
include "_order.pxi"
include "_plain_pickle.pxi"
include "_host.pxi"


cdef int pattern_of(void *given, mls_pattern *out) noexcept:
    """The parameters of a Pattern, for another extension of this package."""
    if not isinstance(<object>given, Pattern):
        return -1
    out[0] = (<Pattern>given).pattern
    return 0


cdef mls_core_api core_api
mls_core_api_init(&core_api)
core_api.pattern_of = &pattern_of
_core_api = PyCapsule_New(&core_api, MLS_CORE_API_CAPSULE, NULL)  # what _http imports
