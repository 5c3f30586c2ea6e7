#include "sha256.h"

#include <string.h>

#define BLOCK 64u

/* FIPS 180-4, 4.2.2: the first 32 bits of the fractional parts of the cube roots of the first 64 primes. */
static const uint32_t K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static inline uint32_t rotate_right(uint32_t x, int bits)
{
    return x >> bits | x << (32 - bits);
}

static inline uint32_t load_big(const uint8_t *p)
{
    uint32_t v;
    memcpy(&v, p, sizeof v);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    v = __builtin_bswap32(v);
#endif
    return v;
}

static inline void store_big(uint8_t *p, uint32_t v)
{
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    v = __builtin_bswap32(v);
#endif
    memcpy(p, &v, sizeof v);
}

static void consume(uint32_t state[8], const uint8_t *p, size_t nblocks)
{
    for (; nblocks > 0; nblocks--, p += BLOCK) {
        uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
        uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
        uint32_t w[16]; /* the message schedule's last 16 words */

#pragma GCC unroll 64
        for (int t = 0; t < 64; t++) {
            if (t < 16) {
                w[t] = load_big(p + 4 * t);
            } else {
                const uint32_t w15 = w[(t - 15) & 15], w2 = w[(t - 2) & 15];
                w[t & 15] += (rotate_right(w15, 7) ^ rotate_right(w15, 18) ^ w15 >> 3) + w[(t - 7) & 15] +
                             (rotate_right(w2, 17) ^ rotate_right(w2, 19) ^ w2 >> 10);
            }
            const uint32_t t1 = h + (rotate_right(e, 6) ^ rotate_right(e, 11) ^ rotate_right(e, 25)) +
                                (g ^ (e & (f ^ g))) + K[t] + w[t & 15];
            const uint32_t t2 = (rotate_right(a, 2) ^ rotate_right(a, 13) ^ rotate_right(a, 22)) +
                                ((a & b) | (c & (a | b)));
            h = g, g = f, f = e, e = d + t1;
            d = c, c = b, b = a, a = t1 + t2;
        }
        state[0] += a, state[1] += b, state[2] += c, state[3] += d;
        state[4] += e, state[5] += f, state[6] += g, state[7] += h;
    }
}

void mls_sha256_init(mls_sha256 *s)
{
    /* FIPS 180-4, 5.3.3: the same of the square roots of the first 8 primes */
    *s = (mls_sha256){.state = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab,
                                0x5be0cd19}};
}

void mls_sha256_update(mls_sha256 *s, const void *p, size_t n)
{
    const uint8_t *at = p;
    const size_t held = s->total_bytes % BLOCK;

    if (n == 0)
        return;
    s->total_bytes += n;
    if (held > 0) {
        const size_t take = n < BLOCK - held ? n : BLOCK - held;
        memcpy(s->pending + held, at, take);
        if (held + take < BLOCK)
            return;
        consume(s->state, s->pending, 1);
        at += take;
        n -= take;
    }
    consume(s->state, at, n / BLOCK);
    at += n / BLOCK * BLOCK;
    if (n % BLOCK > 0)
        memcpy(s->pending, at, n % BLOCK);
}

void mls_sha256_final(mls_sha256 *s, uint8_t digest[MLS_SHA256_BYTES])
{
    const uint64_t nbits = s->total_bytes * 8;
    size_t held = s->total_bytes % BLOCK;

    s->pending[held++] = 0x80;
    if (held > BLOCK - 8) {
        memset(s->pending + held, 0, BLOCK - held);
        consume(s->state, s->pending, 1);
        held = 0;
    }
    memset(s->pending + held, 0, BLOCK - 8 - held);
    store_big(s->pending + BLOCK - 8, (uint32_t)(nbits >> 32));
    store_big(s->pending + BLOCK - 4, (uint32_t)nbits);
    consume(s->state, s->pending, 1);
    for (int i = 0; i < 8; i++)
        store_big(digest + 4 * i, s->state[i]);
}

void mls_sha256_once(const void *p, size_t n, uint8_t digest[MLS_SHA256_BYTES])
{
    mls_sha256 s;
    mls_sha256_init(&s);
    mls_sha256_update(&s, p, n);
    mls_sha256_final(&s, digest);
}

void mls_hmac_key_init(mls_hmac_key *key, const void *p, size_t n)
{
    uint8_t block[BLOCK] = {0};

    if (n > BLOCK)
        mls_sha256_once(p, n, block);
    else if (n > 0)
        memcpy(block, p, n);
    for (size_t i = 0; i < BLOCK; i++)
        block[i] ^= 0x36;
    mls_sha256_init(&key->inner);
    mls_sha256_update(&key->inner, block, BLOCK);
    for (size_t i = 0; i < BLOCK; i++)
        block[i] ^= 0x36 ^ 0x5c;
    mls_sha256_init(&key->outer);
    mls_sha256_update(&key->outer, block, BLOCK);
    explicit_bzero(block, sizeof block);
}

void mls_hmac_sha256(const mls_hmac_key *key, const void *p, size_t n, uint8_t digest[MLS_SHA256_BYTES])
{
    mls_sha256 s = key->inner;
    mls_sha256_update(&s, p, n);
    mls_sha256_final(&s, digest);
    s = key->outer;
    mls_sha256_update(&s, digest, MLS_SHA256_BYTES);
    mls_sha256_final(&s, digest);
}

void mls_sha256_hex(const uint8_t digest[MLS_SHA256_BYTES], char hex[MLS_SHA256_HEX_BYTES])
{
    static const char digits[16] = "0123456789abcdef";

    for (size_t i = 0; i < MLS_SHA256_BYTES; i++) {
        hex[2 * i] = digits[digest[i] >> 4];
        hex[2 * i + 1] = digits[digest[i] & 15];
    }
}
