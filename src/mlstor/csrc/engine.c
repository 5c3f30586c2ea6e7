#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "engine.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "worker.h"

#define MAX_THREADS 256
/* Half of the usual RLIMIT_NOFILE of 1024: thousands of tiny files may be handed over at once. */
#define MOST_OPEN_FILES ((size_t)512)
#define HUGE_PAGE_BYTES ((size_t)2 << 20)
/* A range that is not aligned spans one alignment block more at each end. */
#define SLOT_MARGIN_BYTES ((uint64_t)2 * 4096)

static void cond_init_monotonic(pthread_cond_t *cond)
{
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(cond, &attr);
    pthread_condattr_destroy(&attr);
}

/* False when `deadline_ns` (0: none) has passed. */
static bool cond_wait_until(pthread_cond_t *cond, pthread_mutex_t *lock, uint64_t deadline_ns)
{
    if (!deadline_ns) {
        pthread_cond_wait(cond, lock);
        return true;
    }
    struct timespec until = {(time_t)(deadline_ns / 1000000000u), (long)(deadline_ns % 1000000000u)};
    return pthread_cond_timedwait(cond, lock, &until) != ETIMEDOUT;
}

static uint64_t deadline_after(int64_t timeout_ns) { return timeout_ns < 0 ? 0 : mls_now_ns() + (uint64_t)timeout_ns; }

/* ---- crews ---- */

