#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "steps.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "files_worker.h"
#include "plan.h"

static uint64_t automatic_block(const mls_engine *engine, const mls_file *file)
{
    uint64_t preferred = file->align.blksize;
    uint64_t block = preferred > MLS_AUTOMATIC_BLOCK_BYTES ? preferred : MLS_AUTOMATIC_BLOCK_BYTES;
    return block < engine->config.block_bytes ? block : engine->config.block_bytes;
}

static uint64_t tail_start(const mls_op *op)
{
    uint32_t align = op->file->direct ? op->file->align.offset_align : 1;
    return op->file_nbytes / align * align;
}

/* Ranges of an operation that failed before they were taken: each is reported, or its caller would wait for ever. */
static void report_unclaimed(const mls_op *op)
{
    int error = atomic_load(&op->failed);
    uint64_t now = mls_now_ns();
    for (size_t i = op->unclaimed; error && i < op->nunits; i++) {
        mls_range_done done = {op->tags[i], -(int64_t)(error == MLS_ECANCELED ? ECANCELED : error), 0, now};
        mls_range_queue_push(op->ranges_queue, &done, 1);
    }
}

/* What the result says of the file, and the end of what was open. */
static void settle_result(mls_worker *worker, mls_op *op)
{
    mls_file *file = op->file;
    mls_result *result = &op->result;
    if (op->dir_fd >= 0)
        close(op->dir_fd);
    op->dir_fd = -1;
    free(op->sync_io);
    op->sync_io = NULL;
    result->nbytes = atomic_load(&op->transferred);
    result->zero_copy_bytes = atomic_load(&op->zero_copy);
    result->staged_bytes = atomic_load(&op->staged);
    result->threads = worker->crew->backend == &mls_backend_threads;
    result->align = file->align;
    result->file_nbytes = file->nbytes;
    result->direct = atomic_load(&file->confirmed);
    if (op->kind == MLS_OP_RANGES) {
        mls_worker_flush_ranges(worker);
        report_unclaimed(op);
    } else { /* their file is shared by operations that are still under way */
        memcpy(result->reason, file->reason, sizeof result->reason);
        mls_file_close(file); /* an error of a read-only close says nothing about what was read */
        if (file->temporary) {
            unlink(file->temporary);
            free(file->temporary);
            file->temporary = NULL;
        }
    }
}

static void finish(mls_worker *worker, mls_op *op)
{
    pthread_mutex_lock(&op->lock); /* an error that is just being noted comes first, a later one too late */
    op->ended = true;
    pthread_mutex_unlock(&op->lock);
    atomic_store(&op->state, MLS_STATE_DONE);
    if (op->file)
        settle_result(worker, op);
    if (op->batch)
        mls_files_op_ended(worker, op);
    mls_engine_finished(worker->engine, op);
}

static void fail_and_finish(mls_worker *worker, mls_op *op, int error, int stage, uint64_t offset)
{
    mls_op_fail(op, error, stage, offset);
    finish(worker, op);
}

/* Units [begin, end) may be taken, in front of the queue of its crew: what was begun is ended before more is opened. At
 * first one only, if direct I/O has not been seen to work here. `avail` is set last: nobody can take one before. */
