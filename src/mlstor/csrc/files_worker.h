/* Arrays of files inside the engine: between files.c, files_worker.c, steps.c and the worker's loop. */
#ifndef MLS_FILES_WORKER_H
#define MLS_FILES_WORKER_H

#include "files.h"
#include "mounts.h"
#include "worker.h"

struct mls_files {
    mls_engine *engine;
    char *root;
    int root_fd;
    int mode;
    uint32_t write_steps;
    bool evict;
    bool local;              /* fstat of an open file asks no server */
    _Atomic bool direct;     /* how files are opened: as the mount learnt last was found to be */
    mls_mounts mounts;
    mls_done_queue *queue;
    _Atomic uint64_t ended;
    _Atomic int refs;
    pthread_mutex_t pace_lock; /* transfers that are to begin later; held while they are begun. Before `lock` */
    pthread_cond_t pace;
    struct mls_delayed *delayed;
    pthread_t pacer;
    bool pacing, stopping;
    pthread_mutex_t lock;    /* what follows; the engine's lock may be taken while it is held, not the other way */
    mls_op *ops;             /* under way */
    mls_file_failure failures[MLS_KEPT_FAILURES];
    size_t nfailures;
};

struct mls_batch {
    mls_files *files;
    mls_transfer *transfers;
    size_t count;
    char *keys;              /* each ended by a NUL */
    size_t *key_at;
    mls_files_memory memory;
    mls_pattern pattern;
    uint64_t submit_ns;
    _Atomic size_t left;     /* transfers that have not ended */
    _Atomic int refs;
};

static inline const char *mls_batch_key(const mls_batch *batch, size_t member)
{
    return batch->keys + batch->key_at[member];
}

/* ---- files.c, files_start.c ---- */

/* The range that a READ asks for of a file of `file_nbytes`: 0, MLS_ELENGTH or MLS_ESHORT. */
int mls_files_range(const mls_transfer *transfer, uint64_t file_nbytes, uint64_t *offset, uint64_t *nbytes);

/* An operation for one file, submitted; in front of the queue if it was begun at `start_ns`, which is
 * not 0. 0 or -ENOMEM. For a READ the range
 * is given. */
int mls_files_own_op(mls_batch *batch, size_t member, uint64_t offset, uint64_t nbytes, uint64_t start_ns);

/* A completion with what is known from the start. */
void mls_files_blank(const mls_batch *batch, size_t member, mls_completion *done);

/* Sets result and kind for `error` (0, errno or MLS_E*), and keeps failures. */
void mls_files_judge(mls_batch *batch, size_t member, mls_completion *done, int error, int stage);

/* Hands completions over. */
void mls_files_push(mls_batch **batches, const mls_completion *done, size_t count);

/* Compares a digest with the one that was given. 0 or MLS_KIND_CHECKSUM. */
int mls_files_compare(const mls_transfer *transfer, const mls_completion *done);

/* No longer under way. */
void mls_files_forget(mls_files *files, mls_op *op);

/* ---- files_worker.c ---- */

/* The crew for an MLS_OP_FILES operation. */
int mls_files_crew(const mls_worker *worker, const mls_op *op);
void mls_files_begin(mls_worker *worker, mls_op *op, size_t unit);
void mls_files_complete(mls_worker *worker, mls_io *io, uint64_t now);
void mls_files_flush(mls_worker *worker);

/* An operation with a batch has ended. */
void mls_files_op_ended(mls_worker *worker, mls_op *op);

/* Makes the directories that a file is to lie in, durably where the steps ask for that. 0 or -errno. */
int mls_files_make_parents(const mls_op *op);

/* The open file of an operation against what its transfer asks for: 0, MLS_ELENGTH or MLS_ESHORT. */
int mls_files_check_length(const mls_op *op);

#endif
