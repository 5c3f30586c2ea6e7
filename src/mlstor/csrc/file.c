#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

/* One read or write moves at most 0x7ffff000 bytes (read(2)); a round number below it keeps offsets aligned. */
#define MAX_TRANSFER_BYTES ((uint64_t)1 << 30)
#define TEMPORARY_SUFFIX ".mlstor-tmp"
/* f_type values of statfs(2), from linux/magic.h */
#define TMPFS_MAGIC 0x01021994u
#define RAMFS_MAGIC 0x858458f6u
#define FUSE_MAGIC 0x65735546u

uint64_t mls_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

mls_file *mls_file_new(const char *path)
{
    mls_file *file = calloc(1, sizeof *file);
    if (!file)
        return NULL;
    file->fd = -1;
    file->path = strdup(path);
    atomic_init(&file->refs, 1);
    if (!file->path) {
        free(file);
        return NULL;
    }
    return file;
}

void mls_file_ref(mls_file *file) { atomic_fetch_add_explicit(&file->refs, 1, memory_order_relaxed); }

static void discard_temporary(mls_file *file)
{
    if (file->temporary)
        unlink(file->temporary);
    free(file->temporary);
    file->temporary = NULL;
}

void mls_file_unref(mls_file *file)
{
    if (atomic_fetch_sub_explicit(&file->refs, 1, memory_order_acq_rel) != 1)
        return;
    if (file->fd >= 0)
        close(file->fd);
    discard_temporary(file);
    free(file->path);
    free(file);
}

static bool latch_find(mls_latches *latches, const mls_alignment *align, mls_latch *found)
{
    bool known = false;
    pthread_mutex_lock(&latches->lock);
    for (size_t i = 0; i < latches->count && !known; i++) {
        if (latches->latch[i].dev == align->dev && latches->latch[i].mnt_id == align->mnt_id) {
            *found = latches->latch[i];
            known = true;
        }
    }
    pthread_mutex_unlock(&latches->lock);
    return known;
}

static void latch_set(mls_latches *latches, const mls_alignment *align, bool direct_works, const char *reason)
{
    mls_latch known;
    if (latch_find(latches, align, &known))
        return;
    pthread_mutex_lock(&latches->lock);
    /* A full table costs a probe per file, nothing else. */
    if (latches->count < MLS_LATCHES) {
        mls_latch *latch = &latches->latch[latches->count++];
        latch->dev = align->dev;
        latch->mnt_id = align->mnt_id;
        latch->direct_works = direct_works;
        snprintf(latch->reason, sizeof latch->reason, "%s", reason);
    }
    pthread_mutex_unlock(&latches->lock);
}

/* `.<name>.<8 hex>.mlstor-tmp` in the same directory, the name cut so that NAME_MAX holds. */
static char *temporary_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    size_t dir_length = slash ? (size_t)(slash - path) + 1 : 0;
    uint32_t unique = 0;
    char *name = NULL;
    if (getrandom(&unique, sizeof unique, 0) != (ssize_t)sizeof unique)
        unique = (uint32_t)mls_now_ns() ^ (uint32_t)getpid();
    if (asprintf(&name, "%.*s.%.200s.%08x" TEMPORARY_SUFFIX, (int)dir_length, path, path + dir_length, unique) < 0)
        return NULL;
    return name;
}

static int open_with(const mls_file *file, bool write, int extra)
{
    const char *name = file->temporary ? file->temporary : file->path;
    int flags = O_CLOEXEC | extra | (write ? O_RDWR | O_CREAT : O_RDONLY);
    int fd;
    do
        fd = open(name, flags, 0666);
    while (fd < 0 && errno == EINTR);
    return fd < 0 ? -errno : fd;
}

static bool refuses_direct(int error)
{
    return error == EINVAL || error == EOPNOTSUPP || error == ENOTSUP || error == EPERM;
}

static void set_buffered(mls_file *file, const char *reason)
{
    file->direct = false;
    atomic_store(&file->confirmed, MLS_PATH_BUFFERED);
    snprintf(file->reason, sizeof file->reason, "%s", reason);
    file->align.mem_align = file->align.offset_align = file->align.read_offset_align = 1;
}

