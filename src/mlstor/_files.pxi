# Part of _io.pyx: arrays of files under one directory, without a Python object per file.


@cython.final
cdef class _FileBatch:
    """Transfers submitted together, and the buffer that is theirs until they are done."""

    cdef mls_batch *batch
    cdef _View target

    def __dealloc__(self):
        if self.batch != NULL:
            mls_batch_unref(self.batch)


@cython.final
cdef class ObjectFiles:
    """Files under a directory, read, written, looked at and removed in batches; the `Transfers` of a directory.

    One thread at a time submits and reaps.

    Parameters
    ----------
    engine : Engine
        Its `depth` times `workers` files are in flight at most. Reads of up to a block (1 MiB where that is automatic)
        are one transfer; larger ones have several blocks in flight.
    root : str or os.PathLike
        Keys are relative to it. A key that leaves it by ``..`` or begins with a slash is refused.
    direct : str, optional
        auto, require or off; by default the setting for `root`.
    steps : Step
        Of writes; by default `DURABLE`.
    evict : bool
        Where reads are buffered, drop a file's pages before it is read, and after; True by default, so that it is the
        storage that answers and not the page cache.
    owns_engine : bool
        `close` closes the engine too.

    Raises
    ------
    OSError
        If `root` is no directory that can be opened.
    ValueError
        If `direct` is another word.
    """

    cdef mls_files *files
    cdef readonly Engine engine
    cdef readonly str root
    cdef readonly size_t outstanding
    cdef list batches     # not known to be done
    cdef bint closed, owns_engine

    def __cinit__(self, Engine engine, root, direct=None, steps=DURABLE, evict=True, owns_engine=False):
        cdef mls_files_config config
        cdef int error = 0
        self.engine = engine
        self.root = os.fsdecode(root)
        self.batches = []
        self.owns_engine = owns_engine
        engine.alive()
        mode = engine.settings.for_target(root).direct if direct is None else direct
        if mode not in MODES:
            raise ValueError(f"direct is auto, require or off, not {mode!r}")
        encoded = encoded_path(root)
        config.root = encoded
        config.mode = MODES[mode]
        config.write_steps = int(steps)
        config.evict = evict
        engine.inside += 1
        with nogil:
            self.files = mls_files_new(engine.engine, &config, &error)
        engine.inside -= 1
        if self.files == NULL:
            raise OSError(-error, os.strerror(-error), self.root)

    def __dealloc__(self):
        # In a child the threads do not exist; nothing of theirs can be freed.
        if self.files != NULL and self.engine.pid == getpid():
            with nogil:
                mls_files_unref(self.files)

    cdef int alive(self) except -1:
        if self.closed:
            raise ValueError(f"{self.root}: the transfers are closed")
        return self.engine.alive()

    @property
    def direct(self):
        """How files were read: yes (confirmed for the first of each mount and a sample of the others), no, or
        unverified; of several mounts the worst."""
        cdef char reason[160]
        return PATHS[mls_files_path(self.files, reason)]

    @property
    def reason(self):
        """Why `direct` is what it is."""
        cdef char reason[160]
        mls_files_path(self.files, reason)
        return reason.decode(errors="replace")

    def submit(self, transfers, names, buffer=None, pattern=None):
        """Takes transfers; returns how many.

        Parameters
        ----------
        transfers : array of TRANSFER_DTYPE
            C-contiguous; copied. ``endpoint`` is given back as it is, ``query`` and retries do not apply.
        names : buffer
            Holds the keys; copied.
        buffer : writable buffer, optional
            Where BUFFER transfers read to or write from, held until they are done. Where a READ ends inside an
            alignment block, the rest of its ``room`` may be overwritten. An `AlignedBuffer` that is given again and
            again is registered with the ring.
        pattern : Pattern, optional
            Of PATTERN transfers, each with its ``place`` as file id.

        Raises
        ------
        ValueError
            If one can't be taken, and why; then none was.
        """
        cdef _View array = _View(transfers, False)
        cdef _View keys = _View(names, False)
        cdef _View target = None if buffer is None else _View(buffer, False)
        cdef const mls_transfer *item = <const mls_transfer *>array.view.buf
        cdef size_t count = array.view.len // sizeof(mls_transfer), i
        cdef const char *refusal
        cdef mls_files_memory memory
        cdef _FileBatch batch = _FileBatch()
        self.alive()
        if array.view.len % sizeof(mls_transfer):
            raise ValueError("transfers is an array of TRANSFER_DTYPE")
        memory.buffer, memory.nbytes = NULL, 0
        memory.pattern, memory.region_id = NULL, 0
        if target is not None:
            memory.buffer, memory.nbytes = <unsigned char *>target.view.buf, target.view.len
        if pattern is not None:
            memory.pattern = &(<Pattern?>pattern).pattern
        if isinstance(buffer, AlignedBuffer):
            memory.region_id = (<AlignedBuffer>buffer).serial
        for i in range(count):
            refusal = mls_files_refusal(&item[i], <const char *>keys.view.buf, keys.view.len, &memory)
            if refusal != NULL:
                raise ValueError(f"transfer {i}: {refusal.decode()}")
            if target is not None and target.view.readonly and item[i].op == MLS_TRANSFER_READ and \
                    item[i].memory == MLS_TRANSFER_BUFFER:
                raise ValueError(f"transfer {i}: it reads into a buffer that is read-only")
        if not count:
            return 0
        batch.target = target
        self.engine.inside += 1
        with nogil:
            batch.batch = mls_files_submit(self.files, item, count, <const char *>keys.view.buf, &memory)
        self.engine.inside -= 1
        if batch.batch == NULL:
            raise MemoryError(f"no memory, or no thread, for {count} transfers")
        self.outstanding += count
        self.batches.append(batch)
        in_flight[id(self)] = self
        return count

    def reap(self, out, min_done=1, timeout_s=None):
        """Fills `out`, an array of COMPLETION_DTYPE; returns how many. Waits for `min_done`, or as many as are
        outstanding. Ctrl-C cancels what has not begun, and raises KeyboardInterrupt.
        """
        cdef _View view = _View(out, True)
        cdef mls_completion *done = <mls_completion *>view.view.buf
        cdef size_t most = view.view.len // sizeof(mls_completion)
        cdef size_t least = min(min_done, self.outstanding, most)
        cdef size_t count = 0
        cdef uint64_t deadline = deadline_of(timeout_s)
        cdef int64_t tick
        try:
            while True:
                self.alive()
                tick = tick_of(deadline)
                with nogil:
                    count += mls_files_reap(self.files, done + count, most - count,
                                            least - count if least > count else 0, tick)
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
            self.batches = [batch for batch in self.batches if not mls_batch_is_done((<_FileBatch>batch).batch)]
            if not self.outstanding:
                in_flight.pop(id(self), None)
        return count

    def failures(self):
        """Of the failures since the last call the first 256, as `Failure`."""
        from mlstor.storage.transfers import Failure, Kind

        cdef mls_file_failure found[256]
        cdef size_t count, i
        with nogil:
            count = mls_files_failures(self.files, found, 256)
        failures = []
        for i in range(count):
            path = os.path.join(self.root, os.fsdecode(found[i].key))
            free(found[i].key)
            if found[i].error:
                text = storage_error(found[i].error, found[i].stage, 0, path).strerror
            else:
                text = FAILURE_TEXTS[found[i].kind]
            failures.append(Failure(found[i].tag, Kind(found[i].kind), 0, path, text))
        return failures

    def cancel(self):
        """What has not begun comes back as CANCELLED."""
        self.alive()
        self.stop()

    cdef int stop(self) except -1:
        cdef Engine engine = self.engine
        if engine.engine != NULL:
            engine.inside += 1
            with nogil:
                mls_files_cancel(self.files)
            engine.inside -= 1
        return 0

    def counters(self):
        """What the engine's workers did since it was made, whoever asked for it, as `TransferCounters`; ``requests``
        are the transfers of these files that have ended."""
        from mlstor.storage.transfers import TransferCounters

        done = self.engine.counters()
        return TransferCounters(done.read_bytes, done.written_bytes, 0, mls_files_ended(self.files), done.retried,
                                done.busy_ns, done.wait_ns)

    def close(self):
        """Cancels what has not begun, waits for what has; completions that were not reaped are gone. The engine stays,
        unless it is owned. Again: does nothing.
        """
        cdef mls_completion done[16]
        cdef size_t count
        if self.closed:
            return
        if self.engine.engine != NULL and self.engine.pid == getpid() and self.outstanding:
            self.stop()
            while self.outstanding:
                with nogil:
                    count = mls_files_reap(self.files, done, 16, 1, TICK_NS)
                self.outstanding -= count
                PyErr_CheckSignals()
        self.closed = True
        self.batches = []
        mls_files_close(self.files)
        in_flight.pop(id(self), None)
        if self.owns_engine:
            self.engine.close()


cdef dict FAILURE_TEXTS = {
    MLS_KIND_SHORT: "the file ends before the bytes that were asked for; was its writer interrupted?",
    MLS_KIND_LENGTH: "the file has another length than its catalog says, or than there is room for; list it again",
    MLS_KIND_CHECKSUM: "the bytes have another checksum than the one that was given",
}
