/* What the core lends to another extension of this package, so that nothing of it is linked twice: mlstor._io keeps one
 * such table in the capsule MLS_CORE_API_CAPSULE.
 */
#ifndef MLS_CORE_API_H
#define MLS_CORE_API_H

#include "digest.h"
#include "pattern.h"

#define MLS_CORE_API_CAPSULE "mlstor._io._core_api"

typedef struct mls_core_api {
    size_t nbytes; /* sizeof of this, as its maker knows it: both extensions must be of one build */
    int (*pattern_init)(mls_pattern *p, uint64_t run_id, uint32_t checkpoint, uint64_t file_id,
                        uint32_t compressibility);
    void (*pattern_fill)(const mls_pattern *p, void *dst, uint64_t offset, size_t nbytes);
    size_t (*pattern_check)(const mls_pattern *p, const void *src, uint64_t offset, size_t nbytes, mls_damage *out,
                            size_t max, size_t *ndamage);
    uint32_t (*crc32)(uint32_t crc, const void *p, size_t n);
    uint32_t (*crc32c)(uint32_t crc, const void *p, size_t n);
    void (*xxh64_reset)(mls_xxh64 *x, uint64_t seed);
    void (*xxh64_update)(mls_xxh64 *x, const void *p, size_t n);
    uint64_t (*xxh64_digest)(const mls_xxh64 *x);
    /* The parameters of a Python Pattern; -1 if `object` is none. With the GIL. */
    int (*pattern_of)(void *object, mls_pattern *out);
} mls_core_api;

/* All but pattern_of, which is the extension's own. */
void mls_core_api_init(mls_core_api *api);

#endif