/* Whether direct I/O is out of the question here, and why. */
static bool direct_excluded(const mls_file *file, mls_latches *latches, char *reason)
{
    mls_latch latch;
    if (file->align.fs_magic == TMPFS_MAGIC || file->align.fs_magic == RAMFS_MAGIC)
        snprintf(reason, MLS_REASON_BYTES, "%s is memory: O_DIRECT is accepted and ignored", file->align.fs_name);
    else if (file->align.direct_supported == MLS_DIRECT_NO)
        snprintf(reason, MLS_REASON_BYTES, "statx says that %s has no direct I/O for this file", file->align.fs_name);
    else if (latch_find(latches, &file->align, &latch) && !latch.direct_works)
        snprintf(reason, MLS_REASON_BYTES, "%s", latch.reason);
    else
        return false;
    return true;
}

/* What takes a file's place keeps its mode, and its owner if we may give it that: a private file stays private. */
static int keep_access(int fd, const struct stat *now, const struct stat *old)
{
    if ((now->st_uid != old->st_uid || now->st_gid != old->st_gid) && fchown(fd, old->st_uid, old->st_gid) < 0 &&
        errno != EPERM)
        return -errno;
    return (now->st_mode ^ old->st_mode) & 0777 && fchmod(fd, old->st_mode & 0777) < 0 ? -errno : 0;
}

int mls_file_open(mls_file *file, bool write, bool temporary, int mode, mls_latches *latches)
{
    char reason[MLS_REASON_BYTES];
    struct stat st, old;
    mls_latch latch;
    const bool replaces = temporary && stat(file->path, &old) == 0;
    /* rename(2) puts a file in the place of a device, pipe or socket too, as root even of /dev/null */
    if (replaces && !S_ISREG(old.st_mode) && !S_ISDIR(old.st_mode))
        return -ENXIO;
    if (temporary && !(file->temporary = temporary_name(file->path)))
        return -ENOMEM;
    int create = write && file->temporary ? O_EXCL : 0;
    int fd = open_with(file, write, create | (mode == MLS_MODE_OFF ? 0 : O_DIRECT));
    bool direct = fd >= 0 && mode != MLS_MODE_OFF;
    if (mode == MLS_MODE_OFF)
        snprintf(reason, sizeof reason, "direct I/O was switched off");
    if (fd < 0 && mode != MLS_MODE_OFF && refuses_direct(-fd)) {
        int refusal = -fd;
        snprintf(reason, sizeof reason, "open with O_DIRECT was refused: %s", strerror(refusal));
        if (mode == MLS_MODE_REQUIRE) {
            snprintf(file->reason, sizeof file->reason, "%s", reason);
            return -refusal;
        }
        /* the refused open may have created the file (open(2): O_DIRECT is checked late) */
        fd = open_with(file, write, 0);
    }
    if (fd < 0) {
        if (write && file->temporary && fd == -EEXIST) {
            free(file->temporary); /* not ours to remove */
            file->temporary = NULL;
        }
        return fd;
    }
    file->fd = fd;
    if (fstat(fd, &st) < 0)
        return -errno;
    if (S_ISDIR(st.st_mode))
        return -EISDIR;
    const int kept = replaces && S_ISREG(old.st_mode) ? keep_access(fd, &st, &old) : 0;
    if (kept)
        return kept;
    file->nbytes = (uint64_t)st.st_size;
    int probed = mls_probe_alignment(fd, &file->align);
    if (probed < 0)
        return probed;
    if (direct && direct_excluded(file, latches, reason)) {
        if (mode == MLS_MODE_REQUIRE) {
            snprintf(file->reason, sizeof file->reason, "%s", reason);
            return -EOPNOTSUPP;
        }
        if (fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_DIRECT) < 0)
            return -errno;
        direct = false;
    }
    /* not by O_TRUNC: a file is not emptied before it is known that it can be written as asked */
    if (write && S_ISREG(st.st_mode) && st.st_size && ftruncate(fd, 0) < 0)
        return -errno;
    if (!direct) {
        set_buffered(file, reason);
        return 0;
    }
    file->direct = true;
    file->proven = latch_find(latches, &file->align, &latch) && latch.direct_works;
    atomic_store(&file->confirmed, MLS_PATH_UNVERIFIED);
    snprintf(file->reason, sizeof file->reason, "no aligned block was transferred");
    return 0;
}

int mls_file_fall_back(mls_file *file, bool write, int mode, int error, mls_latches *latches)
{
    char reason[MLS_REASON_BYTES];
    snprintf(reason, sizeof reason, "the first aligned direct %s was refused: %s", write ? "write" : "read",
             strerror(error));
    latch_set(latches, &file->align, false, reason);
    if (mode == MLS_MODE_REQUIRE) {
        snprintf(file->reason, sizeof file->reason, "%s", reason);
        return -error;
    }
    int fd = open_with(file, write, 0);
    if (fd < 0)
        return fd;
    close(file->fd);
    file->fd = fd;
    set_buffered(file, reason);
    return 0;
}

