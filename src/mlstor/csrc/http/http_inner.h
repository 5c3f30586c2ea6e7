/* What the files of the HTTP engine share; http.h is what others see. */
#ifndef MLS_HTTP_INNER_H
#define MLS_HTTP_INNER_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <curl/curl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

#include "http.h"
#include "http_frame.h"
#include "http_headers.h"
#include "sigv4.h"

#define MLS_HTTP_LINES (16 + 2 * MLS_HTTP_MOST_HEADERS)
#define MLS_HTTP_DAYS 8
#define MLS_HTTP_CALL_SLOTS 8 /* per worker, for control requests: a listing asks for as many at once */
#define MLS_HTTP_MOST_REDIRECTS 5
#define MLS_HTTP_ERROR_BYTES 1024 /* of a refusal's body that are looked at */
#define MLS_HTTP_CALL_BYTES ((size_t)64 << 20) /* of a control answer: a page of a listing takes 1 to 20 MB */
#define MLS_BLOCK_BYTES 4096u
#define MLS_NEVER UINT64_MAX

static inline uint64_t mls_http_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* ---- endpoints ---- */

typedef struct mls_http_header {
    char *line, *name; /* as sent; name in lower case, for signing */
    const char *value; /* in line */
    bool sign;
} mls_http_header;

/* Credentials of an endpoint at one time; whoever uses them holds a reference. */
typedef struct mls_http_identity {
    atomic_uint refs;
    mls_sigv4 *signer; /* or NULL */
    char *bearer;      /* header line, or NULL */
} mls_http_identity;

typedef struct mls_http_endpoint {
    char *base; /* "http://host:port/": scheme, host, and what decides on the connection */
    char *host; /* as in the Host header */
    char *path; /* its own, at least "/" */
    char *head; /* what precedes an escaped key */
    char *query;
    mls_http_header headers[MLS_HTTP_MOST_HEADERS];
    size_t nheaders;
    int dialect;
    bool follow;
    bool plain;           /* sends no header that decides on framing: wires may carry it */
    pthread_mutex_t lock; /* of identity */
    mls_http_identity *identity;
} mls_http_endpoint;

void mls_http_endpoint_free(mls_http_endpoint *endpoint);
mls_http_identity *mls_http_identity_get(mls_http_endpoint *endpoint); /* a reference, or NULL */
void mls_http_identity_put(mls_http_identity *identity);
/* 0, -EINVAL with *why, -ENOMEM. */
int mls_http_header_parse(const char *line, mls_http_header *out, const char **why);
void mls_http_header_free(mls_http_header *header);
/* Visible ASCII without spaces: fit for a request line. */
bool mls_http_is_visible(const char *text, size_t nbytes);

/* ---- jobs ---- */

typedef struct mls_http_job {
    mls_transfer transfer;
    mls_http_batch *batch; /* NULL for a call's */
    mls_http_call *call;   /* NULL for a batch's */
    struct mls_http_job *next;
    uint64_t submit_ns, epoch;
} mls_http_job;

struct mls_http_batch {
    const char *names;
    uint8_t *memory;
    mls_pattern pattern;
    size_t count;
    atomic_size_t left;
    mls_http_job jobs[];
};

typedef struct mls_bytes {
    char *at;
    size_t n, room;
} mls_bytes;

/* False: no memory. The text stays ended by a zero, which n does not count. */
bool mls_bytes_add(mls_bytes *bytes, const void *more, size_t n);
bool mls_bytes_reserve(mls_bytes *bytes, size_t room);

struct mls_http_call {
    mls_http_job job;
    mls_http_call_spec spec;
    mls_http_header headers[MLS_HTTP_MOST_HEADERS];
    uint64_t deadline_ns; /* 0: none */
    atomic_bool cancelled;
    bool over; /* under the engine's done_lock */
    mls_completion done;
    mls_bytes answer_headers, answer_body;
    char *url, message[256];
};

/* ---- slots: one transfer in flight each ---- */

enum mls_slot_state { MLS_SLOT_FREE, MLS_SLOT_RUNNING, MLS_SLOT_RETRY };
enum mls_sink { MLS_SINK_DROP, MLS_SINK_MEMORY, MLS_SINK_PATTERN, MLS_SINK_CALL, MLS_SINK_REFUSAL };
enum mls_shape { MLS_SHAPE_NONE, MLS_SHAPE_GET, MLS_SHAPE_HEAD, MLS_SHAPE_BODY }; /* what the easy handle is set to */

