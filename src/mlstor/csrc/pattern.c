#include "pattern.h"

#include <errno.h>
#include <stdatomic.h>
#include <string.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "stamp and stream are little-endian");

#define BLOCK MLS_PATTERN_BLOCK_BYTES
#define BLOCK_PAIRS (MLS_PATTERN_BLOCK_BYTES / 128)
#define SECTOR_BYTES 512 /* the least that a device or file system loses or zeroes */
#define GOLDEN 0x9e3779b97f4a7c15u /* 2^64 / golden ratio, splitmix64's increment */

#define LANE(i) (uint64_t)((i + 1) * GOLDEN)
static const uint64_t LANE_CONSTANTS[16] = {
    LANE(0), LANE(1), LANE(2),  LANE(3),  LANE(4),  LANE(5),  LANE(6),  LANE(7),
    LANE(8), LANE(9), LANE(10), LANE(11), LANE(12), LANE(13), LANE(14), LANE(15),
};
static const uint64_t BEYOND_STAMP[8] = {0, 0, 0, 0, 0, UINT64_MAX, UINT64_MAX, UINT64_MAX};

/* Output function of splitmix64 (Steele, Lea, Flood 2014): a bijection that mixes well. */
static inline uint64_t mix64(uint64_t z)
{
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static uint64_t pattern_key(uint64_t run_id, uint32_t checkpoint, uint64_t file_id, uint32_t compressibility)
{
    uint64_t key = mix64(run_id + GOLDEN);
    key = mix64(key + file_id + GOLDEN);
    return mix64(key + ((uint64_t)compressibility << 32 | checkpoint) + GOLDEN);
}

/* Seeds a block's stream; its upper half is the stamp's `check`. */
static inline uint64_t block_key(uint64_t key, uint64_t offset)
{
    return mix64(key + (offset / BLOCK + 1) * GOLDEN);
}

static inline void make_stamp(const mls_pattern *p, uint64_t key, uint64_t offset, uint64_t *words)
{
    words[0] = MLS_PATTERN_MAGIC | (uint64_t)MLS_PATTERN_VERSION << 32 | (uint64_t)p->compressibility << 48;
    words[1] = p->checkpoint | (key >> 32) << 32;
    words[2] = p->run_id;
    words[3] = p->file_id;
    words[4] = offset;
}

static int all_zero(const uint8_t *bytes, size_t n)
{
    return n == 0 || (bytes[0] == 0 && memcmp(bytes, bytes + 1, n - 1) == 0);
}

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 8") /* at -O2 gcc would keep the arrays of vectors in memory */
#endif

/* Plain stores: non-temporal ones were no faster, and made what reads the block next (digest, copy, device) slower.
 * No AVX-512 set: faster in L2, but slower than AVX2 once the slots are larger than the caches.
 */
#define KERNEL(name) name##_baseline
#define KERNEL_TARGET
#define KERNEL_LANES 2
#include "pattern_kernel.h"

#if defined(__x86_64__)
#define KERNEL(name) name##_avx2
#define KERNEL_TARGET __attribute__((target("avx2")))
#define KERNEL_LANES 4
#include "pattern_kernel.h"
#endif

struct kernel {
    const char *name;
    void (*fill)(const mls_pattern *, uint8_t *, uint64_t, size_t);
    size_t (*compare)(const mls_pattern *, const uint8_t *, uint64_t, size_t);
};

#define KERNEL_ENTRY(isa) {#isa, fill_##isa, compare_##isa}
static const struct kernel kernels[] = {
    KERNEL_ENTRY(baseline),
#if defined(__x86_64__)
    KERNEL_ENTRY(avx2),
#endif
};
#define NKERNELS (sizeof kernels / sizeof kernels[0])

static _Atomic(const struct kernel *) chosen;

static int cpu_has(const struct kernel *k)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (strcmp(k->name, "avx2") == 0)
        return __builtin_cpu_supports("avx2");
#endif
    return strcmp(k->name, "baseline") == 0;
}

