/* A worker: one thread, its ring, its slice of the staging pool, its histograms. Shared by worker.c and engine.c only. */
#ifndef MLS_WORKER_H
#define MLS_WORKER_H

#include "backend.h"
#include "engine.h"

#define MLS_RANGE_BATCH 64

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
    uint64_t in_flight_bytes, window_bytes; /* of transfers; the window is 0 where depth alone rules */
    uint64_t took_ns, took_count, took_bytes; /* transfers since the window was last looked at */
    uint64_t region_id, next_region_id; /* attached, or refused; seen once */
    bool region_attached;
    mls_op *current;
    mls_io *deferred;         /* the backend was full */
    _Atomic unsigned user_memory; /* transfers in flight that touch the caller's memory */
    _Atomic bool looking;         /* for units, of which some may be such transfers */
    _Atomic bool waiting;     /* in reap with room for more: wake it when work comes */
    mls_range_done ranges[MLS_RANGE_BATCH];
    size_t nranges;
    mls_range_queue *ranges_queue;
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