void mls_file_confirm(mls_file *file, uint64_t offset, uint64_t nbytes, mls_latches *latches)
{
    uint64_t resident = 0;
    latch_set(latches, &file->align, true, "");
    int error = mls_resident(file->fd, offset, nbytes, &resident);
    if (file->align.fs_magic == FUSE_MAGIC)
        snprintf(file->reason, sizeof file->reason, "a FUSE daemon may buffer what the kernel passes on directly");
    else if (error < 0)
        snprintf(file->reason, sizeof file->reason, "the page cache could not be asked: %s", strerror(-error));
    else if (resident)
        snprintf(file->reason, sizeof file->reason, "%llu of the first %llu bytes were in the page cache afterwards",
                 (unsigned long long)resident, (unsigned long long)nbytes);
    else {
        snprintf(file->reason, sizeof file->reason, "nothing of the first block was in the page cache afterwards");
        atomic_store(&file->confirmed, MLS_PATH_DIRECT);
    }
}

int mls_file_preallocate(mls_file *file, uint64_t nbytes)
{
    int result;
    if (!nbytes)
        return 0;
    do
        result = fallocate(file->fd, 0, 0, (off_t)nbytes);
    while (result < 0 && errno == EINTR);
    if (result < 0 && (errno == EOPNOTSUPP || errno == ENOSYS || errno == EINVAL))
        result = ftruncate(file->fd, (off_t)nbytes);
    return result < 0 ? -errno : 0;
}

int64_t mls_pwrite_all(int fd, const void *bytes, uint64_t nbytes, uint64_t offset)
{
    uint64_t done = 0;
    while (done < nbytes) {
        uint64_t left = nbytes - done;
        ssize_t n = pwrite(fd, (const char *)bytes + done, left < MAX_TRANSFER_BYTES ? left : MAX_TRANSFER_BYTES,
                           (off_t)(offset + done));
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : -EIO;
        done += (uint64_t)n;
    }
    return (int64_t)done;
}

int64_t mls_pread_all(int fd, void *bytes, uint64_t nbytes, uint64_t offset, uint32_t align)
{
    uint64_t done = 0;
    while (done < nbytes) {
        uint64_t left = nbytes - done;
        ssize_t n = pread(fd, (char *)bytes + done, left < MAX_TRANSFER_BYTES ? left : MAX_TRANSFER_BYTES,
                          (off_t)(offset + done));
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        done += (uint64_t)n;
        if (n == 0 || done % align) /* a direct read that ends inside a block has met the end of the file */
            break;
    }
    return (int64_t)done;
}

int mls_file_write_tail(mls_file *file, const void *bytes, size_t nbytes, uint64_t offset)
{
    if (file->direct) {
        int flags = fcntl(file->fd, F_GETFL);
        if (flags < 0 || fcntl(file->fd, F_SETFL, flags & ~O_DIRECT) < 0)
            return -errno;
    }
    int64_t written = mls_pwrite_all(file->fd, bytes, nbytes, offset);
    return written < 0 ? (int)written : 0;
}

void mls_drop_pages(int fd, uint64_t offset, uint64_t nbytes)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t begin = offset / page * page, end = (offset + nbytes + page - 1) / page * page;
    posix_fadvise(fd, (off_t)begin, (off_t)(end - begin), POSIX_FADV_DONTNEED);
}

int mls_file_path(const mls_file *file) { return atomic_load(&file->confirmed); }

int mls_file_close(mls_file *file)
{
    int fd = file->fd;
    file->fd = -1;
    return fd >= 0 && close(fd) < 0 && errno != EINTR ? -errno : 0;
}

int mls_file_publish(mls_file *file)
{
    if (!file->temporary)
        return 0;
    if (rename(file->temporary, file->path) < 0)
        return -errno;
    free(file->temporary);
    file->temporary = NULL;
    return 0;
}

int mls_file_open_dir(const mls_file *file)
{
    const char *slash = strrchr(file->path, '/');
    char *dir = slash == file->path ? strdup("/") : slash ? strndup(file->path, (size_t)(slash - file->path)) : strdup(".");
    if (!dir)
        return -ENOMEM;
    int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int result = fd < 0 ? -errno : fd;
    free(dir);
    return result;
}
