# Part of _io.pyx: an operation between Python and the core.

cdef int supply_late(void *user) noexcept with gil:
    request = <Request>user
    try:
        request.supply_late()
        return 0
    except BaseException as error:
        request.late_error = error
        return -1


cdef bytes encoded_path(path):
    """The path as the core takes it."""
    encoded = os.fsencode(path)
    if b"\0" in encoded:
        raise ValueError(f"a path holds no null byte: {os.fsdecode(path)!r}")
    return encoded


@cython.final
cdef class Request:
    """An operation under way, or done. Made by `Engine.submit`; holds the buffers until it is done."""

    cdef mls_op *op
    cdef readonly object operation
    cdef readonly Engine engine
    cdef object __weakref__
    cdef list views, lates, late_bytes, groups
    cdef str path
    cdef object late_error
    cdef bint reaped

    def __cinit__(self, Engine engine, operation):
        writing = isinstance(operation, WriteFile)
        if not writing and not isinstance(operation, ReadFile):
            raise TypeError(f"an operation is a WriteFile or a ReadFile, not {type(operation).__name__}")
        self.engine = engine
        self.operation = operation
        self.views, self.lates, self.late_bytes = [], [], []
        self.path = os.fsdecode(operation.path)
        settings = engine.settings.for_target(operation.path)
        direct = settings.direct if operation.direct is None else operation.direct
        if direct not in MODES:
            raise ValueError(f"direct is auto, require or off, not {direct!r}")
        extents = list(operation.extents)
        if not all(isinstance(extent, Extent) for extent in extents):
            raise TypeError("extents is a sequence of Extent")
        self.groups = sorted({extent.group for extent in extents if extent.digest is not None})
        group_index = {group: i for i, group in enumerate(self.groups)}
        encoded = encoded_path(operation.path)
        self.op = mls_op_new(MLS_OP_WRITE if writing else MLS_OP_READ, encoded, NULL, len(extents), len(self.groups))
        if self.op == NULL:
            raise MemoryError
        self.op.steps = int(operation.steps)
        self.op.block_bytes = operation.block_bytes or min(settings.block_bytes, engine.settings.slot_nbytes())
        self.op.direct_mode = MODES[direct]
        self.op.serial = operation.serial
        if writing:
            if operation.bytes_per_s < 0:
                raise ValueError(f"bytes_per_s is not negative: {operation.bytes_per_s}")
            self.op.bytes_per_s = operation.bytes_per_s
        if self.op.block_bytes > engine.settings.slot_nbytes():
            raise ValueError(f"block_bytes={self.op.block_bytes} exceeds the engine's {engine.settings.slot_nbytes()}")
        for i, extent in enumerate(extents):
            self.set_extent(&self.op.extents[i], extent, group_index.get(extent.group, 0), writing)
        self.seal(extents, writing)

    cdef int set_extent(self, mls_extent *out, extent, uint32_t group, bint writing) except -1:
        cdef _View view
        data = extent.data
        offset, nbytes = index(extent.offset), index(extent.nbytes)
        if offset < 0 or nbytes < 0:
            raise ValueError(f"an extent's offset and nbytes are not negative: {offset}, {nbytes}")
        if offset + nbytes > MOST_FILE_BYTES:
            raise ValueError(f"an extent ends at {offset + nbytes}, beyond the greatest file offset")
        if extent.digest not in DIGESTS:
            raise ValueError(f"a digest is crc32, crc32c, crc32+crc32c or xxh64, not {extent.digest!r}")
        out.offset, out.nbytes, out.digest = offset, nbytes, DIGESTS[extent.digest]
        out.group = group
        if isinstance(data, Pattern):
            out.kind = MLS_EXTENT_PATTERN
            out.pattern = (<Pattern>data).pattern
        elif data is None and not writing:
            out.kind = MLS_EXTENT_DROP
        elif isinstance(data, Late) and writing:
            if extent.digest is not None:
                raise ValueError("late extents have no digest of their own")
            out.kind = MLS_EXTENT_LATE
            out.group = len(self.lates)
            self.lates.append(data)
            self.op.has_late = True
            self.op.late = supply_late
            self.op.user = <void *>self
        else:
            view = _View(data, not writing)
            if view.view.len != nbytes:
                raise ValueError(f"an extent of {nbytes} bytes was given a buffer of {view.view.len}")
            out.kind = MLS_EXTENT_MEMORY
            out.memory = <unsigned char *>view.view.buf
            self.views.append(view)
        return 0

    cdef int seal(self, extents, bint writing) except -1:
        cdef size_t bad = 0
        kinds = {(extent.group, extent.digest) for extent in extents if extent.digest is not None}
        if len(kinds) > len(self.groups):
            raise ValueError("the extents of a group have one kind of digest")
        if self.lates and any(extent.digest == "xxh64" for extent in extents):
            raise ValueError("xxh64 needs the bytes in file order, and late extents come last")
        if mls_op_seal(self.op, &bad) < 0:
            raise ValueError("extents overlap, or break the order that xxh64 needs, at offset "
                             f"{self.op.extents[bad].offset}")
        end = max((extent.offset + extent.nbytes for extent in extents), default=0)
        if writing:
            nbytes = end if self.operation.nbytes is None else index(self.operation.nbytes)
            if nbytes < end:
                raise ValueError(f"nbytes={nbytes} is below the end of the extents, {end}")
            if nbytes > MOST_FILE_BYTES:
                raise ValueError(f"nbytes={nbytes} is beyond the greatest file offset")
            self.op.file_nbytes = nbytes
        return 0

    def __dealloc__(self):
        if self.op != NULL:
            mls_op_unref(self.op)

    cdef supply_late(self):
        digests = self.digests()
        for i in range(self.op.nextents):
            extent = &self.op.extents[i]
            if extent.kind != MLS_EXTENT_LATE:
                continue
            late = bytes(memoryview(self.lates[extent.group].callback(digests)))
            if PyBytes_GET_SIZE(late) != <Py_ssize_t>extent.nbytes:
                raise ValueError(f"a late extent of {extent.nbytes} bytes was given {len(late)}")
            self.late_bytes.append(late)
            extent.memory = <unsigned char *>PyBytes_AS_STRING(late)

    cdef dict digests(self):
        return {group: mls_op_digest(self.op, i) for i, group in enumerate(self.groups)}

    cdef void release(self):
        for view in self.views:
            (<_View>view).release()
        self.views, self.late_bytes = [], []

    @property
    def done(self):
        """Whether the operation has ended, one way or another."""
        return mls_op_is_done(self.op)

    cdef void stop(self) noexcept:
        cdef Engine engine = self.engine
        if engine.engine == NULL:
            return
        engine.inside += 1
        with nogil:
            mls_engine_cancel(engine.engine, self.op)
        engine.inside -= 1

    def cancel(self):
        """Submits nothing more of it. It is done, with ECANCELED, when what is in flight is."""
        if not self.done:
            self.engine.alive()
            self.stop()

    def wait(self, timeout_s=None):
        """Waits until it is done and returns its result as `result` does; `Engine.reap` will not return it then.

        Ctrl-C cancels it and raises KeyboardInterrupt; its buffers stay the engine's until `Engine.drain` has returned.

        Raises
        ------
        TimeoutError
            After `timeout_s` seconds; the operation goes on.
        """
        cdef uint64_t deadline = deadline_of(timeout_s)
        cdef int64_t tick
        cdef Engine engine = self.engine
        while not self.done:
            engine.alive()
            tick = tick_of(deadline)
            engine.inside += 1
            with nogil:
                mls_engine_wait(engine.engine, self.op, tick)
            engine.inside -= 1
            try:
                PyErr_CheckSignals()
            except BaseException:
                self.take()  # nobody else will ask for it
                self.stop()
                raise
            if mls_now_ns() >= deadline and not self.done:
                raise TimeoutError(f"{self.path}: not done after {timeout_s} s")
        self.take()
        engine.collect(0, 0)
        self.release()
        return self.result()

    cdef void take(self) noexcept:
        """Returned to the caller, or given up by it: `Engine.reap` is not to return it."""
        self.reaped = True
        self.engine.finished.pop(id(self), None)

    def result(self):
        """The `Result` of a done operation.

        Raises
        ------
        OSError
            What the storage answered, with errno, file name and offset; ECANCELED for a cancelled operation.
        RuntimeError
            If it is not done yet.
        """
        cdef mls_result *out = &self.op.result
        if not self.done:
            raise RuntimeError(f"{self.path}: not done yet")
        if out.error == MLS_ELATE:
            raise self.late_error
        if out.error == MLS_ESHORT:
            raise short_error(self.path, out.file_nbytes, out.error_offset)
        if out.error:
            code = errno.ECANCELED if out.error == MLS_ECANCELED else out.error
            detail = out.reason.decode(errors="replace") if code in (errno.EOPNOTSUPP, errno.EINVAL) else ""
            raise storage_error(code, out.stage, out.error_offset, self.path, detail)
        return Result(
            self.path, out.nbytes, out.start_ns, out.end_ns, out.open_ns, out.data_ns, out.sync_ns, out.commit_ns,
            "threads" if out.threads else "io_uring", PATHS[out.direct], out.reason.decode(errors="replace"),
            out.align.mem_align, out.align.offset_align, out.align.fs_name.decode(), out.zero_copy_bytes,
            out.staged_bytes, self.digests(), sorted(damage_of(&out.damage[i]) for i in range(out.ndamage)),
            out.damaged_blocks)
