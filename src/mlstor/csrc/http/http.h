/* Many HTTP transfers at once, on libcurl's multi interface: what Cython sees.
 *
 * Worker threads own a multi handle each, and with it their connections. A batch is an array of transfers that share
 * names, memory and pattern; what became of each comes back as an mls_completion. Control requests (calls) go by the
 * same workers, in slots of their own, so that they don't wait behind data.
 */
#ifndef MLS_HTTP_H
#define MLS_HTTP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../core_api.h"
#include "../transfer.h"

#define MLS_HTTP_MOST_ENDPOINTS 4096u
#define MLS_HTTP_MOST_WORKERS 256u
#define MLS_HTTP_MOST_IN_FLIGHT 4096u
#define MLS_HTTP_MOST_FAILURES 256u
#define MLS_HTTP_MOST_HEADERS 16u /* of an endpoint, and as many of a call */

typedef struct mls_http_config {
    const mls_core_api *core;
    unsigned workers, in_flight; /* per worker */
    unsigned tries;              /* attempts in all, at least 1 */
    uint64_t backoff_ns, backoff_most_ns, connect_timeout_ns, stall_timeout_ns;
    uint64_t payload_bytes; /* of a body made by a pattern, at most */
    size_t buffer_bytes;    /* for receiving, per transfer in flight; 0: chosen */
    const char *ca_file;    /* NULL: libcurl's own choice */
    bool insecure;          /* no look at certificates */
    bool libcurl_only;      /* no wires of our own */
} mls_http_config;

typedef struct mls_http_engine mls_http_engine;

/* NULL with *error = -errno if there is no memory, thread or descriptor, or -ENOENT for a CA file that can't be read. */
mls_http_engine *mls_http_engine_new(const mls_http_config *config, int *error);
/* Cancels all, ends the workers, wipes the keys. All batches must have been given back their transfers or be freed later;
 * calls must be over.
 */
void mls_http_engine_free(mls_http_engine *engine);

enum mls_http_dialect { MLS_HTTP_PLAIN, MLS_HTTP_S3, MLS_HTTP_AIS };

typedef struct mls_http_endpoint_spec {
    const char *url;        /* scheme://host[:port][/path]; the path is escaped already */
    const char *key_prefix; /* unescaped; goes before each key */
    const char *query;      /* escaped; goes before each transfer's own */
    const char *const *headers; /* "Name: value" */
    size_t nheaders;
    int dialect;
    bool follow;
} mls_http_endpoint_spec;

/* Number of the new endpoint. -EINVAL: not such a URL, query or header (*why says it). -ENFILE: too many. -ENOMEM. */
int mls_http_endpoint_add(mls_http_engine *engine, const mls_http_endpoint_spec *spec, const char **why);
unsigned mls_http_endpoints(mls_http_engine *engine);
/* From now on, for what begins after this. Empty strings take the credentials away. 0, -EINVAL or -ENOMEM. */
int mls_http_sign(mls_http_engine *engine, unsigned endpoint, const char *access_key, const char *secret_key,
                  const char *token, const char *region, const char *service);
int mls_http_bearer(mls_http_engine *engine, unsigned endpoint, const char *token);

typedef struct mls_http_batch mls_http_batch;

/* Copies the transfers; names and memory are the caller's until mls_http_batch_is_done. NULL: no memory, or *why says what
 * is wrong with transfer number *bad.
 */
mls_http_batch *mls_http_batch_new(mls_http_engine *engine, const mls_transfer *transfers, size_t count,
                                   const char *names, uint64_t names_nbytes, uint8_t *memory, uint64_t memory_nbytes,
                                   bool writable, const mls_pattern *pattern, size_t *bad, const char **why);
bool mls_http_batch_is_done(const mls_http_batch *batch);
void mls_http_batch_free(mls_http_batch *batch);
void mls_http_submit(mls_http_engine *engine, mls_http_batch *batch);

/* Waits for `min` completions; timeout_ns < 0 waits for ever. */
size_t mls_http_reap(mls_http_engine *engine, mls_completion *out, size_t max, size_t min, int64_t timeout_ns);
/* What was submitted before is not begun, and what runs is broken off; each comes back as CANCELLED. */
void mls_http_cancel(mls_http_engine *engine);

typedef struct mls_http_failure {
    uint64_t tag;
    uint16_t status;
    uint8_t kind;
    char *url, message[256];
} mls_http_failure;

/* Moves up to `max` records to `out`; their url is to be freed by the caller. */
size_t mls_http_failures(mls_http_engine *engine, mls_http_failure *out, size_t max);

typedef struct mls_http_counters {
    uint64_t received_bytes, sent_bytes, connections, requests, retries, busy_ns, wait_ns;
} mls_http_counters;

void mls_http_counters_sum(const mls_http_engine *engine, mls_http_counters *sum);

/* One control request. All strings and the body are the caller's until it is over. */
typedef struct mls_http_call mls_http_call;

typedef struct mls_http_call_spec {
    unsigned endpoint;
    const char *method;
    const char *key, *query; /* key unescaped; NULL of key_nbytes 0: the endpoint's own path without its prefix */
    size_t key_nbytes;
    const char *const *headers;
    size_t nheaders;
    const void *body;
    size_t body_nbytes;
    uint64_t timeout_ns; /* 0: none but stalls */
} mls_http_call_spec;

mls_http_call *mls_http_call_new(mls_http_engine *engine, const mls_http_call_spec *spec, const char **why);
void mls_http_call_begin(mls_http_engine *engine, mls_http_call *call);
/* False if it is not over after timeout_ns. */
bool mls_http_call_wait(mls_http_engine *engine, mls_http_call *call, int64_t timeout_ns);
void mls_http_call_cancel(mls_http_engine *engine, mls_http_call *call);
void mls_http_call_free(mls_http_call *call);

typedef struct mls_http_answer {
    uint8_t kind; /* MLS_KIND_OK: there is an answer, whatever its status */
    uint16_t status;
    int error;           /* -errno of what went wrong */
    const char *headers; /* lines of the answer, each with its CRLF */
    size_t headers_nbytes;
    const uint8_t *body;
    size_t body_nbytes;
    const char *url, *message;
} mls_http_answer;

/* Once it is over; what it points to is the call's. */
void mls_http_call_answer(const mls_http_call *call, mls_http_answer *out);

const char *mls_http_libcurl(void); /* version and TLS library in use, "7.88.1 OpenSSL/3.0" */

#endif
