/* What a request says: where to, its header lines, its signature. */
#include "http_inner.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

#include "url.h"

/* ---- where ---- */

bool mls_http_request_target(mls_http_slot *slot)
{
    const mls_http_job *job = slot->job;
    const mls_http_endpoint *endpoint = slot->endpoint;
    const mls_http_call_spec *call = job->call ? &job->call->spec : NULL;
    const mls_transfer *t = &job->transfer;
    const char *key = call ? call->key : job->batch->names + t->key_start;
    const size_t nkey = call ? call->key_nbytes : t->key_nbytes;
    const char *query = call ? call->query : job->batch->names + t->query_start;
    const size_t nquery = call ? strlen(call->query) : t->query_nbytes;
    const char *head = call && !nkey ? endpoint->path : endpoint->head;
    const size_t nhead = strlen(head), nown = strlen(endpoint->query);
    mls_bytes *target = &slot->target;
    if (!mls_bytes_reserve(target, nhead + 3 * nkey + nown + nquery + 3))
        return false;
    char *at = target->at;
    memcpy(at, head, nhead);
    at += nhead;
    at += mls_url_escape(at, 3 * nkey, key, nkey, true);
    if (nown || nquery)
        *at++ = '?';
    memcpy(at, endpoint->query, nown);
    at += nown;
    if (nown && nquery)
        *at++ = '&';
    memcpy(at, query, nquery);
    at += nquery;
    *at = '\0';
    target->n = (size_t)(at - target->at);
    return true;
}

/* ---- header lines ---- */

static bool add_line(mls_http_slot *slot, const char *line)
{
    if (slot->nlines == MLS_HTTP_LINES)
        return false;
    slot->lines[slot->nlines - 1].next = &slot->lines[slot->nlines];
    slot->lines[slot->nlines] = (struct curl_slist){.data = (char *)line};
    slot->nlines++;
    return true;
}

static bool add_header(mls_http_slot *slot, const mls_http_header *header)
{
    if (slot->foreign && strcmp(header->name, "authorization") == 0)
        return true; /* for the endpoint's own server only */
    if (header->sign && slot->nsigned < MLS_SIGV4_MOST_HEADERS)
        slot->signed_headers[slot->nsigned++] = (mls_sigv4_header){header->name, header->value};
    return add_line(slot, header->line);
}

/* A line of the slot's own whose value begins after `name` and ": ". */
static bool add_signed_line(mls_http_slot *slot, const char *name, const char *line)
{
    if (slot->nsigned < MLS_SIGV4_MOST_HEADERS)
        slot->signed_headers[slot->nsigned++] = (mls_sigv4_header){name, line + strlen(name) + 2};
    return add_line(slot, line);
}

static bool checksum_lines(mls_http_slot *slot)
{
    const mls_transfer *t = &slot->job->transfer;
    const int dialect = slot->endpoint->dialect;
    const bool asks = t->op == MLS_TRANSFER_STAT || (t->op == MLS_TRANSFER_READ && !slot->ranged);
    if (asks && dialect == MLS_HTTP_S3 && t->digest == MLS_TRANSFER_CRC32C)
        return add_signed_line(slot, "x-amz-checksum-mode", "x-amz-checksum-mode: ENABLED");
    if (t->op != MLS_TRANSFER_WRITE || t->digest == MLS_TRANSFER_NO_DIGEST || slot->asked_empty)
        return true;
    if (dialect == MLS_HTTP_S3 && t->digest == MLS_TRANSFER_CRC32C) {
        strcpy(slot->checksum, "x-amz-checksum-crc32c: ");
        mls_http_crc_base64((uint32_t)slot->done.digest_value, slot->checksum + strlen(slot->checksum));
        return add_signed_line(slot, "x-amz-checksum-crc32c", slot->checksum);
    }
    if (dialect != MLS_HTTP_AIS || t->digest == MLS_TRANSFER_CRC32) /* of which the stores know nothing */
        return true;
    const bool crc = t->digest == MLS_TRANSFER_CRC32C;
    snprintf(slot->checksum_type, sizeof slot->checksum_type, "Ais-Checksum-Type: %s", crc ? "crc32c" : "xxhash2");
    snprintf(slot->checksum, sizeof slot->checksum, "Ais-Checksum-Value: %0*llx", crc ? 8 : 16,
             (unsigned long long)slot->done.digest_value);
    return add_line(slot, slot->checksum_type) && add_line(slot, slot->checksum);
}

