/* The HTTP engine without Python, for the sanitizers: many transfers against a server that fails now and then, with
 * cancels, control requests and new credentials in between. Every transfer must come back, once.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "http/http.h"
#include "http/http_frame.h"

#define CHECK(condition)                                                                  \
    do {                                                                                  \
        if (!(condition)) {                                                               \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);       \
            exit(1);                                                                      \
        }                                                                                 \
    } while (0)

#define COUNT 600u
#define MOST_BYTES 100000u

static uint8_t content[MOST_BYTES];
static atomic_uint asked;

/* ---- a server: GET /NBYTES, PUT anything; each 7th answer is 503, each 11th breaks off ---- */

static bool answer(int fd, const char *request)
{
    const unsigned number = atomic_fetch_add(&asked, 1) + 1;
    const bool breaks = number % 11 == 0;
    size_t nbytes = strncmp(request, "GET /", 5) == 0 ? (size_t)atol(request + 5) : 0;
    char head[256];
    if (number % 7 == 0)
        nbytes = 0;
    const int n = snprintf(head, sizeof head, "HTTP/1.1 %s\r\nContent-Length: %zu\r\nETag: \"%u\"\r\n\r\n",
                           number % 7 == 0 ? "503 Slow down" : "200 OK", nbytes, number);
    if (send(fd, head, (size_t)n, MSG_NOSIGNAL) != n)
        return false;
    for (size_t at = 0, end = breaks ? nbytes / 2 : nbytes; at < end;) {
        const ssize_t sent = send(fd, content + at, end - at, MSG_NOSIGNAL);
        if (sent <= 0)
            return false;
        at += (size_t)sent;
    }
    return !breaks;
}

static void *serve_one(void *arg)
{
    const int fd = (int)(intptr_t)arg;
    char *have = malloc(MOST_BYTES + 8192);
    size_t n = 0;
    for (bool more = true; more;) {
        const ssize_t got = recv(fd, have + n, MOST_BYTES + 8191 - n, 0);
        if (got <= 0)
            break;
        n += (size_t)got;
        have[n] = '\0';
        const char *end = strstr(have, "\r\n\r\n"), *length = strstr(have, "Content-Length: ");
        const size_t body = end && length && length < end ? (size_t)atol(length + 16) : 0;
        if (!end || n < (size_t)(end + 4 - have) + body)
            continue;
        more = answer(fd, have);
        n = 0;
    }
    close(fd);
    free(have);
    return NULL;
}

static void *serve(void *arg)
{
    const int listener = *(int *)arg;
    for (;;) {
        const int fd = accept(listener, NULL, NULL);
        pthread_t thread;
        if (fd < 0)
            return NULL;
        if (pthread_create(&thread, NULL, serve_one, (void *)(intptr_t)fd) == 0)
            pthread_detach(thread);
    }
}

static int listen_anywhere(unsigned *port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t nbytes = sizeof address;
    const int fd = socket(AF_INET, SOCK_STREAM, 0);
    CHECK(fd >= 0 && bind(fd, (struct sockaddr *)&address, sizeof address) == 0 && listen(fd, 128) == 0);
    CHECK(getsockname(fd, (struct sockaddr *)&address, &nbytes) == 0);
    *port = ntohs(address.sin_port);
    return fd;
}

/* ---- the client ---- */

static mls_http_engine *engine;
static atomic_bool over;

static void *renew(void *arg)
{
    (void)arg;
    while (!atomic_load(&over)) {
        CHECK(mls_http_sign(engine, 0, "AKID", "secret", "token", "us-east-1", "s3") == 0);
        CHECK(mls_http_sign(engine, 0, "", "", "", "", "") == 0);
        usleep(500);
    }
    return NULL;
}

