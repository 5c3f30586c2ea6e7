# Part of _io.pyx: memory that I/O goes to or comes from, and the pattern that fills it.

cdef uint64_t buffers_made = 0


@cython.final
cdef class AlignedBuffer:
    """Memory whose address is a multiple of `align_bytes`, zeroed; a writable buffer of bytes. From 2 MiB on it asks
    for huge pages, with which direct I/O costs about half the CPU.

    Parameters
    ----------
    nbytes : int
    align_bytes : int
        A power of two, 4096 by default, which satisfies direct I/O on every file system seen.

    Raises
    ------
    ValueError
        If `nbytes` is not positive or `align_bytes` no power of two.
    MemoryError
    """

    cdef unsigned char *memory
    cdef void *mapping
    cdef readonly size_t nbytes
    cdef size_t mapped
    cdef uint64_t serial  # never that of another, as an address may be

    def __cinit__(self, nbytes, align_bytes=4096):
        if nbytes <= 0 or align_bytes <= 0 or align_bytes & (align_bytes - 1):
            raise ValueError("nbytes must be positive and align_bytes a power of two")
        global buffers_made
        buffers_made += 1
        self.serial = buffers_made
        self.nbytes = nbytes
        # A huge page is pinned for a transfer in one step instead of 512.
        huge = self.nbytes >= HUGE_PAGE_BYTES
        align_bytes = max(align_bytes, HUGE_PAGE_BYTES) if huge else align_bytes
        self.mapped = self.nbytes + <size_t>align_bytes
        self.mapping = mmap(NULL, self.mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        if self.mapping == MAP_FAILED:
            self.mapping = NULL
            raise MemoryError(f"no memory for a buffer of {nbytes} bytes")
        address = (<uintptr_t>self.mapping + align_bytes - 1) // align_bytes * align_bytes
        self.memory = <unsigned char *><uintptr_t>address
        if huge:
            madvise(self.memory, self.nbytes, MADV_HUGEPAGE)  # a wish: without them all works, at more CPU

    def __dealloc__(self):
        if self.mapping != NULL:
            munmap(self.mapping, self.mapped)

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.memory, self.nbytes, 0, flags)

    def __len__(self):
        return self.nbytes

    @property
    def address(self):
        """Address of the first byte."""
        return <uintptr_t>self.memory


cdef class _View:
    """A buffer that is held until it is released."""

    cdef Py_buffer view
    cdef bint held

    def __cinit__(self, data, bint writable):
        PyObject_GetBuffer(data, &self.view, PyBUF_WRITABLE if writable else PyBUF_SIMPLE)
        self.held = True

    def __dealloc__(self):
        self.release()

    cdef void release(self) noexcept:
        if self.held:
            PyBuffer_Release(&self.view)
        self.held = False


cdef object damage_of(const mls_damage *found):
    return Damage(found.offset, found.nbytes, mls_damage_kind_name(found.kind).decode(), found.found_run_id,
                  found.found_checkpoint, found.found_file_id, found.found_offset)


@cython.final
cdef class Pattern:
    """Stamped contents: a pure function of these four numbers and the offset; see csrc/pattern.h.

    Parameters
    ----------
    run_id, file_id : int
        64 bits each.
    checkpoint : int
        32 bits.
    compressibility : int
        Percent of each 4 KiB block that is zeros; 0 by default: incompressible.
    """

    cdef mls_pattern pattern

    def __cinit__(self, run_id, checkpoint=0, file_id=0, compressibility=0):
        if mls_pattern_init(&self.pattern, run_id, checkpoint, file_id, compressibility) < 0:
            raise ValueError(f"compressibility is a percentage, not {compressibility}")

    def fill(self, buffer, uint64_t offset=0):
        """Writes the pattern's bytes from `offset` on into `buffer`."""
        cdef _View view = _View(buffer, True)
        with nogil:
            mls_pattern_fill(&self.pattern, view.view.buf, offset, view.view.len)

    def check(self, buffer, uint64_t offset=0, limit=16):
        """Compares `buffer` with the pattern from `offset` on: at most `limit` (1 to 16) `Damage` of 4 KiB blocks."""
        cdef _View view = _View(buffer, False)
        cdef mls_damage found[16]
        cdef size_t count = 0, most = min(limit, 16)
        with nogil:
            mls_pattern_check(&self.pattern, view.view.buf, offset, view.view.len, found, most, &count)
        return [damage_of(&found[i]) for i in range(count)]