/* ---- signing ---- */

static bool sign(mls_http_slot *slot, const char *method)
{
    mls_http_worker *worker = slot->worker;
    mls_http_identity *identity = slot->identity;
    if (identity->bearer)
        return add_line(slot, identity->bearer);
    char hash[MLS_SHA256_HEX_BYTES + 1] = MLS_SIGV4_EMPTY;
    if (slot->body_nbytes && !slot->job->call) {
        strcpy(hash, MLS_SIGV4_UNSIGNED);
    } else if (slot->body_nbytes) {
        uint8_t digest[MLS_SHA256_BYTES];
        mls_sha256_once(slot->body, slot->body_nbytes, digest);
        mls_sha256_hex(digest, hash);
    }
    char *mark = strchr(slot->target.at, '?');
    if (mark)
        *mark = '\0';
    const mls_sigv4_request request = {
        .method = method,
        .path = slot->target.at,
        .query = mark ? mark + 1 : "",
        .host = slot->endpoint->host,
        .payload_hash = hash,
        .headers = slot->signed_headers,
        .nheaders = slot->nsigned,
        .time_s = (int64_t)time(NULL),
    };
    mls_sigv4_day *day = &worker->days[slot->job->transfer.endpoint % MLS_HTTP_DAYS];
    const int error = mls_sigv4_sign(identity->signer, day, &request, &slot->signature);
    if (mark)
        *mark = '?';
    mls_sigv4_lines *lines = &slot->signature;
    return !error && add_line(slot, lines->authorization) && add_line(slot, lines->date) &&
           (!lines->content_sha256[0] || add_line(slot, lines->content_sha256)) &&
           (!lines->token || add_line(slot, lines->token));
}

bool mls_http_request_lines(mls_http_slot *slot, const char *method)
{
    const mls_http_endpoint *endpoint = slot->endpoint;
    const mls_http_call *call = slot->job->call;
    const mls_transfer *t = &slot->job->transfer;
    bool typed = false, fine = true;
    slot->nlines = 1;
    slot->lines[0].next = NULL;
    slot->nsigned = 0;
    for (size_t i = 0; i < endpoint->nheaders; i++) {
        typed = typed || strcmp(endpoint->headers[i].name, "content-type") == 0;
        fine = fine && add_header(slot, &endpoint->headers[i]);
    }
    for (size_t i = 0; call && i < call->spec.nheaders; i++) {
        typed = typed || strcmp(call->headers[i].name, "content-type") == 0;
        fine = fine && add_header(slot, &call->headers[i]);
    }
    if (slot->asked_shape == MLS_SHAPE_BODY) { /* libcurl would wait for 100 Continue, and call it a form */
        fine = fine && add_line(slot, "Expect:");
        fine = fine && (typed || add_line(slot, "Content-Type: application/octet-stream"));
    }
    if (slot->ranged && t->nbytes == MLS_WHOLE)
        snprintf(slot->range, sizeof slot->range, "Range: bytes=%llu-", (unsigned long long)t->offset);
    else if (slot->ranged)
        snprintf(slot->range, sizeof slot->range, "Range: bytes=%llu-%llu", (unsigned long long)t->offset,
                 (unsigned long long)(t->offset + t->nbytes - 1));
    fine = fine && (!slot->ranged || add_line(slot, slot->range)) && (call || checksum_lines(slot));
    return fine && (!slot->identity || slot->foreign || sign(slot, method));
}
