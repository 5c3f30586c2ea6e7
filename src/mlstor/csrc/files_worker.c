/* Arrays of files, in the workers: a small file is opened, looked at, read and closed by one io; what does not fit that
 * (the first file of a mount, a large one) is handed over to an operation of its own.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "files_worker.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "steps.h"

/* Up to this a copy costs no more than pinning the pages that it goes to. */
#define SMALL_READ_BYTES (16u << 10)
#define MOST_TRIES 10000

/* A file on its way through its steps. */
struct mls_job {
    mls_completion done;
    struct mls_statx statx;
    mls_mount *mount;
    uint64_t offset, nbytes; /* what is read of it */
    int fd;
    unsigned tries;
    bool direct;             /* opened so */
    bool sample;
};

static const mls_transfer *transfer_of(const mls_io *io)
{
    return &io->op->batch->transfers[io->op->tags[io->unit]];
}

int mls_files_crew(const mls_worker *worker, const mls_op *op)
{
    const mls_crew *direct = &worker->engine->crews[MLS_CREW_DIRECT];
    const mls_backend *backend = direct->backend;
    bool names = backend->takes_names && backend->takes_names(direct->workers[0].state);
    bool one_at_a_time = backend->max_depth == 1;
    return names && (one_at_a_time || atomic_load(&op->batch->files->direct)) ? MLS_CREW_DIRECT : MLS_CREW_BUFFERED;
}

/* ---- reporting ---- */

void mls_files_flush(mls_worker *worker)
{
    if (worker->nfiles_done)
        mls_files_push(worker->files_batch, worker->files_done, worker->nfiles_done);
    worker->nfiles_done = 0;
}

static void report(mls_worker *worker, mls_batch *batch, const mls_completion *done)
{
    worker->files_batch[worker->nfiles_done] = batch;
    worker->files_done[worker->nfiles_done++] = *done;
    if (worker->nfiles_done == MLS_FILE_BATCH)
        mls_files_flush(worker);
}

static void report_job(mls_worker *worker, mls_io *io, int error, int stage, uint64_t now)
{
    struct mls_job *job = io->job;
    mls_op *op = io->op;
    job->done.end_ns = now;
    if (!job->done.first_byte_ns)
        job->done.first_byte_ns = now;
    mls_files_judge(op->batch, op->tags[io->unit], &job->done, error, stage);
    report(worker, op->batch, &job->done);
}

/* ---- steps ---- */

static void go(mls_worker *worker, mls_io *io, int kind)
{
    io->kind = kind;
    io->bytes = NULL;
    io->nbytes = io->io_nbytes = 0;
    io->submit_ns = mls_now_ns();
    worker->in_flight++;
    mls_worker_submit(worker, io);
}

/* The last step: the io is free. */
static void leave(mls_worker *worker, mls_io *io)
{
    mls_op *op = io->op;
    mls_worker_release_io(worker, io);
    if (atomic_fetch_sub(&op->remaining, 1) == 1)
        mls_steps_advance(worker, op, 0);
}

static void close_or_leave(mls_worker *worker, mls_io *io)
{
    if (io->job->fd < 0) {
        leave(worker, io);
        return;
    }
    io->fd = io->job->fd;
    io->job->fd = -1;
    go(worker, io, MLS_IO_CLOSE);
}

static void end(mls_worker *worker, mls_io *io, int error, int stage, uint64_t now)
{
    report_job(worker, io, error, stage, now);
    close_or_leave(worker, io);
}

/* To an operation of its own, which reports it. The size is looked up if it isn't known yet: rare. */
static void hand_over(mls_worker *worker, mls_io *io, bool size_known, uint64_t now)
{
    struct mls_job *job = io->job;
    mls_op *op = io->op;
    size_t member = op->tags[io->unit];
    int error = 0;
    if (!size_known) {
        if (mls_statx_at(op->batch->files->root_fd, mls_batch_key(op->batch, member), MLS_STATX_BASIC_STATS, &job->statx) < 0)
            error = errno;
        else if (!S_ISREG(job->statx.stx_mode))
            error = S_ISDIR(job->statx.stx_mode) ? EISDIR : EINVAL;
        else
            error = mls_files_range(transfer_of(io), job->statx.stx_size, &job->offset, &job->nbytes);
    }
    if (!error)
        error = -mls_files_own_op(op->batch, member, job->offset, job->nbytes, job->done.start_ns);
    if (worker->current) { /* so that the next look at the queue meets it: it may show what the others wait for */
        mls_op_unref(worker->current);
        worker->current = NULL;
    }
    if (error)
        report_job(worker, io, error, MLS_STAGE_OPEN, now);
    close_or_leave(worker, io);
}

