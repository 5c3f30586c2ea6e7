/* A worker: one thread, its ring, its slice of the staging pool, its histograms. For the files that make up the engine:
 * worker.c, complete.c, steps.c, files_worker.c, engine.c.
 */
#ifndef MLS_WORKER_H
#define MLS_WORKER_H

#include "backend.h"
#include "engine.h"
#include "transfer.h"
#include "window.h"

#define MLS_RANGE_BATCH 64
#define MLS_FILE_BATCH 32
/* Small enough that what a worker has in flight stays in cache, and what Lustre and GPFS want where they say so. */
#define MLS_AUTOMATIC_BLOCK_BYTES ((uint64_t)1 << 20)

typedef struct mls_crew mls_crew;

typedef struct mls_worker {
    mls_engine *engine;
    mls_crew *crew;
    pthread_t thread;
    void *state;              /* the backend's */
    int setup_error;
    char granted[MLS_REASON_BYTES];
    unsigned char *pool;
    size_t pool_nbytes;
    mls_io *ios, *free_ios;
    unsigned in_flight;
    uint64_t in_flight_bytes; /* of transfers */
    mls_window window;        /* 0 where depth alone rules */
    uint64_t region_id, next_region_id; /* attached, or refused; seen once */
    bool region_attached;
    uint64_t reaped_ns;       /* the last return from `reap`, or 0 */
    unsigned settles;         /* how often the backend has let go of files since */
    uint64_t due_ns;          /* the next unit that a limit of bytes/s holds back; UINT64_MAX: none */
    mls_op *current;
    mls_io *deferred;         /* the backend was full */
    _Atomic unsigned user_memory; /* transfers in flight that touch the caller's memory */
    _Atomic bool looking;         /* for units, of which some may be such transfers */
    _Atomic bool waiting;     /* in reap with room for more: wake it when work comes */
    mls_range_done ranges[MLS_RANGE_BATCH];
    size_t nranges;
    mls_range_queue *ranges_queue;
    mls_completion files_done[MLS_FILE_BATCH];
    struct mls_batch *files_batch[MLS_FILE_BATCH]; /* of each; their operations are not at their end yet */
    size_t nfiles_done;
    mls_histogram times[MLS_TIMINGS];
    _Atomic uint64_t read_bytes, written_bytes, reads, writes, syncs, busy_ns, wait_ns, zero_copy_bytes, staged_bytes,
        retried;
} mls_worker;

struct mls_crew {
    const mls_backend *backend;
    unsigned nworkers, depth;
    mls_worker *workers;
    bool started, stopping;
    mls_op *head, *tail;      /* operations with units left to take, or not yet opened; oldest first */
    pthread_cond_t work;
    _Atomic unsigned long changes; /* of the queue, or of what its operations offer */
};

struct mls_engine {
    mls_config config;
    uint64_t slot_bytes;
    pthread_mutex_t lock;
    pthread_cond_t done_cond, quiet;
    mls_crew crews[2];        /* direct, buffered */
    pthread_mutex_t starting; /* of the buffered crew, once */
    _Atomic unsigned paused;  /* depth: forks of several threads may overlap */
    _Atomic bool closing;
    size_t in_flight;
    size_t open_files, most_open_files; /* of operations under way */
    mls_op *done_head, *done_tail;
    mls_latches latches;
    char granted[MLS_REASON_BYTES];
};

enum { MLS_CREW_DIRECT, MLS_CREW_BUFFERED };

/* States of an operation. */
enum { MLS_STATE_NEW, MLS_STATE_DATA, MLS_STATE_SYNC, MLS_STATE_SYNC_DIR, MLS_STATE_DONE };

void *mls_worker_main(void *worker);

static inline void mls_count(_Atomic uint64_t *counter, uint64_t n) /* one writer */
{
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + n, memory_order_relaxed);
}

static inline void mls_worker_add_user_memory(mls_worker *worker, int n) /* one writer */
{
    unsigned now = atomic_load_explicit(&worker->user_memory, memory_order_relaxed);
    atomic_store_explicit(&worker->user_memory, now + (unsigned)n, memory_order_release);
}

/* worker.c */
void mls_worker_submit(mls_worker *worker, mls_io *io); /* the caller has counted it in in_flight */
/* btrfs, which does not report its alignment, reads through the page cache into memory that has never been touched. */
void mls_worker_touch(unsigned char *bytes, uint64_t nbytes);

/* complete.c: what a completion means for its transfer */
enum mls_outcome { MLS_OUTCOME_COMPLETE, MLS_OUTCOME_AGAIN, MLS_OUTCOME_SHORT, MLS_OUTCOME_ERROR };

void mls_worker_complete(mls_worker *worker, mls_io *io, uint64_t now);
/* Takes a result into account; `needed` bytes of the transfer are wanted. */
enum mls_outcome mls_worker_judge(mls_io *io, uint64_t needed);
/* A transfer that the kernel cut short goes on from the last aligned place that it reached. */
void mls_worker_go_on(mls_worker *worker, mls_io *io);
void mls_worker_account(mls_worker *worker, mls_op *op, const mls_io *io, uint64_t nbytes, uint64_t now);
void mls_worker_release_io(mls_worker *worker, mls_io *io);

/* engine.c, for the workers */
int mls_crew_ensure(mls_engine *engine, int crew); /* starts it if need be: 0 or -errno */
void mls_crew_enqueue_locked(mls_crew *crew, mls_op *op, bool front);
void mls_crew_dequeue_locked(mls_crew *crew, mls_op *op);
void mls_crew_wake(mls_engine *engine, mls_crew *crew);
void mls_engine_finished(mls_engine *engine, mls_op *op);

/* Transfers in flight that touch the caller's memory. */
unsigned mls_engine_user_memory(mls_engine *engine);

/* mls_engine_new with both crews on `backend`, for tests of what no real backend does on demand. */
mls_engine *mls_engine_new_on(const mls_config *config, const mls_backend *backend, int *error);

#endif
