#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include "platform.h"

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#ifndef __NR_statx
#if defined(__x86_64__)
#define __NR_statx 332
#elif defined(__aarch64__)
#define __NR_statx 291
#endif
#endif
#ifndef __NR_cachestat
#define __NR_cachestat 451 /* the same on every architecture since 5.x numbering */
#endif

#ifdef STATX_BASIC_STATS /* the C library's headers have struct statx */
#define SAME_PLACE(field)                                                                                      \
    _Static_assert(offsetof(struct mls_statx, field) == offsetof(struct statx, field), #field " out of place"); \
    _Static_assert(sizeof(((struct mls_statx *)0)->field) == sizeof(((struct statx *)0)->field), #field " size")
SAME_PLACE(stx_mask);
SAME_PLACE(stx_attributes);
SAME_PLACE(stx_mode);
SAME_PLACE(stx_ino);
SAME_PLACE(stx_size);
SAME_PLACE(stx_attributes_mask);
SAME_PLACE(stx_atime);
SAME_PLACE(stx_mtime);
SAME_PLACE(stx_rdev_major);
SAME_PLACE(stx_dev_major);
SAME_PLACE(stx_dev_minor);
#ifdef STATX_MNT_ID
SAME_PLACE(stx_mnt_id);
#endif
#ifdef STATX_DIOALIGN
SAME_PLACE(stx_dio_mem_align);
SAME_PLACE(stx_dio_offset_align);
#endif
#ifdef STATX_DIO_READ_ALIGN
SAME_PLACE(stx_dio_read_offset_align);
#endif
_Static_assert(sizeof(struct mls_statx) == sizeof(struct statx), "struct statx size");
#endif
_Static_assert(sizeof(struct mls_statx) == 256, "struct statx is 256 bytes");
_Static_assert(offsetof(struct mls_statx, stx_dio_mem_align) == 0x98, "stx_dio_mem_align");
_Static_assert(offsetof(struct mls_statx, stx_dio_read_offset_align) == 0xb4, "stx_dio_read_offset_align");

/* From <xfs/xfs_fs.h>, which not every build machine has. */
struct xfs_dio_limits {
    uint32_t mem_align;
    uint32_t min_bytes;
    uint32_t max_bytes;
};
#define XFS_DIO_LIMITS _IOR('X', 30, struct xfs_dio_limits)

/* cachestat(2), Linux 6.5 */
struct cachestat_range_abi {
    uint64_t off;
    uint64_t len;
};
struct cachestat_abi {
    uint64_t nr_cache;
    uint64_t nr_dirty;
    uint64_t nr_writeback;
    uint64_t nr_evicted;
    uint64_t nr_recently_evicted;
};

#define TMPFS_MAGIC 0x01021994u
#define RAMFS_MAGIC 0x858458f6u
#define HUGETLBFS_MAGIC 0x958458f6u
#define XFS_MAGIC 0x58465342u

#define LARGEST_BLOCK_BYTES (1u << 20) /* a block size beyond this is not believed */

/* f_type values: statfs(2), linux/magic.h, and the sources of those out of tree. */
static const struct {
    uint32_t magic;
    const char *name;
} file_systems[] = {
    {0x0000ef53, "ext4"},
    {XFS_MAGIC, "xfs"},
    {0x9123683e, "btrfs"},
    {TMPFS_MAGIC, "tmpfs"},
    {RAMFS_MAGIC, "ramfs"},
    {HUGETLBFS_MAGIC, "hugetlbfs"},
    {0x794c7630, "overlay"},
    {0x00006969, "nfs"},
    {0x65735546, "fuse"},
    {0x0bd00bd0, "lustre"},
    {0x47504653, "gpfs"},
    {0x00c36400, "ceph"},
    {0xff534d42, "cifs"},
    {0xfe534d42, "smb2"},
    {0x0000517b, "smb"},
    {0x2fc12fc1, "zfs"},
    {0xf2f52010, "f2fs"},
    {0xca451a4e, "bcachefs"},
    {0x19830326, "beegfs"},
    {0x01021997, "9p"},
    {0x5346414f, "afs"},
    {0x20030528, "orangefs"},
    {0xaad7aaea, "panfs"},
    {0x73717368, "squashfs"},
    {0xe0f5e1e2, "erofs"},
    {0x00004d44, "vfat"},
    {0x2011bab0, "exfat"},
    {0x7366746e, "ntfs3"},
    {0x01161970, "gfs2"},
    {0x7461636f, "ocfs2"},
    {0x00003434, "nilfs2"},
    {0x9660, "iso9660"},
    {0x62646576, "bdev"},
};

int mls_statx_fd(int fd, uint32_t mask, struct mls_statx *out)
{
    if (syscall(__NR_statx, fd, "", AT_EMPTY_PATH, mask, out) != 0)
        return -errno;
    return 0;
}

int mls_statx_at(int dir_fd, const char *path, uint32_t mask, struct mls_statx *out)
{
    struct stat st;
    if (syscall(__NR_statx, dir_fd, path, AT_EMPTY_PATH, mask, out) == 0)
        return 0;
    if (errno != ENOSYS && errno != EPERM) /* EPERM: a sandbox that does not know the call */
        return -1;
    if (fstatat(dir_fd, path, &st, AT_EMPTY_PATH) != 0)
        return -1;
    memset(out, 0, sizeof *out);
    out->stx_mode = (uint16_t)st.st_mode;
    out->stx_size = (uint64_t)st.st_size;
    out->stx_dev_major = major(st.st_dev);
    out->stx_dev_minor = minor(st.st_dev);
    return 0;
}

const char *mls_fs_name(uint64_t fs_magic)
{
    for (size_t i = 0; i < sizeof file_systems / sizeof file_systems[0]; i++) {
        if (file_systems[i].magic == fs_magic)
            return file_systems[i].name;
    }
    return "unknown";
}

static int is_power_of_two(uint32_t n)
{
    return n != 0 && (n & (n - 1)) == 0;
}

static uint32_t larger(uint32_t a, uint32_t b)
{
    return a > b ? a : b;
}

static uint32_t page_bytes(void)
{
    return (uint32_t)sysconf(_SC_PAGESIZE);
}

/* A block size from a block device's queue directory, or 0 where there is none (or none to be believed). */
static uint32_t sysfs_block_bytes(dev_t dev, const char *name)
{
    /* a partition has no queue of its own: its disk is the directory above */
    static const char *const places[] = {"queue", "../queue"};

    for (size_t i = 0; i < sizeof places / sizeof places[0]; i++) {
        char path[96], text[24];
        snprintf(path, sizeof path, "/sys/dev/block/%u:%u/%s/%s", major(dev), minor(dev), places[i], name);
        const int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            continue;
        const ssize_t n = read(fd, text, sizeof text - 1);
        close(fd);
        if (n <= 0)
            continue;
        text[n] = '\0';
        const unsigned long bytes = strtoul(text, NULL, 10);
        if (bytes <= LARGEST_BLOCK_BYTES && is_power_of_two((uint32_t)bytes))
            return (uint32_t)bytes;
    }
    return 0;
}

/* Take what statx says about direct I/O. Returns whether it said something. */
static int align_by_statx(const struct mls_statx *stx, mls_alignment *out)
{
    if (!(stx->stx_mask & MLS_STATX_DIOALIGN))
        return 0;
    out->source = "statx";
    if (stx->stx_dio_mem_align == 0 || stx->stx_dio_offset_align == 0) {
        out->direct_supported = MLS_DIRECT_NO;
        return 1;
    }
    out->direct_supported = MLS_DIRECT_YES;
    out->mem_align = stx->stx_dio_mem_align;
    out->offset_align = stx->stx_dio_offset_align;
    out->read_offset_align = stx->stx_dio_offset_align;
    /* 0 here means: reads need the same as writes */
    if ((stx->stx_mask & MLS_STATX_DIO_READ_ALIGN) && stx->stx_dio_read_offset_align != 0)
        out->read_offset_align = stx->stx_dio_read_offset_align;
    return 1;
}

static int align_by_xfs(int fd, mls_alignment *out)
{
    struct xfs_dio_limits limits;

    if (out->fs_magic != XFS_MAGIC || ioctl(fd, XFS_DIO_LIMITS, &limits) != 0)
        return 0;
    if (!is_power_of_two(limits.mem_align) || !is_power_of_two(limits.min_bytes))
        return 0;
    out->source = "xfs";
    out->direct_supported = MLS_DIRECT_YES;
    out->mem_align = limits.mem_align;
    out->offset_align = out->read_offset_align = limits.min_bytes;
    return 1;
}

int mls_probe_alignment(int fd, mls_alignment *out)
{
    struct stat st;
    struct statfs fs;
    struct mls_statx stx;

    if (fstat(fd, &st) != 0 || fstatfs(fd, &fs) != 0)
        return -errno;
    const int rc = mls_statx_fd(
        fd, MLS_STATX_DIOALIGN | MLS_STATX_DIO_READ_ALIGN | MLS_STATX_MNT_ID | MLS_STATX_MNT_ID_UNIQUE, &stx);
    if (rc == -ENOSYS || rc == -EPERM) /* old kernel, or a sandbox that does not know the call */
        memset(&stx, 0, sizeof stx);
    else if (rc != 0)
        return rc;

    const dev_t dev = S_ISBLK(st.st_mode) ? st.st_rdev : st.st_dev;
    const uint32_t page = page_bytes();
    *out = (mls_alignment){
        .mem_align = page,
        .offset_align = page,
        .read_offset_align = page,
        .direct_supported = MLS_DIRECT_UNKNOWN,
        .blksize = (uint32_t)st.st_blksize,
        .logical_block = sysfs_block_bytes(dev, "logical_block_size"),
        .physical_block = sysfs_block_bytes(dev, "physical_block_size"),
        .dev = st.st_dev,
        .mnt_id = stx.stx_mask & (MLS_STATX_MNT_ID | MLS_STATX_MNT_ID_UNIQUE) ? stx.stx_mnt_id : 0,
        .fs_magic = (uint32_t)fs.f_type,
        .source = "page",
    };
    out->fs_name = mls_fs_name(out->fs_magic);

    if (!align_by_statx(&stx, out) && !align_by_xfs(fd, out) && out->logical_block != 0) {
        /* a file system may want more than its device: only memory is taken from it, and reads stay at a page */
        out->source = "sysfs";
        out->mem_align = out->logical_block;
    }
    /* a direct write of less than a physical block makes the device read, modify and write it */
    out->offset_align = larger(out->offset_align, out->physical_block);
    if (out->fs_magic == TMPFS_MAGIC || out->fs_magic == RAMFS_MAGIC || out->fs_magic == HUGETLBFS_MAGIC)
        out->direct_supported = MLS_DIRECT_NO;
    return 0;
}

/* Bytes of [begin, end) on pages that mincore(2) says are resident. */
static int resident_by_mincore(int fd, uint64_t begin, uint64_t end, uint64_t *resident_bytes)
{
    const uint64_t page = page_bytes();
    const uint64_t window_bytes = 1u << 30; /* bounds the vector: 256 KiB for pages of 4 KiB */
    unsigned char *const vector = malloc(window_bytes / page);
    int rc = 0;

    if (vector == NULL)
        return -ENOMEM;
    *resident_bytes = 0;
    for (uint64_t at = begin - begin % page; at < end && rc == 0; at += window_bytes) {
        const uint64_t length = end - at < window_bytes ? end - at : window_bytes;
        void *const map = mmap(NULL, length, PROT_READ, MAP_SHARED, fd, (off_t)at);
        if (map == MAP_FAILED) {
            rc = -errno;
            break;
        }
        if (mincore(map, length, vector) != 0)
            rc = -errno;
        munmap(map, length);
        for (uint64_t i = 0; rc == 0 && i * page < length; i++) {
            if (vector[i] & 1) {
                const uint64_t from = at + i * page, to = from + page;
                *resident_bytes += (to < end ? to : end) - (from > begin ? from : begin);
            }
        }
    }
    free(vector);
    return rc;
}

int mls_resident(int fd, uint64_t offset, uint64_t nbytes, uint64_t *resident_bytes)
{
    struct stat st;

    if (fstat(fd, &st) != 0)
        return -errno;
    const uint64_t size = (uint64_t)st.st_size;
    *resident_bytes = 0;
    if (offset >= size)
        return 0;
    const uint64_t end = nbytes == 0 || nbytes > size - offset ? size : offset + nbytes;

    const struct cachestat_range_abi range = {.off = offset, .len = end - offset};
    struct cachestat_abi found;
    if (syscall(__NR_cachestat, fd, &range, &found, 0) == 0) {
        const uint64_t cached_bytes = found.nr_cache * page_bytes();
        *resident_bytes = cached_bytes < end - offset ? cached_bytes : end - offset;
        return 0;
    }
    if (errno == EPERM && st.st_uid != geteuid() && geteuid() != 0)
        return -EPERM; /* of someone else's file mincore would say that all of it is resident */
    if (errno != ENOSYS && errno != EOPNOTSUPP && errno != EPERM)
        return -errno;
    return resident_by_mincore(fd, offset, end, resident_bytes);
}

int mls_evict(int fd)
{
    if (fdatasync(fd) != 0)
        return -errno;
    return -posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
}
