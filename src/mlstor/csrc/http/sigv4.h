/* AWS Signature Version 4 in headers (not in the query).
 *
 * An mls_sigv4 never changes, so that any thread may sign with it; what is worth keeping from one request to the next,
 * the day's key, is in an mls_sigv4_day of the thread's own. Renewed credentials are a new mls_sigv4.
 */
#ifndef MLS_SIGV4_H
#define MLS_SIGV4_H

#include "sha256.h"

#include <stddef.h>
#include <stdint.h>

#define MLS_SIGV4_UNSIGNED "UNSIGNED-PAYLOAD"
/* SHA-256 of no bytes: requests without a body */
#define MLS_SIGV4_EMPTY "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

#define MLS_SIGV4_MOST_HEADERS 24 /* that a caller may have signed besides those that signing adds */

typedef struct mls_sigv4 mls_sigv4;

/* Copies all strings; token is "" where there is none. For services "s3..." the payload's hash is a header too.
 * NULL: no memory, or EINVAL in errno: access key (at most 128 bytes), region or service (at most 64) is empty or too
 * long, or a string holds a control character.
 */
mls_sigv4 *mls_sigv4_new(const char *access_key, const char *secret_key, const char *token, const char *region,
                         const char *service);

/* Wipes the secrets first. NULL is fine. */
void mls_sigv4_free(mls_sigv4 *who);

/* The key of one day for one mls_sigv4; all zeros at first. It finds out by itself when it no longer holds. One thread
 * at a time uses it; to be wiped with mls_sigv4_wipe before its memory goes.
 */
typedef struct mls_sigv4_day {
    uint64_t identity; /* of the mls_sigv4; 0: no key yet */
    int64_t day;       /* since 1970-01-01 UTC */
    char date[16];     /* the same as YYYYMMDD */
    mls_hmac_key key;
} mls_sigv4_day;

void mls_sigv4_wipe(mls_sigv4_day *day);

typedef struct mls_sigv4_header {
    const char *name;  /* lower case */
    const char *value; /* as it is sent; spaces around it and double ones are taken care of */
} mls_sigv4_header;

typedef struct mls_sigv4_request {
    const char *method;       /* "GET" */
    const char *path;         /* escaped (mls_url_escape with keep_slash), beginning with "/" */
    const char *query;        /* escaped, sorted by name, "name=" where there is no value; "" for none */
    const char *host;         /* as the Host header says it: without the scheme's default port */
    const char *payload_hash; /* MLS_SIGV4_UNSIGNED, MLS_SIGV4_EMPTY or the hexadecimal SHA-256 of the body */
    const mls_sigv4_header *headers; /* further ones to sign, in any order, none twice. S3 wants all x-amz-* signed */
    size_t nheaders;
    int64_t time_s; /* since 1970-01-01 UTC */
} mls_sigv4_request;

/* Header lines ("name: value") that the request needs besides its own. */
typedef struct mls_sigv4_lines {
    char authorization[1280];
    char date[32];
    char content_sha256[96]; /* "" where the service wants none */
    const char *token;       /* belongs to the mls_sigv4; NULL where there is none */
} mls_sigv4_lines;

/* Signs. 0, or -EINVAL: time_s before 1970 or after 9999, more than MLS_SIGV4_MOST_HEADERS, a payload_hash longer than
 * 64 bytes, or names too long for the Authorization line.
 */
int mls_sigv4_sign(const mls_sigv4 *who, mls_sigv4_day *day, const mls_sigv4_request *request, mls_sigv4_lines *out);

#endif