typedef struct mls_http_slot {
    struct mls_http_worker *worker;
    CURL *easy;
    struct mls_http_slot *next; /* among the free */
    mls_http_job *job;
    mls_http_endpoint *endpoint;
    mls_http_identity *identity;
    int state;
    bool for_calls;
    struct mls_http_wire *wire; /* that carries it; NULL: libcurl does, or finds a connection for it */
    bool connecting;            /* libcurl makes a connection that will be a wire */
    bool connect_only;          /* the handle is set to that */
    uint64_t activity_ns, retry_ns;
    uint64_t leave_ns; /* cancelled, and waited for until then; 0: not cancelled */
    mls_completion done;

    /* the request; what the handle holds already is not set again */
    int asked_shape; /* of this request */
    int shape;
    const char *custom; /* method, a literal or the call's; NULL: the shape's own */
    mls_bytes base, target;
    const void *body;
    uint64_t body_nbytes;
    const void *held_body; /* that the handle knows */
    uint64_t held_nbytes, sent_nbytes;
    bool new_base;
    bool ranged, asked_empty; /* asked_empty: the body waits for the redirect */
    bool foreign;             /* redirected to another host */
    unsigned redirects;
    struct curl_slist lines[MLS_HTTP_LINES];
    size_t nlines;
    mls_sigv4_header signed_headers[MLS_SIGV4_MOST_HEADERS];
    size_t nsigned;
    mls_sigv4_lines signature;
    char range[64], checksum_type[40], checksum[64];

    /* the payload of a PUT that a pattern makes; block that a READ compares */
    uint8_t *payload;
    size_t payload_room;
    uint8_t *carry;
    size_t ncarry;
    mls_pattern pattern;

    /* the answer */
    mls_http_headers answer;
    bool judged;
    int sink;
    uint64_t expected; /* bytes of the body, MLS_WHOLE if not known */
    uint64_t received, damaged;
    uint32_t crc;
    mls_xxh64 xxh;
    uint8_t verdict; /* kind found by a callback or by the worker; OK: none */
    int verdict_errno;
    char why[128];
    char refusal[MLS_HTTP_ERROR_BYTES + 1];
    size_t nrefusal;
    char curl_error[CURL_ERROR_SIZE];
} mls_http_slot;

/* ---- wires: connections without TLS or proxy that libcurl made and left to us ---- */

/* A server of this worker's wires. */
typedef struct mls_http_host {
    struct mls_http_host *next;
    struct mls_http_worker *worker;
    struct mls_http_wire *idle; /* the last one used first */
    size_t nbase;
    char base[];
} mls_http_host;

typedef struct mls_http_wire {
    int fd;
    mls_http_host *host;
    mls_http_slot *slot; /* NULL: idle */
    struct mls_http_wire *next, *before; /* among the idle of its host */
    uint64_t idle_ns;    /* since when */
    bool used;           /* an answer came by it: if it breaks before the next one begins, the server had closed it */
    bool wants_out;
    mls_bytes request;   /* line and headers */
    const uint8_t *body;
    uint64_t body_nbytes, sent; /* sent: of both */
    mls_http_frame frame;
} mls_http_wire;

/* ---- workers ---- */

typedef struct mls_http_socket {
    mls_http_slot *slot; /* that waits for it; NULL: idle */
    mls_http_wire *wire; /* NULL: libcurl's */
    uint32_t registered, wanted;
    bool is_connection;  /* made by us, and we hear when it is closed */
} mls_http_socket;

typedef struct mls_http_worker {
    mls_http_engine *engine;
    pthread_t thread;
    CURLM *multi;
    int epoll, event, timer;
    bool wants_data, wants_calls; /* has room, found none and will sleep; under the engine's lock */
    mls_http_slot *slots, *free_data, *free_calls;
    unsigned nslots, data_room, call_room, nretry;
    uint64_t curl_due_ns, timer_ns, queue_due_ns, sweep_ns, now_ns, epoch, call_epoch;
    mls_http_socket *sockets;
    size_t nsockets;
    mls_http_host *hosts;
    size_t nidle; /* wires */
    uint8_t *scratch; /* what wires receive that has no place of its own */
    size_t scratch_room;
    mls_sigv4_day days[MLS_HTTP_DAYS];
    uint64_t random;
    mls_completion done[64];
    size_t ndone;
    _Atomic uint64_t received_bytes, sent_bytes, connections, requests, retries, busy_ns, wait_ns;
} mls_http_worker;

static inline void mls_count(_Atomic uint64_t *counter, uint64_t more)
{
    /* one writer each: no locked instruction is needed */
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + more, memory_order_relaxed);
}

