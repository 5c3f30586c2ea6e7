/* Moving a CRC past bytes that follow: multiplication by x^(8n) modulo the generator polynomial. */
#include "crc_tables.h"
#include "digest.h"

#include <assert.h>
#include <pthread.h>

#define DIGITS 16 /* a byte count is 16 hexadecimal digits */

/* power[i][d] = x^(8 * d * 16^i) mod P */
struct powers {
    uint32_t power[DIGITS][16];
};

static struct powers powers_crc32, powers_crc32c;
static pthread_once_t once = PTHREAD_ONCE_INIT;

/* a * b modulo poly, polynomials with reflected bits: x^0 is bit 31. */
static uint32_t multiply(uint32_t poly, uint32_t a, uint32_t b)
{
    uint32_t product = 0;
    for (int i = 0; i < 32; i++) {
        product ^= b & (0u - (a >> 31));
        a <<= 1;
        b = b >> 1 ^ (poly & (0u - (b & 1)));
    }
    return product;
}

static void build(struct powers *t, uint32_t poly)
{
    uint32_t base = 1u << (31 - 8); /* x^8 */
    for (int i = 0; i < DIGITS; i++) {
        t->power[i][0] = 1u << 31; /* 1 */
        for (int d = 1; d < 16; d++)
            t->power[i][d] = multiply(poly, t->power[i][d - 1], base);
        base = multiply(poly, t->power[i][15], base);
    }
}

static void build_all(void)
{
    build(&powers_crc32, MLS_POLY_CRC32);
    build(&powers_crc32c, MLS_POLY_CRC32C);
}

uint32_t mls_crc_times_bytes(uint32_t poly, uint32_t crc, uint64_t nbytes)
{
    const int failed = pthread_once(&once, build_all);
    assert(!failed);
    (void)failed;
    const struct powers *t = poly == MLS_POLY_CRC32 ? &powers_crc32 : &powers_crc32c;
    for (int i = 0; nbytes != 0; i++, nbytes >>= 4) {
        if (nbytes & 15)
            crc = multiply(poly, t->power[i][nbytes & 15], crc);
    }
    return crc;
}

uint64_t mls_crc_shift(int alg, uint64_t crc, uint64_t nbytes)
{
    assert(mls_digest_combines(alg));
    switch (alg) {
    case MLS_DIGEST_CRC32:
        return mls_crc_times_bytes(MLS_POLY_CRC32, (uint32_t)crc, nbytes);
    case MLS_DIGEST_CRC32C:
        return mls_crc_times_bytes(MLS_POLY_CRC32C, (uint32_t)crc, nbytes);
    case MLS_DIGEST_CRC32_CRC32C:
        return (uint64_t)mls_crc_times_bytes(MLS_POLY_CRC32C, (uint32_t)(crc >> 32), nbytes) << 32 |
               mls_crc_times_bytes(MLS_POLY_CRC32, (uint32_t)crc, nbytes);
    default:
        return 0;
    }
}
