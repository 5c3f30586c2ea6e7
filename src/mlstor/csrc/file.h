/* An open file and the path that its I/O takes: direct or buffered, decided at open and at the first aligned I/O, and
 * remembered per mount.
 */
#ifndef MLS_FILE_H
#define MLS_FILE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "platform.h"

enum mls_mode { MLS_MODE_AUTO, MLS_MODE_REQUIRE, MLS_MODE_OFF };
enum mls_path { MLS_PATH_BUFFERED, MLS_PATH_DIRECT, MLS_PATH_UNVERIFIED };

#define MLS_REASON_BYTES 160
#define MLS_LATCHES 64

/* What was learnt of a mount. Keyed by device and mount id: loop mounts that follow one another can share a device number. */
typedef struct mls_latch {
    uint64_t dev, mnt_id;
    bool direct_works;
    char reason[MLS_REASON_BYTES];
} mls_latch;

typedef struct mls_latches {
    pthread_mutex_t lock;
    size_t count;
    mls_latch latch[MLS_LATCHES];
} mls_latches;

typedef struct mls_file {
    char *path;
    char *temporary;           /* the name under which it is written until it is durable, or NULL */
    int fd;                    /* -1 when closed */
    bool direct;               /* fd has O_DIRECT */
    bool proven;               /* direct I/O is known to work on this mount */
    mls_alignment align;       /* 1/1 where not direct */
    uint64_t nbytes;           /* at open */
    _Atomic int confirmed;     /* enum mls_path; set once by the first aligned transfer */
    _Atomic bool confirming;   /* that transfer has been chosen */
    char reason[MLS_REASON_BYTES];
    _Atomic int refs;
} mls_file;

mls_file *mls_file_new(const char *path);
void mls_file_ref(mls_file *file);
void mls_file_unref(mls_file *file); /* closes; removes a temporary file that was not renamed */

/* Opens for reading, or creates for writing (under a temporary name beside the path with `temporary`; else truncated).
 * `mode` AUTO falls back to buffered and says why in file->reason; REQUIRE fails. 0 or -errno. */
int mls_file_open(mls_file *file, bool write, bool temporary, int mode, mls_latches *latches);

/* The first aligned I/O was refused with `error`: remembers that for the mount and opens the file again, buffered.
 * 0, or -error if direct I/O was required. */
int mls_file_fall_back(mls_file *file, bool write, int mode, int error, mls_latches *latches);

/* Direct I/O of [offset, offset+nbytes) has just been done, and the first of the file: did it leave pages in the cache? */
void mls_file_confirm(mls_file *file, uint64_t offset, uint64_t nbytes, mls_latches *latches);

/* fallocate to `nbytes`, or ftruncate where the file system has none (never posix_fallocate: it writes). 0 or -errno. */
int mls_file_preallocate(mls_file *file, uint64_t nbytes);

/* Writes the last partial block, buffered, through the same descriptor. 0 or -errno. */
int mls_file_write_tail(mls_file *file, const void *bytes, size_t nbytes, uint64_t offset);

/* Blocking pwrite or pread of all of it, in pieces where the kernel gives less: bytes done, less only at the end of the
 * file, or -errno. */
int64_t mls_pwrite_all(int fd, const void *bytes, uint64_t nbytes, uint64_t offset);
int64_t mls_pread_all(int fd, void *bytes, uint64_t nbytes, uint64_t offset, uint32_t align);

/* Asks the kernel to drop the pages that hold [offset, offset+nbytes). A page in part would stay (posix_fadvise(2)), and a
 * direct read need not end at a page's end. */
void mls_drop_pages(int fd, uint64_t offset, uint64_t nbytes);

int mls_file_path(const mls_file *file); /* enum mls_path: as far as it is known by now */
int mls_file_close(mls_file *file);   /* 0 or -errno: some file systems report a failed upload only here */
int mls_file_publish(mls_file *file); /* rename(temporary, path): 0 or -errno */
int mls_file_open_dir(const mls_file *file); /* its directory, for fsync: a descriptor or -errno */

uint64_t mls_now_ns(void);            /* CLOCK_MONOTONIC */

#endif
