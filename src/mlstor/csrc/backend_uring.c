/* One io_uring per worker, created in the worker's thread. Flags come off one rung at a time where the kernel refuses. */
#ifdef MLS_HAVE_LIBURING
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "backend.h"

#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "platform.h"

/* Newer than some headers; the kernel has them since 5.19, 6.0 and 6.1. */
#ifndef IORING_SETUP_COOP_TASKRUN
#define IORING_SETUP_COOP_TASKRUN (1U << 8)
#endif
#ifndef IORING_SETUP_SINGLE_ISSUER
#define IORING_SETUP_SINGLE_ISSUER (1U << 12)
#endif
#ifndef IORING_SETUP_DEFER_TASKRUN
#define IORING_SETUP_DEFER_TASKRUN (1U << 13)
#endif

/* Prepared transfers are handed to the kernel together, but not so many bytes of them that the next block is generated
 * while these wait: their clock has begun. */
#define BATCH_BYTES ((uint64_t)256 << 10)
/* Of many small transfers in flight, so many are waited for at once: a system call and a switch of context for each would
 * cost as much as the transfers. A completion is then seen up to seven others late. */
#define SMALL_BYTES ((uint64_t)64 << 10)
#define MANY_IN_FLIGHT 32
#define WAIT_BATCH 8
/* Opens of files whose inodes are not in memory block: the kernel hands them to threads of its own, of which it would have
 * four per processor. */
#define MOST_KERNEL_THREADS 64u
#define SPARE_ENTRIES 8 /* syncs and the wake-up read go beside the transfers */

typedef struct uring_state {
    struct io_uring ring;
    unsigned char *pool;
    bool registered;        /* the pool, as buffer 0 */
    bool attachable;        /* there is a slot for a buffer 1 */
    bool names;             /* OPEN, CLOSE, STAT and UNLINK are granted */
    int event_fd;
    uint64_t event_value;
    bool event_armed;
    uint64_t unsubmitted_bytes;
    unsigned in_flight;
    bool small;             /* the last transfer was */
} uring_state;

static const unsigned ladder[] = {
    IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_COOP_TASKRUN,
    IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_COOP_TASKRUN,
    IORING_SETUP_COOP_TASKRUN,
    0,
};

/* The most flags that the kernel takes. 0 or -errno. */
static int ring_setup(struct io_uring *ring, unsigned entries)
{
    int error = -EINVAL;
    for (size_t rung = 0; rung < sizeof ladder / sizeof *ladder && error == -EINVAL; rung++) {
        struct io_uring_params params;
        memset(&params, 0, sizeof params);
        params.flags = ladder[rung];
        error = io_uring_queue_init_params(entries, ring, &params);
    }
    return error;
}

/* A sandbox may grant a ring without the operations; that is no ring. 0 or -errno. *names: are those of files granted? */
static int check_operations(struct io_uring *ring, bool *names)
{
    static const int of_names[] = {IORING_OP_OPENAT, IORING_OP_CLOSE, IORING_OP_STATX, IORING_OP_UNLINKAT};
    static const int needed[] = {IORING_OP_READ, IORING_OP_WRITE, IORING_OP_READ_FIXED, IORING_OP_WRITE_FIXED,
                                 IORING_OP_FSYNC};
    struct io_uring_probe *probe = io_uring_get_probe_ring(ring);
    int error = probe ? 0 : -EOPNOTSUPP;
    for (size_t i = 0; !error && i < sizeof needed / sizeof *needed; i++)
        error = io_uring_opcode_supported(probe, needed[i]) ? 0 : -EOPNOTSUPP;
    *names = !error;
    for (size_t i = 0; *names && i < sizeof of_names / sizeof *of_names; i++)
        *names = io_uring_opcode_supported(probe, of_names[i]);
    io_uring_free_probe(probe);
    return error;
}

static void uring_close(void *state)
{
    uring_state *uring = state;
    io_uring_queue_exit(&uring->ring);
    if (uring->event_fd >= 0)
        close(uring->event_fd);
    free(uring);
}

