#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* memmem */
#endif
#include "http_headers.h"

#include <string.h>
#include <strings.h>

void mls_http_headers_reset(mls_http_headers *headers)
{
    headers->status = 0;
    headers->ended = headers->too_long = false;
    headers->length = headers->range_start = headers->range_end = headers->range_total = MLS_WHOLE;
    headers->checksum_type[0] = headers->checksum[0] = headers->location[0] = headers->retry_after[0] = '\0';
    memset(headers->etag, 0, sizeof headers->etag);
}

/* Digits at *at, which moves on; MLS_WHOLE if there are none or too many. */
static uint64_t take_number(const char **at, const char *end)
{
    uint64_t value = 0;
    const char *start = *at;
    while (*at < end && **at >= '0' && **at <= '9') {
        const unsigned digit = (unsigned)(**at - '0');
        if (value > (MLS_WHOLE - 1 - digit) / 10)
            return MLS_WHOLE;
        value = 10 * value + digit;
        (*at)++;
    }
    return *at == start ? MLS_WHOLE : value;
}

/* "bytes 0-9/20", "bytes 0-9/" and a star, "bytes *" "/20" */
static void take_range(mls_http_headers *headers, const char *at, const char *end)
{
    if (end - at < 6 || strncasecmp(at, "bytes ", 6) != 0)
        return;
    at += 6;
    if (at < end && *at == '*') {
        at++;
    } else {
        headers->range_start = take_number(&at, end);
        if (at == end || *at++ != '-')
            return;
        headers->range_end = take_number(&at, end);
    }
    if (at < end && *at++ == '/')
        headers->range_total = take_number(&at, end);
}

static void take_text(char *out, size_t room, const char *at, const char *end)
{
    size_t n = (size_t)(end - at);
    n = n < room ? n : room - 1;
    memcpy(out, at, n);
    out[n] = '\0';
}

static void take_etag(mls_http_headers *headers, const char *at, const char *end)
{
    if (end - at > 2 && at[0] == 'W' && at[1] == '/')
        at += 2;
    if (end - at >= 2 && at[0] == '"' && end[-1] == '"') {
        at++;
        end--;
    }
    memset(headers->etag, 0, sizeof headers->etag);
    take_text(headers->etag, sizeof headers->etag, at, end);
}

static void take_status(mls_http_headers *headers, const char *at, const char *end)
{
    mls_http_headers_reset(headers);
    while (at < end && *at != ' ')
        at++;
    while (at < end && *at == ' ')
        at++;
    const uint64_t status = take_number(&at, end);
    headers->status = status <= 999 ? (unsigned)status : 0;
}

#define IS(name) (nname == sizeof name - 1 && strncasecmp(line, name, sizeof name - 1) == 0)

void mls_http_headers_add(mls_http_headers *headers, const char *line, size_t nbytes)
{
    const char *end = line + nbytes, *colon, *at;
    while (end > line && (end[-1] == '\n' || end[-1] == '\r' || end[-1] == ' ' || end[-1] == '\t'))
        end--;
    if (end == line) {
        headers->ended = true;
        return;
    }
    if (nbytes > 5 && memcmp(line, "HTTP/", 5) == 0) {
        take_status(headers, line, end);
        return;
    }
    switch (line[0] | 0x20) { /* most lines are none of ours */
    case 'a':
    case 'c':
    case 'e':
    case 'l':
    case 'r':
    case 'x':
        break;
    default:
        return;
    }
    colon = memchr(line, ':', (size_t)(end - line));
    if (!colon)
        return;
    const size_t nname = (size_t)(colon - line);
    for (at = colon + 1; at < end && (*at == ' ' || *at == '\t'); at++)
        ;
    if (IS("Content-Length"))
        headers->length = take_number(&at, end);
    else if (IS("Content-Range"))
        take_range(headers, at, end);
    else if (IS("ETag"))
        take_etag(headers, at, end);
    else if (IS("Location")) {
        headers->too_long = (size_t)(end - at) >= sizeof headers->location;
        take_text(headers->location, sizeof headers->location, at, end);
    } else if (IS("Retry-After"))
        take_text(headers->retry_after, sizeof headers->retry_after, at, end);
    else if (IS("Ais-Checksum-Type"))
        take_text(headers->checksum_type, sizeof headers->checksum_type, at, end);
    else if (IS("Ais-Checksum-Value"))
        take_text(headers->checksum, sizeof headers->checksum, at, end);
    else if (IS("x-amz-checksum-crc32c")) {
        strcpy(headers->checksum_type, "crc32c");
        take_text(headers->checksum, sizeof headers->checksum, at, end);
    }
}

void mls_http_crc_base64(uint32_t crc, char out[9])
{
    static const char digits[64] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    const uint64_t bits = (uint64_t)crc << 4; /* 32 bits and 4 of filling: six digits */
    for (int i = 0; i < 6; i++)
        out[i] = digits[bits >> (30 - 6 * i) & 63];
    memcpy(out + 6, "==", 3);
}

/* What lies between `open` and `close`, NULL if it isn't there. */
static const char *between(const char *body, size_t nbytes, const char *open, const char *close, size_t *found)
{
    const char *start = memmem(body, nbytes, open, strlen(open));
    if (!start)
        return NULL;
    start += strlen(open);
    const char *end = memmem(start, (size_t)(body + nbytes - start), close, strlen(close));
    *found = (size_t)((end ? end : body + nbytes) - start);
    return start;
}

static size_t add_printable(char *out, size_t at, size_t room, const char *text, size_t nbytes)
{
    for (size_t i = 0; i < nbytes && at + 1 < room; i++)
        out[at++] = (unsigned char)text[i] < 0x20 || text[i] == 0x7f ? ' ' : text[i];
    out[at] = '\0';
    return at;
}

/* A JSON string's bytes up to its closing quote; escapes are taken by their letter. */
static size_t json_string(const char *text, size_t nbytes, char *out, size_t room)
{
    size_t n = 0;
    for (size_t i = 0; i < nbytes && text[i] != '"' && n + 1 < room; i++) {
        if (text[i] == '\\' && i + 1 < nbytes) {
            i++;
            out[n++] = text[i] == 'n' || text[i] == 't' || text[i] == 'r' ? ' ' : text[i];
        } else {
            out[n++] = text[i];
        }
    }
    out[n] = '\0';
    return n;
}

void mls_http_refusal_text(const char *body, size_t nbytes, char *out, size_t room)
{
    size_t n = 0, ncode = 0, at = 0;
    const char *code = between(body, nbytes, "<Code>", "</Code>", &ncode);
    const char *message = between(body, nbytes, "<Message>", "</Message>", &n);
    out[0] = '\0';
    if (code || message) {
        if (code)
            at = add_printable(out, at, room, code, ncode);
        if (code && message)
            at = add_printable(out, at, room, ": ", 2);
        if (message)
            add_printable(out, at, room, message, n);
        return;
    }
    message = memmem(body, nbytes, "\"message\"", 9);
    if (message) {
        const char *end = body + nbytes;
        for (message += 9; message < end && (*message == ' ' || *message == ':'); message++)
            ;
        if (message < end && *message == '"') {
            char plain[256];
            n = json_string(message + 1, (size_t)(end - message - 1), plain, sizeof plain);
            add_printable(out, 0, room, plain, n);
            return;
        }
    }
    const char *line = memchr(body, '\n', nbytes);
    add_printable(out, 0, room, body, line ? (size_t)(line - body) : nbytes);
}
