/* Digests of data on its way: crc32 (zlib), crc32c (Castagnoli), both CRCs at once, xxh64.
 *
 * The CRCs use zlib's convention: start with 0, pass the previous result to go on; inversions are inside.
 */
#ifndef MLS_DIGEST_H
#define MLS_DIGEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum mls_digest {
    MLS_DIGEST_NONE,
    MLS_DIGEST_CRC32,  /* polynomial 0x04c11db7, reflected: zlib, zip, gzip, PNG */
    MLS_DIGEST_CRC32C, /* polynomial 0x1edc6f41, reflected: iSCSI, ext4, GCS */
    MLS_DIGEST_XXH64,  /* seed 0 unless told otherwise; does not combine */
    MLS_DIGEST_CRC32_CRC32C, /* crc32c << 32 | crc32: what a container's field and a store's check each ask for */
};

/* CRC of nbytes at p, continuing from crc (0 to start). Never fails; n may be 0. */
uint32_t mls_crc32(uint32_t crc, const void *p, size_t n);
uint32_t mls_crc32c(uint32_t crc, const void *p, size_t n);

/* Whether digests of pieces combine to that of the whole: of the kinds below. */
static inline bool mls_digest_combines(int alg)
{
    return alg == MLS_DIGEST_CRC32 || alg == MLS_DIGEST_CRC32C || alg == MLS_DIGEST_CRC32_CRC32C;
}

/* The same by its kind, one that combines; any other is the caller's bug (assert; 0 under NDEBUG). */
uint64_t mls_crc(int alg, uint64_t crc, const void *p, size_t n);

/* The crc's part in the crc of something nbytes longer: crc(A||B) = mls_crc_shift(alg, crc(A), len(B)) ^ crc(B).
 * A group's crc is therefore the XOR, in any order, of mls_crc_shift(alg, crc(piece), bytes that follow the piece).
 * alg as for mls_crc.
 * O(log nbytes), below 1 us.
 */
uint64_t mls_crc_shift(int alg, uint64_t crc, uint64_t nbytes);

/* Streaming XXH64. reset, update any number of times, digest (which does not end the stream). */
typedef struct mls_xxh64 {
    uint64_t total_bytes;
    uint64_t seed;
    uint64_t acc[4];
    uint8_t pending[32];
    uint32_t npending;
} mls_xxh64;

void mls_xxh64_reset(mls_xxh64 *x, uint64_t seed);
void mls_xxh64_update(mls_xxh64 *x, const void *p, size_t n);
uint64_t mls_xxh64_digest(const mls_xxh64 *x);

/* What computes a digest in this process: "isa-l", "sse4.2", "armv8", "table", "scalar"; "none" for any other kind. */
const char *mls_digest_impl(int alg);

#endif
