/* Life of the engine, and batches. */
#include "http_inner.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void cond_init_monotonic(pthread_cond_t *cond)
{
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(cond, &attr);
    pthread_condattr_destroy(&attr);
}

static void join_workers(mls_http_engine *engine)
{
    atomic_store(&engine->stopping, true);
    mls_http_wake_all(engine);
    for (unsigned i = 0; i < engine->started; i++)
        pthread_join(engine->workers[i].thread, NULL);
}

static void release(mls_http_engine *engine)
{
    for (unsigned i = 0; engine->workers && i < engine->config.workers; i++)
        mls_http_worker_close(&engine->workers[i]);
    const unsigned count = atomic_load(&engine->nendpoints);
    for (unsigned i = 0; i < count; i++)
        mls_http_endpoint_free(engine->endpoints[i]);
    for (size_t i = 0; i < engine->nfailures; i++)
        free(engine->failures[i].url);
    pthread_cond_destroy(&engine->done_ready);
    pthread_cond_destroy(&engine->call_over);
    pthread_mutex_destroy(&engine->lock);
    pthread_mutex_destroy(&engine->done_lock);
    free(engine->workers);
    free(engine->later);
    free(engine->done);
    free(engine->ca_file);
    free(engine);
}

static int start_workers(mls_http_engine *engine)
{
    sigset_t all, before;
    int error = 0;
    for (unsigned i = 0; i < engine->config.workers; i++) {
        mls_http_worker *worker = &engine->workers[i];
        worker->engine = engine;
        worker->epoll = worker->event = worker->timer = -1;
    }
    for (unsigned i = 0; i < engine->config.workers && !error; i++)
        error = mls_http_worker_open(&engine->workers[i]);
    if (error)
        return error;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the caller's threads */
    for (unsigned i = 0; i < engine->config.workers && !error; i++) {
        pthread_mutex_lock(&engine->lock); /* a worker that is up looks at `started` */
        error = -pthread_create(&engine->workers[i].thread, NULL, mls_http_worker_main, &engine->workers[i]);
        engine->started += !error;
        pthread_mutex_unlock(&engine->lock);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error;
}

static bool is_set(const char *name)
{
    const char *value = getenv(name);
    return value && value[0];
}

/* libcurl reads these variables itself, for each request; where there are none it is told so. */
static void look_for_proxies(mls_http_engine *engine)
{
    const bool any = is_set("all_proxy") || is_set("ALL_PROXY");
    engine->full_urls = any || is_set("http_proxy"); /* only in lower case, for a reason: see curl's manual */
    engine->no_proxy = !engine->full_urls && !is_set("https_proxy") && !is_set("HTTPS_PROXY");
}

mls_http_engine *mls_http_engine_new(const mls_http_config *config, int *error)
{
    *error = -ENOMEM;
    if (config->ca_file && access(config->ca_file, R_OK) < 0) {
        *error = -errno;
        return NULL;
    }
    if (curl_global_init(CURL_GLOBAL_DEFAULT) != CURLE_OK) /* counted, and never taken back */
        return NULL;
    mls_http_engine *engine = calloc(1, sizeof *engine);
    if (!engine)
        return NULL;
    engine->config = *config;
    look_for_proxies(engine);
    pthread_mutex_init(&engine->lock, NULL);
    pthread_mutex_init(&engine->done_lock, NULL);
    cond_init_monotonic(&engine->done_ready);
    cond_init_monotonic(&engine->call_over);
    engine->ca_file = config->ca_file ? strdup(config->ca_file) : NULL;
    engine->config.ca_file = engine->ca_file;
    if (!config->ca_file || engine->ca_file)
        engine->workers = calloc(config->workers, sizeof *engine->workers);
    if (engine->workers)
        *error = start_workers(engine);
    if (!*error)
        return engine;
    join_workers(engine);
    release(engine);
    return NULL;
}

void mls_http_engine_free(mls_http_engine *engine)
{
    if (!engine)
        return;
    mls_http_cancel(engine);
    join_workers(engine);
    release(engine);
}

void mls_http_counters_sum(const mls_http_engine *engine, mls_http_counters *sum)
{
    *sum = (mls_http_counters){0};
    for (unsigned i = 0; i < engine->config.workers; i++) {
        const mls_http_worker *worker = &engine->workers[i];
        sum->received_bytes += atomic_load_explicit(&worker->received_bytes, memory_order_relaxed);
        sum->sent_bytes += atomic_load_explicit(&worker->sent_bytes, memory_order_relaxed);
        sum->connections += atomic_load_explicit(&worker->connections, memory_order_relaxed);
        sum->requests += atomic_load_explicit(&worker->requests, memory_order_relaxed);
        sum->retries += atomic_load_explicit(&worker->retries, memory_order_relaxed);
        sum->busy_ns += atomic_load_explicit(&worker->busy_ns, memory_order_relaxed);
        sum->wait_ns += atomic_load_explicit(&worker->wait_ns, memory_order_relaxed);
    }
}

/* ---- batches ---- */

static bool lies_within(uint64_t start, uint64_t nbytes, uint64_t room) { return start <= room && nbytes <= room - start; }

static const char *check_memory(const mls_transfer *t, uint64_t memory_nbytes, bool writable, bool has_pattern,
                                uint64_t payload_bytes)
{
    const bool write = t->op == MLS_TRANSFER_WRITE;
    if (t->op != MLS_TRANSFER_READ && !write)
        return NULL;
    switch (t->memory) {
    case MLS_TRANSFER_DROP:
        return write ? "a WRITE has a body: from the buffer or the pattern" : NULL;
    case MLS_TRANSFER_BUFFER:
        if (!write && !writable)
            return "the buffer is read-only";
        return lies_within(t->place, write ? t->nbytes : t->room, memory_nbytes) ? NULL : "it lies outside the buffer";
    case MLS_TRANSFER_PATTERN:
        if (!has_pattern)
            return "it needs a pattern, and none was given";
        return !write || t->nbytes <= payload_bytes ? NULL : "its body is longer than payload_bytes: write it in parts";
    default:
        return "its memory is none of DROP, BUFFER, PATTERN";
    }
}

static const char *check(mls_http_engine *engine, const mls_transfer *t, const char *names, uint64_t names_nbytes)
{
    if (!lies_within(t->key_start, t->key_nbytes, names_nbytes) ||
        !lies_within(t->query_start, t->query_nbytes, names_nbytes))
        return "its key or its query lies outside names";
    if (t->endpoint >= atomic_load(&engine->nendpoints))
        return "there is no such endpoint";
    if (!t->key_nbytes && engine->endpoints[t->endpoint]->dialect == MLS_HTTP_S3)
        return "its key is empty"; /* the bucket itself would be asked, made or deleted */
    if (!mls_http_is_visible(names + t->query_start, t->query_nbytes))
        return "its query is not escaped";
    if (t->op > MLS_TRANSFER_DELETE || t->digest > MLS_TRANSFER_CRC32)
        return "its operation or its digest is unknown";
    if (t->op == MLS_TRANSFER_WRITE && (t->nbytes > INT64_MAX || t->offset > INT64_MAX))
        return "its size is not known";
    if (t->op == MLS_TRANSFER_READ && t->nbytes != MLS_WHOLE && t->offset > MLS_WHOLE - 1 - t->nbytes)
        return "its range ends beyond 2^64";
    if (t->op == MLS_TRANSFER_READ && t->nbytes == 0 && (t->offset || t->object_nbytes))
        return "a range of no bytes can't be asked for";
    return NULL;
}

mls_http_batch *mls_http_batch_new(mls_http_engine *engine, const mls_transfer *transfers, size_t count,
                                   const char *names, uint64_t names_nbytes, uint8_t *memory, uint64_t memory_nbytes,
                                   bool writable, const mls_pattern *pattern, size_t *bad, const char **why)
{
    *why = NULL;
    for (size_t i = 0; i < count; i++) {
        *bad = i;
        *why = check(engine, &transfers[i], names, names_nbytes);
        if (!*why)
            *why = check_memory(&transfers[i], memory_nbytes, writable, pattern, engine->config.payload_bytes);
        if (*why)
            return NULL;
    }
    mls_http_batch *batch = malloc(sizeof *batch + count * sizeof batch->jobs[0]);
    if (!batch)
        return NULL;
    batch->names = names;
    batch->memory = memory;
    batch->pattern = pattern ? *pattern : (mls_pattern){0};
    batch->count = count;
    atomic_init(&batch->left, count);
    for (size_t i = 0; i < count; i++)
        batch->jobs[i] = (mls_http_job){.transfer = transfers[i], .batch = batch};
    return batch;
}

bool mls_http_batch_is_done(const mls_http_batch *batch) { return atomic_load(&batch->left) == 0; }

void mls_http_batch_free(mls_http_batch *batch) { free(batch); }