static int worker_prepare(mls_worker *worker, mls_engine *engine, mls_crew *crew)
{
    worker->engine = engine;
    worker->crew = crew;
    for (int i = 0; i < MLS_TIMINGS; i++)
        mls_histogram_reset(&worker->times[i]);
    size_t slots = crew->depth * engine->slot_bytes;
    size_t page = slots >= 8 * HUGE_PAGE_BYTES ? HUGE_PAGE_BYTES : 4096; /* all of it will be touched */
    worker->pool_nbytes = (slots + page - 1) / page * page;
    mls_window_init(&worker->window, crew->depth > 1 ? engine->config.window_bytes : 0, worker->pool_nbytes);
    worker->pool = mmap(NULL, worker->pool_nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (worker->pool == MAP_FAILED) {
        worker->pool = NULL;
        return -errno;
    }
    /* A child must not copy pages that the kernel writes to (open(2) on O_DIRECT and fork). */
    madvise(worker->pool, worker->pool_nbytes, MADV_DONTFORK);
    if (engine->config.huge_pages)
        madvise(worker->pool, worker->pool_nbytes, MADV_HUGEPAGE);
    worker->ios = calloc(crew->depth, sizeof *worker->ios);
    if (!worker->ios)
        return -ENOMEM;
    for (unsigned i = 0; i < crew->depth; i++) {
        worker->ios[i].slot = worker->pool + i * engine->slot_bytes;
        worker->ios[i].next = worker->free_ios;
        worker->free_ios = &worker->ios[i];
    }
    return 0;
}

static void worker_release(mls_worker *worker)
{
    if (worker->pool)
        munmap(worker->pool, worker->pool_nbytes);
    for (unsigned i = 0; worker->ios && i < worker->crew->depth; i++)
        free(worker->ios[i].job);
    free(worker->ios);
}

static void crew_join(mls_crew *crew, unsigned started)
{
    for (unsigned i = 0; i < started; i++)
        pthread_join(crew->workers[i].thread, NULL);
    for (unsigned i = 0; i < crew->nworkers; i++)
        worker_release(&crew->workers[i]);
    free(crew->workers);
    crew->workers = NULL;
    crew->started = crew->stopping = false;
}

/* Threads, pools and rings of a crew. 0 or -errno; nothing is left behind on failure. Engine's lock not held. */
static int crew_start(mls_engine *engine, mls_crew *crew)
{
    sigset_t all, before;
    unsigned started = 0;
    int error = 0;
    crew->workers = calloc(crew->nworkers, sizeof *crew->workers);
    if (!crew->workers)
        return -ENOMEM;
    for (unsigned i = 0; i < crew->nworkers; i++)
        crew->workers[i].setup_error = 1; /* not known yet */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the caller's threads */
    for (; started < crew->nworkers && !error; started += !error) {
        mls_worker *worker = &crew->workers[started];
        error = worker_prepare(worker, engine, crew);
        if (!error)
            error = -pthread_create(&worker->thread, NULL, mls_worker_main, worker);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_mutex_lock(&engine->lock);
    for (unsigned i = 0; i < started; i++) {
        while (crew->workers[i].setup_error > 0)
            pthread_cond_wait(&engine->quiet, &engine->lock);
        if (!error)
            error = crew->workers[i].setup_error;
    }
    crew->started = !error;
    if (error) { /* those that are up end when they see this */
        crew->stopping = true;
        pthread_cond_broadcast(&crew->work);
    }
    pthread_mutex_unlock(&engine->lock);
    if (error)
        crew_join(crew, started);
    return error;
}

static void wake_locked(mls_crew *crew)
{
    atomic_fetch_add(&crew->changes, 1);
    pthread_cond_broadcast(&crew->work);
    for (unsigned i = 0; crew->started && i < crew->nworkers; i++)
        if (atomic_load(&crew->workers[i].waiting))
            crew->backend->wake(crew->workers[i].state);
}

void mls_crew_wake(mls_engine *engine, mls_crew *crew)
{
    pthread_mutex_lock(&engine->lock);
    wake_locked(crew);
    pthread_mutex_unlock(&engine->lock);
}

void mls_crew_enqueue_locked(mls_crew *crew, mls_op *op, bool front)
{
    op->queued = true;
    op->queue_prev = front ? NULL : crew->tail;
    op->queue_next = front ? crew->head : NULL;
    *(op->queue_prev ? &op->queue_prev->queue_next : &crew->head) = op;
    *(op->queue_next ? &op->queue_next->queue_prev : &crew->tail) = op;
}

void mls_crew_dequeue_locked(mls_crew *crew, mls_op *op)
{
    if (!op->queued)
        return;
    op->queued = false;
    *(op->queue_prev ? &op->queue_prev->queue_next : &crew->head) = op->queue_next;
    *(op->queue_next ? &op->queue_next->queue_prev : &crew->tail) = op->queue_prev;
}

int mls_crew_ensure(mls_engine *engine, int index)
{
    mls_crew *crew = &engine->crews[index];
    int error = 0;
    pthread_mutex_lock(&engine->starting);
    if (!crew->started)
        error = crew_start(engine, crew);
    pthread_mutex_unlock(&engine->starting);
    return error;
}

/* ---- life ---- */

/* `crew` runs on `backend`: as many workers as it takes to have the configured depth. 0 or -errno. */
static int crew_choose(mls_engine *engine, mls_crew *crew, const mls_backend *backend)
{
    const mls_config *config = &engine->config;
    unsigned threads = config->workers * config->depth;
    bool one_at_a_time = backend->max_depth == 1;
    crew->backend = backend;
    crew->nworkers = !one_at_a_time ? config->workers : threads < MAX_THREADS ? threads : MAX_THREADS;
    crew->depth = config->depth < backend->max_depth ? config->depth : backend->max_depth;
    return crew == &engine->crews[MLS_CREW_DIRECT] ? crew_start(engine, crew) : 0;
}

static mls_engine *engine_alloc(const mls_config *config)
{
    mls_engine *engine = calloc(1, sizeof *engine);
    if (!engine)
        return NULL;
    size_t in_flight = (size_t)config->workers * config->depth;
    engine->config = *config;
    engine->most_open_files = in_flight < MOST_OPEN_FILES ? in_flight : MOST_OPEN_FILES;
    engine->slot_bytes = config->block_bytes + SLOT_MARGIN_BYTES;
    pthread_mutex_init(&engine->lock, NULL);
    pthread_mutex_init(&engine->starting, NULL);
    pthread_mutex_init(&engine->latches.lock, NULL);
    cond_init_monotonic(&engine->done_cond);
    cond_init_monotonic(&engine->quiet);
    for (int i = 0; i < 2; i++)
        cond_init_monotonic(&engine->crews[i].work);
    return engine;
}

mls_engine *mls_engine_new_on(const mls_config *config, const mls_backend *backend, int *error)
{
    mls_engine *engine = engine_alloc(config);
    *error = -ENOMEM;
    if (!engine)
        return NULL;
    crew_choose(engine, &engine->crews[MLS_CREW_BUFFERED], backend);
    *error = crew_choose(engine, &engine->crews[MLS_CREW_DIRECT], backend);
    if (!*error)
        return engine;
    mls_engine_free(engine);
    return NULL;
}

mls_engine *mls_engine_new(const mls_config *config, int *error)
{
    *error = -EINVAL;
    if (!config->workers || !config->depth || !config->block_bytes)
        return NULL;
    mls_engine *engine = engine_alloc(config);
    *error = -ENOMEM;
    if (!engine)
        return NULL;
    mls_crew *direct = &engine->crews[MLS_CREW_DIRECT];
    crew_choose(engine, &engine->crews[MLS_CREW_BUFFERED], &mls_backend_threads);
    *error = -ENOSYS;
    snprintf(engine->granted, sizeof engine->granted, "threads were asked for");
    if (config->backend != MLS_BACKEND_THREADS) {
#ifdef MLS_HAVE_LIBURING
        *error = crew_choose(engine, direct, &mls_backend_uring);
        if (*error == 0)
            snprintf(engine->granted, sizeof engine->granted, "%s", direct->workers[0].granted);
        else
            snprintf(engine->granted, sizeof engine->granted, "io_uring refused: %s", strerror(-*error));
#else
        snprintf(engine->granted, sizeof engine->granted, "built without liburing");
#endif
        if (*error && config->backend == MLS_BACKEND_URING) {
            mls_engine_free(engine);
            return NULL;
        }
    }
    if (*error)
        *error = crew_choose(engine, direct, &mls_backend_threads);
    if (*error) {
        mls_engine_free(engine);
        return NULL;
    }
    return engine;
}

void mls_engine_free(mls_engine *engine)
{
    atomic_store(&engine->closing, true);
    mls_engine_cancel_all(engine);
    mls_engine_drain(engine, -1);
    for (int i = 0; i < 2; i++) {
        mls_crew *crew = &engine->crews[i];
        if (crew->started) {
            pthread_mutex_lock(&engine->lock);
            crew->stopping = true;
            pthread_mutex_unlock(&engine->lock);
            mls_crew_wake(engine, crew);
            crew_join(crew, crew->nworkers);
        }
        pthread_cond_destroy(&crew->work);
    }
    while (engine->done_head) {
        mls_op *op = engine->done_head;
        engine->done_head = op->done_next;
        mls_op_unref(op);
    }
    pthread_cond_destroy(&engine->done_cond);
    pthread_cond_destroy(&engine->quiet);
    pthread_mutex_destroy(&engine->latches.lock);
    pthread_mutex_destroy(&engine->starting);
    pthread_mutex_destroy(&engine->lock);
    free(engine);
}

const char *mls_engine_backend(const mls_engine *engine) { return engine->crews[MLS_CREW_DIRECT].backend->name; }
const char *mls_engine_granted(const mls_engine *engine) { return engine->granted; }
unsigned mls_engine_workers(const mls_engine *engine) { return engine->crews[MLS_CREW_DIRECT].nworkers; }
mls_latches *mls_engine_latches(mls_engine *engine) { return &engine->latches; }

uint64_t mls_engine_small_bytes(const mls_engine *engine)
{
    uint64_t block = engine->config.block_bytes;
    return engine->config.automatic_block && block > MLS_AUTOMATIC_BLOCK_BYTES ? MLS_AUTOMATIC_BLOCK_BYTES : block;
}

/* ---- operations ---- */

static int submit(mls_engine *engine, mls_op **ops, size_t count, bool front)
{
    mls_crew *crew = &engine->crews[MLS_CREW_DIRECT];
    for (size_t i = 0; i < count; i++)
        if (ops[i]->block_bytes > engine->config.block_bytes)
            return -EINVAL;
    uint64_t now = mls_now_ns();
    pthread_mutex_lock(&engine->lock);
    for (size_t i = 0; i < count; i++) {
        mls_op_ref(ops[i]);
        if (!ops[i]->block_bytes && !engine->config.automatic_block)
            ops[i]->block_bytes = engine->config.block_bytes;
        ops[i]->result.start_ns = now;
        ops[i]->crew = MLS_CREW_DIRECT;
        mls_crew_enqueue_locked(crew, ops[i], front);
        engine->in_flight++;
    }
    pthread_mutex_unlock(&engine->lock);
    mls_crew_wake(engine, crew);
    return 0;
}

int mls_engine_submit(mls_engine *engine, mls_op **ops, size_t count) { return submit(engine, ops, count, false); }
int mls_engine_submit_first(mls_engine *engine, mls_op *op) { return submit(engine, &op, 1, true); }

void mls_engine_finished(mls_engine *engine, mls_op *op)
{
    op->result.end_ns = mls_now_ns();
    pthread_mutex_lock(&engine->lock);
    mls_crew_dequeue_locked(&engine->crews[op->crew], op);
    engine->in_flight--;
    bool was_full = op->opened && engine->open_files-- == engine->most_open_files;
    bool array = op->kind == MLS_OP_RANGES || op->batch; /* reported elsewhere */
    if (!array) {
        op->done_next = NULL;
        if (engine->done_tail)
            engine->done_tail->done_next = op;
        else
            engine->done_head = op;
        engine->done_tail = op;
    }
    atomic_store(&op->done, true);
    pthread_cond_broadcast(&engine->done_cond);
    if (was_full) /* under the lock: with nothing in flight the engine may be freed as soon as it is open */
        wake_locked(&engine->crews[MLS_CREW_DIRECT]);
    pthread_mutex_unlock(&engine->lock);
    if (array)
        mls_op_unref(op);
}

size_t mls_engine_reap(mls_engine *engine, mls_op **ops, size_t max, size_t min, int64_t timeout_ns)
{
    uint64_t deadline = deadline_after(timeout_ns);
    size_t count = 0;
    pthread_mutex_lock(&engine->lock);
    for (;;) {
        while (count < max && engine->done_head) {
            ops[count++] = engine->done_head;
            engine->done_head = engine->done_head->done_next;
            if (!engine->done_head)
                engine->done_tail = NULL;
        }
        if (count >= min || count == max || !engine->in_flight ||
            !cond_wait_until(&engine->done_cond, &engine->lock, deadline))
            break;
    }
    pthread_mutex_unlock(&engine->lock);
    return count;
}

bool mls_engine_wait(mls_engine *engine, mls_op *op, int64_t timeout_ns)
{
    uint64_t deadline = deadline_after(timeout_ns);
    pthread_mutex_lock(&engine->lock);
    while (!atomic_load(&op->done) && cond_wait_until(&engine->done_cond, &engine->lock, deadline))
        continue;
    pthread_mutex_unlock(&engine->lock);
    return atomic_load(&op->done);
}

void mls_engine_cancel(mls_engine *engine, mls_op *op)
{
    if (atomic_load(&op->done))
        return;
    mls_op_fail(op, MLS_ECANCELED, MLS_STAGE_NONE, 0);
    for (int i = 0; i < 2; i++)
        mls_crew_wake(engine, &engine->crews[i]);
}

void mls_engine_cancel_all(mls_engine *engine)
{
    pthread_mutex_lock(&engine->lock);
    for (int i = 0; i < 2; i++)
        for (mls_op *op = engine->crews[i].head; op; op = op->queue_next)
            mls_op_fail(op, MLS_ECANCELED, MLS_STAGE_NONE, 0);
    pthread_mutex_unlock(&engine->lock);
    for (int i = 0; i < 2; i++)
        mls_crew_wake(engine, &engine->crews[i]);
}

bool mls_engine_drain(mls_engine *engine, int64_t timeout_ns)
{
    uint64_t deadline = deadline_after(timeout_ns);
    pthread_mutex_lock(&engine->lock);
    while (engine->in_flight && cond_wait_until(&engine->done_cond, &engine->lock, deadline))
        continue;
    bool drained = engine->in_flight == 0;
    pthread_mutex_unlock(&engine->lock);
    return drained;
}

size_t mls_engine_in_flight(mls_engine *engine)
{
    pthread_mutex_lock(&engine->lock);
    size_t count = engine->in_flight;
    pthread_mutex_unlock(&engine->lock);
    return count;
}

/* Transfers that touch the caller's memory, and with `looking` also workers that may be about to begin some. */
static unsigned user_memory(mls_engine *engine, bool looking)
{
    unsigned sum = 0;
    pthread_mutex_lock(&engine->lock);
    for (int c = 0; c < 2; c++)
        for (unsigned i = 0; engine->crews[c].started && i < engine->crews[c].nworkers; i++) {
            mls_worker *worker = &engine->crews[c].workers[i];
            sum += looking && atomic_load(&worker->looking); /* first: it ends after its transfers are counted */
            sum += atomic_load(&worker->user_memory);
        }
    pthread_mutex_unlock(&engine->lock);
    return sum;
}

unsigned mls_engine_user_memory(mls_engine *engine) { return user_memory(engine, false); }

void mls_engine_pause(mls_engine *engine)
{
    const struct timespec tick = {0, 200000};
    atomic_fetch_add(&engine->paused, 1);
    while (user_memory(engine, true))
        nanosleep(&tick, NULL);
}

void mls_engine_resume(mls_engine *engine)
{
    atomic_fetch_sub(&engine->paused, 1);
    for (int i = 0; i < 2; i++)
        mls_crew_wake(engine, &engine->crews[i]);
}

void mls_engine_counters(mls_engine *engine, mls_counters *sum)
{
    memset(sum, 0, sizeof *sum);
    pthread_mutex_lock(&engine->lock);
    for (int c = 0; c < 2; c++) {
        mls_crew *crew = &engine->crews[c];
        for (unsigned i = 0; crew->started && i < crew->nworkers; i++) {
            mls_worker *worker = &crew->workers[i];
#define ADD(field) sum->field += atomic_load_explicit(&worker->field, memory_order_relaxed)
            ADD(read_bytes), ADD(written_bytes), ADD(reads), ADD(writes), ADD(syncs), ADD(busy_ns), ADD(wait_ns);
            ADD(zero_copy_bytes), ADD(staged_bytes), ADD(retried);
#undef ADD
        }
    }
    pthread_mutex_unlock(&engine->lock);
}

bool mls_engine_reset_histograms(mls_engine *engine)
{
    pthread_mutex_lock(&engine->lock);
    bool quiet = engine->in_flight == 0;
    for (int c = 0; quiet && c < 2; c++)
        for (unsigned i = 0; engine->crews[c].started && i < engine->crews[c].nworkers; i++)
            for (int timing = 0; timing < MLS_TIMINGS; timing++)
                mls_histogram_reset(&engine->crews[c].workers[i].times[timing]);
    pthread_mutex_unlock(&engine->lock);
    return quiet;
}

void mls_engine_histogram(mls_engine *engine, int timing, mls_histogram *sum)
{
    mls_histogram_reset(sum);
    pthread_mutex_lock(&engine->lock);
    for (int c = 0; c < 2; c++)
        for (unsigned i = 0; engine->crews[c].started && i < engine->crews[c].nworkers; i++)
            mls_histogram_merge(sum, &engine->crews[c].workers[i].times[timing]);
    pthread_mutex_unlock(&engine->lock);
}
