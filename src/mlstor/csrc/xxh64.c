/* XXH64, written from its specification (doc/xxhash_spec.md of the xxHash project, version 0.2.0). */
#include "digest.h"

#include <string.h>

#define PRIME_1 0x9e3779b185ebca87u
#define PRIME_2 0xc2b2ae3d27d4eb4fu
#define PRIME_3 0x165667b19e3779f9u
#define PRIME_4 0x85ebca77c2b2ae63u
#define PRIME_5 0x27d4eb2f165667c5u

#define STRIPE_BYTES 32

static inline uint64_t rotate_left(uint64_t x, int bits)
{
    return x << bits | x >> (64 - bits);
}

static inline uint64_t load64(const uint8_t *p)
{
    uint64_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline uint64_t round64(uint64_t acc, uint64_t lane)
{
    return rotate_left(acc + lane * PRIME_2, 31) * PRIME_1;
}

static inline uint64_t merge_round(uint64_t hash, uint64_t acc)
{
    return (hash ^ round64(0, acc)) * PRIME_1 + PRIME_4;
}

static void consume_stripes(uint64_t acc[4], const uint8_t *p, size_t nstripes)
{
    uint64_t a = acc[0], b = acc[1], c = acc[2], d = acc[3];
    for (; nstripes > 0; nstripes--, p += STRIPE_BYTES) {
        a = round64(a, load64(p));
        b = round64(b, load64(p + 8));
        c = round64(c, load64(p + 16));
        d = round64(d, load64(p + 24));
    }
    acc[0] = a, acc[1] = b, acc[2] = c, acc[3] = d;
}

void mls_xxh64_reset(mls_xxh64 *x, uint64_t seed)
{
    *x = (mls_xxh64){
        .seed = seed,
        .acc = {seed + PRIME_1 + PRIME_2, seed + PRIME_2, seed, seed - PRIME_1},
    };
}

void mls_xxh64_update(mls_xxh64 *x, const void *p, size_t n)
{
    const uint8_t *at = p;

    x->total_bytes += n;
    if (x->npending > 0) {
        const size_t room = STRIPE_BYTES - x->npending;
        const size_t take = n < room ? n : room;
        if (take > 0)
            memcpy(x->pending + x->npending, at, take);
        x->npending += (uint32_t)take;
        if (x->npending < STRIPE_BYTES)
            return;
        consume_stripes(x->acc, x->pending, 1);
        x->npending = 0;
        at += take;
        n -= take;
    }
    const size_t nstripes = n / STRIPE_BYTES;
    consume_stripes(x->acc, at, nstripes);
    x->npending = (uint32_t)(n % STRIPE_BYTES);
    if (x->npending > 0)
        memcpy(x->pending, at + nstripes * STRIPE_BYTES, x->npending);
}

uint64_t mls_xxh64_digest(const mls_xxh64 *x)
{
    uint64_t hash;

    if (x->total_bytes >= STRIPE_BYTES) {
        hash = rotate_left(x->acc[0], 1) + rotate_left(x->acc[1], 7) + rotate_left(x->acc[2], 12) +
               rotate_left(x->acc[3], 18);
        for (int i = 0; i < 4; i++)
            hash = merge_round(hash, x->acc[i]);
    } else {
        hash = x->seed + PRIME_5;
    }
    hash += x->total_bytes;

    const uint8_t *p = x->pending;
    size_t n = x->npending;
    for (; n >= 8; p += 8, n -= 8)
        hash = rotate_left(hash ^ round64(0, load64(p)), 27) * PRIME_1 + PRIME_4;
    if (n >= 4) {
        uint32_t half;
        memcpy(&half, p, sizeof half);
        hash = rotate_left(hash ^ half * PRIME_1, 23) * PRIME_2 + PRIME_3;
        p += 4;
        n -= 4;
    }
    for (; n > 0; p++, n--)
        hash = rotate_left(hash ^ *p * PRIME_5, 11) * PRIME_1;

    hash = (hash ^ hash >> 33) * PRIME_2;
    hash = (hash ^ hash >> 29) * PRIME_3;
    return hash ^ hash >> 32;
}
