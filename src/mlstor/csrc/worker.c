/* The worker's loop: take units, submit them, reap what is done, hand it on. What becomes of an operation between its
 * transfers (open, late bytes, tail, syncs, rename) is in steps.c.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "worker.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "plan.h"
#include "steps.h"

#define REAP_BATCH 64
#define SMALL_READ_BYTES (16u << 10)
#define REGION_IDLE_S 1
/* At 4 MiB per worker in flight, 4 ms are 1 GB/s per worker: below that rate more in flight may help. */
#define SLOW_TRANSFER_NS 4000000u

static void count(_Atomic uint64_t *counter, uint64_t n) /* one writer */
{
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + n, memory_order_relaxed);
}

static void add_user_memory(mls_worker *worker, int n) /* one writer */
{
    unsigned now = atomic_load_explicit(&worker->user_memory, memory_order_relaxed);
    atomic_store_explicit(&worker->user_memory, now + (unsigned)n, memory_order_release);
}

/* ---- the caller's memory, registered ---- */

/* At the second operation in a row that has the region: pinning its pages takes longer than a few reads. */
static void attach_region(mls_worker *worker, const mls_op *op)
{
    const mls_backend *backend = worker->crew->backend;
    if (!backend->attach)
        return;
    if (worker->region_id != op->region_id && worker->next_region_id == op->region_id) {
        worker->region_attached = backend->attach(worker->state, op->region, op->region_nbytes) == 0;
        worker->region_id = op->region_id; /* after a refusal too: it would be refused again */
    }
    worker->next_region_id = op->region_id;
}

static void detach_region(mls_worker *worker)
{
    if (worker->region_attached)
        worker->crew->backend->attach(worker->state, NULL, 0);
    worker->region_attached = false;
    worker->region_id = worker->next_region_id = 0;
}

/* ---- taking ---- */

/* The next unit of an operation, if it has one that may be taken now. */
static bool claim(mls_op *op, size_t *unit)
{
    size_t next = atomic_load(&op->next);
    while (next < atomic_load(&op->avail))
        if (atomic_compare_exchange_weak(&op->next, &next, next + 1)) {
            *unit = next;
            return true;
        }
    return false;
}

/* A failed or cancelled operation: its units that nobody took are done. True if those were the last ones. */
static bool abandon_rest(mls_op *op)
{
    size_t end = atomic_load(&op->phase_end);
    size_t next = atomic_exchange(&op->next, end);
    size_t skipped = next < end ? end - next : 0;
    op->unclaimed = next < end ? next : end;
    return skipped && atomic_fetch_sub(&op->remaining, skipped) == skipped;
}

static bool exhausted(const mls_op *op) { return atomic_load(&op->next) >= atomic_load(&op->phase_end); }

/* Looks through the queue for something to do: an operation to open (*opened), to end (*ended), or with a unit. */
static mls_op *search(mls_worker *worker, size_t *unit, bool *opened, bool *ended)
{
    mls_crew *crew = worker->crew;
    *opened = *ended = false;
    for (mls_op *op = crew->head, *following; op; op = following) {
        following = op->queue_next;
        if (op->state == MLS_STATE_NEW) {
            mls_engine *engine = worker->engine;
            if (op->kind != MLS_OP_RANGES) {
                if (engine->open_files >= engine->most_open_files)
                    return NULL; /* those that were begun are in front of it; mls_engine_finished wakes */
                engine->open_files++;
                op->opened = true;
            }
            mls_crew_dequeue_locked(crew, op);
            *opened = true;
            return op;
        }
        if (atomic_load(&op->failed)) {
            mls_crew_dequeue_locked(crew, op);
            *ended = abandon_rest(op);
            if (*ended)
                return op;
            continue;
        }
        if (op->serial && op->owner && op->owner != worker)
            continue;
        if (claim(op, unit)) {
            op->owner = worker;
            if (exhausted(op))
                mls_crew_dequeue_locked(crew, op);
            return op;
        }
        if (exhausted(op))
            mls_crew_dequeue_locked(crew, op);
    }
    return NULL;
}

