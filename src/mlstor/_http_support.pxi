# Part of _http.pyx: what a transfer uses while it is under way, and small conversions.


class Response(NamedTuple):
    """The answer to `HttpEngine.request`."""

    status: int
    #: names in lower case
    headers: dict[str, str]
    body: bytes
    #: of the last place asked, without a redirect's query
    url: str


@cython.final
@cython.no_gc_clear
cdef class _View:
    """A buffer that is held until it is released."""

    cdef Py_buffer view
    cdef bint held

    def __cinit__(self, data, bint writable):
        PyObject_GetBuffer(data, &self.view, PyBUF_WRITABLE if writable else PyBUF_SIMPLE)
        self.held = True

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)


@cython.final
@cython.no_gc_clear
cdef class _Batch:
    """Transfers submitted together, and the memory that is theirs until they are done."""

    cdef mls_http_batch *batch
    cdef _View names, memory

    def __dealloc__(self):
        mls_http_batch_free(self.batch)


cdef class _Lines:
    """Header lines as C has them."""

    cdef list held
    cdef const char *lines[16]
    cdef size_t count

    def __cinit__(self, headers):
        self.held = []
        for name, value in headers:
            if self.count == 16:
                raise ValueError("at most 16 headers are taken")
            line = text_of(f"{name}: {value}", "a header")
            self.held.append(line)
            self.lines[self.count] = <const char *>line
            self.count += 1


cdef uint64_t now_ns() noexcept:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t>now.tv_sec * 1_000_000_000 + <uint64_t>now.tv_nsec


cdef uint64_t ns_of(value, str name, bint positive=True) except? 0:
    """Seconds as ns."""
    if not (0 < value < 1e9 if positive else 0 <= value < 1e9):
        raise ValueError(f"{name} is a number of seconds, not {value!r}")
    return <uint64_t>(value * 1e9)


cdef uint64_t deadline_of(timeout_s) except? 0:
    """The end of a wait on CLOCK_MONOTONIC, ns."""
    if timeout_s is None:
        return UINT64_MAX
    return now_ns() + <uint64_t>(min(max(timeout_s, 0), 1e9) * 1e9)


cdef int64_t tick_of(uint64_t deadline):
    """How long to wait before signals are looked at again, ns."""
    cdef uint64_t now = now_ns()
    if now >= deadline:
        return 0
    return TICK_NS if deadline - now > <uint64_t>TICK_NS else <int64_t>(deadline - now)


cdef bytes text_of(str value, str name):
    """UTF-8 for C, which ends it at the first zero."""
    text = value.encode()
    if b"\0" in text:
        raise ValueError(f"{name} holds a zero byte")
    return text


cdef dict headers_of(bytes lines):
    """By name in lower case; what comes several times is joined by a comma."""
    found = {}
    for line in lines.decode("latin-1").split("\r\n")[1:]:
        name, colon, value = line.partition(":")
        if colon:
            name, value = name.strip().lower(), value.strip()
            found[name] = f"{found[name]}, {value}" if name in found else value
    return found
