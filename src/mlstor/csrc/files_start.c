/* Arrays of files: batches become operations, at once or when their time comes. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "files_worker.h"

/* Transfers of a batch that are to begin later, the next one first. */
typedef struct mls_delayed {
    mls_batch *batch;
    size_t *members;
    size_t next, count;
    struct mls_delayed *following;
} mls_delayed;

/* ---- operations ---- */

static void end_early(mls_batch *batch, size_t member, int error)
{
    mls_completion done;
    mls_files_blank(batch, member, &done);
    done.start_ns = done.attempt_ns = done.first_byte_ns = done.end_ns = mls_now_ns();
    mls_files_judge(batch, member, &done, error, MLS_STAGE_NONE);
    mls_files_push(&batch, &done, 1);
}

void mls_files_forget(mls_files *files, mls_op *op)
{
    pthread_mutex_lock(&files->lock);
    if (op->batch_next)
        op->batch_next->batch_prev = op->batch_prev;
    *(op->batch_prev ? &op->batch_prev->batch_next : &files->ops) = op->batch_next;
    pthread_mutex_unlock(&files->lock);
}

/* An operation of the batch, which it refers to. */
static mls_op *new_op(mls_batch *batch, int kind, const char *path, size_t nextents, size_t ngroups)
{
    mls_op *op = mls_op_new(kind, path, NULL, nextents, ngroups);
    if (!op)
        return NULL;
    op->batch = batch;
    atomic_fetch_add_explicit(&batch->refs, 1, memory_order_relaxed);
    op->direct_mode = batch->files->mode;
    return op;
}

/* Submits it and drops the caller's reference. */
static void submit(mls_files *files, mls_op *op, bool first)
{
    pthread_mutex_lock(&files->lock);
    op->batch_next = files->ops;
    if (files->ops)
        files->ops->batch_prev = op;
    files->ops = op;
    pthread_mutex_unlock(&files->lock);
    /* refuses too large a block alone, and none is asked for */
    first ? mls_engine_submit_first(files->engine, op) : mls_engine_submit(files->engine, &op, 1);
    mls_op_unref(op);
}

static mls_op *make_own_op(mls_batch *batch, size_t member, uint64_t offset, uint64_t nbytes)
{
    static const uint8_t digests[] = {MLS_DIGEST_NONE, MLS_DIGEST_CRC32C, MLS_DIGEST_XXH64, MLS_DIGEST_CRC32};
    static const uint8_t kinds[] = {[MLS_TRANSFER_DROP] = MLS_EXTENT_DROP, [MLS_TRANSFER_BUFFER] = MLS_EXTENT_MEMORY,
                                    [MLS_TRANSFER_PATTERN] = MLS_EXTENT_PATTERN};
    const mls_transfer *transfer = &batch->transfers[member];
    bool writing = transfer->op == MLS_TRANSFER_WRITE;
    char *path = NULL;
    size_t bad;
    if (asprintf(&path, "%s/%s", batch->files->root, mls_batch_key(batch, member)) < 0)
        return NULL;
    mls_op *op = new_op(batch, writing ? MLS_OP_WRITE : MLS_OP_READ, path, 1, transfer->digest ? 1 : 0);
    free(path);
    if (!op)
        return NULL;
    mls_extent *extent = &op->extents[0];
    extent->offset = offset;
    extent->nbytes = nbytes;
    extent->digest = digests[transfer->digest];
    extent->kind = kinds[transfer->memory];
    if (extent->kind == MLS_EXTENT_MEMORY)
        extent->memory = batch->memory.buffer + transfer->place;
    if (extent->kind == MLS_EXTENT_PATTERN)
        mls_pattern_init(&extent->pattern, batch->pattern.run_id, batch->pattern.checkpoint, transfer->place,
                         batch->pattern.compressibility);
    op->member = member;
    op->file_nbytes = writing ? nbytes : 0;
    op->steps = writing ? batch->files->write_steps : batch->files->evict ? MLS_STEP_DONTNEED : 0;
    mls_op_seal(op, &bad); /* one extent overlaps nothing */
    return op;
}

int mls_files_own_op(mls_batch *batch, size_t member, uint64_t offset, uint64_t nbytes, uint64_t start_ns)
{
    mls_op *op = make_own_op(batch, member, offset, nbytes);
    if (!op)
        return -ENOMEM;
    op->begin_ns = start_ns;
    submit(batch->files, op, start_ns != 0);
    return 0;
}

