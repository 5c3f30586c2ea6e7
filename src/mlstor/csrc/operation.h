/* An operation: one file written or read to its end, an array of ranges of an open file, or an array of small files.
 *
 * The caller makes it, fills in extents, submits it to an engine and may look at its result once it is done. Until then
 * the memory that its extents name belongs to the engine. No function here is called with a lock held.
 */
#ifndef MLS_OPERATION_H
#define MLS_OPERATION_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "digest.h"
#include "file.h"
#include "pattern.h"

enum mls_op_kind { MLS_OP_WRITE, MLS_OP_READ, MLS_OP_RANGES, MLS_OP_FILES };
enum mls_extent_kind { MLS_EXTENT_MEMORY, MLS_EXTENT_PATTERN, MLS_EXTENT_DROP, MLS_EXTENT_LATE };

/* The steps of an operation, beside writing or reading itself. */
enum mls_steps {
    MLS_STEP_PREALLOCATE = 1,  /* fallocate to the final size before the first write; ftruncate where refused */
    MLS_STEP_FDATASYNC = 2,
    MLS_STEP_FSYNC = 4,
    MLS_STEP_RENAME = 8,       /* write under a temporary name, rename over the path when durable */
    MLS_STEP_FSYNC_DIR = 16,
    MLS_STEP_DONTNEED = 32,    /* posix_fadvise(DONTNEED) on each block after it was transferred */
    MLS_STEP_RANDOM = 64,      /* posix_fadvise(RANDOM) on the whole file: no readahead */
};

/* Where an error happened, for its message. */
enum mls_stage {
    MLS_STAGE_NONE, MLS_STAGE_OPEN, MLS_STAGE_ALLOCATE, MLS_STAGE_TRANSFER, MLS_STAGE_LATE, MLS_STAGE_TAIL,
    MLS_STAGE_SYNC, MLS_STAGE_CLOSE, MLS_STAGE_RENAME, MLS_STAGE_SYNC_DIR,
};

/* errors beyond errno */
#define MLS_ESHORT 10001    /* the file ends before the bytes that were asked for */
#define MLS_ELATE 10002     /* the callback of late extents failed */
#define MLS_ECANCELED 10003 /* mls_op_cancel */
#define MLS_ELENGTH 10004   /* another length than the catalog says, or than there is room for */

#define MLS_MAX_DAMAGE 16

typedef struct mls_extent {
    uint64_t offset;        /* in the file */
    uint64_t nbytes;
    unsigned char *memory;  /* MEMORY; LATE once the callback has set it */
    mls_pattern pattern;    /* PATTERN: offset in the pattern = offset in the file */
    uint64_t group_after;   /* bytes of the group that follow this extent; computed */
    uint32_t group;         /* index into groups, where digest is not NONE */
    uint8_t kind;
    uint8_t digest;
} mls_extent;

typedef struct mls_group {
    _Atomic uint64_t crc;   /* XOR of shifted pieces */
    uint64_t nbytes;
    uint64_t sealed_offset; /* of the extent last seen by mls_op_seal */
    uint8_t digest;
    mls_xxh64 xxh64;        /* one worker, in file order */
} mls_group;

/* What one worker transfers at once: a part of one block of the file. */
typedef struct mls_unit {
    uint64_t offset;
    uint32_t nbytes;
    uint32_t first_extent;
    uint32_t nextents;
} mls_unit;

/* A range as it is asked for, and as it was done. */
typedef struct mls_range {
    uint64_t tag, offset, nbytes, dest;
} mls_range;

typedef struct mls_range_done {
    uint64_t tag;
    int64_t result;         /* bytes, or -errno */
    uint64_t latency_ns;    /* from its submission to the kernel; 0: it never began */
    uint64_t end_ns;        /* CLOCK_MONOTONIC, when the worker saw it */
} mls_range_done;

typedef struct mls_result {
    int error;              /* 0, errno, or MLS_E* */
    int stage;
    uint64_t error_offset;
    uint64_t start_ns, open_ns, data_ns, sync_ns, commit_ns, end_ns; /* start and end: CLOCK_MONOTONIC; others durations */
    uint64_t nbytes;        /* transferred and asked for */
    uint64_t zero_copy_bytes, staged_bytes;
    uint64_t file_nbytes;   /* of the file found, for reads */
    int threads;            /* which crew: 0 io_uring, 1 threads */
    int direct;             /* enum mls_path */
    char reason[MLS_REASON_BYTES];
    mls_alignment align;
    size_t ndamage;
    uint64_t damaged_blocks;
    mls_damage damage[MLS_MAX_DAMAGE];
} mls_result;