static int uring_setup(void **state, unsigned depth, unsigned char *pool, size_t pool_nbytes, bool registration,
                       char *granted, size_t granted_size)
{
    uring_state *uring = calloc(1, sizeof *uring);
    const char *refusal = "off";
    if (!uring)
        return -ENOMEM;
    int error = ring_setup(&uring->ring, depth + SPARE_ENTRIES);
    if (error < 0) {
        free(uring);
        return error;
    }
    error = check_operations(&uring->ring, &uring->names);
    if (error < 0) {
        io_uring_queue_exit(&uring->ring);
        free(uring);
        return error;
    }
    io_uring_ring_dontfork(&uring->ring);
    unsigned kernel_threads[2] = {depth < MOST_KERNEL_THREADS ? depth : MOST_KERNEL_THREADS, 0};
    io_uring_register_iowq_max_workers(&uring->ring, kernel_threads); /* Linux 5.15; without it opens overlap less */
    io_uring_register_ring_fd(&uring->ring); /* saves a descriptor look-up per call; works without */
    uring->event_fd = eventfd(0, EFD_CLOEXEC);
    if (uring->event_fd < 0) {
        error = -errno;
        uring_close(uring);
        return error;
    }
    uring->pool = pool;
    if (registration) { /* a refusal (8 MiB of memlock, as a rule) costs page pinning per transfer, nothing else */
        struct iovec both[] = {{pool, pool_nbytes}, {NULL, 0}};
        error = io_uring_register_buffers(&uring->ring, both, 2);
        uring->attachable = error == 0;
        if (error) /* empty slots came with Linux 5.13 */
            error = io_uring_register_buffers(&uring->ring, both, 1);
        uring->registered = error == 0;
        refusal = strerror(-error);
    }
    snprintf(granted, granted_size, "ring flags 0x%x; buffers %s%s", uring->ring.flags,
             uring->registered ? "registered" : "not registered: ", uring->registered ? "" : refusal);
    *state = uring;
    return 0;
}

static int uring_attach(void *state, unsigned char *bytes, size_t nbytes)
{
    uring_state *uring = state;
    const struct iovec region = {bytes, nbytes};
    const __u64 tag = 0;
    if (!uring->attachable)
        return -EOPNOTSUPP;
    int updated = io_uring_register_buffers_update_tag(&uring->ring, MLS_IO_REGION - MLS_IO_POOL, &region, &tag, 1);
    return updated == 1 ? 0 : updated < 0 ? updated : -EINVAL;
}

static struct io_uring_sqe *next_sqe(uring_state *uring)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(&uring->ring);
    if (!sqe) {
        io_uring_submit(&uring->ring);
        sqe = io_uring_get_sqe(&uring->ring);
    }
    return sqe;
}

static int uring_submit(void *state, mls_io *io)
{
    uring_state *uring = state;
    struct io_uring_sqe *sqe = next_sqe(uring);
    if (!sqe)
        return -EAGAIN;
    unsigned nbytes = (unsigned)io->nbytes;
    bool fixed = io->memory == MLS_IO_REGION || (io->memory == MLS_IO_POOL && uring->registered);
    int buffer = io->memory - MLS_IO_POOL;
    switch (io->kind) {
    case MLS_IO_READ:
        if (fixed)
            io_uring_prep_read_fixed(sqe, io->fd, io->bytes, nbytes, io->offset, buffer);
        else
            io_uring_prep_read(sqe, io->fd, io->bytes, nbytes, io->offset);
        break;
    case MLS_IO_WRITE:
        if (fixed)
            io_uring_prep_write_fixed(sqe, io->fd, io->bytes, nbytes, io->offset, buffer);
        else
            io_uring_prep_write(sqe, io->fd, io->bytes, nbytes, io->offset);
        break;
    case MLS_IO_OPEN:
        io_uring_prep_openat(sqe, io->fd, io->path, io->open_flags, 0666);
        break;
    case MLS_IO_CLOSE:
        io_uring_prep_close(sqe, io->fd);
        break;
    case MLS_IO_STAT:
        io_uring_prep_statx(sqe, io->fd, io->path, AT_EMPTY_PATH, MLS_STATX_BASIC_STATS, (struct statx *)io->statx);
        break;
    case MLS_IO_UNLINK:
        io_uring_prep_unlinkat(sqe, io->fd, io->path, 0);
        break;
    default:
        io_uring_prep_fsync(sqe, io->fd, io->kind == MLS_IO_FDATASYNC ? IORING_FSYNC_DATASYNC : 0);
    }
    io_uring_sqe_set_data(sqe, io);
    uring->in_flight++;
    uring->small = io->nbytes <= SMALL_BYTES;
    uring->unsubmitted_bytes += io->nbytes;
    if (uring->unsubmitted_bytes >= BATCH_BYTES) {
        uring->unsubmitted_bytes = 0;
        io_uring_submit(&uring->ring); /* what it can't take now, reap hands over */
    }
    return 0;
}