/* A unit to transfer, opening and ending operations on the way. The operation is referenced by worker->current. */
static bool take(mls_worker *worker, mls_op **op, size_t *unit)
{
    mls_engine *engine = worker->engine;
    for (;;) {
        bool opened, ended;
        mls_op *current = worker->current;
        bool room = worker->in_flight < worker->crew->depth; /* opening may have put syncs in flight */
        if (room && current && !atomic_load(&current->failed) && claim(current, unit)) {
            *op = current;
            return true;
        }
        worker->current = NULL;
        pthread_mutex_lock(&engine->lock);
        mls_op *found = room ? search(worker, unit, &opened, &ended) : NULL;
        if (found)
            mls_op_ref(found);
        pthread_mutex_unlock(&engine->lock);
        if (current)
            mls_op_unref(current);
        if (!found)
            return false;
        if (!opened && !ended) {
            if (found->region_id)
                attach_region(worker, found);
            worker->current = *op = found;
            return true;
        }
        if (opened)
            mls_steps_open(worker, found);
        else
            mls_steps_advance(worker, found, 0);
        mls_op_unref(found);
    }
}

/* ---- submitting ---- */

static void submit(mls_worker *worker, mls_io *io)
{
    const mls_backend *backend = worker->crew->backend;
    if (backend->submit(worker->state, io) == 0)
        return;
    io->next = worker->deferred;
    worker->deferred = io;
}

void mls_worker_sync(mls_worker *worker, mls_op *op, int fd, int kind)
{
    mls_io *io = op->sync_io;
    memset(io, 0, sizeof *io);
    io->kind = kind;
    io->fd = fd;
    io->op = op;
    io->submit_ns = mls_now_ns();
    mls_op_ref(op);
    worker->in_flight++;
    submit(worker, io);
}

/* btrfs, which does not report its alignment, reads through the page cache into memory that has never been touched. */
static void touch_destination(unsigned char *bytes, uint64_t nbytes)
{
    volatile unsigned char *page = bytes; /* about to be overwritten */
    for (uint64_t i = 0; i < nbytes; i += 4096)
        page[i] = 0;
    page[nbytes - 1] = 0;
}

static void transfer(mls_worker *worker, mls_op *op, size_t index)
{
    const mls_unit *unit = &op->units[index];
    mls_file *file = op->file;
    bool writing = op->kind == MLS_OP_WRITE;
    uint32_t offset_align = writing ? file->align.offset_align : file->align.read_offset_align;
    mls_io *io = worker->free_ios;
    worker->free_ios = io->next;
    uint64_t begin = unit->offset / offset_align * offset_align;
    uint64_t end = (unit->offset + unit->nbytes + offset_align - 1) / offset_align * offset_align;
    /* A small read goes through the registered pool: the copy costs no more than pinning its page. Where the
     * destination is registered too, it costs neither. */
    bool small = !writing && file->direct && unit->nbytes <= SMALL_READ_BYTES && worker->crew->backend->max_depth > 1;
    bool region = worker->region_attached && worker->region_id == op->region_id;
    unsigned char *in_place = small && !region ? NULL : mls_plan_zero_copy(op, unit, file->align.mem_align, offset_align);
    bool second_pass = op->late_done; /* what is not late was digested before */
    io->kind = writing ? MLS_IO_WRITE : MLS_IO_READ;
    io->fd = file->fd;
    io->op = op;
    io->unit = index;
    io->zero_copy = in_place != NULL;
    io->memory = !in_place ? MLS_IO_POOL : region ? MLS_IO_REGION : MLS_IO_ANYWHERE;
    io->align = file->direct ? offset_align : 1;
    io->io_bytes = in_place ? in_place : io->slot;
    io->io_offset = begin;
    io->io_nbytes = end - begin;
    io->done_nbytes = io->reached_nbytes = 0;
    io->tries = 0;
    io->confirm = file->direct && !atomic_load_explicit(&file->confirming, memory_order_relaxed) &&
                  !atomic_exchange(&file->confirming, true);
    if (io->confirm && !writing) /* what others left in the cache would be taken for ours */
        posix_fadvise(file->fd, (off_t)begin, (off_t)(end - begin), POSIX_FADV_DONTNEED);
    if (!writing && in_place && file->direct && file->align.direct_supported == MLS_DIRECT_UNKNOWN)
        touch_destination(in_place, end - begin);
    if (writing && in_place)
        mls_plan_gather(op, unit->first_extent, begin, end - begin, NULL, !second_pass, true);
    else if (writing)
        mls_plan_gather(op, unit->first_extent, begin, end - begin, io->slot, !second_pass, true);
    if (io->zero_copy)
        add_user_memory(worker, 1);
    io->bytes = io->io_bytes;
    io->offset = io->io_offset;
    io->nbytes = io->io_nbytes;
    worker->in_flight++;
    worker->in_flight_bytes += io->io_nbytes;
    io->submit_ns = mls_now_ns();
    submit(worker, io); /* the engine's reference holds `op`: it ends only when no unit remains */
}

