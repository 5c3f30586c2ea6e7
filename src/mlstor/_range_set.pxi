# Part of _io.pyx: arrays of ranges of many files, of which a bounded number is open at once.


@cython.final
cdef class _SetBatch:
    """Ranges submitted together: an operation for those of direct files, and one for the others."""

    cdef mls_op *ops[2]
    cdef _View target

    def __dealloc__(self):
        for i in range(2):
            if self.ops[i] != NULL:
                mls_op_unref(self.ops[i])

    cdef bint done(self) noexcept:
        return ((self.ops[0] == NULL or mls_op_is_done(self.ops[0]))
                and (self.ops[1] == NULL or mls_op_is_done(self.ops[1])))


@cython.final
cdef class RangeSet:
    """Files of which ranges are read in batches, whichever file each is in. Made by `open_range_set`.

    A file is opened when a range of it is first submitted, and stays open until `handles` others have been used since.
    One thread at a time submits and reaps.
    """

    cdef mls_range_queue *queue
    cdef mls_file **files     # by number; NULL: not open
    cdef uint64_t *used       # by number: when it was last used, in ranges
    cdef uint32_t *held       # numbers of the open ones
    cdef size_t nfiles, nheld, most_held
    cdef int64_t slot_nbytes
    cdef uint64_t last_offset
    cdef readonly Engine engine
    cdef readonly size_t outstanding
    cdef readonly uint64_t opens
    cdef uint64_t ranges
    cdef list paths, batches
    cdef object mode
    cdef set proven           # mounts of which it is known whether they do direct I/O
    cdef dict ways            # how files were reached that are closed again

    def __cinit__(self, Engine engine, paths, size_t handles=512, direct=None):
        self.engine = engine
        self.paths = [os.fsdecode(path) for path in paths]
        self.batches = []
        self.proven = set()
        self.ways = {}
        engine.alive()
        if not self.paths or not handles:
            raise ValueError(f"{len(self.paths)} files with {handles} open at once; give one at least of each")
        self.mode = engine.settings.for_target(self.paths[0]).direct if direct is None else direct
        if self.mode not in MODES:
            raise ValueError(f"direct is auto, require or off, not {self.mode!r}")
        self.slot_nbytes = engine.settings.slot_nbytes()
        self.last_offset = MOST_FILE_BYTES - self.slot_nbytes
        self.nfiles = len(self.paths)
        self.most_held = min(handles, self.nfiles)
        self.queue = mls_range_queue_new()
        self.files = <mls_file **>calloc(self.nfiles, sizeof(mls_file *))
        self.used = <uint64_t *>calloc(self.nfiles, sizeof(uint64_t))
        self.held = <uint32_t *>calloc(self.most_held, sizeof(uint32_t))
        if self.queue == NULL or self.files == NULL or self.used == NULL or self.held == NULL:
            raise MemoryError

    def __dealloc__(self):
        cdef size_t i
        for i in range(self.nheld):
            mls_file_unref(self.files[self.held[i]])
        free(self.files)
        free(self.used)
        free(self.held)
        if self.queue != NULL:
            mls_range_queue_free(self.queue)

    @property
    def files_open(self):
        """How many are open now."""
        return self.nheld

    @property
    def ways_taken(self):
        """How often files were opened, by the way on which their ranges are read: {(direct, reason, fs_type): opens}.

        ``direct`` is yes (confirmed), no or unverified, as far as it is known by now.
        """
        ways = dict(self.ways)
        for i in range(self.nheld):
            note_way(ways, self.files[self.held[i]])
        return ways

    cdef mls_file *open(self, uint32_t number) except NULL:
        path = self.paths[number]
        cdef mls_file *file = mls_file_new(encoded_path(path))
        cdef int word = MODES[self.mode], error
        if file == NULL:
            raise MemoryError
        self.engine.inside += 1
        with nogil:
            error = mls_file_open(file, False, False, word, mls_engine_latches(self.engine.engine))
        self.engine.inside -= 1
        if error < 0:
            reason = file.reason.decode(errors="replace")
            mls_file_unref(file)
            raise storage_error(-error, 1, 0, path, reason)
        self.opens += 1
        return file

    cdef mls_file *opened(self, uint32_t number) except NULL:
        """The open file; the one that was not used for longest makes room for it."""
        cdef mls_file *file = self.files[number]
        cdef size_t i, oldest = 0
        self.ranges += 1
        self.used[number] = self.ranges
        if file != NULL:
            return file
        file = self.open(number)
        mount = (file.align.dev, file.align.mnt_id)
        if mount not in self.proven:  # learns whether direct I/O works on this mount
            nbytes = <object>file.nbytes
            mls_file_unref(file)
            self.opens -= 1
            if nbytes and self.mode != "off":
                self.engine.read_file(self.paths[number], None, 0, min(nbytes, 4096), direct=self.mode)
                self.engine.alive()
            self.proven.add(mount)
            file = self.open(number)
        if self.nheld == self.most_held:
            for i in range(1, self.nheld):
                if self.used[self.held[i]] < self.used[self.held[oldest]]:
                    oldest = i
            self.drop(oldest)
        self.files[number] = file
        self.held[self.nheld] = number
        self.nheld += 1
        return file

    cdef int drop(self, size_t place) except -1:
        """Closes an open file, as soon as its ranges that are under way are done."""
        cdef uint32_t number = self.held[place]
        note_way(self.ways, self.files[number])
        mls_file_unref(self.files[number])
        self.files[number] = NULL
        self.nheld -= 1
        self.held[place] = self.held[self.nheld]
        return 0

    cdef int check(self, const mls_range *item, uint32_t number, const mls_file *file, _View target) except -1:
        cdef uint64_t room = 0 if target is None else target.view.len
        # A range may touch two alignment blocks in part; a staging slot has 8 KiB beyond block_bytes for them.
        cdef int64_t most = self.slot_nbytes
        if file.align.read_offset_align > 4096:
            most += 8192 - 2 * <int64_t>file.align.read_offset_align
        if (not item.nbytes or <int64_t>item.nbytes > most or item.offset > self.last_offset
                or (target is not None and (item.dest > room or item.nbytes > room - item.dest))):
            raise ValueError(f"a range of {item.nbytes} bytes at {item.offset} of {self.paths[number]}, to {item.dest}"
                             f": 1 to {most} bytes (block_bytes) in a buffer of {room} are accepted")
        return 0

    cdef mls_op *operation(self, mls_file *file, size_t most) except NULL:
        """An operation with room for `most` ranges and none yet; `file` stands for all of them."""
        cdef mls_op *op = mls_op_new(MLS_OP_RANGES, NULL, file, most, 0)
        if op == NULL:
            raise MemoryError
        op.units = <mls_unit *>calloc(most, sizeof(mls_unit))
        op.tags = <uint64_t *>calloc(most, sizeof(uint64_t))
        op.files = <mls_file **>calloc(most, sizeof(mls_file *))
        op.nextents = 0
        if op.units == NULL or op.tags == NULL or op.files == NULL:
            mls_op_unref(op)
            raise MemoryError
        op.ranges_queue = self.queue
        return op

    def submit(self, ranges, files, buffer=None):
        """Reads many ranges; returns how many were submitted.

        Parameters
        ----------
        ranges : array of RANGE_DTYPE
            C-contiguous; a range holds 1 to `block_bytes` bytes.
        files : array of uint32
            The number of each range's file, in the order of the paths.
        buffer : writable buffer, optional
            Where they go, each at its ``dest``; see `RangeFile.submit`. None drops them.

        Raises
        ------
        ValueError
            If a range is empty, too long, or lies outside the buffer, or there is no such file.
        OSError
            If a file can't be opened. Nothing was submitted then.
        """
        cdef _View array = _View(ranges, False), which = _View(files, False)
        cdef _View target = None if buffer is None else _View(buffer, True)
        cdef const mls_range *item = <const mls_range *>array.view.buf
        cdef const uint32_t *numbers = <const uint32_t *>which.view.buf
        cdef size_t count = array.view.len // sizeof(mls_range), i, last, nops = 0
        cdef _SetBatch batch
        cdef mls_file *file
        cdef mls_op *op
        cdef mls_op *given[2]
        cdef bint region = isinstance(buffer, AlignedBuffer)
        cdef int error
        self.engine.alive()
        if array.view.len % sizeof(mls_range) or <size_t>which.view.len != count * sizeof(uint32_t):
            raise ValueError("ranges is an array of RANGE_DTYPE, and files one of uint32 with as many elements")
        batch = _SetBatch()
        batch.target = target
        for i in range(count):
            if numbers[i] >= self.nfiles:
                raise ValueError(f"there is no file {numbers[i]}; they are 0 to {self.nfiles - 1}")
            file = self.opened(numbers[i])
            self.check(&item[i], numbers[i], file, target)
            if batch.ops[file.direct] == NULL:
                batch.ops[file.direct] = self.operation(file, count)
            op = batch.ops[file.direct]
            last = op.nunits
            op.tags[last] = item[i].tag
            op.extents[last].offset = op.units[last].offset = item[i].offset
            op.extents[last].nbytes = op.units[last].nbytes = item[i].nbytes
            op.units[last].first_extent, op.units[last].nextents = last, 1
            op.extents[last].kind = MLS_EXTENT_DROP
            if target is not None:
                op.extents[last].kind = MLS_EXTENT_MEMORY
                op.extents[last].memory = <unsigned char *>target.view.buf + item[i].dest
            mls_file_ref(file)
            op.files[last] = file
            op.nunits = op.nextents = last + 1
        for i in range(2):
            if batch.ops[i] == NULL:
                continue
            if region:
                batch.ops[i].region_id = (<AlignedBuffer>buffer).serial
                batch.ops[i].region, batch.ops[i].region_nbytes = <unsigned char *>target.view.buf, target.view.len
            given[nops] = batch.ops[i]
            nops += 1
        if not nops:
            return 0
        error = mls_engine_submit(self.engine.engine, given, nops)
        if error < 0:
            raise OSError(-error, os.strerror(-error))
        self.outstanding += count
        self.batches.append(batch)
        in_flight[id(self)] = self
        return count

    def reap(self, out, min_done=1, timeout_s=None):
        """Fills `out`, an array of DONE_DTYPE, with completions of any file; as `RangeFile.reap`."""
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
            self.cancel()
            raise
        finally:  # what Ctrl-C came amidst has been taken all the same
            self.outstanding -= count
            self.batches = [batch for batch in self.batches if not (<_SetBatch>batch).done()]
            if not self.outstanding:
                in_flight.pop(id(self), None)
        return count

    def cancel(self):
        """Submits no more of the ranges that have not begun; they are reaped with ECANCELED."""
        cdef _SetBatch batch
        if self.engine.engine == NULL:
            return
        for batch in self.batches:
            for i in range(2):
                if batch.ops[i] != NULL:
                    mls_engine_cancel(self.engine.engine, batch.ops[i])


cdef int note_way(dict ways, const mls_file *file) except -1:
    way = PATHS[mls_file_path(file)]
    name = b"" if file.align.fs_name == NULL else <bytes>file.align.fs_name
    key = (way, "" if way == "yes" else file.reason.decode(errors="replace"), name.decode())
    ways[key] = ways.get(key, 0) + 1
    return 0


def open_range_set(Engine engine, paths, handles=512, direct=None):
    """Prepares files on `engine` for `RangeSet.submit`; at most `handles` are open at once, and none yet."""
    return RangeSet(engine, paths, handles, direct)