static void *request(void *arg)
{
    (void)arg;
    for (unsigned i = 0; !atomic_load(&over); i++) {
        const mls_http_call_spec spec = {.endpoint = 0, .method = "GET", .key = "77", .key_nbytes = 2, .query = ""};
        const char *why;
        mls_http_call *call = mls_http_call_new(engine, &spec, &why);
        mls_http_answer found;
        CHECK(call);
        mls_http_call_begin(engine, call);
        if (i % 5 == 4)
            mls_http_call_cancel(engine, call);
        CHECK(mls_http_call_wait(engine, call, -1));
        mls_http_call_answer(call, &found);
        CHECK(found.kind == MLS_KIND_CANCELLED || found.kind == MLS_KIND_OK || found.kind == MLS_KIND_SHORT);
        CHECK(found.kind != MLS_KIND_OK || found.status == 503 ||
              (found.body_nbytes == 77 && memcmp(found.body, content, 77) == 0));
        mls_http_call_free(call);
    }
    return NULL;
}

static void round_of(unsigned seed, bool cancel)
{
    static mls_transfer transfers[COUNT];
    static mls_completion done[COUNT];
    static uint8_t seen[COUNT];
    uint8_t *memory = malloc((size_t)COUNT * MOST_BYTES);
    char *names = malloc(COUNT * 8u);
    mls_pattern pattern;
    size_t count = 0, bad;
    const char *why;
    CHECK(memory && names && mls_pattern_init(&pattern, seed, 0, 0, 0) == 0);
    memset(seen, 0, sizeof seen);
    for (unsigned i = 0; i < COUNT; i++) {
        const uint64_t nbytes = (i * 7919u + seed) % MOST_BYTES + 1;
        mls_transfer *t = &transfers[i];
        *t = (mls_transfer){.tag = i, .key_start = i * 8, .nbytes = MLS_WHOLE, .object_nbytes = nbytes,
                            .place = (uint64_t)i * MOST_BYTES, .room = MOST_BYTES, .op = (uint8_t)(i % 4),
                            .memory = MLS_TRANSFER_BUFFER, .digest = (uint8_t)(i % 3)};
        t->key_nbytes = (uint32_t)sprintf(names + t->key_start, "%u", (unsigned)nbytes);
        if (t->op == MLS_TRANSFER_WRITE) {
            t->nbytes = nbytes;
            t->memory = MLS_TRANSFER_PATTERN;
        } else if (t->op == MLS_TRANSFER_STAT) {
            t->object_nbytes = MLS_WHOLE;
        }
    }
    mls_http_batch *batch = mls_http_batch_new(engine, transfers, COUNT, names, COUNT * 8, memory,
                                               (uint64_t)COUNT * MOST_BYTES, true, &pattern, &bad, &why);
    CHECK(batch);
    mls_http_submit(engine, batch);
    while (count < COUNT) {
        if (cancel && count > COUNT / 3) {
            mls_http_cancel(engine);
            cancel = false;
        }
        count += mls_http_reap(engine, done + count, COUNT - count, 1, 20000000000);
    }
    CHECK(mls_http_batch_is_done(batch));
    for (unsigned i = 0; i < COUNT; i++) {
        const mls_completion *c = &done[i];
        CHECK(!seen[c->tag]++);
        CHECK(c->kind == MLS_KIND_OK || c->kind == MLS_KIND_CANCELLED || c->kind == MLS_KIND_SHORT ||
              c->kind == MLS_KIND_RESET || (c->kind == MLS_KIND_HTTP && c->status == 503));
        if (c->kind == MLS_KIND_OK && c->op == MLS_TRANSFER_READ)
            CHECK(memcmp(memory + transfers[c->tag].place, content, (size_t)c->result) == 0);
    }
    mls_http_batch_free(batch);
    mls_http_failure failures[MLS_HTTP_MOST_FAILURES];
    for (size_t i = mls_http_failures(engine, failures, MLS_HTTP_MOST_FAILURES); i-- > 0;)
        free(failures[i].url);
    free(memory);
    free(names);
}

/* ---- answers at random, in pieces that end where their memory does: nothing is read beyond them ---- */