static void begin_phase(mls_worker *worker, mls_op *op, size_t begin, size_t end, int crew)
{
    mls_engine *engine = worker->engine;
    int error = begin == end ? 0 : mls_crew_ensure(engine, crew);
    if (error) {
        fail_and_finish(worker, op, -error, MLS_STAGE_OPEN, 0);
        return;
    }
    if (atomic_load(&engine->closing))
        mls_op_fail(op, MLS_ECANCELED, MLS_STAGE_NONE, 0);
    op->probing = op->file && op->file->direct && !op->file->proven && op->kind != MLS_OP_RANGES;
    /* Under the lock: who looks through the queue must not meet a phase half begun, and who claims the last unit must
     * not end the operation before it is queued. */
    pthread_mutex_lock(&engine->lock);
    mls_crew_dequeue_locked(&engine->crews[op->crew], op);
    bool same = op->crew == crew;
    op->crew = crew;
    /* What comes from the other crew has waited its turn there, and does so here. */
    if (begin != end)
        mls_crew_enqueue_locked(&engine->crews[crew], op, same);
    op->unclaimed = end;
    atomic_store(&op->state, MLS_STATE_DATA);
    atomic_store(&op->remaining, end - begin);
    atomic_store(&op->phase_end, end);
    atomic_store(&op->next, begin);
    atomic_store(&op->avail, op->probing && begin < end ? begin + 1 : end);
    pthread_mutex_unlock(&engine->lock);
    if (begin == end)
        mls_steps_advance(worker, op, 0);
    else
        mls_crew_wake(engine, &engine->crews[crew]);
}

/* Cuts the units and starts on them, on the crew that the file's path asks for. */
static void start_data(mls_worker *worker, mls_op *op)
{
    mls_engine *engine = worker->engine;
    bool writing = op->kind == MLS_OP_WRITE;
    uint64_t align = writing ? op->file->align.offset_align : op->file->align.read_offset_align; /* 1 where buffered */
    bool threads = !op->file->direct && engine->crews[MLS_CREW_DIRECT].backend != &mls_backend_threads;
    int error = 0;
    if (!op->block_bytes)
        op->block_bytes = automatic_block(engine, op->file);
    if (op->block_bytes % align)
        op->block_bytes = op->block_bytes < align ? align : op->block_bytes / align * align;
    if (op->block_bytes > engine->config.block_bytes)
        error = -EINVAL; /* the file system's alignment is larger than a staging slot */
    if (!error && op->kind != MLS_OP_RANGES)
        error = mls_plan_units(op, writing ? tail_start(op) : UINT64_MAX);
    if (error) {
        fail_and_finish(worker, op, -error, MLS_STAGE_OPEN, 0);
        return;
    }
    op->owner = NULL;
    op->data_start_ns = mls_now_ns();
    begin_phase(worker, op, 0, op->late_done ? op->nunits : op->nunits - op->nlate,
                threads ? MLS_CREW_BUFFERED : MLS_CREW_DIRECT);
}

/* Of an array of files: with the directories that it lies in, and of the length that was announced. 0, -errno, or
 * -MLS_E*. */
static int open_file(mls_worker *worker, mls_op *op)
{
    bool writing = op->kind == MLS_OP_WRITE, temporary = writing && (op->steps & MLS_STEP_RENAME);
    mls_latches *latches = &worker->engine->latches;
    int error = mls_file_open(op->file, writing, temporary, op->direct_mode, latches);
    if (error == -ENOENT && writing && op->batch) {
        error = mls_files_make_parents(op);
        free(op->file->temporary); /* it was not made */
        op->file->temporary = NULL;
        if (!error)
            error = mls_file_open(op->file, writing, temporary, op->direct_mode, latches);
    }
    return !error && !writing && op->batch ? -mls_files_check_length(op) : error;
}

void mls_steps_open(mls_worker *worker, mls_op *op)
{
    bool writing = op->kind == MLS_OP_WRITE;
    mls_file *file = op->file;
    uint64_t began = mls_now_ns();
    int error = 0;
    if (atomic_load(&op->failed)) {
        finish(worker, op);
        return;
    }
    if (op->kind == MLS_OP_RANGES) {
        start_data(worker, op);
        return;
    }
    if (!op->begin_ns)
        op->begin_ns = began;
    if (op->kind == MLS_OP_FILES) {
        begin_phase(worker, op, 0, op->nunits, mls_files_crew(worker, op));
        return;
    }
    op->sync_io = calloc(1, sizeof *op->sync_io);
    if (!op->sync_io)
        error = -ENOMEM;
    if (!error)
        error = open_file(worker, op);
    if (error) {
        fail_and_finish(worker, op, -error, MLS_STAGE_OPEN, 0);
        return;
    }
    if (op->steps & MLS_STEP_RANDOM)
        posix_fadvise(file->fd, 0, 0, POSIX_FADV_RANDOM);
    if (writing && (op->steps & MLS_STEP_PREALLOCATE)) {
        error = mls_file_preallocate(file, op->file_nbytes);
        if (error) {
            fail_and_finish(worker, op, -error, MLS_STAGE_ALLOCATE, 0);
            return;
        }
    }
    op->result.open_ns = mls_now_ns() - began;
    mls_histogram_add(&worker->times[MLS_TIME_OPEN], op->result.open_ns);
    start_data(worker, op);
}

