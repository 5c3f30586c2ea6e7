#include "core_api.h"

void mls_core_api_init(mls_core_api *api)
{
    *api = (mls_core_api){
        .nbytes = sizeof *api,
        .pattern_init = mls_pattern_init,
        .pattern_fill = mls_pattern_fill,
        .pattern_check = mls_pattern_check,
        .crc32 = mls_crc32,
        .crc32c = mls_crc32c,
        .xxh64_reset = mls_xxh64_reset,
        .xxh64_update = mls_xxh64_update,
        .xxh64_digest = mls_xxh64_digest,
    };
}
