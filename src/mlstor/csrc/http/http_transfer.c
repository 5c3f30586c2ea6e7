/* One transfer: what is asked of libcurl, attempt by attempt. */
#include "http_inner.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>

/* A response of 64 KiB with its header arrives in one or two reads; larger ones find the L2 cache. */
#define BUFFER_BYTES (128 << 10)
#define UPLOAD_BUFFER_BYTES (256 << 10)
#define HUGE_PAGE_BYTES ((size_t)2 << 20)

bool mls_bytes_reserve(mls_bytes *bytes, size_t room)
{
    if (room < bytes->room)
        return true;
    size_t larger = bytes->room ? bytes->room : 256;
    while (larger <= room)
        larger += larger / 2;
    char *moved = realloc(bytes->at, larger);
    if (!moved)
        return false;
    bytes->at = moved;
    bytes->room = larger;
    return true;
}

bool mls_bytes_add(mls_bytes *bytes, const void *more, size_t n)
{
    if (!mls_bytes_reserve(bytes, bytes->n + n))
        return false;
    memcpy(bytes->at + bytes->n, more, n);
    bytes->n += n;
    bytes->at[bytes->n] = '\0';
    return true;
}

/* ---- the easy handle ---- */

#define SET(option, value) (error = error ? error : curl_easy_setopt(easy, option, value))

int mls_http_slot_open(mls_http_slot *slot)
{
    const mls_http_worker *worker = slot->worker;
    const mls_http_config *config = &worker->engine->config;
    CURLcode error = CURLE_OK;
    CURL *easy = slot->easy = curl_easy_init();
    if (!easy)
        return -ENOMEM;
    SET(CURLOPT_NOSIGNAL, 1L);
    SET(CURLOPT_NOPROGRESS, 1L);
    SET(CURLOPT_HTTP_VERSION, (long)CURL_HTTP_VERSION_1_1);
    SET(CURLOPT_PRIVATE, slot);
    SET(CURLOPT_HEADERFUNCTION, mls_http_on_header);
    SET(CURLOPT_HEADERDATA, slot);
    SET(CURLOPT_WRITEFUNCTION, mls_http_on_body);
    SET(CURLOPT_WRITEDATA, slot);
    SET(CURLOPT_SOCKOPTFUNCTION, mls_http_socket_made);
    SET(CURLOPT_SOCKOPTDATA, slot);
    SET(CURLOPT_CLOSESOCKETFUNCTION, mls_http_socket_closed);
    SET(CURLOPT_CLOSESOCKETDATA, slot->worker);
    SET(CURLOPT_ERRORBUFFER, slot->curl_error);
    SET(CURLOPT_USERAGENT, "mlstor");
    SET(CURLOPT_SUPPRESS_CONNECT_HEADERS, 1L);
    SET(CURLOPT_PATH_AS_IS, 1L);
    SET(CURLOPT_CONNECTTIMEOUT_MS, (long)(config->connect_timeout_ns / 1000000u));
    SET(CURLOPT_BUFFERSIZE, (long)(config->buffer_bytes ? config->buffer_bytes : BUFFER_BYTES));
    SET(CURLOPT_UPLOAD_BUFFERSIZE, (long)UPLOAD_BUFFER_BYTES);
#if LIBCURL_VERSION_NUM >= 0x075500
    SET(CURLOPT_PROTOCOLS_STR, "http,https");
#else
    SET(CURLOPT_PROTOCOLS, (long)(CURLPROTO_HTTP | CURLPROTO_HTTPS));
#endif
    if (worker->engine->no_proxy)
        SET(CURLOPT_PROXY, "");
    if (config->ca_file)
        SET(CURLOPT_CAINFO, config->ca_file);
    if (config->insecure) {
        SET(CURLOPT_SSL_VERIFYPEER, 0L);
        SET(CURLOPT_SSL_VERIFYHOST, 0L);
    }
    /* The list's first line is always there, so that libcurl is told of the list only once. */
    slot->lines[0].data = (char *)"Accept-Encoding: identity";
    slot->nlines = 1;
    SET(CURLOPT_HTTPHEADER, slot->lines);
    slot->carry = malloc(MLS_BLOCK_BYTES);
    return error == CURLE_OK && slot->carry ? 0 : error == CURLE_OK || error == CURLE_OUT_OF_MEMORY ? -ENOMEM : -EINVAL;
}