void mls_steps_fall_back(mls_worker *worker, mls_op *op, int error)
{
    bool writing = op->kind == MLS_OP_WRITE;
    int result = mls_file_fall_back(op->file, writing, op->direct_mode, error, &worker->engine->latches);
    op->probing = false;
    pthread_mutex_lock(&worker->engine->lock); /* nobody is to look at it while it is planned anew */
    mls_crew_dequeue_locked(&worker->engine->crews[op->crew], op);
    pthread_mutex_unlock(&worker->engine->lock);
    if (worker->current == op) { /* the other crew's now: two owners would break the order of a serial one */
        worker->current = NULL;
        mls_op_unref(op);
    }
    if (result < 0) {
        fail_and_finish(worker, op, -result, MLS_STAGE_TRANSFER, 0);
        return;
    }
    for (size_t g = 0; g < op->ngroups && !op->late_done; g++) { /* the first unit comes again */
        atomic_store(&op->groups[g].crc, 0);
        mls_xxh64_reset(&op->groups[g].xxh64, 0);
    }
    op->next_ordered = 0;
    if (writing && (op->steps & MLS_STEP_PREALLOCATE))
        result = mls_file_preallocate(op->file, op->file_nbytes);
    if (result < 0) {
        fail_and_finish(worker, op, -result, MLS_STAGE_ALLOCATE, 0);
        return;
    }
    start_data(worker, op);
}

void mls_steps_settle(mls_op *op, uint64_t offset, uint64_t nbytes)
{
    if (op->steps & MLS_STEP_DONTNEED)
        posix_fadvise(op->file->fd, (off_t)offset, (off_t)nbytes, POSIX_FADV_DONTNEED);
    else if (op->kind == MLS_OP_WRITE) /* starts write-back, so that the cache does not fill; durable it is not */
        sync_file_range(op->file->fd, (off_t)offset, (off_t)nbytes, SYNC_FILE_RANGE_WRITE);
}

/* Digests what shares a unit or the tail with late bytes, then asks for them. */
static int supply_late(mls_op *op)
{
    uint64_t tail = tail_start(op);
    for (size_t i = op->nunits - op->nlate; i < op->nunits; i++) {
        const mls_unit *unit = &op->units[i];
        mls_plan_gather(op, unit->first_extent, unit->offset, unit->nbytes, NULL, true, false);
    }
    if (tail < op->file_nbytes)
        mls_plan_gather(op, (uint32_t)mls_plan_find(op, tail), tail, op->file_nbytes - tail, NULL, true, false);
    return op->late(op->user);
}

static int write_tail(mls_op *op)
{
    uint64_t tail = tail_start(op);
    size_t nbytes = (size_t)(op->file_nbytes - tail);
    if (!nbytes)
        return 0;
    unsigned char *bytes = malloc(nbytes);
    if (!bytes)
        return -ENOMEM;
    mls_plan_gather(op, (uint32_t)mls_plan_find(op, tail), tail, nbytes, bytes, !op->late_done, true);
    int error = mls_file_write_tail(op->file, bytes, nbytes, tail);
    free(bytes);
    if (!error) {
        atomic_fetch_add_explicit(&op->transferred, nbytes, memory_order_relaxed);
        atomic_fetch_add_explicit(&op->staged, nbytes, memory_order_relaxed);
    }
    return error;
}