static void open_file(mls_worker *worker, mls_io *io)
{
    mls_files *files = io->op->batch->files;
    io->job->direct = atomic_load_explicit(&files->direct, memory_order_relaxed);
    io->fd = files->root_fd;
    io->open_flags = O_RDONLY | O_CLOEXEC | (io->job->direct ? O_DIRECT : 0);
    if (!io->job->tries) /* a FIFO would wait for its writer; a lease that is in the way says EAGAIN, and is waited for */
        io->open_flags |= O_NONBLOCK;
    go(worker, io, MLS_IO_OPEN);
}

void mls_files_begin(mls_worker *worker, mls_op *op, size_t unit)
{
    mls_io *io = worker->free_ios;
    size_t member = op->tags[unit];
    const mls_transfer *transfer = &op->batch->transfers[member];
    worker->free_ios = io->next;
    io->op = op;
    io->unit = unit;
    io->zero_copy = io->confirm = false;
    if (!io->job && !(io->job = malloc(sizeof *io->job))) {
        mls_completion done;
        mls_files_blank(op->batch, member, &done);
        done.start_ns = done.attempt_ns = done.first_byte_ns = done.end_ns = mls_now_ns();
        mls_files_judge(op->batch, member, &done, ENOMEM, MLS_STAGE_OPEN);
        report(worker, op->batch, &done);
        leave(worker, io);
        return;
    }
    struct mls_job *job = io->job;
    mls_files_blank(op->batch, member, &job->done);
    job->fd = -1;
    job->tries = 0;
    job->sample = false;
    job->mount = NULL;
    job->done.start_ns = job->done.attempt_ns = mls_now_ns();
    io->path = mls_batch_key(op->batch, member);
    io->statx = &job->statx;
    if (transfer->op == MLS_TRANSFER_READ) {
        open_file(worker, io);
        return;
    }
    io->fd = op->batch->files->root_fd;
    go(worker, io, transfer->op == MLS_TRANSFER_STAT ? MLS_IO_STAT : MLS_IO_UNLINK);
}

/* Whether the file may be read into the caller's memory now, and counted so: not while a fork is being made. */
static bool claim_user_memory(mls_worker *worker)
{
    atomic_store(&worker->looking, true); /* before the look at `paused`: see mls_engine_pause */
    bool free_to = !atomic_load(&worker->engine->paused);
    if (free_to)
        mls_worker_add_user_memory(worker, 1);
    atomic_store(&worker->looking, false);
    return free_to;
}

/* The caller's memory, if the aligned range can be read into it as it is, else NULL. */
static unsigned char *in_place(mls_worker *worker, const mls_io *io, uint64_t begin, uint64_t nbytes, bool *region)
{
    const mls_transfer *transfer = transfer_of(io);
    const mls_alignment *align = &io->job->mount->align;
    unsigned char *place = io->op->batch->memory.buffer + transfer->place;
    *region = worker->region_attached && worker->region_id == io->op->region_id;
    if (transfer->memory != MLS_TRANSFER_BUFFER || begin != io->job->offset || (uintptr_t)place % align->mem_align)
        return NULL;
    if (nbytes > (transfer->room ? transfer->room : transfer->nbytes)) /* what follows the range would be overwritten */
        return NULL;
    if (nbytes <= SMALL_READ_BYTES && io->job->direct && worker->crew->backend->max_depth > 1 && !*region)
        return NULL;
    return claim_user_memory(worker) ? place : NULL;
}

