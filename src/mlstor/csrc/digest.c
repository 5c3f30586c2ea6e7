#include "digest.h"

#include "crc_tables.h"

#include <assert.h>
#include <pthread.h>
#include <string.h>

#ifdef MLS_HAVE_ISAL

#include <isa-l/crc.h>

/*
 * ISA-L leaves prefetching to the processor, whose streams end at every page: what a device or another core has just
 * written then costs twice the sum itself. Measured, CRC-32 of 1 GB on one 2.5 GHz core, without and with the loop
 * below: from the third-level cache 0.14 and 0.08 s, from memory, which is read in 0.10 s at best, 0.15 and 0.11 s, from
 * the second-level one 0.06 s both. A distance of 2 KiB gave 0.075 s there, 8 KiB the same as this.
 */
#define STEP_BYTES ((size_t)1 << 10)
#define AHEAD_BYTES ((size_t)4 << 10)
#define LINE_BYTES ((size_t)64)

static void prefetch_ahead(const uint8_t *p, size_t n)
{
    const size_t end = n < AHEAD_BYTES + STEP_BYTES ? n : AHEAD_BYTES + STEP_BYTES;
    for (size_t at = AHEAD_BYTES; at < end; at += LINE_BYTES)
        __builtin_prefetch(p + at);
}

uint32_t mls_crc32(uint32_t crc, const void *data, size_t n)
{
    const uint8_t *p = data;
    while (n > 0) {
        const size_t step = n < STEP_BYTES ? n : STEP_BYTES;
        prefetch_ahead(p, n);
        crc = crc32_gzip_refl(crc, p, step); /* inverts by itself, as zlib does */
        p += step;
        n -= step;
    }
    return crc;
}

uint32_t mls_crc32c(uint32_t crc, const void *data, size_t n)
{
    unsigned char *p = (unsigned char *)(uintptr_t)data; /* the prototype lacks const */
    crc = ~crc;                                          /* crc32_iscsi inverts neither at the start nor at the end */
    while (n > 0) {
        const size_t step = n < STEP_BYTES ? n : STEP_BYTES;
        prefetch_ahead(p, n);
        crc = crc32_iscsi(p, (int)step, crc);
        p += step;
        n -= step;
    }
    return ~crc;
}

static const char *crc_impl(int alg)
{
    (void)alg;
    return "isa-l";
}

#else /* !MLS_HAVE_ISAL */

#if defined(__x86_64__)
#include <nmmintrin.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#ifndef HWCAP_CRC32
#define HWCAP_CRC32 (1 << 7)
#endif
#endif

typedef uint32_t crc_update(uint32_t state, const uint8_t *p, size_t n);