static bool has_room(const mls_worker *worker)
{
    return worker->free_ios && worker->in_flight < worker->crew->depth &&
           (!worker->window_bytes || !worker->in_flight || worker->in_flight_bytes < worker->window_bytes);
}

/* What is in flight grows where transfers take long: more of it costs nothing on slow storage, hides latency on distant
 * storage, and is held back where it would only push the staging memory out of the caches. */
static void adapt_window(mls_worker *worker, uint64_t nbytes, uint64_t took_ns)
{
    if (!worker->window_bytes || worker->window_bytes >= worker->pool_nbytes)
        return;
    worker->took_ns += took_ns;
    worker->took_count++;
    worker->took_bytes += nbytes;
    if (worker->took_bytes < 2 * worker->window_bytes)
        return;
    if (worker->took_ns / worker->took_count > SLOW_TRANSFER_NS)
        worker->window_bytes *= 2;
    worker->took_ns = worker->took_count = worker->took_bytes = 0;
}

/* As many units as there is room for. */
static void fill(mls_worker *worker)
{
    mls_engine *engine = worker->engine;
    mls_op *op;
    size_t unit;
    atomic_store(&worker->looking, true); /* before the look at `paused`: see mls_engine_pause */
    while (has_room(worker) && !atomic_load(&engine->paused) && take(worker, &op, &unit))
        transfer(worker, op, unit);
    atomic_store(&worker->looking, false);
}

/* ---- completing ---- */

void mls_worker_flush_ranges(mls_worker *worker)
{
    if (worker->nranges)
        mls_range_queue_push(worker->ranges_queue, worker->ranges, worker->nranges);
    worker->nranges = 0;
}

static void report_range(mls_worker *worker, const mls_io *io, int64_t result, uint64_t now)
{
    mls_op *op = io->op;
    if (worker->nranges == MLS_RANGE_BATCH || worker->ranges_queue != op->ranges_queue)
        mls_worker_flush_ranges(worker);
    worker->ranges_queue = op->ranges_queue;
    worker->ranges[worker->nranges++] =
        (mls_range_done){op->tags[io->unit], result, now - io->submit_ns};
}

static void release(mls_worker *worker, mls_io *io)
{
    io->next = worker->free_ios;
    worker->free_ios = io;
}

/* The bytes of a unit are there: hand them on, in file order where a digest needs that. */
static void deliver(mls_worker *worker, mls_io *io)
{
    mls_op *op = io->op;
    if (op->kind != MLS_OP_WRITE && !atomic_load(&op->failed))
        mls_plan_scatter(op, &op->units[io->unit], io->io_bytes, io->io_offset, io->zero_copy);
    release(worker, io);
    if (atomic_fetch_sub(&op->remaining, 1) == 1)
        mls_steps_advance(worker, op, 0);
}

static void deliver_in_turn(mls_worker *worker, mls_io *io)
{
    mls_op *op = io->op;
    mls_op_ref(op);
    io->next = op->parked;
    op->parked = io;
    for (mls_io **link = &op->parked; *link;) {
        mls_io *parked = *link;
        if (parked->unit != op->next_ordered && !atomic_load(&op->failed)) {
            link = &parked->next;
            continue;
        }
        *link = parked->next;
        op->next_ordered = parked->unit + 1;
        deliver(worker, parked);
        link = &op->parked;
    }
    mls_op_unref(op);
}

/* What a completion means for its transfer. */
enum outcome { OUTCOME_COMPLETE, OUTCOME_AGAIN, OUTCOME_SHORT, OUTCOME_ERROR };

/* A transfer that the kernel keeps putting off is given up after so many tries in a row. */
#define MOST_TRIES 10000

