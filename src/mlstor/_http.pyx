# cython: language_level=3str, binding=True, embedsignature=True, cdivision=True
"""Many HTTP transfers at once: object stores as the core sees them.

Arguments are checked once, here; what follows runs in the core's threads without the GIL. `Transfers` in
mlstor.storage.transfers says what goes in and comes out.
"""

import atexit
import os
import weakref
from typing import NamedTuple

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer
from cpython.exc cimport PyErr_CheckSignals
from cpython.pycapsule cimport PyCapsule_Import
from libc.stdint cimport UINT64_MAX, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from posix.types cimport pid_t
from posix.unistd cimport getpid, usleep

from mlstor._http_core cimport *

import mlstor._io  # no-cython-lint: has what core_api takes
from mlstor.storage.transfers import Failure, Kind, TransferCounters

cdef int64_t TICK_NS = 100_000_000  # how long a wait lasts before signals are looked at
cdef dict DIALECTS = {"plain": MLS_HTTP_PLAIN, "s3": MLS_HTTP_S3, "ais": MLS_HTTP_AIS}

_engines = weakref.WeakSet()


cdef const mls_core_api *core_api() except NULL:
    """What mlstor._io lends, so that pattern and checksums are there once."""
    cdef const mls_core_api *api = <const mls_core_api *>PyCapsule_Import(MLS_CORE_API_CAPSULE, False)
    if api.nbytes != sizeof(mls_core_api):
        raise ImportError("mlstor._http and mlstor._io are of different builds: install mlstor again")
    return api


include "_http_support.pxi"
include "_http_engine.pxi"


def place(transfers, names, bytes uname_prefix, digests, endpoints):
    """Fills in the endpoint of each transfer: AIStore's target that holds its key, by rendezvous hashing.

    Parameters
    ----------
    transfers : writable array of TRANSFER_DTYPE
    names : buffer
        Where their keys lie, UTF-8.
    uname_prefix : bytes
        What precedes a key in the name that is hashed, as ``b"ais/@#/bucket/"``.
    digests : array of u8
        The targets' ``id_digest`` of the cluster map.
    endpoints : array of u4
        The number that `HttpEngine.endpoint` gave for each target.

    Raises
    ------
    ValueError
        If a key lies outside `names`, there is no target, or the arrays do not match.
    """
    cdef _View array = _View(transfers, True), text = _View(names, False)
    cdef _View ids = _View(digests, False), numbers = _View(endpoints, False)
    cdef const mls_core_api *api = core_api()
    cdef mls_hrw_hash hash
    cdef mls_hrw_map targets
    cdef size_t count = array.view.len // sizeof(mls_transfer), done
    if array.view.len % sizeof(mls_transfer):
        raise ValueError("transfers is an array of TRANSFER_DTYPE")
    targets.ntargets = ids.view.len // sizeof(uint64_t)
    if not targets.ntargets or <size_t>numbers.view.len != targets.ntargets * sizeof(uint32_t):
        raise ValueError("there is one digest (u8) and one endpoint (u4) per target, and at least one target")
    hash.reset, hash.update, hash.digest = api.xxh64_reset, api.xxh64_update, api.xxh64_digest
    targets.id_digests, targets.endpoints = <const uint64_t *>ids.view.buf, <const uint32_t *>numbers.view.buf
    targets.uname_prefix, targets.uname_prefix_nbytes = uname_prefix, len(uname_prefix)
    with nogil:
        done = mls_hrw_place(&hash, &targets, <mls_transfer *>array.view.buf, count, <const char *>text.view.buf,
                             text.view.len)
    if done < count:
        raise ValueError(f"transfer {done}: its key lies outside names")


def build_info():
    """The libcurl in use and its TLS library: ``{"libcurl": "7.88.1 OpenSSL/3.0.17"}``."""
    return {"libcurl": mls_http_libcurl().decode()}


def _close_all():
    cdef HttpEngine engine
    for engine in list(_engines):
        if engine.pid == getpid():
            engine.close()


atexit.register(_close_all)
