/* The worker's loop: take units, submit them, reap what is done, hand it on. What becomes of an operation between its
 * transfers (open, late bytes, tail, syncs, rename) is in steps.c.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "worker.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "files_worker.h"
#include "plan.h"
#include "steps.h"

#define REAP_BATCH 64
#define SMALL_READ_BYTES (16u << 10)
#define REGION_IDLE_NS 1000000000u
#define SETTLES 4 /* 1, 10, 100 and 1000 ms after the last completion */
#define FIRST_SETTLE_NS 1000000u

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

static uint64_t pace_ns(const mls_op *op, uint64_t nbytes)
{
    return (uint64_t)((double)nbytes * 1e9 / (double)op->bytes_per_s);
}

/* Whether a limit of bytes/s lets a unit be taken now; else the worker is to look again when one may be. */
static bool is_due(mls_worker *worker, mls_op *op)
{
    if (!op->bytes_per_s)
        return true;
    uint64_t due = atomic_load(&op->due_ns);
    if (due <= mls_now_ns())
        return true;
    if (due < worker->due_ns)
        worker->due_ns = due;
    return false;
}

/* A unit was taken. What fell behind is caught up with, up to one block. */
static void charge(mls_op *op, size_t unit)
{
    uint64_t cost = pace_ns(op, op->units[unit].nbytes), credit = pace_ns(op, op->block_bytes), now = mls_now_ns();
    uint64_t earliest = now > credit ? now - credit : 0, due = atomic_load(&op->due_ns), next;
    do
        next = (due > earliest ? due : earliest) + cost;
    while (!atomic_compare_exchange_weak(&op->due_ns, &due, next));
}

/* The next unit of an operation, if it has one that may be taken now. */
static bool claim(mls_worker *worker, mls_op *op, size_t *unit)
{
    size_t next = atomic_load(&op->next);
    while (next < atomic_load(&op->avail)) {
        if (!is_due(worker, op))
            return false;
        if (atomic_compare_exchange_weak(&op->next, &next, next + 1)) {
            if (op->bytes_per_s)
                charge(op, next);
            *unit = next;
            return true;
        }
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
            if (op->file && op->kind != MLS_OP_RANGES) {
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
        if (claim(worker, op, unit)) {
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
        if (room && current && !atomic_load(&current->failed) && claim(worker, current, unit)) {
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

void mls_worker_submit(mls_worker *worker, mls_io *io)
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
    mls_worker_submit(worker, io);
}

void mls_worker_touch(unsigned char *bytes, uint64_t nbytes)
{
    volatile unsigned char *page = bytes; /* about to be overwritten */
    for (uint64_t i = 0; i < nbytes; i += 4096)
        page[i] = 0;
    page[nbytes - 1] = 0;
}

static void transfer(mls_worker *worker, mls_op *op, size_t index)
{
    if (op->kind == MLS_OP_FILES) {
        mls_files_begin(worker, op, index);
        return;
    }
    const mls_unit *unit = &op->units[index];
    mls_file *file = mls_op_file(op, index);
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
        mls_drop_pages(file->fd, begin, end - begin);
    if (!writing && in_place && file->direct && file->align.direct_supported == MLS_DIRECT_UNKNOWN)
        mls_worker_touch(in_place, end - begin);
    if (writing && in_place)
        mls_plan_gather(op, unit->first_extent, begin, end - begin, NULL, !second_pass, true);
    else if (writing)
        mls_plan_gather(op, unit->first_extent, begin, end - begin, io->slot, !second_pass, true);
    if (io->zero_copy)
        mls_worker_add_user_memory(worker, 1);
    io->bytes = io->io_bytes;
    io->offset = io->io_offset;
    io->nbytes = io->io_nbytes;
    worker->in_flight++;
    worker->in_flight_bytes += io->io_nbytes;
    io->submit_ns = mls_now_ns();
    mls_worker_submit(worker, io); /* the engine's reference holds `op`: it ends only when no unit remains */
}

static bool has_room(const mls_worker *worker)
{
    return worker->free_ios && worker->in_flight < worker->crew->depth &&
           (!worker->window.bytes || !worker->in_flight || worker->in_flight_bytes < worker->window.bytes);
}

/* As many units as there is room for. */
static void fill(mls_worker *worker)
{
    mls_engine *engine = worker->engine;
    mls_op *op;
    size_t unit;
    worker->due_ns = UINT64_MAX;
    atomic_store(&worker->looking, true); /* before the look at `paused`: see mls_engine_pause */
    while (has_room(worker) && !atomic_load(&engine->paused) && take(worker, &op, &unit))
        transfer(worker, op, unit);
    atomic_store(&worker->looking, false);
}

/* ---- the loop ---- */

/* When the backend is to let go of files next: some time after the last completion, a few times. */
static uint64_t settle_at(const mls_worker *worker)
{
    uint64_t after = FIRST_SETTLE_NS;
    if (!worker->reaped_ns || worker->settles == SETTLES || !worker->crew->backend->settle)
        return UINT64_MAX;
    for (unsigned i = 0; i < worker->settles; i++)
        after *= 10;
    return worker->reaped_ns + after;
}

/* Waits until something has changed since `seen`, or a unit is due. False when the crew is to end. On the way the backend
 * lets go of files, and of the caller's memory after a while: it may long have been freed. */
static bool idle(mls_worker *worker, unsigned long seen)
{
    mls_engine *engine = worker->engine;
    mls_crew *crew = worker->crew;
    uint64_t let_go = worker->region_attached ? mls_now_ns() + REGION_IDLE_NS : UINT64_MAX;
    uint64_t end = worker->due_ns < let_go ? worker->due_ns : let_go;
    bool timed_out = false;
    pthread_mutex_lock(&engine->lock);
    while (!crew->stopping && atomic_load(&crew->changes) == seen && !timed_out) {
        uint64_t settle = settle_at(worker), next = settle < end ? settle : end;
        struct timespec until = {(time_t)(next / 1000000000u), (long)(next % 1000000000u)};
        int error = next != UINT64_MAX ? pthread_cond_timedwait(&crew->work, &engine->lock, &until)
                                       : pthread_cond_wait(&crew->work, &engine->lock);
        timed_out = error == ETIMEDOUT && next == end;
        if (error == ETIMEDOUT && !timed_out) {
            pthread_mutex_unlock(&engine->lock);
            crew->backend->settle(worker->state);
            worker->settles++;
            pthread_mutex_lock(&engine->lock);
        }
    }
    bool go_on = !crew->stopping;
    pthread_mutex_unlock(&engine->lock);
    if (timed_out && end == let_go)
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
        mls_worker_submit(worker, io);
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
            mls_count(&worker->busy_ns, mls_now_ns() - mark);
            if (!idle(worker, seen))
                break;
            mls_window_rest(&worker->window);
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
        worker->reaped_ns = now;
        worker->settles = 0;
        uint64_t waited = now - (backend->max_depth > 1 || !ndone ? asked : done[0]->submit_ns); /* threads block in submit */
        mls_count(&worker->wait_ns, waited);
        mls_count(&worker->busy_ns, now - mark > waited ? now - mark - waited : 0);
        mark = now;
        for (size_t i = 0; i < ndone; i++)
            mls_worker_complete(worker, done[i], now);
        mls_worker_flush_ranges(worker);
        mls_files_flush(worker);
    }
    if (worker->current)
        mls_op_unref(worker->current);
    backend->close(worker->state);
    return NULL;
}