static const struct kernel *kernel(void)
{
    const struct kernel *k = atomic_load_explicit(&chosen, memory_order_relaxed);
    if (k == NULL) { /* threads that race here choose the same */
        size_t i = NKERNELS - 1;
        while (!cpu_has(&kernels[i]))
            i--;
        k = &kernels[i];
        atomic_store_explicit(&chosen, k, memory_order_relaxed);
    }
    return k;
}

const char *mls_pattern_isa(void)
{
    return kernel()->name;
}

int mls_pattern_set_isa(const char *name)
{
    static const char *const known[] = {"baseline", "avx2"};

    if (name == NULL) {
        atomic_store_explicit(&chosen, NULL, memory_order_relaxed);
        return 0;
    }
    for (size_t i = 0; i < NKERNELS; i++) {
        if (strcmp(name, kernels[i].name) == 0 && cpu_has(&kernels[i])) {
            atomic_store_explicit(&chosen, &kernels[i], memory_order_relaxed);
            return 0;
        }
    }
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        if (strcmp(name, known[i]) == 0)
            return -ENOTSUP;
    }
    return -EINVAL;
}

int mls_pattern_init(mls_pattern *p, uint64_t run_id, uint32_t checkpoint, uint64_t file_id,
                     uint32_t compressibility)
{
    if (compressibility > MLS_PATTERN_MAX_COMPRESSIBILITY)
        return -EINVAL;
    const uint32_t live_bytes = BLOCK - BLOCK * compressibility / 100;
    *p = (mls_pattern){
        .run_id = run_id,
        .file_id = file_id,
        .checkpoint = checkpoint,
        .compressibility = compressibility,
        .key = pattern_key(run_id, checkpoint, file_id, compressibility),
        .live_bytes = live_bytes < MLS_PATTERN_STAMP_BYTES ? MLS_PATTERN_STAMP_BYTES : live_bytes,
    };
    return 0;
}

void mls_pattern_fill(const mls_pattern *p, void *dst, uint64_t offset, size_t nbytes)
{
    const struct kernel *k = kernel();
    uint8_t scratch[BLOCK] __attribute__((aligned(64)));
    uint8_t *at = dst;

    const size_t skip = offset % BLOCK;
    if (skip != 0 && nbytes > 0) {
        const size_t n = nbytes < BLOCK - skip ? nbytes : BLOCK - skip;
        k->fill(p, scratch, offset - skip, 1);
        memcpy(at, scratch + skip, n);
        at += n, offset += n, nbytes -= n;
    }
    const size_t nblocks = nbytes / BLOCK;
    k->fill(p, at, offset, nblocks);
    at += nblocks * BLOCK, offset += nblocks * BLOCK, nbytes -= nblocks * BLOCK;
    if (nbytes > 0) {
        k->fill(p, scratch, offset, 1);
        memcpy(at, scratch, nbytes);
    }
}

/* Whether the 40 bytes at `bytes` are a valid stamp; if so, put what it says into *found. */
static int read_stamp(const uint8_t *bytes, mls_pattern *found, uint64_t *offset)
{
    uint64_t words[5], again[5];
    memcpy(words, bytes, sizeof words);
    const uint32_t compressibility = (uint32_t)(words[0] >> 48);
    if (mls_pattern_init(found, words[2], (uint32_t)words[1], words[3], compressibility) != 0)
        return 0;
    *offset = words[4];
    make_stamp(found, block_key(found->key, *offset), *offset, again);
    return memcmp(words, again, sizeof words) == 0;
}

