# Part of _io.pyx: arrays of ranges of an open file, without a Python object per range.


@cython.final
cdef class _Batch:
    """Ranges submitted together: their operation, and the buffer that is theirs until it is done."""

    cdef mls_op *op
    cdef _View target

    def __dealloc__(self):
        if self.op != NULL:
            mls_op_unref(self.op)


@cython.final
cdef class RangeFile:
    """An open file of which ranges are read in batches. Made by `open_ranges`.

    One thread at a time submits and reaps.
    """

    cdef mls_file *file
    cdef mls_range_queue *queue
    cdef readonly Engine engine
    cdef readonly str path
    cdef readonly size_t outstanding
    cdef list batches     # not known to be done
    cdef int64_t most

    def __cinit__(self, Engine engine, path, direct=None):
        self.engine = engine
        self.path = os.fsdecode(path)
        self.batches = []
        engine.alive()
        mode = engine.settings.for_target(path).direct if direct is None else direct
        if mode not in MODES:
            raise ValueError(f"direct is auto, require or off, not {mode!r}")
        nbytes = os.stat(path).st_size
        if nbytes and mode != "off":  # learns whether direct I/O works on this mount
            engine.read_file(path, None, 0, min(nbytes, 4096), direct=mode)
        engine.alive()
        self.queue = mls_range_queue_new()
        self.file = mls_file_new(encoded_path(path))
        if self.queue == NULL or self.file == NULL:
            raise MemoryError
        cdef int word = MODES[mode], error
        engine.inside += 1
        with nogil:
            error = mls_file_open(self.file, False, False, word, mls_engine_latches(engine.engine))
        engine.inside -= 1
        if error < 0:
            raise storage_error(-error, 1, 0, self.path, self.file.reason.decode(errors="replace"))
        # A range may touch two alignment blocks in part; a staging slot has 8 KiB beyond block_bytes for them.
        self.most = engine.settings.slot_nbytes()
        if self.file.align.read_offset_align > 4096:
            self.most += 8192 - 2 * <int64_t>self.file.align.read_offset_align
        if self.most < 1:
            raise ValueError(f"{self.path}: block_bytes={engine.settings.slot_nbytes()} is too small for direct ranges "
                             f"in blocks of {self.file.align.read_offset_align} bytes")

    def __dealloc__(self):
        if self.file != NULL:
            mls_file_unref(self.file)
        if self.queue != NULL:
            mls_range_queue_free(self.queue)

    @property
    def nbytes(self):
        """Size at open, bytes."""
        return self.file.nbytes

    @property
    def direct(self):
        """How the ranges are read, once one has been: yes (confirmed), no, or unverified."""
        return PATHS[mls_file_path(self.file)]

    def submit(self, ranges, buffer=None):
        """Reads many ranges; returns how many were submitted.

        Parameters
        ----------
        ranges : array of RANGE_DTYPE
            C-contiguous; a range holds 1 to `block_bytes` bytes.
        buffer : writable buffer, optional
            Where they go, each at its ``dest``. None drops them. An `AlignedBuffer` that is given again and again is
            registered with the ring (io_uring from Linux 5.13, memlock permitting), so that aligned ranges are neither
            copied nor pinned one by one; its pages stay pinned until the engine has been idle for a second.

        Raises
        ------
        ValueError
            If a range is empty, too long, or lies outside the buffer.
        """
        cdef _View array = _View(ranges, False)
        cdef _View target = None if buffer is None else _View(buffer, True)
        cdef const mls_range *item = <const mls_range *>array.view.buf
        cdef size_t count = array.view.len // sizeof(mls_range)
        cdef size_t room = 0 if target is None else target.view.len
        cdef uint64_t most = self.most, last = MOST_FILE_BYTES - self.most
        cdef _Batch batch = _Batch()
        cdef mls_op *op
        cdef size_t i, bad = 0
        cdef int error
        self.engine.alive()
        if array.view.len % sizeof(mls_range):
            raise ValueError("ranges is an array of RANGE_DTYPE")
        if not count:
            return 0
        op = mls_op_new(MLS_OP_RANGES, NULL, self.file, count, 0)
        if op == NULL:
            raise MemoryError
        batch.op, batch.target = op, target
        op.units = <mls_unit *>calloc(count, sizeof(mls_unit))
        op.tags = <uint64_t *>calloc(count, sizeof(uint64_t))
        if op.units == NULL or op.tags == NULL:
            raise MemoryError
        for i in range(count):
            if not item[i].nbytes or item[i].nbytes > most:
                raise ValueError(f"range {i} has {item[i].nbytes} bytes; 1 to {most} (block_bytes) are accepted")
            if target is not None and (item[i].dest > room or item[i].nbytes > room - item[i].dest):
                raise ValueError(f"range {i} lies outside the buffer of {room} bytes")
            if item[i].offset > last:
                raise ValueError(f"range {i} begins at {item[i].offset}, beyond the greatest file offset")
            op.tags[i] = item[i].tag
            op.extents[i].offset = op.units[i].offset = item[i].offset
            op.extents[i].nbytes = op.units[i].nbytes = item[i].nbytes
            op.units[i].first_extent, op.units[i].nextents = i, 1
            op.extents[i].kind = MLS_EXTENT_DROP
            if target is not None:
                op.extents[i].kind = MLS_EXTENT_MEMORY
                op.extents[i].memory = <unsigned char *>target.view.buf + item[i].dest
        if isinstance(buffer, AlignedBuffer):
            op.region_id = (<AlignedBuffer>buffer).serial
            op.region, op.region_nbytes = <unsigned char *>target.view.buf, room
        op.nunits = count
        op.ranges_queue = self.queue
        mls_op_seal(op, &bad)
        error = mls_engine_submit(self.engine.engine, &op, 1)
        if error < 0:
            raise OSError(-error, os.strerror(-error), self.path)
        self.outstanding += count
        self.batches.append(batch)
        in_flight[id(self)] = self
        return count

    def reap(self, out, min_done=1, timeout_s=None):
        """Fills `out`, an array of DONE_DTYPE, with completions; returns how many. ``result`` is bytes, or -errno
        (-10001: the file ends before). Waits for `min_done`, or as many as are outstanding. Ctrl-C cancels the ranges
        that have not begun, and raises KeyboardInterrupt.
        """
        cdef _View view = _View(out, True)
        cdef mls_range_done *done = <mls_range_done *>view.view.buf
        cdef size_t most = view.view.len // sizeof(mls_range_done)
        cdef size_t least = min(min_done, self.outstanding, most)
        cdef size_t count = 0
        cdef uint64_t deadline = deadline_of(timeout_s)
        cdef int64_t tick
        try:
            while True:
                self.engine.alive()
                tick = tick_of(deadline)
                with nogil:
                    count += mls_range_queue_pop(self.queue, done + count, most - count, least - count, tick)
                if count >= least:
                    break
                PyErr_CheckSignals()
                if mls_now_ns() >= deadline:
                    break
        except BaseException:
            self.stop()
            raise
        finally:  # what Ctrl-C came amidst has been taken all the same
            self.outstanding -= count
            # An operation is marked as done a moment after its last range was handed over.
            self.batches = [batch for batch in self.batches
                            if self.outstanding and not mls_op_is_done((<_Batch>batch).op)]
            if not self.outstanding:
                in_flight.pop(id(self), None)
        return count

    cdef int stop(self) except -1:
        """Submits no more of the ranges; those that were not are reaped with ECANCELED."""
        if self.engine.engine != NULL:
            for batch in self.batches:
                mls_engine_cancel(self.engine.engine, (<_Batch>batch).op)
        return 0


def open_ranges(Engine engine, path, direct=None):
    """Opens `path` on `engine` for `RangeFile.submit`; `direct` as in `ReadFile`."""
    return RangeFile(engine, path, direct)
