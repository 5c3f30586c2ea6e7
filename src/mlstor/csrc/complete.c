/* What a worker does with a transfer that is done: judges it, hands its bytes on, reports it. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "worker.h"

#include <errno.h>

#include "files_worker.h"
#include "plan.h"
#include "steps.h"

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
        (mls_range_done){op->tags[io->unit], result, now - io->submit_ns, now};
}

void mls_worker_release_io(mls_worker *worker, mls_io *io)
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
    mls_worker_release_io(worker, io);
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

/* A transfer that the kernel keeps putting off is given up after so many tries in a row. */
#define MOST_TRIES 10000

enum mls_outcome mls_worker_judge(mls_io *io, uint64_t needed)
{
    if ((io->result == -EINTR || io->result == -EAGAIN) && ++io->tries < MOST_TRIES)
        return MLS_OUTCOME_AGAIN;
    if (io->result < 0)
        return MLS_OUTCOME_ERROR;
    uint64_t reached = io->done_nbytes + (uint64_t)io->result;
    bool progress = reached > io->reached_nbytes;
    io->reached_nbytes = progress ? reached : io->reached_nbytes;
    io->tries = 0;
    if (reached >= needed)
        return MLS_OUTCOME_COMPLETE;
    return progress ? MLS_OUTCOME_AGAIN : MLS_OUTCOME_SHORT;
}

void mls_worker_go_on(mls_worker *worker, mls_io *io)
{
    io->done_nbytes = io->reached_nbytes / io->align * io->align;
    io->bytes = io->io_bytes + io->done_nbytes;
    io->offset = io->io_offset + io->done_nbytes;
    io->nbytes = io->io_nbytes - io->done_nbytes;
    mls_count(&worker->retried, 1);
    worker->in_flight++;
    mls_worker_submit(worker, io);
}

void mls_worker_account(mls_worker *worker, mls_op *op, const mls_io *io, uint64_t nbytes, uint64_t now)
{
    bool writing = op->kind == MLS_OP_WRITE;
    mls_count(writing ? &worker->written_bytes : &worker->read_bytes, nbytes);
    mls_count(io->zero_copy ? &worker->zero_copy_bytes : &worker->staged_bytes, nbytes);
    mls_count(writing ? &worker->writes : &worker->reads, 1);
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
    mls_worker_release_io(worker, io);
    if (atomic_fetch_sub(&op->remaining, 1) == 1) {
        mls_worker_flush_ranges(worker);
        mls_steps_advance(worker, op, 0);
    }
}

static void complete_transfer(mls_worker *worker, mls_io *io, uint64_t now)
{
    mls_op *op = io->op;
    mls_file *file = mls_op_file(op, io->unit);
    const mls_unit *unit = &op->units[io->unit];
    bool writing = op->kind == MLS_OP_WRITE;
    uint64_t needed = writing ? io->io_nbytes : unit->offset + unit->nbytes - io->io_offset;
    enum mls_outcome outcome = mls_worker_judge(io, needed);
    if (outcome == MLS_OUTCOME_AGAIN && !atomic_load(&op->failed)) {
        mls_worker_go_on(worker, io);
        return;
    }
    worker->in_flight_bytes -= io->io_nbytes;
    mls_window_note(&worker->window, io->io_nbytes, now - io->submit_ns, now);
    int error = outcome == MLS_OUTCOME_AGAIN ? atomic_load(&op->failed) : outcome == MLS_OUTCOME_ERROR ? (int)-io->result : outcome == MLS_OUTCOME_SHORT ? (writing ? EIO : MLS_ESHORT) : 0;
    if (io->zero_copy)
        mls_worker_add_user_memory(worker, -1);
    if (error && op->probing && file->direct && (error == EINVAL || error == EOPNOTSUPP)) {
        mls_worker_release_io(worker, io);
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
        mls_worker_account(worker, op, io, unit->nbytes, now);
        uint64_t none = 0;
        if (op->batch)
            atomic_compare_exchange_strong(&op->first_byte_ns, &none, now);
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

void mls_worker_complete(mls_worker *worker, mls_io *io, uint64_t now)
{
    mls_op *op = io->op;
    worker->in_flight--;
    if (op->kind == MLS_OP_FILES) {
        mls_files_complete(worker, io, now);
        return;
    }
    if (io->kind == MLS_IO_READ || io->kind == MLS_IO_WRITE) {
        complete_transfer(worker, io, now);
        return;
    }
    if (io->result == -EINTR) {
        mls_worker_sync(worker, op, io->fd, io->kind);
    } else {
        mls_count(&worker->syncs, 1);
        mls_histogram_add(&worker->times[MLS_TIME_SYNC], now - io->submit_ns);
        mls_steps_advance(worker, op, io->result < 0 ? (int)-io->result : 0);
    }
    mls_op_unref(op);
}