struct mls_http_engine {
    mls_http_config config;
    char *ca_file;
    bool full_urls; /* a proxy of the environment may be in the way, and wants them */
    bool no_proxy;
    mls_http_worker *workers;
    unsigned started;
    mls_http_endpoint *endpoints[MLS_HTTP_MOST_ENDPOINTS];
    atomic_uint nendpoints;

    pthread_mutex_t lock; /* of what follows: jobs that no worker has taken */
    mls_http_job *first, *last, *first_call, *last_call;
    size_t queued;
    mls_http_job **later; /* heap by not_before_ns */
    size_t nlater, later_room;
    _Atomic uint64_t epoch, call_epoch; /* how often what was there has been cancelled */
    atomic_bool stopping;

    pthread_mutex_t done_lock;
    pthread_cond_t done_ready, call_over;
    mls_completion *done; /* [done_first, done_last) wait for the caller */
    size_t done_first, done_last, done_room, done_wanted;
    mls_http_failure failures[MLS_HTTP_MOST_FAILURES];
    size_t nfailures;
};

/* http_queue.c */
/* Up to data_room jobs and call_room calls, linked by next. Notes what the worker is to be woken for. */
mls_http_job *mls_http_take(mls_http_worker *worker);
void mls_http_hand_back(mls_http_engine *engine, const mls_completion *done, size_t count);
void mls_http_call_end(mls_http_engine *engine, mls_http_call *call);
void mls_http_note_failure(mls_http_engine *engine, const mls_completion *done, char *url, const char *message);
void mls_http_wake_all(mls_http_engine *engine);
void mls_http_drop_queue(mls_http_engine *engine);

/* http_worker.c */
void *mls_http_worker_main(void *arg);
int mls_http_worker_open(mls_http_worker *worker);
void mls_http_worker_close(mls_http_worker *worker);
int mls_http_socket_made(void *slot, curl_socket_t fd, curlsocktype purpose);
int mls_http_socket_closed(void *worker, curl_socket_t fd);
mls_http_socket *mls_http_socket_of(mls_http_worker *worker, int fd); /* NULL: no memory */
/* Ends a running transfer before its time; its connection goes with it. */
void mls_http_break_off(mls_http_slot *slot, int kind, int error, const char *why);
void mls_http_flush_done(mls_http_worker *worker);

/* http_transfer.c */
int mls_http_slot_open(mls_http_slot *slot);
void mls_http_slot_close(mls_http_slot *slot);
/* Makes the payload, and begins. What can't begin is settled like any other failure. */
void mls_http_slot_begin(mls_http_slot *slot, mls_http_job *job);
void mls_http_slot_attempt(mls_http_slot *slot);
/* Sets base and target by the answer's location; false if that can't be followed. */
bool mls_http_slot_follow(mls_http_slot *slot);
void mls_http_slot_send(mls_http_slot *slot);
/* Has libcurl make a connection for the slot's request. */
void mls_http_slot_connect(mls_http_slot *slot);
const char *mls_http_method_of(const mls_http_slot *slot);

/* http_request.c; false: no memory, or too many headers */
bool mls_http_request_target(mls_http_slot *slot); /* the path with the key, and the query */
bool mls_http_request_lines(mls_http_slot *slot, const char *method);

/* http_wire.c */
/* Whether wires may carry what the slot asks for. */
bool mls_http_wire_fits(const mls_http_slot *slot);
/* Sends the slot's request by an idle wire. False: there is none. */
bool mls_http_wire_send(mls_http_slot *slot);
/* libcurl has made the connection of slot->connecting: takes it over, and sends. */
void mls_http_wire_connected(mls_http_slot *slot);
void mls_http_wire_event(mls_http_wire *wire, uint32_t events);
void mls_http_wire_close(mls_http_wire *wire);
void mls_http_wires_free(mls_http_worker *worker);

/* http_answer.c */
size_t mls_http_on_header(char *line, size_t one, size_t n, void *user);
size_t mls_http_on_body(char *data, size_t one, size_t n, void *user);
/* Is the answer what was asked for? Decides where its body goes. False: no, see verdict. */
bool mls_http_judge(mls_http_slot *slot);
/* What is known only at the end: carried block, length, checksums. */
void mls_http_answer_end(mls_http_slot *slot);
void mls_http_verdict(mls_http_slot *slot, int kind, int error, const char *why);

/* http_settle.c */
void mls_http_settle(mls_http_slot *slot, CURLcode code);
void mls_http_finish(mls_http_slot *slot);

#endif
