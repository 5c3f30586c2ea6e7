/* Which of AIStore's targets holds an object: rendezvous hashing (highest random weight) over the cluster map.
 *
 * uname = provider "/" namespace "/" bucket "/" object, as "ais/@#/bench/obj1"; names are unescaped UTF-8.
 */
#ifndef MLS_RENDEZVOUS_H
#define MLS_RENDEZVOUS_H

#include "../digest.h"
#include "../transfer.h"

#include <stddef.h>
#include <stdint.h>

/* XXH64 as the caller has it: digest.h's functions where they are linked, or pointers to them from elsewhere. */
typedef struct mls_hrw_hash {
    void (*reset)(mls_xxh64 *x, uint64_t seed);
    void (*update)(mls_xxh64 *x, const void *p, size_t n);
    uint64_t (*digest)(const mls_xxh64 *x);
} mls_hrw_hash;

/* AIStore's digest of a uname. */
uint64_t mls_hrw_digest(const mls_hrw_hash *hash, const char *uname, size_t n);

/* A target's weight for an object is this of (target's id_digest ^ uname's digest). */
uint64_t mls_hrw_mix(uint64_t x);

/* Index of the target with the greatest weight. id_digests of those that take part (not in maintenance, not being
 * decommissioned), in any order; n > 0.
 */
size_t mls_hrw_pick(uint64_t digest, const uint64_t *id_digests, size_t n);

typedef struct mls_hrw_map {
    const uint64_t *id_digests;
    const uint32_t *endpoints; /* what goes into mls_transfer.endpoint for each */
    size_t ntargets;           /* > 0 */
    const char *uname_prefix;  /* what precedes the key: "ais/@#/bucket/" and the store's prefix */
    size_t uname_prefix_nbytes;
} mls_hrw_map;

/* Fill in the endpoint of each transfer from its key in names. Returns how many were done: count, or the index of the
 * first whose key does not lie within names_nbytes.
 */
size_t mls_hrw_place(const mls_hrw_hash *hash, const mls_hrw_map *map, mls_transfer *transfers, size_t count,
                     const char *names, uint64_t names_nbytes);

#endif