static void arm_event(uring_state *uring)
{
    struct io_uring_sqe *sqe = next_sqe(uring);
    if (!sqe)
        return; /* the queue is full of transfers: one of them will end the wait */
    io_uring_prep_read(sqe, uring->event_fd, &uring->event_value, sizeof uring->event_value, 0);
    io_uring_sqe_set_data(sqe, NULL);
    uring->event_armed = true;
}

static size_t uring_reap(void *state, mls_io **done, size_t max)
{
    uring_state *uring = state;
    struct io_uring_cqe *cqe;
    unsigned head, seen = 0;
    size_t count = 0;
    if (!uring->event_armed)
        arm_event(uring);
    int error = io_uring_submit_and_wait(&uring->ring, uring->small && uring->in_flight >= MANY_IN_FLIGHT ? WAIT_BATCH : 1);
    uring->unsubmitted_bytes = 0;
    /* these ask for another round: what was done meanwhile is looked at first */
    if (error < 0 && error != -EINTR && error != -EAGAIN && error != -EBUSY) {
        fprintf(stderr, "mlstor: io_uring_enter failed: %s; what is in flight can't be accounted for\n", strerror(-error));
        abort();
    }
    io_uring_for_each_cqe(&uring->ring, head, cqe) {
        mls_io *io = io_uring_cqe_get_data(cqe);
        if (io && count == max)
            break;
        seen++;
        if (!io) {
            uring->event_armed = false;
            continue;
        }
        io->result = cqe->res;
        uring->in_flight--;
        done[count++] = io;
    }
    io_uring_cq_advance(&uring->ring, seen);
    return count;
}

/* A request that a thread of the kernel's carried out holds its file until that thread has put it away, which may be after
 * its completion was reaped, and then until this thread enters the ring again. */
static void uring_settle(void *state) { io_uring_get_events(&((uring_state *)state)->ring); }

static bool uring_takes_names(const void *state) { return ((const uring_state *)state)->names; }

static void uring_wake(void *state)
{
    uring_state *uring = state;
    uint64_t one = 1;
    ssize_t written = write(uring->event_fd, &one, sizeof one);
    (void)written; /* EAGAIN is a full counter, which wakes as well */
}

const mls_backend mls_backend_uring = {
    .name = "io_uring",
    .setup = uring_setup,
    .submit = uring_submit,
    .reap = uring_reap,
    .attach = uring_attach,
    .takes_names = uring_takes_names,
    .settle = uring_settle,
    .wake = uring_wake,
    .close = uring_close,
    .max_depth = 1024,
};

void mls_uring_probe_run(mls_uring_probe *probe)
{
    const size_t pool_nbytes = (size_t)64 << 20;
    struct io_uring ring;
    memset(probe, 0, sizeof *probe);
    probe->error = -ring_setup(&ring, 8);
    if (probe->error)
        return;
    bool names;
    probe->error = -check_operations(&ring, &names);
    if (probe->error) {
        io_uring_queue_exit(&ring);
        return;
    }
    probe->flags = ring.flags;
    probe->features = ring.features;
    probe->ring_fd_registered = io_uring_register_ring_fd(&ring) == 1;
    void *pool = mmap(NULL, pool_nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pool == MAP_FAILED) {
        probe->registration_error = errno;
    } else {
        struct iovec whole = {pool, pool_nbytes};
        probe->registration_error = -io_uring_register_buffers(&ring, &whole, 1);
        munmap(pool, pool_nbytes);
    }
    io_uring_queue_exit(&ring);
}
#else
typedef int mls_no_uring; /* an empty translation unit is not ISO C */
#endif
