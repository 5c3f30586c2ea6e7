#include "rendezvous.h"

#include <assert.h>

#define UNAME_SEED 1103515245u /* cmn/cos of AIStore: the seed of all its name digests */

uint64_t mls_hrw_digest(const mls_hrw_hash *hash, const char *uname, size_t n)
{
    mls_xxh64 x;
    hash->reset(&x, UNAME_SEED);
    hash->update(&x, uname, n);
    return hash->digest(&x);
}

/* One step of splitmix64: the state moves on by 2^64 over the golden ratio, then is mixed. */
static inline uint64_t split_mix(uint64_t state)
{
    uint64_t z = state + 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

uint64_t mls_hrw_mix(uint64_t x)
{
    const uint64_t z = split_mix(split_mix(x)) * 5; /* then the output function of xoshiro256** */
    return (z << 7 | z >> 57) * 9;
}

size_t mls_hrw_pick(uint64_t digest, const uint64_t *id_digests, size_t n)
{
    size_t best = 0;
    uint64_t most = 0;

    assert(n > 0);
    for (size_t i = 0; i < n; i++) {
        const uint64_t weight = mls_hrw_mix(id_digests[i] ^ digest);
        if (i == 0 || weight > most) {
            best = i;
            most = weight;
        }
    }
    return best;
}

size_t mls_hrw_place(const mls_hrw_hash *hash, const mls_hrw_map *map, mls_transfer *transfers, size_t count,
                     const char *names, uint64_t names_nbytes)
{
    mls_xxh64 prefix;

    hash->reset(&prefix, UNAME_SEED);
    hash->update(&prefix, map->uname_prefix, map->uname_prefix_nbytes);
    for (size_t i = 0; i < count; i++) {
        mls_transfer *t = &transfers[i];
        if (t->key_start > names_nbytes || t->key_nbytes > names_nbytes - t->key_start)
            return i;
        mls_xxh64 x = prefix;
        hash->update(&x, names + t->key_start, t->key_nbytes);
        t->endpoint = map->endpoints[mls_hrw_pick(hash->digest(&x), map->id_digests, map->ntargets)];
    }
    return count;
}