static void read_file(mls_worker *worker, mls_io *io)
{
    struct mls_job *job = io->job;
    mls_files *files = io->op->batch->files;
    const mls_alignment *align = &job->mount->align;
    uint64_t begin = job->offset / align->read_offset_align * align->read_offset_align;
    uint64_t end = (job->offset + job->nbytes + align->read_offset_align - 1) / align->read_offset_align *
                   align->read_offset_align;
    bool region = false;
    if (end - begin > worker->engine->slot_bytes) {
        hand_over(worker, io, true, mls_now_ns());
        return;
    }
    job->sample = mls_mounts_sample(&files->mounts, job->mount);
    if (job->sample || (files->evict && !job->direct)) /* what others left in the cache is not the storage's answer */
        mls_drop_pages(job->fd, begin, end - begin);
    unsigned char *place = in_place(worker, io, begin, end - begin, &region);
    if (place && job->direct && align->direct_supported == MLS_DIRECT_UNKNOWN)
        mls_worker_touch(place, end - begin);
    io->kind = MLS_IO_READ;
    io->fd = job->fd;
    io->zero_copy = place != NULL;
    io->memory = !place ? MLS_IO_POOL : region ? MLS_IO_REGION : MLS_IO_ANYWHERE;
    io->align = job->direct ? align->read_offset_align : 1;
    io->bytes = io->io_bytes = place ? place : io->slot;
    io->offset = io->io_offset = begin;
    io->nbytes = io->io_nbytes = end - begin;
    io->done_nbytes = io->reached_nbytes = 0;
    io->tries = 0;
    worker->in_flight++;
    worker->in_flight_bytes += io->io_nbytes;
    io->submit_ns = mls_now_ns();
    mls_worker_submit(worker, io);
}

/* ---- what is done ---- */

/* Opened as another mount's files are: the descriptor is switched. */
static bool set_direct(struct mls_job *job)
{
    if (job->direct == job->mount->direct)
        return true;
    job->direct = job->mount->direct;
    int flags = fcntl(job->fd, F_GETFL);
    return flags >= 0 && fcntl(job->fd, F_SETFL, job->direct ? flags | O_DIRECT : flags & ~O_DIRECT) == 0;
}

/* The file is open and known: how much of it is read, and how. */
static uint64_t digest_of(int digest, const unsigned char *bytes, size_t nbytes)
{
    mls_xxh64 xxh64;
    if (digest == MLS_TRANSFER_CRC32C)
        return mls_crc32c(0, bytes, nbytes);
    if (digest == MLS_TRANSFER_CRC32)
        return mls_crc32(0, bytes, nbytes);
    mls_xxh64_reset(&xxh64, 0);
    mls_xxh64_update(&xxh64, bytes, nbytes);
    return mls_xxh64_digest(&xxh64);
}

static void looked_at(mls_worker *worker, mls_io *io, uint64_t now)
{
    struct mls_job *job = io->job;
    mls_files *files = io->op->batch->files;
    if (!S_ISREG(job->statx.stx_mode)) {
        end(worker, io, S_ISDIR(job->statx.stx_mode) ? EISDIR : EINVAL, MLS_STAGE_OPEN, now);
        return;
    }
    job->done.object_nbytes = job->statx.stx_size;
    int error = mls_files_range(transfer_of(io), job->statx.stx_size, &job->offset, &job->nbytes);
    if (error || !job->nbytes) {
        if (!error && transfer_of(io)->digest) { /* nothing has a digest too */
            job->done.digest_value = digest_of(transfer_of(io)->digest, (const unsigned char *)"", 0);
            job->done.kind = (uint8_t)mls_files_compare(transfer_of(io), &job->done);
        }
        end(worker, io, error, MLS_STAGE_OPEN, now);
        return;
    }
    job->mount = mls_mounts_find(&files->mounts, makedev(job->statx.stx_dev_major, job->statx.stx_dev_minor));
    bool small = job->nbytes <= mls_engine_small_bytes(worker->engine);
    if (!small || !job->mount || !set_direct(job))
        hand_over(worker, io, true, now);
    else
        read_file(worker, io);
}