/* Describe bytes [lo, hi) of the block at block_offset, some of which differ from `want`. got points at byte lo. */
static void classify(const mls_pattern *p, const uint8_t *want, const uint8_t *got, uint64_t block_offset, size_t lo,
                     size_t hi, mls_damage *out)
{
    const size_t n = hi - lo;
    size_t first = 0, last = n - 1;
    while (got[first] == want[lo + first])
        first++;
    while (got[last] == want[lo + last])
        last--;
    const size_t wrong_bytes = last - first + 1;

    *out = (mls_damage){.offset = block_offset + lo + first, .nbytes = wrong_bytes};
    if ((wrong_bytes >= SECTOR_BYTES && all_zero(got + first, wrong_bytes)) || all_zero(got, n)) {
        out->kind = MLS_DAMAGE_ZEROED;
        return;
    }
    if (lo > 0 || n < MLS_PATTERN_STAMP_BYTES) {
        out->kind = MLS_DAMAGE_CORRUPT;
        return;
    }
    mls_pattern found;
    uint64_t found_offset;
    if (!read_stamp(got, &found, &found_offset)) {
        out->kind = MLS_DAMAGE_NO_STAMP;
        return;
    }
    out->found_run_id = found.run_id;
    out->found_checkpoint = found.checkpoint;
    out->found_file_id = found.file_id;
    out->found_offset = found_offset;
    if (found.run_id != p->run_id)
        out->kind = MLS_DAMAGE_OTHER_RUN;
    else if (found.checkpoint != p->checkpoint)
        out->kind = MLS_DAMAGE_OTHER_CHECKPOINT;
    else if (found.file_id != p->file_id)
        out->kind = MLS_DAMAGE_OTHER_FILE;
    else if (found_offset != block_offset)
        out->kind = MLS_DAMAGE_OTHER_OFFSET;
    else
        out->kind = MLS_DAMAGE_CORRUPT;
    if (out->kind != MLS_DAMAGE_CORRUPT) {
        out->offset = block_offset;
        out->nbytes = n;
    }
}

struct report {
    mls_damage *out;
    size_t max, described, damaged;
};

/* Look closely at bytes [lo, hi) of one block; got points at byte lo. */
static void look(const mls_pattern *p, const struct kernel *k, const uint8_t *got, uint64_t block_offset, size_t lo,
                 size_t hi, struct report *r)
{
    uint8_t want[BLOCK] __attribute__((aligned(64)));
    k->fill(p, want, block_offset, 1);
    if (memcmp(want + lo, got, hi - lo) == 0)
        return;
    r->damaged++;
    if (r->described < r->max)
        classify(p, want, got, block_offset, lo, hi, &r->out[r->described++]);
}

size_t mls_pattern_check(const mls_pattern *p, const void *src, uint64_t offset, size_t nbytes, mls_damage *out,
                         size_t max, size_t *ndamage)
{
    const struct kernel *k = kernel();
    struct report r = {.out = out, .max = max};
    const uint8_t *at = src;

    const size_t skip = offset % BLOCK;
    if (skip != 0 && nbytes > 0) {
        const size_t n = nbytes < BLOCK - skip ? nbytes : BLOCK - skip;
        look(p, k, at, offset - skip, skip, skip + n, &r);
        at += n, offset += n, nbytes -= n;
    }
    while (nbytes >= BLOCK) {
        const size_t good_bytes = k->compare(p, at, offset, nbytes / BLOCK) * BLOCK;
        at += good_bytes, offset += good_bytes, nbytes -= good_bytes;
        if (nbytes >= BLOCK) {
            look(p, k, at, offset, 0, BLOCK, &r);
            at += BLOCK, offset += BLOCK, nbytes -= BLOCK;
        }
    }
    if (nbytes > 0)
        look(p, k, at, offset, 0, nbytes, &r);
    if (ndamage != NULL)
        *ndamage = r.described;
    return r.damaged;
}

const char *mls_damage_kind_name(uint32_t kind)
{
    static const char *const names[] = {
        [MLS_DAMAGE_ZEROED] = "zeroed",
        [MLS_DAMAGE_OTHER_RUN] = "other-run",
        [MLS_DAMAGE_OTHER_CHECKPOINT] = "other-checkpoint",
        [MLS_DAMAGE_OTHER_FILE] = "other-file",
        [MLS_DAMAGE_OTHER_OFFSET] = "other-offset",
        [MLS_DAMAGE_CORRUPT] = "corrupt",
        [MLS_DAMAGE_NO_STAMP] = "no-stamp",
    };
    return kind >= MLS_DAMAGE_ZEROED && kind <= MLS_DAMAGE_NO_STAMP ? names[kind] : "unknown";
}