/* How many bytes a READ is known to ask for, or MLS_WHOLE. */
static uint64_t known_nbytes(const mls_transfer *transfer)
{
    if (transfer->nbytes != MLS_WHOLE || transfer->object_nbytes == MLS_WHOLE)
        return transfer->nbytes;
    return transfer->object_nbytes > transfer->offset ? transfer->object_nbytes - transfer->offset : 0;
}

/* A write, or a read of more than a block: with several blocks in flight. A file of unknown size is looked at first. */
static bool has_own_op(const mls_files *files, const mls_transfer *transfer)
{
    if (transfer->op != MLS_TRANSFER_READ)
        return transfer->op == MLS_TRANSFER_WRITE;
    uint64_t nbytes = known_nbytes(transfer);
    return nbytes != MLS_WHOLE && nbytes > mls_engine_small_bytes(files->engine);
}

/* Begins these transfers of the batch. */
static void start(mls_batch *batch, const size_t *members, size_t count)
{
    mls_files *files = batch->files;
    size_t nsmall = 0, taken = 0;
    for (size_t i = 0; i < count; i++)
        nsmall += !has_own_op(files, &batch->transfers[members[i]]);
    mls_op *small = nsmall ? new_op(batch, MLS_OP_FILES, NULL, 0, 0) : NULL;
    uint64_t *tags = small ? small->tags = malloc(nsmall * sizeof *tags) : NULL;
    for (size_t i = 0; i < count; i++) {
        const mls_transfer *transfer = &batch->transfers[members[i]];
        int error = 0;
        if (has_own_op(files, transfer))
            error = mls_files_own_op(batch, members[i], transfer->offset,
                                     transfer->op == MLS_TRANSFER_WRITE ? transfer->nbytes : known_nbytes(transfer), 0);
        else if (tags)
            tags[taken++] = members[i];
        else
            error = -ENOMEM;
        if (error)
            end_early(batch, members[i], -error);
    }
    if (!tags) {
        if (small)
            mls_op_unref(small);
        return;
    }
    small->nunits = taken;
    small->region_id = batch->memory.region_id;
    small->region = batch->memory.buffer;
    small->region_nbytes = batch->memory.nbytes;
    submit(files, small, false);
}

/* ---- transfers that are to begin later ---- */

static uint64_t due_ns(const mls_delayed *delayed)
{
    return delayed->batch->transfers[delayed->members[delayed->next]].not_before_ns;
}

static void drop_delayed(mls_delayed *delayed)
{
    mls_batch_unref(delayed->batch);
    free(delayed->members);
    free(delayed);
}

/* Starts what is due; when the next one is, or UINT64_MAX. The lock is held. */
static uint64_t start_due(mls_files *files)
{
    uint64_t now = mls_now_ns(), earliest = UINT64_MAX;
    for (mls_delayed **link = &files->delayed; *link;) {
        mls_delayed *delayed = *link;
        size_t first = delayed->next;
        while (delayed->next < delayed->count && due_ns(delayed) <= now)
            delayed->next++;
        if (delayed->next > first)
            start(delayed->batch, delayed->members + first, delayed->next - first);
        if (delayed->next == delayed->count) {
            *link = delayed->following;
            drop_delayed(delayed);
            continue;
        }
        earliest = due_ns(delayed) < earliest ? due_ns(delayed) : earliest;
        link = &delayed->following;
    }
    return earliest;
}

static void *pace(void *argument)
{
    mls_files *files = argument;
    pthread_mutex_lock(&files->pace_lock);
    while (!files->stopping) {
        uint64_t until_ns = start_due(files);
        struct timespec until = {(time_t)(until_ns / 1000000000u), (long)(until_ns % 1000000000u)};
        if (until_ns == UINT64_MAX)
            pthread_cond_wait(&files->pace, &files->pace_lock);
        else
            pthread_cond_timedwait(&files->pace, &files->pace_lock, &until);
    }
    pthread_mutex_unlock(&files->pace_lock);
    return NULL;
}

/* 0 or -errno. The lock is held. */
static int ensure_pacer(mls_files *files)
{
    sigset_t all, before;
    if (files->pacing)
        return 0;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&files->pacer, NULL, pace, files);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    files->pacing = !error;
    return -error;
}