/* slice[k][b]: byte b followed by k zero bytes */
static uint32_t slice_crc32[8][256], slice_crc32c[8][256];
static crc_update *update_crc32, *update_crc32c;
static const char *impl_crc32, *impl_crc32c;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static uint64_t load64(const uint8_t *p)
{
    uint64_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* Slicing by 8 (Kounavis and Berry 2005): eight bytes per step, one look-up each. */
static uint32_t slicing(const uint32_t slice[8][256], uint32_t state, const uint8_t *p, size_t n)
{
    for (; n >= 8; p += 8, n -= 8) {
        const uint64_t v = load64(p) ^ state;
        state = slice[7][v & 0xff] ^ slice[6][v >> 8 & 0xff] ^ slice[5][v >> 16 & 0xff] ^ slice[4][v >> 24 & 0xff] ^
                slice[3][v >> 32 & 0xff] ^ slice[2][v >> 40 & 0xff] ^ slice[1][v >> 48 & 0xff] ^ slice[0][v >> 56];
    }
    for (; n > 0; p++, n--)
        state = state >> 8 ^ slice[0][(state ^ *p) & 0xff];
    return state;
}

static uint32_t update_crc32_table(uint32_t state, const uint8_t *p, size_t n)
{
    return slicing(slice_crc32, state, p, n);
}

static uint32_t update_crc32c_table(uint32_t state, const uint8_t *p, size_t n)
{
    return slicing(slice_crc32c, state, p, n);
}

#if defined(__x86_64__) || defined(__aarch64__)

#define LANE_BYTES 4096u /* of each of three interleaved streams; the instruction has 3 cycles latency, 1 throughput */

/* past_lane[k][b]: byte k of a state with value b, moved past LANE_BYTES; [0] is crc32, [1] crc32c */
static uint32_t past_lane[2][4][256];

static uint32_t move_past_lane(const uint32_t table[4][256], uint32_t state)
{
    return table[0][state & 0xff] ^ table[1][state >> 8 & 0xff] ^ table[2][state >> 16 & 0xff] ^ table[3][state >> 24];
}

#if defined(__x86_64__)
#define CRC_TARGET __attribute__((target("sse4.2")))
#define CRC32C_U64(state, v) (uint32_t) _mm_crc32_u64(state, v)
#define CRC32C_U8(state, v) _mm_crc32_u8(state, v)
#else
/* builtins rather than arm_acle.h, which wants the extension for the whole file */
#if defined(__clang__)
#define CRC_TARGET __attribute__((target("crc")))
#define CRC32C_U64(state, v) __builtin_arm_crc32cd(state, v)
#define CRC32C_U8(state, v) __builtin_arm_crc32cb(state, v)
#define CRC32_U64(state, v) __builtin_arm_crc32d(state, v)
#define CRC32_U8(state, v) __builtin_arm_crc32b(state, v)
#else
#define CRC_TARGET __attribute__((target("+crc")))
#define CRC32C_U64(state, v) __builtin_aarch64_crc32cx(state, v)
#define CRC32C_U8(state, v) __builtin_aarch64_crc32cb(state, v)
#define CRC32_U64(state, v) __builtin_aarch64_crc32x(state, v)
#define CRC32_U8(state, v) __builtin_aarch64_crc32b(state, v)
#endif
#endif

#define DEFINE_HARDWARE_UPDATE(name, past, u64, u8)                                         \
    CRC_TARGET static uint32_t name(uint32_t state, const uint8_t *p, size_t n)             \
    {                                                                                       \
        for (; n >= 3 * LANE_BYTES; p += 3 * LANE_BYTES, n -= 3 * LANE_BYTES) {             \
            uint32_t a = state, b = 0, c = 0;                                               \
            for (size_t i = 0; i < LANE_BYTES; i += 8) {                                    \
                a = u64(a, load64(p + i));                                                  \
                b = u64(b, load64(p + LANE_BYTES + i));                                     \
                c = u64(c, load64(p + 2 * LANE_BYTES + i));                                 \
            }                                                                               \
            state = move_past_lane(past, move_past_lane(past, a) ^ b) ^ c;                  \
        }                                                                                   \
        for (; n >= 8; p += 8, n -= 8)                                                      \
            state = u64(state, load64(p));                                                  \
        for (; n > 0; p++, n--)                                                             \
            state = u8(state, *p);                                                          \
        return state;                                                                       \
    }

DEFINE_HARDWARE_UPDATE(update_crc32c_hardware, past_lane[1], CRC32C_U64, CRC32C_U8)
#if defined(__aarch64__)
DEFINE_HARDWARE_UPDATE(update_crc32_hardware, past_lane[0], CRC32_U64, CRC32_U8)
#endif

static void build_past_lane(uint32_t table[4][256], uint32_t poly)
{
    for (uint32_t k = 0; k < 4; k++) {
        for (uint32_t b = 0; b < 256; b++)
            table[k][b] = mls_crc_times_bytes(poly, b << (8 * k), LANE_BYTES);
    }
}

#endif

static void build_slices(uint32_t slice[8][256], uint32_t poly)
{
    for (uint32_t b = 0; b < 256; b++) {
        uint32_t state = b;
        for (int bit = 0; bit < 8; bit++)
            state = state >> 1 ^ (poly & (0u - (state & 1)));
        slice[0][b] = state;
    }
    for (uint32_t b = 0; b < 256; b++) {
        for (int k = 1; k < 8; k++)
            slice[k][b] = slice[k - 1][b] >> 8 ^ slice[0][slice[k - 1][b] & 0xff];
    }
}

static void choose(void)
{
    build_slices(slice_crc32, MLS_POLY_CRC32);
    build_slices(slice_crc32c, MLS_POLY_CRC32C);
    update_crc32 = update_crc32_table;
    update_crc32c = update_crc32c_table;
    impl_crc32 = impl_crc32c = "table";
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("sse4.2")) {
        build_past_lane(past_lane[1], MLS_POLY_CRC32C);
        update_crc32c = update_crc32c_hardware;
        impl_crc32c = "sse4.2";
    }
#elif defined(__aarch64__)
    if (getauxval(AT_HWCAP) & HWCAP_CRC32) {
        build_past_lane(past_lane[0], MLS_POLY_CRC32);
        build_past_lane(past_lane[1], MLS_POLY_CRC32C);
        update_crc32 = update_crc32_hardware;
        update_crc32c = update_crc32c_hardware;
        impl_crc32 = impl_crc32c = "armv8";
    }
#endif
}

static void prepare(void)
{
    const int failed = pthread_once(&once, choose);
    assert(!failed);
    (void)failed;
}

uint32_t mls_crc32(uint32_t crc, const void *p, size_t n)
{
    prepare();
    return ~update_crc32(~crc, p, n);
}

uint32_t mls_crc32c(uint32_t crc, const void *p, size_t n)
{
    prepare();
    return ~update_crc32c(~crc, p, n);
}

static const char *crc_impl(int alg)
{
    prepare();
    return alg == MLS_DIGEST_CRC32 ? impl_crc32 : impl_crc32c;
}

#endif /* MLS_HAVE_ISAL */

/* Two looks at the same bytes: the second finds them in the first-level cache. */
#define HOT_BYTES ((size_t)16 << 10)

static uint64_t both(uint64_t crc, const uint8_t *p, size_t n)
{
    uint32_t crc32 = (uint32_t)crc, crc32c = (uint32_t)(crc >> 32);
    for (size_t done = 0; done < n;) {
        const size_t step = n - done < HOT_BYTES ? n - done : HOT_BYTES;
        crc32 = mls_crc32(crc32, p + done, step);
        crc32c = mls_crc32c(crc32c, p + done, step);
        done += step;
    }
    return (uint64_t)crc32c << 32 | crc32;
}

uint64_t mls_crc(int alg, uint64_t crc, const void *p, size_t n)
{
    assert(mls_digest_combines(alg));
    switch (alg) {
    case MLS_DIGEST_CRC32:
        return mls_crc32((uint32_t)crc, p, n);
    case MLS_DIGEST_CRC32C:
        return mls_crc32c((uint32_t)crc, p, n);
    case MLS_DIGEST_CRC32_CRC32C:
        return both(crc, p, n);
    default:
        return 0;
    }
}

const char *mls_digest_impl(int alg)
{
    switch (alg) {
    case MLS_DIGEST_CRC32:
    case MLS_DIGEST_CRC32C:
        return crc_impl(alg);
    case MLS_DIGEST_XXH64:
        return "scalar";
    default:
        return "none";
    }
}
