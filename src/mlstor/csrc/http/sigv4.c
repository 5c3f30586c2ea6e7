/* As in "Create a signed AWS API request" of the IAM user guide: canonical request, string to sign, key, signature. */
#include "sigv4.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define ALGORITHM "AWS4-HMAC-SHA256"
#define MOST_ACCESS_KEY 128 /* IAM's own limit */
#define MOST_NAME 64
#define DAY_S 86400
#define LAST_SECOND INT64_C(253402300799) /* 9999-12-31T23:59:59Z */
#define MOST_ADDED 4 /* host, x-amz-content-sha256, x-amz-date, x-amz-security-token */

struct mls_sigv4 {
    uint64_t identity; /* never that of another, as an address may be */
    bool send_hash;
    char access_key[MOST_ACCESS_KEY + 1], region[MOST_NAME + 1], service[MOST_NAME + 1];
    char *token_line, *token; /* NULL without one; token points into the line */
    size_t secret_nbytes;
    char secret[]; /* "AWS4" and the secret key */
};

static bool is_plain(const char *text)
{
    for (; *text != '\0'; text++) {
        if ((unsigned char)*text < 0x20 || *text == 0x7f)
            return false;
    }
    return true;
}

static bool is_name(const char *text, size_t most)
{
    return text[0] != '\0' && strlen(text) <= most && is_plain(text);
}

mls_sigv4 *mls_sigv4_new(const char *access_key, const char *secret_key, const char *token, const char *region,
                         const char *service)
{
    static const char header[] = "x-amz-security-token: ";
    static _Atomic uint64_t made;

    if (!is_name(access_key, MOST_ACCESS_KEY) || !is_name(region, MOST_NAME) || !is_name(service, MOST_NAME) ||
        !is_plain(secret_key) || !is_plain(token)) {
        errno = EINVAL;
        return NULL;
    }
    const size_t secret_nbytes = 4 + strlen(secret_key);
    mls_sigv4 *who = calloc(1, sizeof *who + secret_nbytes + 1);
    if (who == NULL)
        return NULL;
    who->secret_nbytes = secret_nbytes;
    memcpy(who->secret, "AWS4", 4);
    memcpy(who->secret + 4, secret_key, secret_nbytes - 4);
    if (token[0] != '\0') {
        const size_t nbytes = strlen(token);
        who->token_line = malloc(sizeof header + nbytes);
        if (who->token_line == NULL) {
            mls_sigv4_free(who);
            return NULL;
        }
        who->token = who->token_line + sizeof header - 1;
        memcpy(who->token_line, header, sizeof header - 1);
        memcpy(who->token, token, nbytes + 1);
    }
    strcpy(who->access_key, access_key);
    strcpy(who->region, region);
    strcpy(who->service, service);
    who->send_hash = strncmp(service, "s3", 2) == 0;
    who->identity = atomic_fetch_add_explicit(&made, 1, memory_order_relaxed) + 1;
    return who;
}

void mls_sigv4_free(mls_sigv4 *who)
{
    if (who == NULL)
        return;
    if (who->token_line != NULL) {
        explicit_bzero(who->token, strlen(who->token));
        free(who->token_line);
    }
    explicit_bzero(who, sizeof *who + who->secret_nbytes);
    free(who);
}

void mls_sigv4_wipe(mls_sigv4_day *day)
{
    explicit_bzero(day, sizeof *day);
}

/* key = HMAC(key, text) */
static void derive(mls_hmac_key *key, const char *text)
{
    uint8_t digest[MLS_SHA256_BYTES];
    mls_hmac_sha256(key, text, strlen(text), digest);
    mls_hmac_key_init(key, digest, sizeof digest);
    explicit_bzero(digest, sizeof digest);
}

/* The key of the day that time_s is in. Its date is kept too: gmtime_r takes a lock of the C library. */
static bool renew(const mls_sigv4 *who, mls_sigv4_day *day, int64_t time_s)
{
    const time_t seconds = (time_t)time_s;
    struct tm utc;

    if (gmtime_r(&seconds, &utc) == NULL)
        return false;
    strftime(day->date, sizeof day->date, "%Y%m%d", &utc);
    mls_hmac_key_init(&day->key, who->secret, who->secret_nbytes);
    derive(&day->key, day->date);
    derive(&day->key, who->region);
    derive(&day->key, who->service);
    derive(&day->key, "aws4_request");
    day->identity = who->identity;
    day->day = time_s / DAY_S;
    return true;
}

static void add_text(mls_sha256 *s, const char *text)
{
    mls_sha256_update(s, text, strlen(text));
}

/* Without spaces around it, and with one where there are several. */
static void add_value(mls_sha256 *s, const char *value)
{
    bool first = true;

    for (;;) {
        value += strspn(value, " \t");
        const size_t word = strcspn(value, " \t");
        if (word == 0)
            return;
        if (!first)
            add_text(s, " ");
        mls_sha256_update(s, value, word);
        value += word;
        first = false;
    }
}

