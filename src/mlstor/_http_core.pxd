# Declarations of csrc/http, nothing else.
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "core_api.h" nogil:
    const char *MLS_CORE_API_CAPSULE
    ctypedef struct mls_pattern:
        pass
    ctypedef struct mls_xxh64:
        pass
    ctypedef struct mls_core_api:
        size_t nbytes
        void (*xxh64_reset)(mls_xxh64 *x, uint64_t seed)
        void (*xxh64_update)(mls_xxh64 *x, const void *p, size_t n)
        uint64_t (*xxh64_digest)(const mls_xxh64 *x)
        int (*pattern_of)(void *object, mls_pattern *out) noexcept

cdef extern from "transfer.h" nogil:
    ctypedef struct mls_transfer:
        uint64_t tag
    ctypedef struct mls_completion:
        uint64_t tag

cdef extern from "http/http.h" nogil:
    enum: MLS_HTTP_PLAIN, MLS_HTTP_S3, MLS_HTTP_AIS, MLS_HTTP_MOST_FAILURES, MLS_HTTP_MOST_HEADERS
    enum: MLS_HTTP_MOST_ENDPOINTS, MLS_HTTP_MOST_WORKERS, MLS_HTTP_MOST_IN_FLIGHT, MLS_KIND_OK
    ctypedef struct mls_http_config:
        const mls_core_api *core
        unsigned workers, in_flight, tries
        uint64_t backoff_ns, backoff_most_ns, connect_timeout_ns, stall_timeout_ns, payload_bytes
        size_t buffer_bytes
        const char *ca_file
        bint insecure, libcurl_only
    ctypedef struct mls_http_engine:
        pass
    ctypedef struct mls_http_batch:
        pass
    ctypedef struct mls_http_call:
        pass
    ctypedef struct mls_http_endpoint_spec:
        const char *url
        const char *key_prefix
        const char *query
        const char *const *headers
        size_t nheaders
        int dialect
        bint follow
    ctypedef struct mls_http_failure:
        uint64_t tag
        uint16_t status
        uint8_t kind
        char *url
        char message[256]
    ctypedef struct mls_http_counters:
        uint64_t received_bytes, sent_bytes, connections, requests, retries, busy_ns, wait_ns
    ctypedef struct mls_http_call_spec:
        unsigned endpoint
        const char *method
        const char *key
        const char *query
        size_t key_nbytes
        const char *const *headers
        size_t nheaders
        const void *body
        size_t body_nbytes
        uint64_t timeout_ns
    ctypedef struct mls_http_answer:
        uint8_t kind
        uint16_t status
        int error
        const char *headers
        size_t headers_nbytes
        const uint8_t *body
        size_t body_nbytes
        const char *url
        const char *message
    mls_http_engine *mls_http_engine_new(const mls_http_config *config, int *error)
    void mls_http_engine_free(mls_http_engine *engine)
    int mls_http_endpoint_add(mls_http_engine *engine, const mls_http_endpoint_spec *spec, const char **why)
    unsigned mls_http_endpoints(mls_http_engine *engine)
    int mls_http_sign(mls_http_engine *engine, unsigned endpoint, const char *access_key, const char *secret_key,
                      const char *token, const char *region, const char *service)
    int mls_http_bearer(mls_http_engine *engine, unsigned endpoint, const char *token)
    mls_http_batch *mls_http_batch_new(mls_http_engine *engine, const mls_transfer *transfers, size_t count,
                                       const char *names, uint64_t names_nbytes, uint8_t *memory,
                                       uint64_t memory_nbytes, bint writable, const mls_pattern *pattern, size_t *bad,
                                       const char **why)
    bint mls_http_batch_is_done(const mls_http_batch *batch)
    void mls_http_batch_free(mls_http_batch *batch)
    void mls_http_submit(mls_http_engine *engine, mls_http_batch *batch)
    size_t mls_http_reap(mls_http_engine *engine, mls_completion *out, size_t max, size_t min, int64_t timeout_ns)
    void mls_http_cancel(mls_http_engine *engine)
    size_t mls_http_failures(mls_http_engine *engine, mls_http_failure *out, size_t max)
    void mls_http_counters_sum(const mls_http_engine *engine, mls_http_counters *sum)
    mls_http_call *mls_http_call_new(mls_http_engine *engine, const mls_http_call_spec *spec, const char **why)
    void mls_http_call_begin(mls_http_engine *engine, mls_http_call *call)
    bint mls_http_call_wait(mls_http_engine *engine, mls_http_call *call, int64_t timeout_ns)
    void mls_http_call_cancel(mls_http_engine *engine, mls_http_call *call)
    void mls_http_call_answer(const mls_http_call *call, mls_http_answer *out)
    void mls_http_call_free(mls_http_call *call)
    const char *mls_http_libcurl()

cdef extern from "http/rendezvous.h" nogil:
    ctypedef struct mls_hrw_hash:
        void (*reset)(mls_xxh64 *x, uint64_t seed)
        void (*update)(mls_xxh64 *x, const void *p, size_t n)
        uint64_t (*digest)(const mls_xxh64 *x)
    ctypedef struct mls_hrw_map:
        const uint64_t *id_digests
        const uint32_t *endpoints
        size_t ntargets
        const char *uname_prefix
        size_t uname_prefix_nbytes
    size_t mls_hrw_place(const mls_hrw_hash *hash, const mls_hrw_map *map, mls_transfer *transfers, size_t count,
                         const char *names, uint64_t names_nbytes)