static void opened(mls_worker *worker, mls_io *io, uint64_t now)
{
    struct mls_job *job = io->job;
    struct stat st;
    if ((io->result == -EINTR || io->result == -EAGAIN) && ++job->tries < MOST_TRIES) {
        open_file(worker, io);
        return;
    }
    if (io->result < 0) {
        int error = (int)-io->result;
        if (job->direct && (error == EINVAL || error == EOPNOTSUPP || error == EPERM)) /* O_DIRECT, perhaps */
            hand_over(worker, io, false, now);
        else
            end(worker, io, error, MLS_STAGE_OPEN, now);
        return;
    }
    mls_histogram_add(&worker->times[MLS_TIME_OPEN], now - io->submit_ns);
    job->fd = (int)io->result;
    if (!io->op->batch->files->local) { /* a server may have to be asked */
        io->fd = job->fd;
        io->path = "";
        go(worker, io, MLS_IO_STAT);
        return;
    }
    if (fstat(job->fd, &st) < 0) {
        end(worker, io, errno, MLS_STAGE_OPEN, now);
        return;
    }
    job->statx.stx_mode = (uint16_t)st.st_mode;
    job->statx.stx_size = (uint64_t)st.st_size;
    job->statx.stx_dev_major = major(st.st_dev);
    job->statx.stx_dev_minor = minor(st.st_dev);
    looked_at(worker, io, now);
}

/* The bytes are there: digested, compared or copied while they are hot. */
static void hand_on(const mls_io *io)
{
    const mls_transfer *transfer = transfer_of(io);
    const mls_batch *batch = io->op->batch;
    struct mls_job *job = io->job;
    const unsigned char *bytes = io->io_bytes + (job->offset - io->io_offset);
    if (transfer->digest)
        job->done.digest_value = digest_of(transfer->digest, bytes, job->nbytes);
    if (transfer->memory == MLS_TRANSFER_BUFFER && !io->zero_copy)
        memcpy(batch->memory.buffer + transfer->place, bytes, job->nbytes);
    if (transfer->memory == MLS_TRANSFER_PATTERN) {
        mls_pattern pattern;
        mls_pattern_init(&pattern, batch->pattern.run_id, batch->pattern.checkpoint, transfer->place,
                         batch->pattern.compressibility);
        job->done.damaged_blocks = (uint32_t)mls_pattern_check(&pattern, bytes, job->offset, job->nbytes, NULL, 0, NULL);
    }
    job->done.kind = (uint8_t)mls_files_compare(transfer, &job->done);
}

static void was_read(mls_worker *worker, mls_io *io, uint64_t now)
{
    struct mls_job *job = io->job;
    mls_files *files = io->op->batch->files;
    enum mls_outcome outcome = mls_worker_judge(io, job->offset + job->nbytes - io->io_offset);
    if (outcome == MLS_OUTCOME_AGAIN) {
        mls_worker_go_on(worker, io);
        return;
    }
    worker->in_flight_bytes -= io->io_nbytes;
    if (io->zero_copy)
        mls_worker_add_user_memory(worker, -1);
    if (outcome != MLS_OUTCOME_COMPLETE) {
        bool refused = outcome == MLS_OUTCOME_ERROR && job->direct && io->result == -EINVAL;
        if (refused) /* another alignment than the mount's, perhaps */
            hand_over(worker, io, true, now);
        else
            end(worker, io, outcome == MLS_OUTCOME_SHORT ? MLS_ESHORT : (int)-io->result, MLS_STAGE_TRANSFER, now);
        return;
    }
    job->done.result = (int64_t)job->nbytes;
    job->done.first_byte_ns = now;
    mls_worker_account(worker, io->op, io, job->nbytes, now);
    if (job->sample)
        mls_mounts_look(&files->mounts, job->mount, job->fd, job->offset, job->nbytes);
    if (files->evict && !job->direct)
        mls_drop_pages(job->fd, io->io_offset, io->io_nbytes);
    hand_on(io);
    end(worker, io, 0, MLS_STAGE_NONE, now);
}

/* STAT, of a name or of a file just opened, and DELETE. */
static void asked(mls_worker *worker, mls_io *io, uint64_t now)
{
    struct mls_job *job = io->job;
    if (io->result == -EINTR && ++job->tries < MOST_TRIES) {
        go(worker, io, io->kind);
        return;
    }
    int error = io->result < 0 ? (int)-io->result : 0;
    if (!error && job->fd >= 0) {
        looked_at(worker, io, now);
        return;
    }
    if (!error && io->kind == MLS_IO_STAT) {
        error = S_ISDIR(job->statx.stx_mode) ? EISDIR : 0;
        job->done.object_nbytes = job->statx.stx_size;
    }
    end(worker, io, error, MLS_STAGE_NONE, now);
}