struct mls_io;
struct mls_worker;
struct mls_batch;

typedef struct mls_op {
    /* as asked */
    int kind;
    uint32_t steps;
    uint64_t file_nbytes;   /* WRITE: final size */
    uint64_t block_bytes;
    int direct_mode;
    bool serial;            /* one worker, in file order */
    uint64_t bytes_per_s;   /* WRITE: at most, on an average; 0: no limit */
    bool ordered;           /* processed in file order too: a digest that does not combine */
    mls_extent *extents;
    size_t nextents;
    mls_group *groups;
    size_t ngroups;
    uint64_t *tags;         /* RANGES: per unit. FILES: which of the batch */
    struct mls_done_queue *ranges_queue;
    uint64_t region_id;     /* RANGES: not 0 if all memory extents lie in one region, which may be attached */
    unsigned char *region;
    uint64_t region_nbytes;
    int (*late)(void *user);/* sets the memory of LATE extents; 0 or -1 */
    void *user;
    bool has_late;

    struct mls_batch *batch;/* FILES, and a file of such an array that is an operation of its own (files.h) */
    size_t member;          /* of the batch, which file that is */

    /* under way */
    mls_file *file;         /* FILES: NULL */
    mls_file **files;       /* RANGES of several files: each unit's, all direct or none; NULL: all are in `file` */
    mls_unit *units;
    size_t nunits, nlate;   /* the last nlate units wait for late bytes */
    _Atomic size_t next, avail, phase_end, remaining;
    _Atomic uint64_t due_ns; /* with bytes_per_s: no unit is taken before */
    _Atomic int failed;     /* 0, or the first error */
    _Atomic int refs;
    _Atomic int state;
    struct mls_worker *owner;
    struct mls_io *parked;  /* ordered: completed ahead of their turn */
    size_t next_ordered;
    uint64_t data_start_ns, step_start_ns;
    int dir_fd;
    struct mls_io *sync_io;
    bool late_done, probing;
    size_t unclaimed;       /* units from here on were never taken, where the operation ended early */
    bool opened;            /* counts among the engine's open files; under its lock */
    _Atomic uint64_t transferred, zero_copy, staged;
    _Atomic uint64_t first_byte_ns; /* with a batch: the end of the first transfer */
    uint64_t begin_ns;      /* when it was first opened; 0 before */
    struct mls_op *batch_next, *batch_prev; /* under way of one mls_files, under its lock */

    /* in the engine's lists, under its lock */
    struct mls_op *queue_next, *queue_prev, *done_next;
    bool queued;
    int crew;
    _Atomic bool done;

    pthread_mutex_t lock;   /* damage, first error, ended, published */
    bool ended;             /* the result is settled: no error is taken any more */
    bool published;         /* the file has its name: too late to cancel */
    mls_result result;
} mls_op;

/* A new operation with one reference, or NULL. `path` is copied; for RANGES pass `file` instead (a reference is taken),
 * for FILES neither. */
mls_op *mls_op_new(int kind, const char *path, mls_file *file, size_t nextents, size_t ngroups);
/* The file that a unit is in. */
static inline mls_file *mls_op_file(const mls_op *op, size_t unit) { return op->files ? op->files[unit] : op->file; }
void mls_op_ref(mls_op *op);
void mls_op_unref(mls_op *op);

/* Checks and sorts the extents, computes what follows each in its group. 0, or -EINVAL with `bad` set to an extent that
 * overlaps the one before it, or that breaks the order that xxh64 needs. */
int mls_op_seal(mls_op *op, size_t *bad);

/* Keeps the first error of an operation that has not ended; of several MLS_ESHORT the one nearest to the start. */
void mls_op_fail(mls_op *op, int error, int stage, uint64_t offset);

bool mls_op_is_done(const mls_op *op);

/* The digest of a group; valid when the operation is done. */
uint64_t mls_op_digest(const mls_op *op, size_t group);

#endif