/* Takes a result into account; `needed` bytes of the transfer are wanted. */
static enum outcome judge(mls_io *io, uint64_t needed)
{
    if ((io->result == -EINTR || io->result == -EAGAIN) && ++io->tries < MOST_TRIES)
        return OUTCOME_AGAIN;
    if (io->result < 0)
        return OUTCOME_ERROR;
    uint64_t reached = io->done_nbytes + (uint64_t)io->result;
    bool progress = reached > io->reached_nbytes;
    io->reached_nbytes = progress ? reached : io->reached_nbytes;
    io->tries = 0;
    if (reached >= needed)
        return OUTCOME_COMPLETE;
    return progress ? OUTCOME_AGAIN : OUTCOME_SHORT;
}

/* A transfer that the kernel cut short goes on from the last aligned place that it reached. */
static void go_on(mls_worker *worker, mls_io *io)
{
    io->done_nbytes = io->reached_nbytes / io->align * io->align;
    io->bytes = io->io_bytes + io->done_nbytes;
    io->offset = io->io_offset + io->done_nbytes;
    io->nbytes = io->io_nbytes - io->done_nbytes;
    count(&worker->retried, 1);
    worker->in_flight++;
    submit(worker, io);
}

static void account(mls_worker *worker, mls_op *op, const mls_io *io, uint64_t nbytes, uint64_t now)
{
    bool writing = op->kind == MLS_OP_WRITE;
    count(writing ? &worker->written_bytes : &worker->read_bytes, nbytes);
    count(io->zero_copy ? &worker->zero_copy_bytes : &worker->staged_bytes, nbytes);
    count(writing ? &worker->writes : &worker->reads, 1);
    if (op->kind != MLS_OP_RANGES) {
        atomic_fetch_add_explicit(&op->transferred, nbytes, memory_order_relaxed);
        atomic_fetch_add_explicit(io->zero_copy ? &op->zero_copy : &op->staged, nbytes, memory_order_relaxed);
    }
    mls_histogram_add(&worker->times[writing ? MLS_TIME_WRITE : MLS_TIME_READ], now - io->submit_ns);
}

static void finish_range(mls_worker *worker, mls_io *io, int error, uint64_t now)
{
    mls_op *op = io->op;
    const mls_unit *unit = &op->units[io->unit];
    if (!error)
        mls_plan_scatter(op, unit, io->io_bytes, io->io_offset, io->zero_copy);
    int code = error == MLS_ECANCELED ? ECANCELED : error;
    report_range(worker, io, error ? -(int64_t)code : (int64_t)unit->nbytes, now);
    release(worker, io);
    if (atomic_fetch_sub(&op->remaining, 1) == 1) {
        mls_worker_flush_ranges(worker);
        mls_steps_advance(worker, op, 0);
    }
}

static void complete_transfer(mls_worker *worker, mls_io *io, uint64_t now)
{
    mls_op *op = io->op;
    mls_file *file = op->file;
    const mls_unit *unit = &op->units[io->unit];
    bool writing = op->kind == MLS_OP_WRITE;
    uint64_t needed = writing ? io->io_nbytes : unit->offset + unit->nbytes - io->io_offset;
    enum outcome outcome = judge(io, needed);
    if (outcome == OUTCOME_AGAIN && !atomic_load(&op->failed)) {
        go_on(worker, io);
        return;
    }
    worker->in_flight_bytes -= io->io_nbytes;
    adapt_window(worker, io->io_nbytes, now - io->submit_ns);
    int error = outcome == OUTCOME_AGAIN ? atomic_load(&op->failed) : outcome == OUTCOME_ERROR ? (int)-io->result : outcome == OUTCOME_SHORT ? (writing ? EIO : MLS_ESHORT) : 0;
    if (io->zero_copy)
        add_user_memory(worker, -1);
    if (error && op->probing && file->direct && (error == EINVAL || error == EOPNOTSUPP)) {
        release(worker, io);
        mls_steps_fall_back(worker, op, error);
        return;
    }
    if (error && op->kind != MLS_OP_RANGES)
        mls_op_fail(op, error, MLS_STAGE_TRANSFER, error == MLS_ESHORT ? io->io_offset + io->reached_nbytes : io->io_offset);
    if (!error) {
        if (io->confirm)
            mls_file_confirm(file, io->io_offset, needed, &worker->engine->latches);
        if (!file->direct)
            mls_steps_settle(op, io->io_offset, io->io_nbytes);
        account(worker, op, io, unit->nbytes, now);
    }
    if (op->probing) {
        op->probing = false;
        file->proven = !error;
        atomic_store(&op->avail, atomic_load(&op->phase_end));
        mls_crew_wake(worker->engine, worker->crew);
    }
    if (op->kind == MLS_OP_RANGES) {
        finish_range(worker, io, error, now);
    } else if (op->ordered && !writing) {
        deliver_in_turn(worker, io);
    } else {
        deliver(worker, io);
    }
}

