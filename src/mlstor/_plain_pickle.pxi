# Part of _io.pyx: what a pickle may do, from its operations alone.

from libc.string cimport memchr, memset

cdef unsigned char REFUSED = 255
cdef unsigned char LINES = 254   # two of them: GLOBAL
cdef unsigned char SHORT = 253   # as many bytes as its first one says
cdef unsigned char LONG = 252    # as its first four say
#: Bytes that follow each operation.
cdef unsigned char ARGUMENT[256]


cdef void fill_arguments() noexcept:
    cdef unsigned char code
    memset(ARGUMENT, REFUSED, sizeof(ARGUMENT))
    for code in b"(N)]}tRQsuaeb.\x85\x86\x87\x88\x89":  # marks, None, containers, calls, references, truths
        ARGUMENT[code] = 0
    for code in b"Kqh":  # BININT1, BINPUT, BINGET
        ARGUMENT[code] = 1
    ARGUMENT[c"M"] = 2
    for code in b"Jrj":  # BININT, LONG_BINPUT, LONG_BINGET
        ARGUMENT[code] = 4
    ARGUMENT[c"G"] = 8
    ARGUMENT[c"c"] = LINES
    ARGUMENT[c"X"] = LONG
    ARGUMENT[0x8A] = SHORT  # LONG1


fill_arguments()


def plain_globals(const unsigned char[::1] data not None):
    """The classes and functions that a pickle of tensors and plain containers names; None if it may be another.

    Such a pickle holds only what a pickler of protocol 2 writes for lists, tuples, mappings, strings, numbers and
    references, and for calls of what it names, by module and name as text. The numbers of its memo follow each other:
    Python's C unpickler takes memory for the highest one.

    Parameters
    ----------
    data
        Contiguous bytes.

    Returns
    -------
    frozenset of str or None
        As ``collections OrderedDict``.
    """
    cdef Py_ssize_t at = 2, end = data.shape[0], start, nbytes
    cdef uint32_t number = 0, memo = 0
    cdef unsigned char code, kind
    cdef const unsigned char *line
    named = set()
    if end < 2 or data[0] != 0x80 or data[1] != 2:
        return None
    while at < end:
        code = data[at]
        kind = ARGUMENT[code]
        at += 1
        if code == c".":
            return frozenset(named) if at == end else None
        if kind == LINES:
            start = at
            for _ in range(2):
                line = <const unsigned char *>memchr(&data[at], c"\n", end - at) if at < end else NULL
                if line == NULL:
                    return None
                at = line - &data[0] + 1
            named.add(bytes(data[start : at - 1]).decode(errors="replace").replace("\n", " "))
            continue
        if kind == REFUSED:
            return None
        nbytes = 1 if kind == SHORT else 4 if kind == LONG else kind
        if end - at < nbytes:
            return None
        if kind == LONG or code == c"r":
            number = data[at] | data[at + 1] << 8 | data[at + 2] << 16 | <uint32_t>data[at + 3] << 24
        elif nbytes:
            number = data[at]
        if code == c"r" or code == c"q":
            if number > memo:
                return None
            memo += 1
        at += nbytes
        if kind == SHORT or kind == LONG:
            if number > end - at:
                return None
            at += number
    return None
