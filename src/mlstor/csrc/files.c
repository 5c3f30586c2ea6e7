/* Arrays of files: their directory, what may be asked for, completions. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "files.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statfs.h>
#include <unistd.h>

#include "files_worker.h"

/* off_t, less what rounding up to a block adds. */
#define MOST_FILE_BYTES (((uint64_t)1 << 63) - ((uint64_t)1 << 31))

/* ---- life ---- */

static bool stat_is_local(const char *fs_name)
{
    static const char *const local[] = {"ext4", "xfs", "btrfs", "tmpfs", "f2fs", "zfs", "bcachefs", "overlay"};
    for (size_t i = 0; i < sizeof local / sizeof *local; i++)
        if (strcmp(fs_name, local[i]) == 0)
            return true;
    return false;
}

mls_files *mls_files_new(mls_engine *engine, const mls_files_config *config, int *error)
{
    struct statfs fs;
    pthread_condattr_t attr;
    mls_files *files = calloc(1, sizeof *files);
    *error = -ENOMEM;
    if (!files)
        return NULL;
    files->engine = engine;
    files->mode = config->mode;
    files->write_steps = config->write_steps;
    files->evict = config->evict;
    atomic_init(&files->direct, config->mode != MLS_MODE_OFF);
    atomic_init(&files->refs, 1);
    pthread_mutex_init(&files->lock, NULL);
    pthread_mutex_init(&files->pace_lock, NULL);
    pthread_mutex_init(&files->mounts.lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&files->pace, &attr);
    pthread_condattr_destroy(&attr);
    files->root_fd = -1;
    files->root = strdup(config->root);
    files->queue = mls_done_queue_new(sizeof(mls_completion));
    if (files->root && files->queue) {
        files->root_fd = open(config->root, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (files->root_fd >= 0 && fstatfs(files->root_fd, &fs) == 0) {
            files->local = stat_is_local(mls_fs_name((uint32_t)fs.f_type));
            *error = 0;
            return files;
        }
        *error = -errno;
    }
    mls_files_unref(files);
    return NULL;
}

void mls_files_close(mls_files *files)
{
    if (files->root_fd >= 0)
        close(files->root_fd);
    files->root_fd = -1;
}

void mls_files_unref(mls_files *files)
{
    if (atomic_fetch_sub_explicit(&files->refs, 1, memory_order_acq_rel) != 1)
        return;
    if (files->pacing) { /* each delayed transfer has a batch that refers to us: there is none */
        pthread_mutex_lock(&files->pace_lock);
        files->stopping = true;
        pthread_cond_signal(&files->pace);
        pthread_mutex_unlock(&files->pace_lock);
        pthread_join(files->pacer, NULL);
    }
    mls_files_close(files);
    if (files->queue)
        mls_done_queue_free(files->queue);
    for (size_t i = 0; i < files->nfailures; i++)
        free(files->failures[i].key);
    pthread_cond_destroy(&files->pace);
    pthread_mutex_destroy(&files->mounts.lock);
    pthread_mutex_destroy(&files->pace_lock);
    pthread_mutex_destroy(&files->lock);
    free(files->root);
    free(files);
}

bool mls_batch_is_done(const mls_batch *batch) { return atomic_load(&batch->left) == 0; }

void mls_batch_unref(mls_batch *batch)
{
    if (atomic_fetch_sub_explicit(&batch->refs, 1, memory_order_acq_rel) != 1)
        return;
    mls_files *files = batch->files;
    free(batch->transfers);
    free(batch->keys);
    free(batch->key_at);
    free(batch);
    mls_files_unref(files);
}

/* ---- what may be asked for ---- */

static const char *refused_key(const char *key, size_t nbytes)
{
    if (!nbytes)
        return "its key is empty";
    if (memchr(key, 0, nbytes))
        return "its key holds a null byte";
    if (key[0] == '/')
        return "its key begins with a slash: keys are relative to the directory";
    if (key[nbytes - 1] == '/')
        return "its key ends with a slash, as no file's does";
    for (size_t begin = 0; begin < nbytes;) {
        const char *slash = memchr(key + begin, '/', nbytes - begin);
        size_t end = slash ? (size_t)(slash - key) : nbytes;
        if (end - begin == 2 && key[begin] == '.' && key[begin + 1] == '.')
            return "its key leaves the directory by '..'";
        begin = end + 1;
    }
    return NULL;
}

static const char *refused_memory(const mls_transfer *transfer, const mls_files_memory *memory)
{
    uint64_t room = transfer->op == MLS_TRANSFER_WRITE || !transfer->room ? transfer->nbytes : transfer->room;
    if (transfer->memory == MLS_TRANSFER_PATTERN)
        return memory->pattern ? NULL : "it names a pattern, and none was given";
    if (transfer->memory != MLS_TRANSFER_BUFFER)
        return transfer->memory != MLS_TRANSFER_DROP ? "its memory is none of DROP, BUFFER and PATTERN"
               : transfer->op == MLS_TRANSFER_WRITE  ? "a WRITE has a buffer or a pattern"
                                                     : NULL;
    if (!memory->buffer)
        return "it names a buffer, and none was given";
    if (transfer->op == MLS_TRANSFER_READ && room == MLS_WHOLE)
        return "it reads to the end of the file and says no room";
    if (transfer->place > memory->nbytes || room > memory->nbytes - transfer->place)
        return "it lies outside the buffer";
    if (transfer->op == MLS_TRANSFER_READ && transfer->nbytes != MLS_WHOLE && transfer->nbytes > room)
        return "it has less room than bytes";
    return NULL;
}

const char *mls_files_refusal(const mls_transfer *transfer, const char *names, size_t names_nbytes,
                              const mls_files_memory *memory)
{
    if (transfer->key_start > names_nbytes || transfer->key_nbytes > names_nbytes - transfer->key_start)
        return "its key lies outside the names";
    const char *refusal = refused_key(names + transfer->key_start, transfer->key_nbytes);
    if (refusal || transfer->op == MLS_TRANSFER_STAT || transfer->op == MLS_TRANSFER_DELETE)
        return refusal;
    if (transfer->op != MLS_TRANSFER_READ && transfer->op != MLS_TRANSFER_WRITE)
        return "its op is none of READ, WRITE, STAT and DELETE";
    if (transfer->digest > MLS_TRANSFER_CRC32)
        return "its digest is none of NONE, CRC32C, XXH64 and CRC32";
    if (transfer->offset > MOST_FILE_BYTES ||
        (transfer->nbytes > MOST_FILE_BYTES - transfer->offset &&
         (transfer->nbytes != MLS_WHOLE || transfer->op == MLS_TRANSFER_WRITE)))
        return "it goes beyond the greatest file offset";
    if (transfer->op == MLS_TRANSFER_WRITE && transfer->offset)
        return "a file is written whole: a WRITE has offset 0";
    return refused_memory(transfer, memory);
}

int mls_files_range(const mls_transfer *transfer, uint64_t file_nbytes, uint64_t *offset, uint64_t *nbytes)
{
    if (transfer->object_nbytes != MLS_WHOLE && transfer->object_nbytes != file_nbytes)
        return MLS_ELENGTH;
    if (transfer->offset > file_nbytes)
        return MLS_ESHORT;
    *offset = transfer->offset;
    *nbytes = transfer->nbytes == MLS_WHOLE ? file_nbytes - transfer->offset : transfer->nbytes;
    if (*nbytes > file_nbytes - transfer->offset)
        return MLS_ESHORT;
    if (transfer->memory == MLS_TRANSFER_BUFFER && *nbytes > (transfer->room ? transfer->room : transfer->nbytes))
        return MLS_ELENGTH;
    return 0;
}

/* ---- completions ---- */

void mls_files_blank(const mls_batch *batch, size_t member, mls_completion *done)
{
    const mls_transfer *transfer = &batch->transfers[member];
    memset(done, 0, sizeof *done);
    done->tag = transfer->tag;
    done->op = transfer->op;
    done->endpoint = transfer->endpoint;
    done->submit_ns = batch->submit_ns;
    done->object_nbytes = MLS_WHOLE;
    done->attempts = 1;
}

int mls_files_compare(const mls_transfer *transfer, const mls_completion *done)
{
    bool differs = transfer->digest && (transfer->flags & MLS_TRANSFER_HAS_DIGEST) &&
                   transfer->digest_value != done->digest_value;
    return differs ? MLS_KIND_CHECKSUM : MLS_KIND_OK;
}

void mls_files_judge(mls_batch *batch, size_t member, mls_completion *done, int error, int stage)
{
    mls_files *files = batch->files;
    if (!error && !done->kind)
        return;
    int code = 0;
    switch (error) {
    case 0: /* the kind was set */
        done->result = -EIO;
        break;
    case MLS_ECANCELED:
        done->kind = MLS_KIND_CANCELLED;
        done->result = -ECANCELED;
        break;
    case MLS_ESHORT:
        done->kind = MLS_KIND_SHORT;
        done->result = -ENODATA;
        break;
    case MLS_ELENGTH:
        done->kind = MLS_KIND_LENGTH;
        done->result = -EIO;
        break;
    default:
        done->kind = MLS_KIND_SYSTEM;
        done->result = -error;
        code = error;
    }
    done->first_kind = done->kind;
    if (done->kind == MLS_KIND_CANCELLED)
        return;
    pthread_mutex_lock(&files->lock);
    if (files->nfailures < MLS_KEPT_FAILURES) {
        char *key = strdup(mls_batch_key(batch, member));
        if (key)
            files->failures[files->nfailures++] = (mls_file_failure){done->tag, done->kind, code, stage, key};
    }
    pthread_mutex_unlock(&files->lock);
}

void mls_files_push(mls_batch **batches, const mls_completion *done, size_t count)
{
    for (size_t first = 0, next; first < count; first = next) {
        mls_files *files = batches[first]->files;
        for (next = first + 1; next < count && batches[next]->files == files;)
            next++;
        atomic_fetch_add(&files->ended, next - first);
        for (size_t i = first; i < next; i++) /* before: who has reaped all is to find them done */
            atomic_fetch_sub(&batches[i]->left, 1);
        mls_done_queue_push(files->queue, done + first, next - first);
    }
}

size_t mls_files_reap(mls_files *files, mls_completion *out, size_t max, size_t min, int64_t timeout_ns)
{
    return mls_done_queue_pop(files->queue, out, max, min, timeout_ns);
}

size_t mls_files_failures(mls_files *files, mls_file_failure *out, size_t max)
{
    pthread_mutex_lock(&files->lock);
    size_t count = files->nfailures < max ? files->nfailures : max;
    memcpy(out, files->failures, count * sizeof *out);
    files->nfailures -= count;
    memmove(files->failures, files->failures + count, files->nfailures * sizeof *out);
    pthread_mutex_unlock(&files->lock);
    return count;
}

int mls_files_path(mls_files *files, char reason[MLS_REASON_BYTES]) { return mls_mounts_path(&files->mounts, reason); }

uint64_t mls_files_ended(const mls_files *files) { return atomic_load(&files->ended); }
