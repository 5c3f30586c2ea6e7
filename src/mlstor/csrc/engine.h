/* The engine: worker threads, their staging memory, and the queue of operations between them and the caller.
 *
 * Two crews of workers: the direct crew (io_uring, or threads where that is refused) and, started when the first
 * buffered file needs it, the buffered crew (threads: buffered I/O through a ring is punted and serialised per file).
 */
#ifndef MLS_ENGINE_H
#define MLS_ENGINE_H

#include "histogram.h"
#include "operation.h"

enum mls_backend_choice { MLS_BACKEND_AUTO, MLS_BACKEND_URING, MLS_BACKEND_THREADS };
enum mls_timing { MLS_TIME_READ, MLS_TIME_WRITE, MLS_TIME_SYNC, MLS_TIME_OPEN, MLS_TIME_COMMIT, MLS_TIMINGS };

typedef struct mls_config {
    int backend;
    unsigned workers;
    unsigned depth;            /* transfers in flight per worker, at most */
    uint64_t block_bytes;      /* of a transfer, and of a staging slot, at most; at most 1 GiB */
    bool automatic_block;      /* 1 MiB, or the file system's preferred size where that is larger */
    uint64_t window_bytes;     /* in flight per worker at first; see window.h. 0: depth alone rules */
    bool huge_pages;           /* ask for them (madvise) */
    bool registration;         /* register the staging pool with the ring */
} mls_config;

typedef struct mls_counters {
    uint64_t read_bytes, written_bytes;   /* by finished transfers */
    uint64_t reads, writes, syncs;
    uint64_t busy_ns, wait_ns;            /* of all workers: working, and waiting for the storage */
    uint64_t zero_copy_bytes, staged_bytes;
    uint64_t retried;                     /* transfers that the kernel cut short and that were continued */
} mls_counters;

typedef struct mls_engine mls_engine;

/* Starts the direct crew. NULL with *error set (-errno): no memory, no threads, or io_uring demanded and refused. */
mls_engine *mls_engine_new(const mls_config *config, int *error);

/* Cancels what has not begun, waits for what has, ends the workers. */
void mls_engine_free(mls_engine *engine);

const char *mls_engine_backend(const mls_engine *engine);  /* "io_uring" or "threads" */
const char *mls_engine_granted(const mls_engine *engine);  /* ring flags and registration, or why there is no ring */
unsigned mls_engine_workers(const mls_engine *engine);     /* of the direct crew */
mls_latches *mls_engine_latches(mls_engine *engine);
/* Reads up to this are done in one transfer. */
uint64_t mls_engine_small_bytes(const mls_engine *engine);

/* Takes sealed operations; a reference is kept until each is reaped. 0, or -EINVAL: a block
 * larger than the engine's. */
int mls_engine_submit(mls_engine *engine, mls_op **ops, size_t count);
int mls_engine_submit_first(mls_engine *engine, mls_op *op); /* in front of all that waits */

/* Done operations, oldest first; each with a reference that is now the caller's. Waits for at least `min` of them or
 * `timeout_ns` (negative: for ever), or until nothing is in flight. */
size_t mls_engine_reap(mls_engine *engine, mls_op **ops, size_t max, size_t min, int64_t timeout_ns);

/* Waits until `op` is done. False on timeout. */
bool mls_engine_wait(mls_engine *engine, mls_op *op, int64_t timeout_ns);

/* No unit of `op` is submitted from now on; it is done, with MLS_ECANCELED, when those in flight are. */
void mls_engine_cancel(mls_engine *engine, mls_op *op);
void mls_engine_cancel_all(mls_engine *engine);

/* Waits until nothing is in flight. False on timeout. */
bool mls_engine_drain(mls_engine *engine, int64_t timeout_ns);
size_t mls_engine_in_flight(mls_engine *engine);

/* Around fork(2): no transfer touches the caller's memory from the return of `pause` until `resume`. */
void mls_engine_pause(mls_engine *engine);
void mls_engine_resume(mls_engine *engine);

void mls_engine_counters(mls_engine *engine, mls_counters *sum);
/* Starts the histograms anew. False, and nothing done, while something is in flight. */
bool mls_engine_reset_histograms(mls_engine *engine);
void mls_engine_histogram(mls_engine *engine, int timing, mls_histogram *sum);

/* Where completions of arrays are reported: ranges of a file, files. All items of a queue have one size. */
typedef struct mls_done_queue mls_done_queue;
mls_done_queue *mls_done_queue_new(size_t item_nbytes);
void mls_done_queue_free(mls_done_queue *queue);
void mls_done_queue_push(mls_done_queue *queue, const void *done, size_t count);
/* At least `min` of them, or as many as there are at the timeout. */
size_t mls_done_queue_pop(mls_done_queue *queue, void *out, size_t max, size_t min, int64_t timeout_ns);

/* One of ranges, with their type. */
typedef mls_done_queue mls_range_queue;
static inline mls_range_queue *mls_range_queue_new(void) { return mls_done_queue_new(sizeof(mls_range_done)); }
static inline void mls_range_queue_free(mls_range_queue *queue) { mls_done_queue_free(queue); }
static inline void mls_range_queue_push(mls_range_queue *queue, const mls_range_done *done, size_t count)
{
    mls_done_queue_push(queue, done, count);
}
static inline size_t mls_range_queue_pop(mls_range_queue *queue, mls_range_done *out, size_t max, size_t min,
                                         int64_t timeout_ns)
{
    return mls_done_queue_pop(queue, out, max, min, timeout_ns);
}

#endif
