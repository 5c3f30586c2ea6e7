#include "mounts.h"

#include <stdio.h>
#include <string.h>

/* One file in so many is looked at: cachestat costs 1 us, dropping what was cached before about as much. */
#define SAMPLE_EVERY 256

mls_mount *mls_mounts_find(mls_mounts *mounts, uint64_t dev)
{
    size_t count = atomic_load_explicit(&mounts->count, memory_order_acquire);
    for (size_t i = 0; i < count; i++)
        if (mounts->mount[i].dev == dev)
            return &mounts->mount[i];
    return NULL;
}

bool mls_mounts_learn(mls_mounts *mounts, const mls_file *file)
{
    int path = mls_file_path(file);
    if (file->direct && !atomic_load(&file->confirming)) /* it was empty: nothing has been seen */
        return false;
    pthread_mutex_lock(&mounts->lock);
    size_t count = atomic_load(&mounts->count);
    mls_mount *mount = mls_mounts_find(mounts, file->align.dev);
    bool learnt = !mount && count < MLS_MOUNTS;
    if (mount && path != MLS_PATH_DIRECT && mount->path == MLS_PATH_DIRECT) { /* a large file, looked at at its begin */
        mount->path = MLS_PATH_UNVERIFIED;
        memcpy(mount->reason, file->reason, sizeof mount->reason);
    } else if (learnt) {
        mount = &mounts->mount[count];
        mount->dev = file->align.dev;
        mount->direct = file->direct;
        mount->path = path;
        mount->align = file->align;
        mount->sampled = 1;
        memcpy(mount->reason, file->reason, sizeof mount->reason);
        atomic_store_explicit(&mounts->count, count + 1, memory_order_release);
    }
    pthread_mutex_unlock(&mounts->lock);
    return learnt;
}

bool mls_mounts_sample(mls_mounts *mounts, mls_mount *mount)
{
    pthread_mutex_lock(&mounts->lock);
    bool sample = ++mount->files % SAMPLE_EVERY == 0 && mount->path == MLS_PATH_DIRECT;
    pthread_mutex_unlock(&mounts->lock);
    return sample;
}

void mls_mounts_look(mls_mounts *mounts, mls_mount *mount, int fd, uint64_t offset, uint64_t nbytes)
{
    uint64_t resident = 0;
    int error = mls_resident(fd, offset, nbytes, &resident);
    pthread_mutex_lock(&mounts->lock);
    mount->sampled += !error;
    if (!error && resident) {
        mount->path = MLS_PATH_UNVERIFIED;
        snprintf(mount->reason, sizeof mount->reason,
                 "%llu of %llu bytes of a file in the sample were in the page cache afterwards",
                 (unsigned long long)resident, (unsigned long long)nbytes);
    }
    pthread_mutex_unlock(&mounts->lock);
}

int mls_mounts_path(mls_mounts *mounts, char reason[MLS_REASON_BYTES])
{
    static const int worse[] = {[MLS_PATH_BUFFERED] = 2, [MLS_PATH_UNVERIFIED] = 1, [MLS_PATH_DIRECT] = 0};
    const mls_mount *worst = NULL;
    int path = MLS_PATH_UNVERIFIED;
    pthread_mutex_lock(&mounts->lock);
    for (size_t i = 0; i < atomic_load(&mounts->count); i++)
        if (!worst || worse[mounts->mount[i].path] > worse[worst->path])
            worst = &mounts->mount[i];
    if (worst)
        path = worst->path;
    if (!worst)
        snprintf(reason, MLS_REASON_BYTES, "nothing was read");
    else if (path == MLS_PATH_DIRECT)
        snprintf(reason, MLS_REASON_BYTES, "nothing of %llu files that were looked at was in the page cache afterwards",
                 (unsigned long long)worst->sampled);
    else
        snprintf(reason, MLS_REASON_BYTES, "%s", worst->reason);
    pthread_mutex_unlock(&mounts->lock);
    return path;
}
