# Part of _io.pyx: the engine and its life across forks and exit.


cdef uint64_t deadline_of(timeout_s) except? 0:
    """The end of a wait on CLOCK_MONOTONIC, ns."""
    if timeout_s is None:
        return UINT64_MAX
    return mls_now_ns() + <uint64_t>(min(max(timeout_s, 0), 1e9) * 1e9)


cdef int64_t tick_of(uint64_t deadline):
    """How long to wait before signals are looked at again, ns."""
    cdef uint64_t now = mls_now_ns()
    if now >= deadline:
        return 0
    return TICK_NS if deadline - now > <uint64_t>TICK_NS else <int64_t>(deadline - now)


cdef list extents_of(source):
    """Extents for what `write_file` and `read_file` take: extents, one buffer, or buffers laid end to end."""
    cdef list extents = []
    items = source if isinstance(source, (list, tuple)) and not isinstance(source, Extent) else [source]
    if items and all(isinstance(item, Extent) for item in items):
        return list(items)
    offset = 0
    for item in items:
        nbytes = memoryview(item).nbytes
        extents.append(Extent(offset, nbytes, item))
        offset += nbytes
    return extents


@cython.final
cdef class Engine:
    """Worker threads that read and write files: io_uring with O_DIRECT where that works, else threads.

    Parameters
    ----------
    settings : Settings, optional
        By default what `Settings.resolve` finds: arguments, ``MLSTOR_*``, the stored profile, defaults.
    **overrides
        Settings by name, for instance ``workers=2, depth=8, block_bytes=4 << 20``.

    Notes
    -----
    Staging memory is ``workers * depth * (block_bytes + 8 KiB)``, 64 MiB by default (blocks of up to 4 MiB, depth up to
    8), allocated and touched once; as much again when the
    first file needs buffered I/O on an engine whose direct I/O goes through io_uring. An engine belongs to the
    process that made it: used after a fork in the child, it raises RuntimeError.

    io_uring needs Linux 5.6, and its fastest flags 6.1; where it is refused, threads with pread and pwrite do the same
    work (`granted` says why).

    Raises
    ------
    OSError
        If no thread or memory is to be had, or io_uring was demanded (``backend="io_uring"``) and refused.
    """

    cdef mls_engine *engine
    cdef readonly object settings
    cdef pid_t pid
    cdef size_t inside    # threads that wait in the core without the GIL: it is not freed under them
    cdef bint closing
    cdef dict finished    # done requests that neither `reap` nor `wait` has returned; oldest first
    cdef object __weakref__

    def __cinit__(self, settings=None, **overrides):
        cdef mls_config config
        cdef int error = 0
        if settings is not None and overrides:
            raise TypeError("give settings or overrides, not both")
        self.settings = settings or Settings.resolve(**overrides)
        self.finished = {}
        self.pid = getpid()
        config.backend = BACKENDS[self.settings.backend]
        config.workers = self.settings.worker_count()
        config.depth = self.settings.depth_count()
        config.window_bytes = 0 if self.settings.depth else WINDOW_BYTES
        config.block_bytes = self.settings.slot_nbytes()
        config.automatic_block = self.settings.block_bytes == 0
        config.huge_pages = self.settings.pool_huge == "auto"
        config.registration = self.settings.register == "auto"
        with nogil:
            self.engine = mls_engine_new(&config, &error)
        if self.engine == NULL:
            raise OSError(-error, f"the engine did not start ({self.settings.backend}, {config.workers} workers, depth "
                          f"{config.depth}, blocks of {config.block_bytes} bytes): {os.strerror(-error)}; "
                          "`mlstor doctor` shows what the kernel grants")
        _engines.add(self)

    def __dealloc__(self):
        # In a child the threads do not exist; nothing of theirs can be freed.
        if self.engine != NULL and self.pid == getpid():
            with nogil:
                mls_engine_free(self.engine)

    cdef int alive(self) except -1:
        if self.engine == NULL or self.closing:
            raise ValueError("the engine is closed")
        if self.pid != getpid():
            raise RuntimeError(f"this engine was made in process {self.pid}, before a fork: make one here, or use "
                               "mlstor.default_engine()")
        return 0

    @property
    def backend(self):
        """What direct I/O goes through: io_uring or threads."""
        self.alive()
        return mls_engine_backend(self.engine).decode()

    @property
    def granted(self):
        """What the kernel granted: ring flags and registration; or why there is no ring."""
        self.alive()
        return mls_engine_granted(self.engine).decode(errors="replace")

    @property
    def workers(self):
        """Number of worker threads for direct I/O."""
        self.alive()
        return mls_engine_workers(self.engine)

    def submit(self, operations):
        """Hands over `WriteFile` and `ReadFile` operations; returns a `Request` for each, at once.

        A destination belongs to the engine until its request is done, or `drain` has returned.

        Raises
        ------
        ValueError, TypeError
            For extents that overlap, buffers of the wrong size, and the like; nothing is submitted then.
        """
        cdef mls_op **ops
        cdef Request request
        cdef int error
        self.alive()
        requests = [Request(self, operation) for operation in operations]
        self.alive()  # the caller's iterator, or another thread meanwhile, may have closed it
        if not requests:
            return requests
        ops = <mls_op **>calloc(len(requests), sizeof(mls_op *))
        if ops == NULL:
            raise MemoryError
        for i in range(len(requests)):
            request = requests[i]
            ops[i] = request.op
            in_flight[<uintptr_t>request.op] = request
        error = mls_engine_submit(self.engine, ops, len(requests))
        free(ops)
        if error < 0:
            for request in requests:
                del in_flight[<uintptr_t>request.op]
            raise OSError(-error, os.strerror(-error))
        return requests

    cdef int collect(self, size_t least, int64_t timeout_ns) except -1:
        """Moves what the core has done with to `finished`, and releases its buffers; waits for `least` of it."""
        cdef mls_op *ops[64]
        cdef size_t count = 64
        cdef Request request
        if self.engine == NULL:
            return 0
        while count == 64:
            self.inside += 1
            with nogil:
                count = mls_engine_reap(self.engine, ops, 64, least, timeout_ns)
            self.inside -= 1
            for i in range(count):
                request = in_flight.pop(<uintptr_t>ops[i])
                mls_op_unref(ops[i])
                request.release()
                if not request.reaped:
                    self.finished[id(request)] = request
            least = 0
        return 0

    def reap(self, min_done=1, timeout_s=None):
        """Done requests, oldest first, that no `Request.wait` has returned: at least `min_done`, unless nothing is left
        in flight or `timeout_s` is over. Ctrl-C cancels all and raises KeyboardInterrupt.
        """
        cdef uint64_t deadline = deadline_of(timeout_s)
        cdef Request request
        self.alive()
        self.collect(0, 0)
        while len(self.finished) < min_done and mls_engine_in_flight(self.engine):
            if mls_now_ns() >= deadline:
                break
            self.collect(1, tick_of(deadline))
            try:
                PyErr_CheckSignals()
                self.alive()
            except BaseException:
                self.cancel_all()
                raise
        self.collect(0, 0)
        done = list(self.finished.values())
        self.finished.clear()
        for request in done:
            request.reaped = True
        return done

    def write_file(self, path, source, steps=DURABLE, **options):
        """Writes a file and waits until it is durable.

        Parameters
        ----------
        path : str or os.PathLike
        source : buffer, list of buffers, or list of Extent
            Buffers are laid end to end.
        steps : Step
            By default `DURABLE`: preallocate, write, fdatasync, rename, fsync the directory.
        **options
            As for `WriteFile`: nbytes, block_bytes, direct, serial, bytes_per_s.

        Returns
        -------
        Result

        Raises
        ------
        OSError
            With errno, file name and, for a transfer, the offset.
        """
        return self.submit([WriteFile(path, extents_of(source), steps, **options)])[0].wait()

    def read_file(self, path, into=None, offset=0, nbytes=None, **options):
        """Reads from a file and waits.

        Parameters
        ----------
        path : str or os.PathLike
        into : buffer, Pattern, list of buffers, list of Extent, or None
            Where the bytes go; a Pattern compares them, None drops them.
        offset, nbytes : int
            What to read; by default as much as the buffer takes, or to the end of the file. Not with a list.
        **options
            As for `ReadFile`: steps, block_bytes, direct, serial.

        Returns
        -------
        Result
            Damage that a Pattern found is in ``damage``.

        Raises
        ------
        OSError
            ENODATA if the file ends before what was asked for.
        """
        if isinstance(into, (list, tuple)) and not isinstance(into, Extent):
            extents = extents_of(into)
        else:
            if nbytes is None:
                known = into is not None and not isinstance(into, Pattern)
                nbytes = memoryview(into).nbytes if known else max(0, os.stat(path).st_size - offset)
            extents = [Extent(offset, nbytes, into)]
        return self.submit([ReadFile(path, extents, **options)])[0].wait()

    def counters(self):
        """What the workers did since the engine was made, as `Counters`."""
        cdef mls_counters sum
        self.alive()
        mls_engine_counters(self.engine, &sum)
        return Counters(sum.read_bytes, sum.written_bytes, sum.reads, sum.writes, sum.syncs, sum.busy_ns, sum.wait_ns,
                        sum.zero_copy_bytes, sum.staged_bytes, sum.retried)

    def histograms(self):
        """Durations since the engine was made, or `reset_histograms`: a `Histogram` each for ``read``, ``write``,
        ``sync``, ``open`` and ``commit``.

        Reads and writes are timed from submission to completion; filling and checking is outside.
        """
        cdef mls_histogram sum
        self.alive()
        histograms = {}
        for timing, name in enumerate(TIMINGS):
            mls_engine_histogram(self.engine, timing, &sum)
            buckets = {i: sum.count[i] for i in range(MLS_HISTOGRAM_BUCKETS) if sum.count[i]}
            histograms[name] = Histogram(buckets, sum.total, sum.sum_ns, sum.min_ns if sum.total else 0, sum.max_ns)
        return histograms

    def reset_histograms(self):
        """Starts the histograms anew, as between the phases of a run.

        Raises
        ------
        RuntimeError
            While operations are in flight.
        """
        self.alive()
        if not mls_engine_reset_histograms(self.engine):
            raise RuntimeError("histograms can't be reset while operations are in flight")

    def cancel(self):
        """Submits nothing more of any request. What is in flight goes on until it is done: see `drain`."""
        self.alive()
        self.cancel_all()

    cdef int cancel_all(self) except -1:
        for held in list(in_flight.values()):
            if isinstance(held, Request) and (<Request>held).engine is self:
                (<Request>held).stop()
            elif isinstance(held, RangeFile) and (<RangeFile>held).engine is self:
                (<RangeFile>held).stop()
            elif isinstance(held, ObjectFiles) and (<ObjectFiles>held).engine is self:
                (<ObjectFiles>held).stop()
        return 0

    def drain(self, timeout_s=None):
        """Waits until nothing is in flight and releases the buffers; False if that is not so after `timeout_s`."""
        cdef uint64_t deadline = deadline_of(timeout_s)
        cdef int64_t tick
        cdef bint quiet = False
        while True:
            self.alive()
            tick = tick_of(deadline)
            self.inside += 1
            with nogil:
                quiet = mls_engine_drain(self.engine, tick)
            self.inside -= 1
            PyErr_CheckSignals()
            if quiet or mls_now_ns() >= deadline:
                break
        self.collect(0, 0)
        return quiet

    def close(self):
        """Cancels what has not begun, waits for what has, ends the workers. Again: does nothing."""
        cdef mls_engine *engine = self.engine
        if engine == NULL or self.closing:
            return
        self.alive()
        self.closing = True  # other threads start nothing more
        self.cancel_all()
        with nogil:
            mls_engine_drain(engine, -1)
        self.collect(0, 0)
        while self.inside:
            with nogil:
                usleep(1000)
        self.engine = NULL
        with nogil:
            mls_engine_free(engine)
        for key, file in list(in_flight.items()):  # last: workers may have been handing over ranges
            if isinstance(file, RangeFile) and (<RangeFile>file).engine is self:
                del in_flight[key]
            elif isinstance(file, ObjectFiles) and (<ObjectFiles>file).engine is self:
                del in_flight[key]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