/* After the data: a file without the allocation step gets its size even where its end is a gap. */
static int set_size(mls_op *op)
{
    uint64_t end = op->nextents ? op->extents[op->nextents - 1].offset + op->extents[op->nextents - 1].nbytes : 0;
    return end < op->file_nbytes && ftruncate(op->file->fd, (off_t)op->file_nbytes) < 0 ? -errno : 0;
}

/* Close, rename, and where asked the directory's sync. True if the operation is at its end. */
static bool commit(mls_worker *worker, mls_op *op)
{
    int error = mls_file_close(op->file);
    if (error < 0) {
        mls_op_fail(op, -error, MLS_STAGE_CLOSE, 0);
        return true;
    }
    error = mls_file_publish(op->file);
    if (error < 0) {
        mls_op_fail(op, -error, MLS_STAGE_RENAME, 0);
        return true;
    }
    pthread_mutex_lock(&op->lock);
    op->published = true;
    pthread_mutex_unlock(&op->lock);
    if (!(op->steps & MLS_STEP_FSYNC_DIR))
        return true;
    op->dir_fd = mls_file_open_dir(op->file);
    if (op->dir_fd < 0) {
        mls_op_fail(op, -op->dir_fd, MLS_STAGE_SYNC_DIR, 0);
        return true;
    }
    op->state = MLS_STATE_SYNC_DIR;
    mls_worker_sync(worker, op, op->dir_fd, MLS_IO_FSYNC);
    return false;
}

/* All units are done. True if the operation goes on with a sync or with its late units. */
static bool after_data(mls_worker *worker, mls_op *op)
{
    op->result.data_ns = mls_now_ns() - op->data_start_ns;
    if (atomic_load(&op->failed) || op->kind != MLS_OP_WRITE)
        return false;
    if (op->has_late && !op->late_done) {
        if (supply_late(op) < 0) {
            mls_op_fail(op, MLS_ELATE, MLS_STAGE_LATE, 0);
            return false;
        }
        op->late_done = true;
        if (op->nlate) {
            begin_phase(worker, op, op->nunits - op->nlate, op->nunits, op->crew);
            return true;
        }
    }
    int error = write_tail(op);
    if (!error)
        error = set_size(op);
    if (error) {
        mls_op_fail(op, -error, MLS_STAGE_TAIL, tail_start(op));
        return false;
    }
    op->step_start_ns = mls_now_ns();
    op->state = MLS_STATE_SYNC;
    if (op->steps & (MLS_STEP_FSYNC | MLS_STEP_FDATASYNC)) {
        mls_worker_sync(worker, op, op->file->fd, op->steps & MLS_STEP_FSYNC ? MLS_IO_FSYNC : MLS_IO_FDATASYNC);
        return true;
    }
    return false;
}

void mls_steps_advance(mls_worker *worker, mls_op *op, int error)
{
    uint64_t now;
    if (op->state == MLS_STATE_DATA) {
        if (after_data(worker, op))
            return;
        if (op->state != MLS_STATE_SYNC) {
            finish(worker, op);
            return;
        }
    }
    now = mls_now_ns();
    if (op->state == MLS_STATE_SYNC) {
        op->result.sync_ns = now - op->step_start_ns;
        if (error) {
            fail_and_finish(worker, op, error, MLS_STAGE_SYNC, 0);
            return;
        }
        if (atomic_load(&op->failed)) { /* cancelled meanwhile: the former file stays */
            finish(worker, op);
            return;
        }
        op->step_start_ns = now;
        if (!commit(worker, op))
            return;
    } else if (error) {
        mls_op_fail(op, error, MLS_STAGE_SYNC_DIR, 0);
    }
    op->result.commit_ns = mls_now_ns() - op->step_start_ns;
    mls_histogram_add(&worker->times[MLS_TIME_COMMIT], op->result.commit_ns);
    finish(worker, op);
}
