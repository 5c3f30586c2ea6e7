/* pread, pwrite, open and the like: one transfer at a time, so that an engine starts as many of these workers as it wants depth. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "backend.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "file.h"

typedef struct threads_state {
    mls_io *done;
} threads_state;

static int threads_setup(void **state, unsigned depth, unsigned char *pool, size_t pool_nbytes, bool registration,
                         char *granted, size_t granted_size)
{
    (void)depth, (void)pool, (void)pool_nbytes, (void)registration;
    *state = calloc(1, sizeof(threads_state));
    snprintf(granted, granted_size, "pread, pwrite");
    return *state ? 0 : -ENOMEM;
}

static int64_t sync_file(const mls_io *io)
{
    int result;
    do
        result = io->kind == MLS_IO_FSYNC ? fsync(io->fd) : fdatasync(io->fd);
    while (result < 0 && errno == EINTR);
    return result < 0 ? -errno : 0;
}

static int64_t name_call(const mls_io *io)
{
    switch (io->kind) {
    case MLS_IO_OPEN:
        return openat(io->fd, io->path, io->open_flags, 0666);
    case MLS_IO_CLOSE:
        return close(io->fd);
    case MLS_IO_STAT:
        return mls_statx_at(io->fd, io->path, MLS_STATX_BASIC_STATS, io->statx);
    default:
        return unlinkat(io->fd, io->path, 0);
    }
}

static int threads_submit(void *state, mls_io *io)
{
    threads_state *threads = state;
    if (threads->done)
        return -EAGAIN;
    if (io->kind == MLS_IO_READ)
        io->result = mls_pread_all(io->fd, io->bytes, io->nbytes, io->offset, io->align);
    else if (io->kind == MLS_IO_WRITE)
        io->result = mls_pwrite_all(io->fd, io->bytes, io->nbytes, io->offset);
    else if (io->kind == MLS_IO_FSYNC || io->kind == MLS_IO_FDATASYNC)
        io->result = sync_file(io);
    else if ((io->result = name_call(io)) < 0)
        io->result = -errno;
    threads->done = io;
    return 0;
}

static size_t threads_reap(void *state, mls_io **done, size_t max)
{
    threads_state *threads = state;
    if (!threads->done || !max)
        return 0;
    done[0] = threads->done;
    threads->done = NULL;
    return 1;
}

static bool threads_takes_names(const void *state)
{
    (void)state;
    return true;
}

static void threads_wake(void *state) { (void)state; }

const mls_backend mls_backend_threads = {
    .name = "threads",
    .setup = threads_setup,
    .submit = threads_submit,
    .reap = threads_reap,
    .takes_names = threads_takes_names,
    .wake = threads_wake,
    .close = free,
    .max_depth = 1,
};
