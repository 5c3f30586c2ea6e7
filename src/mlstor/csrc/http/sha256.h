/* SHA-256 (FIPS 180-4) and HMAC-SHA256 (RFC 2104), for request signatures. Nothing here fails or allocates. */
#ifndef MLS_SHA256_H
#define MLS_SHA256_H

#include <stddef.h>
#include <stdint.h>

#define MLS_SHA256_BYTES 32
#define MLS_SHA256_HEX_BYTES 64

/* Streaming state: init, update any number of times, final once. */
typedef struct mls_sha256 {
    uint32_t state[8];
    uint64_t total_bytes;
    uint8_t pending[64]; /* the last total_bytes % 64 bytes */
} mls_sha256;

void mls_sha256_init(mls_sha256 *s);
void mls_sha256_update(mls_sha256 *s, const void *p, size_t n);
void mls_sha256_final(mls_sha256 *s, uint8_t digest[MLS_SHA256_BYTES]);
void mls_sha256_once(const void *p, size_t n, uint8_t digest[MLS_SHA256_BYTES]);

/* A key made ready: the two states after its padded block, so that each message costs two blocks less. */
typedef struct mls_hmac_key {
    mls_sha256 inner, outer;
} mls_hmac_key;

void mls_hmac_key_init(mls_hmac_key *key, const void *p, size_t n);
void mls_hmac_sha256(const mls_hmac_key *key, const void *p, size_t n, uint8_t digest[MLS_SHA256_BYTES]);

/* 64 lower-case hexadecimal digits, without an ending zero. */
void mls_sha256_hex(const uint8_t digest[MLS_SHA256_BYTES], char hex[MLS_SHA256_HEX_BYTES]);

#endif
