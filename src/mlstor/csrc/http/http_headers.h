/* What is wanted of an answer's header lines, and small things in them. No libcurl: a fuzzer may link it alone. */
#ifndef MLS_HTTP_HEADERS_H
#define MLS_HTTP_HEADERS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../transfer.h"

typedef struct mls_http_headers {
    unsigned status;
    bool ended;          /* the empty line was seen */
    bool too_long;       /* a location longer than there is room for */
    uint64_t length;     /* Content-Length; MLS_WHOLE: not given */
    uint64_t range_start, range_end, range_total; /* Content-Range; MLS_WHOLE: not given */
    char etag[MLS_ETAG_BYTES];
    char checksum_type[24], checksum[72]; /* AIStore's, or "crc32c" and S3's; empty: none */
    char retry_after[40]; /* seconds or a date; empty: none */
    char location[4096];
} mls_http_headers;

void mls_http_headers_reset(mls_http_headers *headers);
/* One line, with or without its CRLF. A status line starts anew, so that 100 Continue leaves nothing. */
void mls_http_headers_add(mls_http_headers *headers, const char *line, size_t nbytes);

/* The CRC-32C as S3 writes it: base64 of its four bytes, most significant first; 8 characters and a zero. */
void mls_http_crc_base64(uint32_t crc, char out[9]);

/* What the body of a refusal says: <Code> and <Message> of XML, or "message" of JSON, else its first line; printable
 * and ended by a zero.
 */
void mls_http_refusal_text(const char *body, size_t nbytes, char *out, size_t room);

#endif
