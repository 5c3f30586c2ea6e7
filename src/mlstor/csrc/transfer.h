/* What crosses the boundary in arrays; storage/transfers.py has the same as numpy records and says what each means. */
#ifndef MLS_TRANSFER_H
#define MLS_TRANSFER_H

#include <assert.h>
#include <stdint.h>

#define MLS_WHOLE UINT64_MAX

enum mls_transfer_op { MLS_TRANSFER_READ, MLS_TRANSFER_WRITE, MLS_TRANSFER_STAT, MLS_TRANSFER_DELETE };
enum mls_transfer_memory { MLS_TRANSFER_DROP, MLS_TRANSFER_BUFFER, MLS_TRANSFER_PATTERN };
enum mls_transfer_digest { MLS_TRANSFER_NO_DIGEST, MLS_TRANSFER_CRC32C, MLS_TRANSFER_XXH64, MLS_TRANSFER_CRC32 };
enum mls_transfer_kind {
    MLS_KIND_OK, MLS_KIND_SYSTEM, MLS_KIND_HTTP, MLS_KIND_CONNECT, MLS_KIND_RESET, MLS_KIND_STALLED, MLS_KIND_SHORT,
    MLS_KIND_LENGTH, MLS_KIND_CHECKSUM, MLS_KIND_REDIRECT, MLS_KIND_CANCELLED, MLS_KIND_TLS, MLS_KIND_RESOLVE,
    MLS_KIND_OTHER,
};
#define MLS_TRANSFER_HAS_DIGEST 1u      /* flags: digest_value is given */
#define MLS_COMPLETION_CONNECTED 1u     /* flags: a new connection was made */
#define MLS_COMPLETION_COMPARED 2u      /* flags: a checksum of the store was compared */
#define MLS_ETAG_BYTES 72

typedef struct mls_transfer {
    uint64_t tag, key_start, query_start;
    uint32_t key_nbytes, query_nbytes;
    uint64_t offset, nbytes, object_nbytes, place, room, not_before_ns, digest_value;
    uint32_t endpoint;
    uint8_t op, memory, digest, flags;
} mls_transfer;

typedef struct mls_completion {
    uint64_t tag;
    int64_t result;
    uint64_t submit_ns, start_ns, attempt_ns, redirect_ns, first_byte_ns, end_ns, object_nbytes, digest_value;
    char etag[MLS_ETAG_BYTES];
    uint32_t damaged_blocks, endpoint;
    uint16_t status, attempts;
    uint8_t op, kind, first_kind, flags;
    uint16_t first_status;
    uint8_t reserved[6];
} mls_completion;

static_assert(sizeof(mls_transfer) == 96, "TRANSFER_DTYPE");
static_assert(sizeof(mls_completion) == 176, "COMPLETION_DTYPE");

#endif
