# Part of _io.pyx: what was built in, what this kernel and this file system grant, the page cache.


def evict(path):
    """Writes back what is dirty of a file and drops its pages from the page cache; `resident` tells whether they are
    gone. Caches of a server, a hypervisor or a FUSE daemon are out of reach.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    cdef int number = fd, error
    try:
        with nogil:
            error = mls_evict(number)
    finally:
        os.close(fd)
    if error < 0:
        raise OSError(-error, os.strerror(-error), os.fsdecode(path))


def resident(path, offset=0, nbytes=None):
    """How much of a file is in the page cache: ``(resident bytes, bytes looked at)``.

    cachestat(2) needs Linux 6.5; before, mincore(2).

    Raises
    ------
    OSError
        EPERM for a file of another user that may not be written: kernels hide the page cache then.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    cdef int number = fd, error
    cdef uint64_t found = 0, first = offset, length
    try:
        size = os.fstat(fd).st_size
        length = max(0, min(size - offset, size if nbytes is None else nbytes))
        error = 0
        if length:
            with nogil:
                error = mls_resident(number, first, length, &found)
    finally:
        os.close(fd)
    if error < 0:
        raise OSError(-error, os.strerror(-error), os.fsdecode(path))
    return found, length


def build_info():
    """What this build holds: liburing and ISA-L versions (None: built without); what computes digests and patterns."""
    return {
        "liburing": MLS_LIBURING_VERSION.decode() or None,
        "isal": MLS_ISAL_VERSION.decode() or None,
        "crc32": mls_digest_impl(MLS_DIGEST_CRC32).decode(),
        "crc32c": mls_digest_impl(MLS_DIGEST_CRC32C).decode(),
        "pattern": mls_pattern_isa().decode(),
    }


cdef dict RING_FLAGS = {1 << 8: "COOP_TASKRUN", 1 << 12: "SINGLE_ISSUER", 1 << 13: "DEFER_TASKRUN"}


def probe():
    """What the kernel grants an io_uring of this process, by setting one up: flags, features, registering 64 MiB."""
    cdef mls_uring_probe found
    with nogil:
        mls_uring_probe_run(&found)
    built = bool(MLS_LIBURING_VERSION)
    return {
        "io_uring": built and found.error == 0,
        "errno": found.error if built else 0,
        "ring_flags": [name for bit, name in RING_FLAGS.items() if found.flags & bit],
        "features": found.features,
        "registration": "granted" if built and not found.error and not found.registration_error
        else f"refused: {os.strerror(found.registration_error)}" if built and not found.error else "no ring",
        "ring_fd_registered": bool(found.ring_fd_registered),
    }


def alignment(path):
    """What direct I/O needs of the file or directory's file system, as statx and its like say, without any I/O."""
    cdef mls_alignment found
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        error = mls_probe_alignment(fd, &found)
    finally:
        os.close(fd)
    if error < 0:
        raise OSError(-error, os.strerror(-error), os.fsdecode(path))
    return {
        "fs_type": found.fs_name.decode(),
        "mem_align": found.mem_align,
        "offset_align": found.offset_align,
        "read_offset_align": found.read_offset_align,
        "alignment_source": found.source.decode(),
        "dio_reported": {MLS_DIRECT_NO: "no", MLS_DIRECT_YES: "yes"}.get(found.direct_supported, "unknown"),
        "st_blksize": found.blksize,
        "dev": found.dev,
        "mnt_id": found.mnt_id,
    }


def probe_path(path):
    """Whether O_DIRECT really works in a directory: writes 1 MiB to a new file there, reads it back, removes it.

    Returns
    -------
    dict
        `alignment` of that file, and ``direct_write`` and ``direct_read``: "yes", "no: reason" or "unverified: reason".
    """
    name = os.path.join(path, f".mlstor-probe-{os.getpid()}")
    pattern = Pattern(os.getpid())
    with Engine(workers=1, depth=1, block_bytes=1 << 20, direct="auto") as engine:
        try:
            wrote = engine.write_file(name, [Extent(0, 1 << 20, pattern)])
            read = engine.read_file(name, pattern)
            facts = alignment(name)
        finally:
            if os.path.exists(name):
                os.unlink(name)
    for key, result in (("direct_write", wrote), ("direct_read", read)):
        facts[key] = "yes" if result.direct == "yes" else f"{result.direct}: {result.reason}"
    return facts
