/* How a worker gets bytes moved. A backend is a table of functions; it is called by its worker's thread alone, but for
 * `wake`.
 */
#ifndef MLS_BACKEND_H
#define MLS_BACKEND_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum mls_io_kind {
    MLS_IO_READ, MLS_IO_WRITE, MLS_IO_FSYNC, MLS_IO_FDATASYNC,
    MLS_IO_OPEN, MLS_IO_CLOSE, MLS_IO_STAT, MLS_IO_UNLINK, /* where `takes_names` */
};

/* Where the bytes of a transfer lie: anywhere; in the worker's staging pool; in the region that was attached. */
enum mls_io_memory { MLS_IO_ANYWHERE, MLS_IO_POOL, MLS_IO_REGION };

struct mls_op;
struct mls_job;
struct mls_statx;

/* One transfer. Its worker owns it from submit until reap gives it back; the bytes stay until then. */
typedef struct mls_io {
    int kind;
    int fd;
    unsigned char *bytes;
    uint64_t nbytes;
    uint64_t offset;
    int memory;              /* enum mls_io_memory */
    uint32_t align;          /* of a direct read: where a short one may go on */
    const char *path;        /* OPEN, STAT, UNLINK: relative to the directory `fd`; STAT: empty for `fd` itself */
    int open_flags;
    struct mls_statx *statx; /* STAT */
    int64_t result;          /* bytes, a descriptor or 0; -errno */
    uint64_t submit_ns;

    /* the worker's */
    struct mls_op *op;
    size_t unit;
    unsigned char *slot;
    uint64_t io_offset, io_nbytes; /* of the whole transfer, of which a continued one does the rest */
    uint64_t done_nbytes, reached_nbytes;
    unsigned tries;          /* in a row that moved nothing */
    unsigned char *io_bytes;
    bool zero_copy, confirm;
    struct mls_job *job;     /* files_worker.c; kept with the io */
    struct mls_io *next;
} mls_io;

typedef struct mls_backend {
    const char *name;
    /* In the worker's thread, once: `pool` is its staging memory. *state is the backend's own. 0 or -errno. */
    int (*setup)(void **state, unsigned depth, unsigned char *pool, size_t pool_nbytes, bool registration, char *granted,
                 size_t granted_size);
    /* Takes the transfer: 0; or -EAGAIN: reap first. */
    int (*submit)(void *state, mls_io *io);
    /* Waits until something is done, or `wake` is called: how many of `done` were filled. */
    size_t (*reap)(void *state, mls_io **done, size_t max);
    /* Registers memory of the caller's, in place of what was attached before; with NULL just lets that go. What is in
     * flight keeps what it began with. 0 or -errno. NULL: the backend has nothing of the kind. */
    int (*attach)(void *state, unsigned char *bytes, size_t nbytes);
    /* Whether it opens, closes, looks at and removes files too. NULL: it does not. */
    bool (*takes_names)(const void *state);
    /* With nothing in flight: lets go of files whose last request was not yet put away when it was reaped. NULL: there
     * are none. */
    void (*settle)(void *state);
    /* From any thread: makes a waiting `reap` return. */
    void (*wake)(void *state);
    void (*close)(void *state);
    unsigned max_depth; /* per worker */
} mls_backend;

extern const mls_backend mls_backend_threads;
#ifdef MLS_HAVE_LIBURING
extern const mls_backend mls_backend_uring;

/* What the kernel grants an io_uring of this process. */
typedef struct mls_uring_probe {
    int error;               /* 0, or the errno of io_uring_setup */
    uint32_t flags;          /* of the ring that was granted */
    uint32_t features;
    int registration_error;  /* 0, or the errno of registering 64 MiB */
    bool ring_fd_registered;
} mls_uring_probe;
void mls_uring_probe_run(mls_uring_probe *probe);
#endif

#endif