static void fuzz_frames(void)
{
    static const char *const parts[] = {
        "HTTP/1.1 200 OK\r\n", "HTTP/1.1 100 Continue\r\n\r\n", "HTTP/1.0 404 No\n", "Content-Length: 5\r\n",
        "Content-Length: 99999999999999999999\r\n", "Transfer-Encoding: chunked\r\n", "Connection: close\r\n", "X: y\r\n",
        "\r\n", "\n", "\r", "5\r\n", "5;a=b\r\nhello\r\n", "0\r\n\r\n", "hello", "ffffffffffffffff\r\n", ":", "", "HTTP/", "\x80",
    };
    mls_http_frame frame = {0};
    uint64_t random = 88172645463325252u;
    unsigned done = 0, bad = 0;
    for (unsigned round = 0; round < 100000; round++) {
        bool over = false;
        mls_frame_begin(&frame, round % 16 == 0);
        for (unsigned i = 0; i < 14 && !over; i++) {
            random ^= random << 13, random ^= random >> 7, random ^= random << 17;
            const unsigned pick = i == 0 && random % 8 ? 0 : random / 64 % (sizeof parts / sizeof parts[0]);
            const size_t whole = strlen(parts[pick]), n = random % 32 ? whole : whole / 2;
            char *data = malloc(n ? n : 1);
            size_t used = 0;
            mls_frame_piece piece = {0};
            CHECK(data);
            memcpy(data, parts[pick], n);
            for (int event = MLS_FRAME_LINE; event == MLS_FRAME_LINE || event == MLS_FRAME_BODY;) {
                event = mls_frame_next(&frame, data, n, &used, &piece);
                CHECK(used <= n);
                if (event == MLS_FRAME_LINE)
                    CHECK(piece.n && piece.at[piece.n - 1] == '\n');
                if (event == MLS_FRAME_BODY)
                    CHECK(piece.at >= data && piece.n && piece.at + piece.n <= data + n);
                over = event == MLS_FRAME_END || event == MLS_FRAME_ERROR;
                done += event == MLS_FRAME_END;
                bad += event == MLS_FRAME_ERROR;
            }
            free(data);
        }
    }
    mls_frame_free(&frame);
    CHECK(done > 1000 && bad > 1000);
}

int main(void)
{
    fuzz_frames();
    unsigned port;
    int listener = listen_anywhere(&port), error;
    pthread_t server, renewer, requester;
    mls_core_api core;
    char url[64];
    const char *why;
    for (size_t i = 0; i < sizeof content; i++)
        content[i] = (uint8_t)(i * 31 + (i >> 8));
    mls_core_api_init(&core);
    CHECK(pthread_create(&server, NULL, serve, &listener) == 0);
    snprintf(url, sizeof url, "http://127.0.0.1:%u", port);
    mls_http_config config = {
        .core = &core, .workers = 3, .in_flight = 5, .tries = 3, .backoff_ns = 100000, .backoff_most_ns = 1000000,
        .connect_timeout_ns = 5000000000, .stall_timeout_ns = 5000000000, .payload_bytes = MOST_BYTES,
    };
    for (unsigned way = 0; way < 2; way++) {
        config.libcurl_only = way == 1;
        engine = mls_http_engine_new(&config, &error);
        CHECK(engine);
        const mls_http_endpoint_spec spec = {.url = url, .key_prefix = "", .query = "", .dialect = MLS_HTTP_S3};
        CHECK(mls_http_endpoint_add(engine, &spec, &why) == 0);
        atomic_store(&over, false);
        CHECK(pthread_create(&renewer, NULL, renew, NULL) == 0 && pthread_create(&requester, NULL, request, NULL) == 0);
        for (unsigned i = 0; i < 6; i++)
            round_of(i, i % 2);
        atomic_store(&over, true);
        pthread_join(renewer, NULL);
        pthread_join(requester, NULL);
        mls_http_engine_free(engine);
    }
    shutdown(listener, SHUT_RDWR);
    close(listener);
    pthread_join(server, NULL);
    puts("ok");
    return 0;
}
