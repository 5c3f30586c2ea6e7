/* What was learnt of the mounts under a directory: how direct I/O is to be aligned there, and whether it is direct.
 *
 * The first file of each mount is read the careful way (file.c), which shows it; of the later ones a sample is looked at.
 */
#ifndef MLS_MOUNTS_H
#define MLS_MOUNTS_H

#include "file.h"

#define MLS_MOUNTS 16

typedef struct mls_mount {
    uint64_t dev;
    bool direct;
    int path;                /* enum mls_path, of all files that were looked at */
    mls_alignment align;     /* 1/1 where not direct */
    uint64_t files, sampled; /* read; looked at afterwards */
    char reason[MLS_REASON_BYTES];
} mls_mount;

typedef struct mls_mounts {
    pthread_mutex_t lock;
    _Atomic size_t count;
    mls_mount mount[MLS_MOUNTS];
} mls_mounts;

/* NULL where nothing is known yet. What it points to stays; of its fields dev, direct and align are constant. */
mls_mount *mls_mounts_find(mls_mounts *mounts, uint64_t dev);

/* `file` was read: its mount is now known. True if it was not before. A full table costs the careful way per file, nothing else. */
bool mls_mounts_learn(mls_mounts *mounts, const mls_file *file);

/* Counts a file of the mount; true if it belongs to the sample: drop its pages, read it, and have it looked at. */
bool mls_mounts_sample(mls_mounts *mounts, mls_mount *mount);
void mls_mounts_look(mls_mounts *mounts, mls_mount *mount, int fd, uint64_t offset, uint64_t nbytes);

/* Of all mounts together: enum mls_path, unverified where nothing was read; why, in `reason`. */
int mls_mounts_path(mls_mounts *mounts, char reason[MLS_REASON_BYTES]);

#endif
