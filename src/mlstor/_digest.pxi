# Part of _io.pyx: CRCs of memory, with the code that the workers use.

cdef Py_ssize_t UNLOCK_BYTES = 16 << 10  # giving up the GIL costs as much as the CRC of a few KiB


cdef int crc_kind(kind) except -1:
    digest = DIGESTS.get(kind, MLS_DIGEST_NONE)
    if not mls_digest_combines(digest):
        raise ValueError(f"a kind of CRC is crc32, crc32c or crc32+crc32c, not {kind!r}")
    return digest


cdef uint64_t crc_value(int kind, value) except? 0:
    cdef uint64_t most = UINT64_MAX if kind == MLS_DIGEST_CRC32_CRC32C else <uint64_t>0xFFFFFFFF
    if not 0 <= value <= most:
        raise ValueError(f"a CRC lies between 0 and {most:#x}: {value}")
    return value


cdef uint64_t crc_of(int kind, buffer, value) except? 0:
    cdef _View view = _View(buffer, False)
    cdef uint64_t crc = crc_value(kind, value)
    if view.view.len < UNLOCK_BYTES:
        return mls_crc(kind, crc, view.view.buf, view.view.len)
    with nogil:
        crc = mls_crc(kind, crc, view.view.buf, view.view.len)
    return crc


def crc32(buffer, value=0):
    """CRC-32 (that of zlib, zip and PNG) of the bytes of a contiguous `buffer`, going on from `value`.

    As `zlib.crc32`, several times as fast. From 16 KiB on without the GIL.
    """
    return crc_of(MLS_DIGEST_CRC32, buffer, value)


def crc32c(buffer, value=0):
    """CRC-32C (Castagnoli; that of iSCSI, ext4 and the object stores) of the bytes of a contiguous `buffer`, going on
    from `value`. From 16 KiB on without the GIL.
    """
    return crc_of(MLS_DIGEST_CRC32C, buffer, value)


def crc32_crc32c(buffer, value=0):
    """Both in one pass over memory: ``crc32c << 32 | crc32``, the digest "crc32+crc32c" of an `Extent`."""
    return crc_of(MLS_DIGEST_CRC32_CRC32C, buffer, value)


def crc_combine(kind, first, second, uint64_t second_nbytes):
    """The CRC of A followed by B, from that of A, that of B and the length of B. Below 1 us.

    Parameters
    ----------
    kind : {"crc32", "crc32c", "crc32+crc32c"}
    first, second : int
        The CRC of no bytes is 0.
    second_nbytes : int

    Raises
    ------
    ValueError
        For another kind, or a value that is no such CRC.
    """
    cdef int alg = crc_kind(kind)
    return mls_crc_shift(alg, crc_value(alg, first), second_nbytes) ^ crc_value(alg, second)


def crc_pieces(kind, addresses, sizes, out):
    """The CRC of each of many pieces of memory in one call, without the GIL.

    Parameters
    ----------
    kind : {"crc32", "crc32c", "crc32+crc32c"}
    addresses, sizes : buffer of uint64
        Of the pieces; `sizes` in bytes. The caller keeps the memory alive: it is read as it is.
    out : buffer of uint32, of uint64 for "crc32+crc32c"
        One value per piece.

    Raises
    ------
    ValueError
        If the three differ in length, or hold numbers of another size.
    """
    cdef int alg = crc_kind(kind)
    cdef _View where = _View(addresses, False), lengths = _View(sizes, False), values = _View(out, True)
    cdef Py_ssize_t wide = sizeof(uint64_t) if alg == MLS_DIGEST_CRC32_CRC32C else sizeof(uint32_t)
    cdef Py_ssize_t count = where.view.len // sizeof(uint64_t), i
    cdef const uint64_t *at = <const uint64_t *>where.view.buf
    cdef const uint64_t *nbytes = <const uint64_t *>lengths.view.buf
    cdef uint64_t crc
    if where.view.len % sizeof(uint64_t) or lengths.view.len != where.view.len or values.view.len != count * wide:
        raise ValueError(f"{where.view.len} bytes of addresses go with as many of sizes and {count * wide} of out, not "
                         f"with {lengths.view.len} and {values.view.len}")
    if <uintptr_t>at % sizeof(uint64_t) or <uintptr_t>nbytes % sizeof(uint64_t) or <uintptr_t>values.view.buf % wide:
        raise ValueError("the numbers are not aligned to their size")
    with nogil:
        for i in range(count):
            crc = mls_crc(alg, 0, <const void *><uintptr_t>at[i], nbytes[i])
            if alg == MLS_DIGEST_CRC32_CRC32C:
                (<uint64_t *>values.view.buf)[i] = crc
            else:
                (<uint32_t *>values.view.buf)[i] = <uint32_t>crc