static int by_due(const void *a, const void *b, void *transfers)
{
    uint64_t x = ((const mls_transfer *)transfers)[*(const size_t *)a].not_before_ns;
    uint64_t y = ((const mls_transfer *)transfers)[*(const size_t *)b].not_before_ns;
    return x < y ? -1 : x > y;
}

/* 0 or -errno: no memory, or no thread. `members` is taken. */
static int delay(mls_batch *batch, size_t *members, size_t count)
{
    mls_files *files = batch->files;
    mls_delayed *delayed = malloc(sizeof *delayed);
    if (!delayed)
        return -ENOMEM;
    qsort_r(members, count, sizeof *members, by_due, batch->transfers);
    pthread_mutex_lock(&files->pace_lock);
    int error = ensure_pacer(files);
    if (!error) {
        *delayed = (mls_delayed){batch, members, 0, count, files->delayed};
        atomic_fetch_add_explicit(&batch->refs, 1, memory_order_relaxed);
        files->delayed = delayed;
        pthread_cond_signal(&files->pace);
    } else {
        free(delayed);
    }
    pthread_mutex_unlock(&files->pace_lock);
    return error;
}

/* ---- batches ---- */

static mls_batch *new_batch(mls_files *files, const mls_transfer *transfers, size_t count, const char *names,
                            const mls_files_memory *memory)
{
    size_t nbytes = count, at = 0;
    mls_batch *batch = calloc(1, sizeof *batch);
    if (!batch)
        return NULL;
    for (size_t i = 0; i < count; i++)
        nbytes += transfers[i].key_nbytes;
    batch->files = files;
    atomic_fetch_add_explicit(&files->refs, 1, memory_order_relaxed);
    atomic_init(&batch->refs, 1);
    atomic_init(&batch->left, count);
    batch->count = count;
    batch->memory = *memory;
    if (memory->pattern)
        batch->pattern = *memory->pattern;
    batch->memory.pattern = NULL; /* the caller's */
    batch->submit_ns = mls_now_ns();
    batch->transfers = malloc(count * sizeof *transfers);
    batch->key_at = malloc(count * sizeof *batch->key_at);
    batch->keys = malloc(nbytes);
    if (!batch->transfers || !batch->key_at || !batch->keys) {
        mls_batch_unref(batch);
        return NULL;
    }
    memcpy(batch->transfers, transfers, count * sizeof *transfers);
    for (size_t i = 0; i < count; i++) {
        memcpy(batch->keys + at, names + transfers[i].key_start, transfers[i].key_nbytes);
        batch->key_at[i] = at;
        at += transfers[i].key_nbytes;
        batch->keys[at++] = '\0';
    }
    return batch;
}

mls_batch *mls_files_submit(mls_files *files, const mls_transfer *transfers, size_t count, const char *names,
                            const mls_files_memory *memory)
{
    size_t nnow = 0, nlater = 0;
    mls_batch *batch = new_batch(files, transfers, count, names, memory);
    size_t *now = malloc(count * sizeof *now), *later = malloc(count * sizeof *later);
    int error = batch && now && later ? 0 : -ENOMEM;
    for (size_t i = 0; i < count && !error; i++) {
        bool waits = transfers[i].not_before_ns > batch->submit_ns;
        *(waits ? &later[nlater++] : &now[nnow++]) = i;
    }
    if (!error && nlater)
        error = delay(batch, later, nlater);
    if (!error && nlater)
        later = NULL; /* taken */
    if (!error && nnow)
        start(batch, now, nnow);
    free(now);
    free(later);
    if (error && batch) {
        mls_batch_unref(batch);
        batch = NULL;
    }
    return batch;
}

void mls_files_cancel(mls_files *files)
{
    pthread_mutex_lock(&files->pace_lock); /* what is just being started is among the operations then */
    while (files->delayed) {
        mls_delayed *delayed = files->delayed;
        files->delayed = delayed->following;
        for (size_t i = delayed->next; i < delayed->count; i++)
            end_early(delayed->batch, delayed->members[i], MLS_ECANCELED);
        drop_delayed(delayed);
    }
    pthread_mutex_lock(&files->lock);
    for (mls_op *op = files->ops; op; op = op->batch_next)
        mls_op_fail(op, MLS_ECANCELED, MLS_STAGE_NONE, 0);
    pthread_mutex_unlock(&files->lock);
    pthread_mutex_unlock(&files->pace_lock);
    for (int i = 0; i < 2; i++)
        mls_crew_wake(files->engine, &files->engine->crews[i]);
}
