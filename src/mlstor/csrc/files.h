/* Arrays of files under one directory: read (whole or a range), written, looked at, removed; see transfer.h.
 *
 * A read of at most a block is a unit of an MLS_OP_FILES operation, whose opens, reads and closes all go through the
 * worker's backend (files_worker.c). Writes, and larger reads, become operations of their own.
 */
#ifndef MLS_FILES_H
#define MLS_FILES_H

#include "engine.h"
#include "transfer.h"

#define MLS_KEPT_FAILURES 256

typedef struct mls_files mls_files; /* a directory; counts its references, of which each batch has one */
typedef struct mls_batch mls_batch; /* what was submitted together; counts its references too */

typedef struct mls_file_failure {
    uint64_t tag;
    int kind;                /* enum mls_transfer_kind */
    int error;               /* errno, or 0 where the kind says all */
    int stage;               /* enum mls_stage */
    char *key;               /* the receiver frees it */
} mls_file_failure;

typedef struct mls_files_config {
    const char *root;
    int mode;                /* enum mls_mode */
    uint32_t write_steps;    /* enum mls_steps */
    bool evict;              /* buffered reads: drop a file's pages before it is read, and after */
} mls_files_config;

/* Opens the directory. NULL with *error set (-errno). */
mls_files *mls_files_new(mls_engine *engine, const mls_files_config *config, int *error);
void mls_files_unref(mls_files *files);
/* Lets the directory go, which could not be unmounted otherwise; all completions have been reaped, and nothing follows. */
void mls_files_close(mls_files *files);

/* What a batch of transfers goes to, or comes from. */
typedef struct mls_files_memory {
    unsigned char *buffer;   /* or NULL */
    uint64_t nbytes;
    const mls_pattern *pattern; /* or NULL */
    uint64_t region_id;      /* not 0: the buffer may be registered (operation.h) */
} mls_files_memory;

/* Why a transfer can't be taken, or NULL. */
const char *mls_files_refusal(const mls_transfer *transfer, const char *names, size_t names_nbytes,
                              const mls_files_memory *memory);

/* Takes transfers that were not refused; copies them and their names. The caller has a reference to the batch, and lets
 * the memory be until it is done. NULL: no memory, or no thread for transfers that are to begin later. */
mls_batch *mls_files_submit(mls_files *files, const mls_transfer *transfers, size_t count, const char *names,
                            const mls_files_memory *memory);
bool mls_batch_is_done(const mls_batch *batch);
void mls_batch_unref(mls_batch *batch);

/* At least `min` completions, or as many as there are at the timeout. */
size_t mls_files_reap(mls_files *files, mls_completion *out, size_t max, size_t min, int64_t timeout_ns);

/* What has not begun is reported as cancelled. */
void mls_files_cancel(mls_files *files);

/* Of the failures since the last call the first MLS_KEPT_FAILURES. */
size_t mls_files_failures(mls_files *files, mls_file_failure *out, size_t max);

/* enum mls_path of what was read, and why. */
int mls_files_path(mls_files *files, char reason[MLS_REASON_BYTES]);
uint64_t mls_files_ended(const mls_files *files); /* transfers, since the start */

#endif
