/* Percent-encoding as S3's canonical requests want it, which any HTTP server takes too. */
#ifndef MLS_URL_H
#define MLS_URL_H

#include <stdbool.h>
#include <stddef.h>

/* Escape n bytes at src: RFC 3986's unreserved characters (A-Z a-z 0-9 - . _ ~) stay, and so does "/" with keep_slash
 * (for paths, not a query's names and values); any other byte, of UTF-8 too, becomes %XX with upper-case digits.
 * Returns the escaped length, at most 3 * n. If that is more than room nothing of use is in dst. No zero is appended.
 */
size_t mls_url_escape(char *dst, size_t room, const char *src, size_t n, bool keep_slash);

#endif