void mls_files_complete(mls_worker *worker, mls_io *io, uint64_t now)
{
    switch (io->kind) {
    case MLS_IO_OPEN:
        opened(worker, io, now);
        break;
    case MLS_IO_READ:
        was_read(worker, io, now);
        break;
    case MLS_IO_CLOSE: /* an error of a read-only close says nothing about what was read */
        leave(worker, io);
        break;
    default:
        asked(worker, io, now);
    }
}

/* ---- operations with a batch ---- */

int mls_files_check_length(const mls_op *op)
{
    uint64_t offset, nbytes;
    return mls_files_range(&op->batch->transfers[op->member], op->file->nbytes, &offset, &nbytes);
}

int mls_files_make_parents(const mls_op *op)
{
    const mls_files *files = op->batch->files;
    char *path = strdup(mls_batch_key(op->batch, op->member));
    int error = path ? 0 : -ENOMEM;
    for (char *slash = path ? strchr(path, '/') : NULL; slash && !error; slash = strchr(slash + 1, '/')) {
        *slash = '\0';
        if (mkdirat(files->root_fd, path, 0777) < 0) {
            error = errno == EEXIST ? 0 : -errno;
        } else if (files->write_steps & MLS_STEP_FSYNC_DIR) { /* the new name lies in the directory above */
            char *above = strrchr(path, '/');
            if (above)
                *above = '\0';
            int fd = openat(files->root_fd, above ? path : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
            error = fd < 0 || fsync(fd) < 0 ? -errno : 0;
            if (fd >= 0)
                close(fd);
            if (above)
                *above = '/';
        }
        *slash = '/';
    }
    free(path);
    return error;
}

static void report_own(mls_worker *worker, mls_op *op)
{
    const mls_transfer *transfer = &op->batch->transfers[op->member];
    mls_files *files = op->batch->files;
    const mls_result *result = &op->result;
    mls_completion done;
    mls_files_blank(op->batch, op->member, &done);
    done.end_ns = mls_now_ns();
    done.start_ns = done.attempt_ns = op->begin_ns ? op->begin_ns : done.end_ns;
    uint64_t first_byte_ns = atomic_load(&op->first_byte_ns);
    done.first_byte_ns = first_byte_ns && op->kind == MLS_OP_READ ? first_byte_ns : done.end_ns;
    done.object_nbytes = op->kind == MLS_OP_WRITE ? op->file_nbytes : op->file->nbytes;
    done.damaged_blocks = (uint32_t)result->damaged_blocks;
    if (!result->error) {
        done.result = (int64_t)result->nbytes;
        if (transfer->digest) /* an operation without bytes has no groups */
            done.digest_value = result->nbytes ? mls_op_digest(op, 0) : digest_of(transfer->digest, (const unsigned char *)"", 0);
        done.kind = (uint8_t)mls_files_compare(transfer, &done);
    }
    if (!result->error && op->kind == MLS_OP_READ && result->nbytes)
        if (mls_mounts_learn(&files->mounts, op->file))
            atomic_store(&files->direct, op->file->direct);
    mls_files_judge(op->batch, op->member, &done, result->error, result->stage);
    report(worker, op->batch, &done);
}

void mls_files_op_ended(mls_worker *worker, mls_op *op)
{
    if (op->kind == MLS_OP_FILES) {
        int error = atomic_load(&op->failed);
        for (size_t i = op->unclaimed; error && i < op->nunits; i++) {
            mls_completion done;
            mls_files_blank(op->batch, op->tags[i], &done);
            done.start_ns = done.attempt_ns = done.first_byte_ns = done.end_ns = mls_now_ns();
            mls_files_judge(op->batch, op->tags[i], &done, error, MLS_STAGE_NONE);
            report(worker, op->batch, &done);
        }
    } else {
        report_own(worker, op);
    }
    mls_files_flush(worker); /* the operation holds their batch */
    mls_files_forget(op->batch->files, op);
}