static void complete(mls_worker *worker, mls_io *io, uint64_t now)
{
    mls_op *op = io->op;
    worker->in_flight--;
    if (io->kind == MLS_IO_READ || io->kind == MLS_IO_WRITE) {
        complete_transfer(worker, io, now);
        return;
    }
    if (io->result == -EINTR) {
        mls_worker_sync(worker, op, io->fd, io->kind);
    } else {
        count(&worker->syncs, 1);
        mls_histogram_add(&worker->times[MLS_TIME_SYNC], now - io->submit_ns);
        mls_steps_advance(worker, op, io->result < 0 ? (int)-io->result : 0);
    }
    mls_op_unref(op);
}

/* ---- the loop ---- */

/* Waits until something has changed since `seen`. False when the crew is to end. The caller's memory is let go after a
 * while: it may long have been freed. */
static bool idle(mls_worker *worker, unsigned long seen)
{
    mls_engine *engine = worker->engine;
    mls_crew *crew = worker->crew;
    int error = 0;
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += REGION_IDLE_S;
    pthread_mutex_lock(&engine->lock);
    while (!crew->stopping && atomic_load(&crew->changes) == seen && !error)
        error = worker->region_attached ? pthread_cond_timedwait(&crew->work, &engine->lock, &until)
                                        : pthread_cond_wait(&crew->work, &engine->lock);
    bool go_on = !crew->stopping;
    pthread_mutex_unlock(&engine->lock);
    if (error)
        detach_region(worker);
    return go_on;
}

static void begin(mls_worker *worker)
{
    const mls_backend *backend = worker->crew->backend;
    mls_engine *engine = worker->engine;
    for (size_t i = 0; i < worker->pool_nbytes; i += 4096)
        ((volatile unsigned char *)worker->pool)[i] = 0; /* first touch: here, where it is used */
    int error = backend->setup(&worker->state, worker->crew->depth, worker->pool, worker->pool_nbytes,
                               engine->config.registration, worker->granted, sizeof worker->granted);
    pthread_mutex_lock(&engine->lock);
    worker->setup_error = error;
    pthread_cond_broadcast(&engine->quiet);
    pthread_mutex_unlock(&engine->lock);
}

static void retry_deferred(mls_worker *worker)
{
    mls_io *io = worker->deferred;
    worker->deferred = NULL;
    while (io) {
        mls_io *following = io->next;
        submit(worker, io);
        io = following;
    }
}

void *mls_worker_main(void *argument)
{
    mls_worker *worker = argument;
    const mls_backend *backend = worker->crew->backend;
    mls_io *done[REAP_BATCH];
    begin(worker);
    if (worker->setup_error)
        return NULL;
    uint64_t mark = mls_now_ns();
    for (;;) {
        unsigned long seen = atomic_load(&worker->crew->changes);
        retry_deferred(worker);
        fill(worker);
        if (!worker->in_flight) {
            count(&worker->busy_ns, mls_now_ns() - mark);
            if (!idle(worker, seen))
                break;
            mark = mls_now_ns();
            continue;
        }
        bool room = has_room(worker);
        atomic_store(&worker->waiting, room);
        if (room)
            fill(worker); /* what came between the last look and the flag */
        uint64_t asked = mls_now_ns();
        size_t ndone = backend->reap(worker->state, done, REAP_BATCH);
        atomic_store(&worker->waiting, false);
        uint64_t now = mls_now_ns();
        uint64_t waited = now - (backend->max_depth > 1 || !ndone ? asked : done[0]->submit_ns); /* threads block in submit */
        count(&worker->wait_ns, waited);
        count(&worker->busy_ns, now - mark > waited ? now - mark - waited : 0);
        mark = now;
        for (size_t i = 0; i < ndone; i++)
            complete(worker, done[i], now);
        mls_worker_flush_ranges(worker);
    }
    if (worker->current)
        mls_op_unref(worker->current);
    backend->close(worker->state);
    return NULL;
}