void mls_http_slot_close(mls_http_slot *slot)
{
    if (slot->easy)
        curl_easy_cleanup(slot->easy);
    if (slot->payload)
        munmap(slot->payload, slot->payload_room);
    mls_http_identity_put(slot->identity);
    explicit_bzero(&slot->signature, sizeof slot->signature);
    free(slot->carry);
    free(slot->base.at);
    free(slot->target.at);
}

static bool is_write(const mls_http_slot *slot) { return slot->job->transfer.op == MLS_TRANSFER_WRITE && !slot->job->call; }

/* ---- the payload, before the clock runs ---- */

static bool payload_room(mls_http_slot *slot, uint64_t nbytes)
{
    if (nbytes <= slot->payload_room)
        return true;
    const size_t page = nbytes >= HUGE_PAGE_BYTES ? HUGE_PAGE_BYTES : 4096;
    const size_t room = (size_t)(nbytes + page - 1) / page * page;
    uint8_t *payload = mmap(NULL, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (payload == MAP_FAILED)
        return false;
    madvise(payload, room, MADV_HUGEPAGE);
    if (slot->payload)
        munmap(slot->payload, slot->payload_room);
    slot->payload = payload;
    slot->payload_room = room;
    return true;
}

static bool prepare(mls_http_slot *slot)
{
    const mls_core_api *core = slot->worker->engine->config.core;
    const mls_http_batch *batch = slot->job->batch;
    const mls_transfer *t = &slot->job->transfer;
    if (t->memory == MLS_TRANSFER_PATTERN)
        core->pattern_init(&slot->pattern, batch->pattern.run_id, batch->pattern.checkpoint, t->place,
                           batch->pattern.compressibility);
    if (t->op != MLS_TRANSFER_WRITE)
        return true;
    slot->body_nbytes = t->nbytes;
    if (t->memory == MLS_TRANSFER_PATTERN) {
        if (!payload_room(slot, t->nbytes))
            return false;
        core->pattern_fill(&slot->pattern, slot->payload, t->offset, t->nbytes);
        slot->body = slot->payload;
    } else {
        slot->body = batch->memory + t->place;
    }
    if (t->flags & MLS_TRANSFER_HAS_DIGEST) {
        slot->done.digest_value = t->digest_value;
    } else if (t->digest == MLS_TRANSFER_CRC32C) {
        slot->done.digest_value = core->crc32c(0, slot->body, t->nbytes);
    } else if (t->digest == MLS_TRANSFER_CRC32) {
        slot->done.digest_value = core->crc32(0, slot->body, t->nbytes);
    } else if (t->digest == MLS_TRANSFER_XXH64) {
        core->xxh64_reset(&slot->xxh, 0);
        core->xxh64_update(&slot->xxh, slot->body, t->nbytes);
        slot->done.digest_value = core->xxh64_digest(&slot->xxh);
    }
    return true;
}

/* ---- attempts ---- */

void mls_http_verdict(mls_http_slot *slot, int kind, int error, const char *why)
{
    slot->verdict = (uint8_t)kind;
    slot->verdict_errno = error;
    snprintf(slot->why, sizeof slot->why, "%s", why);
}

static void forget_answer(mls_http_slot *slot)
{
    mls_http_headers_reset(&slot->answer);
    slot->judged = false;
    slot->sink = MLS_SINK_DROP;
    slot->received = slot->damaged = 0;
    slot->expected = MLS_WHOLE;
    slot->ncarry = slot->nrefusal = 0;
    slot->crc = 0;
    slot->verdict = MLS_KIND_OK;
    if (slot->job->transfer.digest == MLS_TRANSFER_XXH64)
        slot->worker->engine->config.core->xxh64_reset(&slot->xxh, 0);
    if (slot->job->call)
        slot->job->call->answer_headers.n = slot->job->call->answer_body.n = 0;
}

const char *mls_http_method_of(const mls_http_slot *slot)
{
    static const char *const methods[] = {
        [MLS_TRANSFER_READ] = "GET", [MLS_TRANSFER_WRITE] = "PUT", [MLS_TRANSFER_STAT] = "HEAD",
        [MLS_TRANSFER_DELETE] = "DELETE",
    };
    return slot->job->call ? slot->job->call->spec.method : methods[slot->job->transfer.op];
}

/* Whether the handle only makes a connection, for a wire, or carries all of a transfer. */
static CURLcode set_connect_only(mls_http_slot *slot, bool only)
{
    if (only == slot->connect_only)
        return CURLE_OK;
    const CURLcode error = curl_easy_setopt(slot->easy, CURLOPT_CONNECT_ONLY, only ? 1L : 0L);
    slot->connect_only = error ? !only : only;
    return error;
}

/* Method and body; the handle keeps what was set, and is told of changes only. */
static CURLcode set_shape(mls_http_slot *slot, const char *method)
{
    CURL *easy = slot->easy;
    CURLcode error = CURLE_OK;
    const int shape = slot->asked_shape;
    const char *custom = shape == MLS_SHAPE_BODY || strcmp(method, "DELETE") == 0 ? method : NULL;
    if (shape != slot->shape) {
        if (shape == MLS_SHAPE_HEAD)
            SET(CURLOPT_NOBODY, 1L);
        else
            SET(CURLOPT_HTTPGET, 1L); /* takes back NOBODY too */
    }
    if (shape == MLS_SHAPE_BODY) {
        const void *body = slot->sent_nbytes ? slot->body : "";
        if (shape != slot->shape || slot->sent_nbytes != slot->held_nbytes)
            SET(CURLOPT_POSTFIELDSIZE_LARGE, (curl_off_t)slot->sent_nbytes);
        if (shape != slot->shape || body != slot->held_body)
            SET(CURLOPT_POSTFIELDS, body);
        slot->held_body = body;
        slot->held_nbytes = slot->sent_nbytes;
    }
    if (custom != slot->custom) /* literals all */
        SET(CURLOPT_CUSTOMREQUEST, custom);
    slot->custom = custom;
    slot->shape = error ? MLS_SHAPE_NONE : shape;
    return error;
}

static CURLcode set_place(mls_http_slot *slot)
{
    CURL *easy = slot->easy;
    CURLcode error = CURLE_OK;
    if (!slot->worker->engine->full_urls) {
        if (slot->new_base)
            SET(CURLOPT_URL, slot->base.at);
        slot->new_base = error != CURLE_OK;
        return SET(CURLOPT_REQUEST_TARGET, slot->target.at);
    }
    const size_t nbase = slot->base.n; /* a proxy is asked for the whole URL */
    if (!mls_bytes_add(&slot->base, slot->target.at + 1, slot->target.n - 1))
        return CURLE_OUT_OF_MEMORY;
    SET(CURLOPT_URL, slot->base.at);
    slot->base.n = nbase;
    slot->base.at[nbase] = '\0';
    return error;
}

static CURLcode set_deadline(mls_http_slot *slot)
{
    const uint64_t deadline = slot->job->call->deadline_ns, now = mls_http_now_ns();
    const uint64_t left = !deadline ? 0 : deadline > now + 1000000 ? deadline - now : 1000000;
    return curl_easy_setopt(slot->easy, CURLOPT_TIMEOUT_MS, (long)(left / 1000000));
}

static void can_not_be_made(mls_http_slot *slot, CURLcode error)
{
    mls_http_verdict(slot, MLS_KIND_SYSTEM, -(error && error != CURLE_OUT_OF_MEMORY ? EINVAL : ENOMEM),
                     "the request can't be made");
    mls_http_settle(slot, CURLE_OK);
}

static void run_handle(mls_http_slot *slot)
{
    slot->curl_error[0] = '\0';
    slot->activity_ns = slot->worker->now_ns;
    slot->state = MLS_SLOT_RUNNING;
    if (curl_multi_add_handle(slot->worker->multi, slot->easy) != CURLM_OK) {
        slot->state = MLS_SLOT_FREE;
        slot->connecting = false;
        mls_http_verdict(slot, MLS_KIND_SYSTEM, -ENOMEM, "libcurl takes no more transfers");
        mls_http_settle(slot, CURLE_OK);
    }
}

void mls_http_slot_connect(mls_http_slot *slot)
{
    CURLcode error = set_connect_only(slot, true);
    forget_answer(slot); /* if a wire has been tried */
    if (!error)
        error = set_place(slot);
    if (error) {
        can_not_be_made(slot, error);
        return;
    }
    slot->connecting = true;
    run_handle(slot);
}

void mls_http_slot_send(mls_http_slot *slot)
{
    const char *method = mls_http_method_of(slot);
    const bool has_body = is_write(slot) || slot->body_nbytes || strcmp(method, "POST") == 0 || strcmp(method, "PUT") == 0;
    slot->asked_shape = has_body ? MLS_SHAPE_BODY : strcmp(method, "HEAD") == 0 ? MLS_SHAPE_HEAD : MLS_SHAPE_GET;
    slot->sent_nbytes = slot->asked_empty ? 0 : slot->body_nbytes;
    forget_answer(slot);
    if (!mls_http_request_lines(slot, method)) {
        can_not_be_made(slot, CURLE_OK);
        return;
    }
    mls_count(&slot->worker->requests, 1);
    if (mls_http_wire_fits(slot)) {
        if (!mls_http_wire_send(slot))
            mls_http_slot_connect(slot);
        return;
    }
    CURLcode error = set_connect_only(slot, false);
    if (!error)
        error = set_shape(slot, method);
    if (!error)
        error = set_place(slot);
    if (!error && slot->for_calls)
        error = set_deadline(slot);
    if (error)
        can_not_be_made(slot, error);
    else
        run_handle(slot);
}

/* The same base again need not be told to the handle. */
static bool set_base(mls_http_slot *slot, const char *scheme_and_host, size_t nbytes)
{
    if (slot->base.n == nbytes && memcmp(slot->base.at, scheme_and_host, nbytes) == 0)
        return true;
    slot->base.n = 0;
    slot->new_base = true;
    return mls_bytes_add(&slot->base, scheme_and_host, nbytes);
}

void mls_http_slot_attempt(mls_http_slot *slot)
{
    const mls_http_endpoint *endpoint = slot->endpoint;
    slot->done.attempts++;
    slot->redirects = 0;
    slot->foreign = false;
    slot->done.redirect_ns = slot->done.first_byte_ns = 0;
    slot->done.status = 0;
    slot->asked_empty = endpoint->follow && is_write(slot) && slot->body_nbytes;
    mls_http_identity_put(slot->identity);
    slot->identity = mls_http_identity_get(slot->endpoint);
    slot->done.attempt_ns = mls_http_now_ns();
    if (slot->done.attempts == 1)
        slot->done.start_ns = slot->done.attempt_ns;
    if (!set_base(slot, endpoint->base, strlen(endpoint->base)) || !mls_http_request_target(slot)) {
        mls_http_verdict(slot, MLS_KIND_SYSTEM, -ENOMEM, "no memory");
        mls_http_settle(slot, CURLE_OK);
        return;
    }
    mls_http_slot_send(slot);
}

void mls_http_slot_begin(mls_http_slot *slot, mls_http_job *job)
{
    const mls_transfer *t = &job->transfer;
    slot->job = job;
    slot->leave_ns = 0;
    slot->endpoint = slot->worker->engine->endpoints[t->endpoint];
    slot->body = job->call ? job->call->spec.body : NULL;
    slot->body_nbytes = job->call ? job->call->spec.body_nbytes : 0;
    slot->ranged = !job->call && t->op == MLS_TRANSFER_READ &&
                   !(t->offset == 0 && (t->nbytes == MLS_WHOLE || t->nbytes == t->object_nbytes));
    slot->verdict = MLS_KIND_OK;
    slot->done = (mls_completion){
        .tag = t->tag, .submit_ns = job->submit_ns, .object_nbytes = MLS_WHOLE, .endpoint = t->endpoint, .op = t->op,
    };
    if (!job->call && !prepare(slot)) {
        slot->done.start_ns = slot->done.attempt_ns = mls_http_now_ns();
        slot->done.attempts = 1;
        mls_http_verdict(slot, MLS_KIND_SYSTEM, -ENOMEM, "no memory for the payload");
        mls_http_settle(slot, CURLE_OK);
        return;
    }
    mls_http_slot_attempt(slot);
}

/* ---- redirects ---- */

/* Length of "http://host:port", 0 if the text doesn't begin so. */
static size_t origin_length(const char *url)
{
    const size_t scheme = strncasecmp(url, "http://", 7) == 0 ? 7 : strncasecmp(url, "https://", 8) == 0 ? 8 : 0;
    const size_t host = scheme ? strcspn(url + scheme, "/?#") : 0;
    return host && !memchr(url + scheme, '@', host) ? scheme + host : 0;
}

/* Bytes beyond ASCII, which AIStore's /s3 leaves as they are, are escaped; the rest is taken as it is. */
static bool add_place(mls_bytes *target, const char *place, size_t nbytes)
{
    static const char digits[] = "0123456789ABCDEF";
    if (!mls_bytes_reserve(target, target->n + 3 * nbytes))
        return false;
    char *at = target->at + target->n;
    for (size_t i = 0; i < nbytes; i++) {
        const unsigned char byte = (unsigned char)place[i];
        if (byte < 0x80) {
            *at++ = (char)byte;
            continue;
        }
        *at++ = '%';
        *at++ = digits[byte >> 4];
        *at++ = digits[byte & 15];
    }
    *at = '\0';
    target->n = (size_t)(at - target->at);
    return true;
}

bool mls_http_slot_follow(mls_http_slot *slot)
{
    const char *place = slot->answer.location;
    const size_t norigin = origin_length(place);
    char origin[sizeof slot->answer.location + 1];
    if (slot->answer.too_long || !mls_http_is_visible(place, norigin))
        return false;
    for (const char *c = place + norigin; *c; c++)
        if ((unsigned char)*c <= 0x20 || *c == 0x7f)
            return false;
    if (norigin) {
        if (slot->base.n > 5 && strncasecmp(slot->base.at, "https", 5) == 0 && strncasecmp(place, "https", 5) != 0)
            return false; /* not from an encrypted connection to one that isn't */
        memcpy(origin, place, norigin);
        origin[norigin] = '/';
        if (!set_base(slot, origin, norigin + 1))
            return false;
        place += norigin;
    } else if (place[0] != '/' || place[1] == '/') {
        return false;
    }
    const size_t nplace = strcspn(place, "#");
    slot->target.n = 0;
    if ((*place != '/' && !mls_bytes_add(&slot->target, "/", 1)) || !add_place(&slot->target, place, nplace))
        return false;
    slot->foreign = slot->base.n != strlen(slot->endpoint->base) || strcasecmp(slot->base.at, slot->endpoint->base) != 0;
    slot->asked_empty = false;
    return true;
}