cdef Engine default = None
cdef object default_lock = allocate_lock()


def default_engine():
    """This process's engine, made when first needed, and again once closed; in a child process of multiprocessing (a
    DataLoader's worker) a small one: one worker, depth 4, blocks of 1 MiB.
    """
    global default
    with default_lock:
        if default is None or default.engine == NULL or default.closing or default.pid != getpid():
            process = sys.modules.get("multiprocessing.process")
            child = process is not None and process.parent_process() is not None
            default = Engine(**{"workers": 1, "depth": 4, "block_bytes": 1 << 20} if child else {})
        return default


cdef dict paused = {}  # by forking thread: the engines that it has paused


def _pause_all():
    # No transfer touches user memory while it is copied on write (open(2), on O_DIRECT and fork).
    cdef Engine engine
    stopped = paused[get_ident()] = []
    for engine in list(_engines):
        if engine.engine == NULL or engine.closing or engine.pid != getpid():
            continue
        engine.inside += 1
        stopped.append(engine)
        with nogil:
            mls_engine_pause(engine.engine)


def _resume_all():
    cdef Engine engine
    for engine in paused.pop(get_ident(), ()):
        mls_engine_resume(engine.engine)
        engine.inside -= 1


def _begin_child():
    # What another thread of the parent held or had paused is of no concern here.
    global default_lock
    default_lock = allocate_lock()
    paused.clear()


def _close_all():
    cdef Engine engine
    for engine in list(_engines):
        if engine.pid == getpid():
            engine.close()


os.register_at_fork(before=_pause_all, after_in_parent=_resume_all, after_in_child=_begin_child)
atexit.register(_close_all)