/* Those that signing adds and the request's own, by name. */
static size_t sorted_headers(const mls_sigv4_request *request, const mls_sigv4_header *added, size_t nadded,
                             const mls_sigv4_header **sorted)
{
    size_t n = 0;

    for (size_t i = 0; i < nadded + request->nheaders; i++) {
        const mls_sigv4_header *header = i < nadded ? &added[i] : &request->headers[i - nadded];
        size_t at = n++;
        for (; at > 0 && strcmp(sorted[at - 1]->name, header->name) > 0; at--)
            sorted[at] = sorted[at - 1];
        sorted[at] = header;
    }
    return n;
}

static void canonical_hash(const mls_sigv4_request *request, const mls_sigv4_header **headers, size_t nheaders,
                           char hex[MLS_SHA256_HEX_BYTES])
{
    uint8_t digest[MLS_SHA256_BYTES];
    mls_sha256 s;

    mls_sha256_init(&s);
    add_text(&s, request->method);
    add_text(&s, "\n");
    add_text(&s, request->path);
    add_text(&s, "\n");
    add_text(&s, request->query);
    add_text(&s, "\n");
    for (size_t i = 0; i < nheaders; i++) {
        add_text(&s, headers[i]->name);
        add_text(&s, ":");
        add_value(&s, headers[i]->value);
        add_text(&s, "\n");
    }
    for (size_t i = 0; i < nheaders; i++) {
        add_text(&s, i == 0 ? "\n" : ";");
        add_text(&s, headers[i]->name);
    }
    add_text(&s, "\n");
    add_text(&s, request->payload_hash);
    mls_sha256_final(&s, digest);
    mls_sha256_hex(digest, hex);
}

/* Appends to text, of which *at bytes are taken; false if it does not fit. */
static bool append(char *text, size_t room, size_t *at, const char *more)
{
    const size_t nbytes = strlen(more);
    if (nbytes >= room - *at)
        return false;
    memcpy(text + *at, more, nbytes + 1);
    *at += nbytes;
    return true;
}

int mls_sigv4_sign(const mls_sigv4 *who, mls_sigv4_day *day, const mls_sigv4_request *request, mls_sigv4_lines *out)
{
    char stamp[32], scope[16 + 2 * MOST_NAME + 32];
    char to_sign[sizeof ALGORITHM + sizeof stamp + sizeof scope + MLS_SHA256_HEX_BYTES + 4];
    const mls_sigv4_header *headers[MLS_SIGV4_MOST_HEADERS + MOST_ADDED];
    uint8_t digest[MLS_SHA256_BYTES];
    char hex[MLS_SHA256_HEX_BYTES + 1];

    if (request->time_s < 0 || request->time_s > LAST_SECOND || request->nheaders > MLS_SIGV4_MOST_HEADERS ||
        strlen(request->payload_hash) > MLS_SHA256_HEX_BYTES)
        return -EINVAL;
    const int64_t day_number = request->time_s / DAY_S;
    if ((day->identity != who->identity || day->day != day_number) && !renew(who, day, request->time_s))
        return -EINVAL;
    const unsigned second = (unsigned)(request->time_s % DAY_S);
    snprintf(stamp, sizeof stamp, "%.8sT%02u%02u%02uZ", day->date, second / 3600, second / 60 % 60, second % 60);
    snprintf(scope, sizeof scope, "%.8s/%s/%s/aws4_request", day->date, who->region, who->service);

    mls_sigv4_header added[MOST_ADDED];
    size_t nadded = 0;
    added[nadded++] = (mls_sigv4_header){"host", request->host};
    if (who->send_hash)
        added[nadded++] = (mls_sigv4_header){"x-amz-content-sha256", request->payload_hash};
    added[nadded++] = (mls_sigv4_header){"x-amz-date", stamp};
    if (who->token != NULL)
        added[nadded++] = (mls_sigv4_header){"x-amz-security-token", who->token};
    const size_t nheaders = sorted_headers(request, added, nadded, headers);

    canonical_hash(request, headers, nheaders, hex);
    hex[MLS_SHA256_HEX_BYTES] = '\0';
    const int nbytes = snprintf(to_sign, sizeof to_sign, ALGORITHM "\n%s\n%s\n%s", stamp, scope, hex);
    mls_hmac_sha256(&day->key, to_sign, (size_t)nbytes, digest);
    mls_sha256_hex(digest, hex);

    char *line = out->authorization;
    const size_t room = sizeof out->authorization;
    size_t at = 0;
    bool fits = append(line, room, &at, "Authorization: " ALGORITHM " Credential=") &&
                append(line, room, &at, who->access_key) && append(line, room, &at, "/") &&
                append(line, room, &at, scope) && append(line, room, &at, ", SignedHeaders=");
    for (size_t i = 0; i < nheaders && fits; i++)
        fits = (i == 0 || append(line, room, &at, ";")) && append(line, room, &at, headers[i]->name);
    if (!fits || !append(line, room, &at, ", Signature=") || !append(line, room, &at, hex))
        return -EINVAL;
    snprintf(out->date, sizeof out->date, "x-amz-date: %.16s", stamp);
    out->content_sha256[0] = '\0';
    if (who->send_hash)
        snprintf(out->content_sha256, sizeof out->content_sha256, "x-amz-content-sha256: %s", request->payload_hash);
    out->token = who->token_line;
    return 0;
}
