# Part of _http.pyx: the engine.


@cython.final
@cython.no_gc_clear
cdef class HttpEngine:
    """Worker threads that move objects over HTTP/1.1: arrays of transfers in, arrays of completions out.

    It is a `Transfers` of mlstor.storage.transfers. Each worker keeps its connections, per server as many as it had
    transfers in flight there.

    Parameters
    ----------
    workers : int
        Threads; 0 takes one per CPU of this process, at most 4.
    in_flight : int
        Transfers at once per worker.
    tries : int
        Attempts in all for what may succeed later: status 429, 500, 502, 503, 504, refused, reset and stalled
        connections, bodies that end early, names that do not resolve.
    backoff_s, backoff_most_s : float
        Before attempt n + 1 a random time between 0 and ``backoff_s * 2**(n - 1)`` passes, capped ("full jitter"); a
        server's Retry-After is waited for, up to the cap.
    connect_timeout_s : float
        For name lookup, TCP and TLS together.
    stall_timeout_s : float
        How long nothing may move.
    payload_bytes : int
        The largest body that is made from a pattern; there is one such buffer per transfer in flight, as large as it
        was needed.
    buffer_bytes : int
        Receive buffer, 1 KiB to 512 KiB: of each worker, and of each of libcurl's transfers; 0 chooses.
    ca_file : str, optional
        Certificates to trust, PEM; by default the system's.
    insecure : bool
        Do not look at certificates.
    libcurl_only : bool
        Let libcurl carry all transfers. Otherwise those over ``http://`` without a proxy go over connections that
        libcurl makes and the engine itself sends on and receives from, which takes about half the CPU.

    Raises
    ------
    OSError
        If no thread, memory or descriptor is to be had, or `ca_file` can't be read.
    ValueError
        For a number out of its range.
    """

    cdef mls_http_engine *engine
    cdef readonly unsigned workers, in_flight
    cdef readonly size_t outstanding
    cdef pid_t pid
    cdef list batches     # not known to be done
    cdef size_t look_at   # how many of them there are when it is worth looking which are
    cdef size_t inside    # threads that wait in the core without the GIL: it is not freed under them
    cdef bint closing
    cdef object __weakref__

    def __cinit__(self, workers=0, in_flight=8, *, tries=5, backoff_s=0.05, backoff_most_s=5.0,
                  connect_timeout_s=10.0, stall_timeout_s=30.0, payload_bytes=64 << 20, buffer_bytes=0, ca_file=None,
                  insecure=False, libcurl_only=False):
        cdef mls_http_config config
        cdef int error = 0
        if not 0 <= workers <= MLS_HTTP_MOST_WORKERS or not 1 <= in_flight <= MLS_HTTP_MOST_IN_FLIGHT:
            raise ValueError(f"workers is 0 to {MLS_HTTP_MOST_WORKERS} and in_flight 1 to {MLS_HTTP_MOST_IN_FLIGHT}")
        if not 1 <= tries <= 1000:
            raise ValueError("tries is 1 to 1000")
        if buffer_bytes and not 1024 <= buffer_bytes <= 512 << 10:
            raise ValueError("buffer_bytes is 1 KiB to 512 KiB")
        self.pid = getpid()
        self.batches = []
        self.look_at = 64
        self.workers = workers or min(4, len(os.sched_getaffinity(0)))
        self.in_flight = in_flight
        path = None if ca_file is None else os.fsencode(ca_file)
        config.core = core_api()
        config.workers, config.in_flight, config.tries = self.workers, in_flight, tries
        config.backoff_ns = ns_of(backoff_s, "backoff_s", False)
        config.backoff_most_ns = ns_of(backoff_most_s, "backoff_most_s", False)
        config.connect_timeout_ns = ns_of(connect_timeout_s, "connect_timeout_s")
        config.stall_timeout_ns = ns_of(stall_timeout_s, "stall_timeout_s")
        config.payload_bytes, config.buffer_bytes = payload_bytes, buffer_bytes
        config.ca_file = NULL
        if path is not None:
            config.ca_file = path
        config.insecure, config.libcurl_only = insecure, libcurl_only
        with nogil:
            self.engine = mls_http_engine_new(&config, &error)
        if self.engine == NULL:
            raise OSError(-error, f"the HTTP engine did not start ({self.workers} workers, {in_flight} in flight "
                          f"each): {os.strerror(-error)}", ca_file)
        _engines.add(self)

    def __dealloc__(self):
        # In a child the threads do not exist; nothing of theirs can be freed.
        if self.engine != NULL and self.pid == getpid():
            with nogil:
                mls_http_engine_free(self.engine)

    cdef int alive(self) except -1:
        if self.engine == NULL or self.closing:
            raise ValueError("the HTTP engine is closed")
        if self.pid != getpid():
            raise RuntimeError(f"this HTTP engine was made in process {self.pid}, before a fork: make one here")
        return 0

    cdef int known(self, endpoint) except -1:
        self.alive()
        if not 0 <= endpoint < mls_http_endpoints(self.engine):
            raise ValueError(f"there is no endpoint {endpoint}")
        return 0

    # ---- servers ----

    def endpoint(self, str url, *, str key_prefix="", str query="", str dialect="plain", headers=(), bint follow=False):
        """Adds a server, with what is sent to it every time; returns its number for `mls_transfer.endpoint`.

        Parameters
        ----------
        url : str
            ``http://HOST[:PORT][/PATH]`` or https; the path is taken as it is, escaped already. A slash is added
            between it and what follows.
        key_prefix : str
            Goes before each key; both are percent-encoded.
        query : str
            Escaped; goes before each transfer's own, with an ``&`` between them.
        dialect : str
            ``"s3"`` and ``"ais"`` send and compare checksums as those stores do; ``"plain"`` has none.
        headers : iterable of (name, value)
            At most 16.
        follow : bool
            Follow redirects (301, 302, 307, 308), at most 5 of them. A WRITE's body is then sent only to where it was
            redirected to.

        Raises
        ------
        ValueError
            If the URL, the query, a header or the dialect is not as it should be.
        OSError
            ENFILE beyond 4096 endpoints.
        """
        cdef mls_http_endpoint_spec spec
        cdef const char *why = NULL
        cdef _Lines lines = _Lines(headers)
        self.alive()
        if dialect not in DIALECTS:
            raise ValueError(f"dialect is plain, s3 or ais, not {dialect!r}")
        texts = text_of(url, "url"), text_of(key_prefix, "key_prefix"), text_of(query, "query")
        spec.url, spec.key_prefix, spec.query = texts[0], texts[1], texts[2]
        spec.headers, spec.nheaders = <const char *const *>lines.lines, lines.count
        spec.dialect, spec.follow = DIALECTS[dialect], follow
        number = mls_http_endpoint_add(self.engine, &spec, &why)
        if why != NULL:
            shown = "" if "@" in url else f"{url}: "  # it may hold a password
            raise ValueError(f"{shown}{why.decode()}")
        if number < 0:
            raise OSError(-number, os.strerror(-number), url)
        return number

    def sign(self, endpoint, str access_key, str secret_key, str token="", str region="us-east-1", str service="s3"):
        """Signs what is sent to the endpoint (AWS Signature Version 4), from now on and until it is called again. Empty
        keys end that.

        Raises
        ------
        ValueError
            If the access key, the region or the service is empty or too long, or one holds a control character.
        """
        self.known(endpoint)
        texts = [text_of(text, "a credential") for text in (access_key, secret_key, token, region, service)]
        error = mls_http_sign(self.engine, endpoint, texts[0], texts[1], texts[2], texts[3], texts[4])
        if error == -12:  # ENOMEM
            raise MemoryError
        if error < 0:
            raise ValueError("the access key, the region or the service is empty or too long, or a credential holds a "
                             "control character")

    def bearer(self, endpoint, str token):
        """Sends the token to the endpoint, from now on and until it is called again. An empty one ends that.

        Raises
        ------
        ValueError
            If it holds what a header can't.
        """
        self.known(endpoint)
        text = text_of(token, "the token")
        error = mls_http_bearer(self.engine, endpoint, text)
        if error == -12:  # ENOMEM
            raise MemoryError
        if error < 0:
            raise ValueError("the token holds spaces or characters that are not ASCII")

    # ---- transfers ----

    def submit(self, transfers, names, buffer=None, pattern=None):
        """Takes an array of TRANSFER_DTYPE; returns how many. `names` and `buffer` are held until all are done.

        Transfers begin in the order given, those with a time at that time.

        Parameters
        ----------
        transfers : array of TRANSFER_DTYPE
            C-contiguous; copied.
        names : buffer
            Keys, unescaped UTF-8, and queries, escaped.
        buffer : buffer, optional
            Memory of transfers with ``Memory.BUFFER``; writable, unless all of them are writes.
        pattern : Pattern, optional
            Of transfers with ``Memory.PATTERN``; each has its own file id, its ``place``.

        Raises
        ------
        ValueError
            If a transfer lies outside `names` or `buffer`, or can't be asked for; then none was taken.
        """
        cdef _View array = _View(transfers, False)
        cdef _Batch batch = _Batch()
        cdef mls_pattern found
        cdef const mls_pattern *given = NULL
        cdef const char *why = NULL
        cdef size_t bad = 0, count = array.view.len // sizeof(mls_transfer)
        self.alive()
        if array.view.len % sizeof(mls_transfer):
            raise ValueError("transfers is an array of TRANSFER_DTYPE")
        if not count:
            return 0
        batch.names = _View(names, False)
        writable = True
        if buffer is not None:
            try:
                batch.memory = _View(buffer, True)
            except (BufferError, TypeError, ValueError):
                if not PyObject_CheckBuffer(buffer):
                    raise
                batch.memory, writable = _View(buffer, False), False
        if pattern is not None:
            if core_api().pattern_of(<void *>pattern, &found) < 0:
                raise TypeError(f"pattern is a Pattern, not {type(pattern).__name__}")
            given = &found
        batch.batch = mls_http_batch_new(
            self.engine, <const mls_transfer *>array.view.buf, count, <const char *>batch.names.view.buf,
            batch.names.view.len, NULL if buffer is None else <uint8_t *>batch.memory.view.buf,
            0 if buffer is None else batch.memory.view.len, writable, given, &bad, &why)
        if why != NULL:
            raise ValueError(f"transfer {bad}: {why.decode()}")
        if batch.batch == NULL:
            raise MemoryError
        self.batches.append(batch)
        self.outstanding += count
        self.inside += 1
        with nogil:
            mls_http_submit(self.engine, batch.batch)
        self.inside -= 1
        return count

    cdef int release(self):
        """Lets go of the memory of batches that are done."""
        if <size_t>len(self.batches) >= self.look_at or not self.outstanding:
            self.batches = [batch for batch in self.batches if not mls_http_batch_is_done((<_Batch>batch).batch)]
            self.look_at = 2 * len(self.batches) + 64
        while self.batches and mls_http_batch_is_done((<_Batch>self.batches[0]).batch):
            del self.batches[0]
        return 0

    def reap(self, out, min_done=1, timeout_s=None):
        """Fills `out`, an array of COMPLETION_DTYPE; returns how many. Waits for `min_done`, or as many as are
        outstanding, at most `timeout_s`. Ctrl-C cancels, and raises KeyboardInterrupt.
        """
        cdef _View view = _View(out, True)
        cdef mls_completion *done = <mls_completion *>view.view.buf
        cdef size_t most = view.view.len // sizeof(mls_completion)
        cdef size_t least = min(max(min_done, 0), self.outstanding, most)
        cdef size_t count = 0
        cdef uint64_t deadline = deadline_of(timeout_s)
        cdef int64_t tick
        try:
            while True:
                self.alive()
                tick = tick_of(deadline)
                self.inside += 1
                with nogil:
                    count += mls_http_reap(self.engine, done + count, most - count, least - count, tick)
                self.inside -= 1
                if count >= least:
                    break
                PyErr_CheckSignals()
                if now_ns() >= deadline:
                    break
        except BaseException:
            if self.engine != NULL and not self.closing and self.pid == getpid():
                self.cancel()
            raise
        finally:  # what Ctrl-C came amidst has been taken all the same
            self.outstanding -= count
            self.release()
        return count

    def failures(self):
        """Of the failures since the last call the first 256, as `Failure`."""
        cdef mls_http_failure found[256]
        cdef size_t count, i
        self.alive()
        count = mls_http_failures(self.engine, found, MLS_HTTP_MOST_FAILURES)
        failures = []
        for i in range(count):
            url = b"" if found[i].url == NULL else <bytes>found[i].url
            free(found[i].url)
            failures.append(Failure(found[i].tag, Kind(found[i].kind), found[i].status, url.decode(errors="replace"),
                                    (<bytes>found[i].message).decode(errors="replace")))
        return failures

    def cancel(self):
        """What has not begun, what waits for a retry and what is under way comes back as CANCELLED, unless it is done
        by then. A WRITE whose body has been sent is waited for up to 5 s more, since its server carries it out
        anyway. Requests (`request`) go on.
        """
        self.alive()
        self.inside += 1
        with nogil:
            mls_http_cancel(self.engine)
        self.inside -= 1

    def counters(self):
        """What the workers did since they were made, as `TransferCounters`; bytes are those of bodies."""
        cdef mls_http_counters sum
        self.alive()
        mls_http_counters_sum(self.engine, &sum)
        return TransferCounters(sum.received_bytes, sum.sent_bytes, sum.connections, sum.requests, sum.retries,
                                sum.busy_ns, sum.wait_ns)

    # ---- control ----

    def request(self, endpoint, str method, str key="", str query="", headers=(), body=b"", timeout_s=None):
        """One request, by the same connections, signing, retries and redirects; waits for its answer. Any thread may
        call it, besides the one that submits.

        Parameters
        ----------
        endpoint : int
        method : str
            GET, HEAD, PUT, POST, DELETE or PATCH.
        key : str
            Percent-encoded after the endpoint's path and prefix; without one the path alone is asked.
        query : str
            Escaped.
        headers : iterable of (name, value)
        body : buffer
        timeout_s : float, optional
            For all attempts together; by default only stalls end it, so that a server has `stall_timeout_s` to begin
            its answer. A longer time than that is how long it may be silent.

        Returns
        -------
        Response
            Whatever its status, once there are no more tries for a 429 or 5xx.

        Raises
        ------
        OSError
            If there is no answer: refused, reset, stalled, a certificate that is not trusted. With errno and URL.
        """
        cdef mls_http_call_spec spec
        cdef mls_http_answer answer
        cdef mls_http_call *call
        cdef const char *why = NULL
        cdef _Lines lines = _Lines(headers)
        cdef _View content = _View(body, False)
        cdef bint over = False
        self.known(endpoint)
        texts = text_of(method, "method"), key.encode(), text_of(query, "query")
        spec.endpoint = endpoint
        spec.method, spec.key, spec.query = texts[0], texts[1], texts[2]
        spec.key_nbytes = len(texts[1])
        spec.headers, spec.nheaders = <const char *const *>lines.lines, lines.count
        spec.body, spec.body_nbytes = content.view.buf, content.view.len
        spec.timeout_ns = 0 if timeout_s is None else ns_of(timeout_s, "timeout_s")
        call = mls_http_call_new(self.engine, &spec, &why)
        if why != NULL:
            raise ValueError(why.decode())
        if call == NULL:
            raise MemoryError
        self.inside += 1
        try:
            with nogil:
                mls_http_call_begin(self.engine, call)
            while not over:
                with nogil:
                    over = mls_http_call_wait(self.engine, call, TICK_NS)
                if not over:
                    PyErr_CheckSignals()
                    self.alive()
            mls_http_call_answer(call, &answer)
            url = answer.url.decode(errors="replace")
            if answer.kind != MLS_KIND_OK:
                why_not = answer.message.decode(errors="replace") or os.strerror(-answer.error)
                raise OSError(-answer.error, f"{method}: {why_not}", url)
            found = b"" if answer.headers == NULL else answer.headers[:answer.headers_nbytes]
            data = b"" if answer.body == NULL else (<const char *>answer.body)[:answer.body_nbytes]
            return Response(answer.status, headers_of(found), data, url)
        finally:
            if not over:
                with nogil:
                    mls_http_call_cancel(self.engine, call)
                    mls_http_call_wait(self.engine, call, -1)
            mls_http_call_free(call)
            self.inside -= 1

    # ---- the end ----

    def close(self):
        """Cancels all, ends the workers, closes the connections. What was not reaped is gone. Again: does nothing."""
        cdef mls_http_engine *engine = self.engine
        if engine == NULL or self.closing:
            return
        self.alive()
        self.closing = True  # other threads start nothing more
        while self.inside:
            with nogil:
                usleep(1000)
        self.engine = NULL
        with nogil:
            mls_http_engine_free(engine)
        self.batches.clear()
        self.outstanding = 0

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()
