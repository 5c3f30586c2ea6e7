/* What kernel and file system grant: alignment for direct I/O, who the file system is, the page cache.
 *
 * Headers lag behind kernels, so that constants and structures newer than Linux 5.4 are spelled out here.
 */
#ifndef MLS_PLATFORM_H
#define MLS_PLATFORM_H

#include <stdint.h>

/* statx(2) request and result bits */
#define MLS_STATX_BASIC_STATS 0x000007ffu
#define MLS_STATX_MNT_ID 0x00001000u         /* 5.8 */
#define MLS_STATX_DIOALIGN 0x00002000u       /* 6.1 */
#define MLS_STATX_MNT_ID_UNIQUE 0x00004000u  /* 6.8 */
#define MLS_STATX_DIO_READ_ALIGN 0x00020000u /* 6.14 */

#define MLS_RWF_DONTCACHE 0x00000080 /* 6.14: buffered, dropped from the page cache when done */

struct mls_statx_timestamp {
    int64_t tv_sec;
    uint32_t tv_nsec;
    int32_t reserved;
};

/* Laid out as the kernel's struct statx (6.14); platform.c asserts it against the header's where there is one. */
struct mls_statx {
    uint32_t stx_mask;
    uint32_t stx_blksize;
    uint64_t stx_attributes;
    uint32_t stx_nlink;
    uint32_t stx_uid;
    uint32_t stx_gid;
    uint16_t stx_mode;
    uint16_t spare0;
    uint64_t stx_ino;
    uint64_t stx_size;
    uint64_t stx_blocks;
    uint64_t stx_attributes_mask;
    struct mls_statx_timestamp stx_atime, stx_btime, stx_ctime, stx_mtime;
    uint32_t stx_rdev_major, stx_rdev_minor;
    uint32_t stx_dev_major, stx_dev_minor;
    uint64_t stx_mnt_id;
    uint32_t stx_dio_mem_align;
    uint32_t stx_dio_offset_align;
    uint64_t stx_subvol;
    uint32_t stx_atomic_write_unit_min, stx_atomic_write_unit_max, stx_atomic_write_segments_max;
    uint32_t stx_dio_read_offset_align;
    uint32_t stx_atomic_write_unit_max_opt;
    uint32_t spare2;
    uint64_t spare3[8];
};

/* statx(2) of `path` in directory `dir_fd`, of `dir_fd` itself where it is empty. Returns 0, or -1 with errno set; where
 * the call does not exist, type and size come from fstatat(2). */
int mls_statx_at(int dir_fd, const char *path, uint32_t mask, struct mls_statx *out);

/* statx(2) of an open file. Returns 0 or -errno (-ENOSYS before 4.11; sandboxes may answer -EPERM). */
int mls_statx_fd(int fd, uint32_t mask, struct mls_statx *out);

enum mls_direct {
    MLS_DIRECT_NO = 0,
    MLS_DIRECT_YES = 1,
    MLS_DIRECT_UNKNOWN = 2, /* nothing says; the first aligned I/O will show */
};

typedef struct mls_alignment {
    uint32_t mem_align;         /* of addresses for direct I/O, bytes; a power of two, as the next two */
    uint32_t offset_align;      /* of offset and length of writes, bytes: not below the physical block where known */
    uint32_t read_offset_align; /* of offset and length of reads, bytes */
    int direct_supported;       /* enum mls_direct */
    uint32_t blksize;           /* preferred I/O size (st_blksize), bytes */
    uint32_t logical_block;     /* of the block device, bytes; 0 where there is none or it is not known */
    uint32_t physical_block;
    uint64_t dev;               /* st_dev */
    uint64_t mnt_id;            /* of the mount: the unique id (6.8), else the reusable one (5.8), else 0 */
    uint64_t fs_magic;          /* f_type of statfs(2) */
    const char *fs_name;        /* "ext4", "xfs", ..., "unknown"; static storage */
    const char *source;         /* what said mem_align: "statx", "xfs", "sysfs" (logical block), "page"; static */
} mls_alignment;

/* Alignment of direct I/O to an open regular file or block device, and on what file system it lies. Does no I/O to it.
 * Where nothing says anything the page size stands in. tmpfs, ramfs and hugetlbfs are reported as not direct, though
 * newer kernels accept O_DIRECT there: it is memory either way. Returns 0 or -errno.
 */
int mls_probe_alignment(int fd, mls_alignment *out);

/* Name for a statfs(2) f_type; ext2, ext3 and ext4 share one and are "ext4". "unknown" for others. */
const char *mls_fs_name(uint64_t fs_magic);

/* How many of the bytes [offset, offset + nbytes) of an open file are in the page cache, in *resident_bytes; nbytes 0
 * means up to the end of the file, and bytes past the end do not count. Exact to pages. cachestat(2) (6.5), else
 * mmap + mincore(2), which wants fd readable. Returns 0 or -errno: -EPERM when the file belongs to someone else and may
 * not be written (kernels hide the page cache then).
 */
int mls_resident(int fd, uint64_t offset, uint64_t nbytes, uint64_t *resident_bytes);

/* Write back what is dirty and ask the kernel to drop the file's pages. Returns 0 or -errno. Whether they are gone,
 * mls_resident tells; caches of a server or a hypervisor are out of reach.
 */
int mls_evict(int fd);

#endif
