/* What comes back: header lines, and the body on its way to memory, to a comparison, or to nowhere. */
#include "http_inner.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

static bool refuse(mls_http_slot *slot, const char *why)
{
    mls_http_verdict(slot, MLS_KIND_LENGTH, -EMSGSIZE, why);
    return false;
}

/* ---- is the answer what was asked for? ---- */

static bool judge_range(mls_http_slot *slot)
{
    const mls_transfer *t = &slot->job->transfer;
    const mls_http_headers *answer = &slot->answer;
    if (answer->status == 206) {
        slot->done.object_nbytes = answer->range_total;
        if (answer->range_start != t->offset)
            return refuse(slot, "the server sent another range than it was asked for");
        if (slot->expected == MLS_WHOLE && answer->range_end != MLS_WHOLE)
            slot->expected = answer->range_end - answer->range_start + 1;
        return true;
    }
    slot->done.object_nbytes = answer->length; /* all of it */
    return t->offset == 0 && answer->length <= t->nbytes ? true : refuse(slot, "the server does not serve ranges");
}

static bool judge_read(mls_http_slot *slot)
{
    const mls_transfer *t = &slot->job->transfer;
    slot->expected = slot->answer.length;
    if (!slot->ranged)
        slot->done.object_nbytes = slot->answer.length;
    else if (!judge_range(slot))
        return false;
    const uint64_t found = slot->done.object_nbytes, known = t->object_nbytes;
    if (known != MLS_WHOLE && found != MLS_WHOLE && known != found)
        return refuse(slot, "the object has another length than the catalog says");
    const uint64_t whole = known != MLS_WHOLE ? known : found;
    const uint64_t wanted = t->nbytes != MLS_WHOLE ? t->nbytes
                            : whole != MLS_WHOLE   ? whole - (t->offset < whole ? t->offset : whole)
                                                   : MLS_WHOLE;
    if (wanted != MLS_WHOLE && slot->expected != MLS_WHOLE && wanted != slot->expected)
        return refuse(slot, slot->expected < wanted ? "the object ends before the range that was asked for"
                                                    : "the server sent more than it was asked for");
    if (slot->expected == MLS_WHOLE)
        slot->expected = wanted;
    if (t->memory == MLS_TRANSFER_BUFFER && slot->expected != MLS_WHOLE && slot->expected > t->room)
        return refuse(slot, "the object is larger than the room there is for it");
    slot->sink = t->memory == MLS_TRANSFER_BUFFER    ? MLS_SINK_MEMORY
                 : t->memory == MLS_TRANSFER_PATTERN ? MLS_SINK_PATTERN
                                                     : MLS_SINK_DROP;
    return true;
}

bool mls_http_judge(mls_http_slot *slot)
{
    const mls_transfer *t = &slot->job->transfer;
    const mls_http_headers *answer = &slot->answer;
    const bool redirects = slot->endpoint->follow && answer->location[0] && answer->status / 100 == 3;
    slot->judged = true;
    slot->done.status = (uint16_t)answer->status;
    if (slot->job->call) {
        slot->sink = redirects ? MLS_SINK_REFUSAL : MLS_SINK_CALL;
        return true;
    }
    if (answer->status / 100 != 2) {
        slot->sink = MLS_SINK_REFUSAL;
        return true;
    }
    memcpy(slot->done.etag, answer->etag, sizeof slot->done.etag);
    if (t->op == MLS_TRANSFER_READ)
        return judge_read(slot);
    if (t->op == MLS_TRANSFER_WRITE) {
        slot->done.object_nbytes = t->nbytes;
    } else if (t->op == MLS_TRANSFER_STAT) {
        slot->done.object_nbytes = answer->length;
        if (t->object_nbytes != MLS_WHOLE && answer->length != MLS_WHOLE && t->object_nbytes != answer->length)
            return refuse(slot, "the object has another length than the catalog says");
    }
    return true;
}

size_t mls_http_on_header(char *line, size_t one, size_t n, void *user)
{
    mls_http_slot *slot = user;
    (void)one;
    if (n > 5 && memcmp(line, "HTTP/", 5) == 0) {
        slot->done.first_byte_ns = mls_http_now_ns();
        slot->judged = false;
        if (slot->job->call)
            slot->job->call->answer_headers.n = 0;
    }
    if (slot->judged) /* a trailer after a chunked body */
        return n;
    mls_http_headers_add(&slot->answer, line, n);
    if (slot->job->call && !mls_bytes_add(&slot->job->call->answer_headers, line, n)) {
        mls_http_verdict(slot, MLS_KIND_SYSTEM, -ENOMEM, "no memory for the answer");
        return 0;
    }
    return !slot->answer.ended || slot->answer.status < 200 || mls_http_judge(slot) ? n : 0;
}

/* ---- the body ---- */

/* Blocks are compared whole: what doesn't fill one is carried over to the next piece. */
static void compare(mls_http_slot *slot, const uint8_t *data, size_t n)
{
    const mls_core_api *core = slot->worker->engine->config.core;
    uint64_t at = slot->job->transfer.offset + slot->received;
    if (slot->ncarry) {
        const uint64_t from = at - slot->ncarry;
        size_t more = MLS_BLOCK_BYTES - (size_t)(from % MLS_BLOCK_BYTES) - slot->ncarry;
        more = more < n ? more : n;
        memcpy(slot->carry + slot->ncarry, data, more);
        slot->ncarry += more;
        data += more, at += more, n -= more;
        if (at % MLS_BLOCK_BYTES)
            return; /* still not a whole one */
        slot->damaged += core->pattern_check(&slot->pattern, slot->carry, from, slot->ncarry, NULL, 0, NULL);
        slot->ncarry = 0;
    }
    const size_t tail = (size_t)((at + n) % MLS_BLOCK_BYTES);
    const size_t carried = tail < n ? tail : n;
    slot->damaged += core->pattern_check(&slot->pattern, data, at, n - carried, NULL, 0, NULL);
    memcpy(slot->carry, data + n - carried, carried);
    slot->ncarry = carried;
}

static bool take_data(mls_http_slot *slot, const uint8_t *data, size_t n)
{
    const mls_core_api *core = slot->worker->engine->config.core;
    const mls_transfer *t = &slot->job->transfer;
    if (slot->expected != MLS_WHOLE && n > slot->expected - slot->received)
        return refuse(slot, "the server sent more than it was asked for");
    if (slot->sink == MLS_SINK_MEMORY) {
        if (n > t->room - slot->received)
            return refuse(slot, "the object is larger than the room there is for it");
        uint8_t *place = slot->job->batch->memory + t->place + slot->received;
        if (place != data) /* a wire receives there at once */
            memcpy(place, data, n);
    } else if (slot->sink == MLS_SINK_PATTERN) {
        compare(slot, data, n);
    }
    if (t->op == MLS_TRANSFER_READ && t->digest == MLS_TRANSFER_CRC32C)
        slot->crc = core->crc32c(slot->crc, data, n);
    else if (t->op == MLS_TRANSFER_READ && t->digest == MLS_TRANSFER_CRC32)
        slot->crc = core->crc32(slot->crc, data, n);
    else if (t->op == MLS_TRANSFER_READ && t->digest == MLS_TRANSFER_XXH64)
        core->xxh64_update(&slot->xxh, data, n);
    slot->received += n;
    return true;
}

size_t mls_http_on_body(char *data, size_t one, size_t n, void *user)
{
    mls_http_slot *slot = user;
    (void)one;
    mls_count(&slot->worker->received_bytes, n);
    if (slot->sink == MLS_SINK_REFUSAL) {
        const size_t room = MLS_HTTP_ERROR_BYTES - slot->nrefusal, some = n < room ? n : room;
        memcpy(slot->refusal + slot->nrefusal, data, some);
        slot->nrefusal += some;
        return n;
    }
    if (slot->sink == MLS_SINK_CALL) {
        mls_bytes *body = &slot->job->call->answer_body;
        if (n > MLS_HTTP_CALL_BYTES - body->n) {
            mls_http_verdict(slot, MLS_KIND_OTHER, -EMSGSIZE, "the answer has more than 64 MiB, which is no listing's page");
            return 0;
        }
        if (mls_bytes_add(body, data, n))
            return n;
        mls_http_verdict(slot, MLS_KIND_SYSTEM, -ENOMEM, "no memory for the answer");
        return 0;
    }
    return slot->job->transfer.op != MLS_TRANSFER_READ || take_data(slot, (const uint8_t *)data, n) ? n : 0;
}

/* ---- at the end ---- */

/* The store's checksum of the whole object against what came. */
static bool store_agrees(mls_http_slot *slot)
{
    const mls_http_headers *answer = &slot->answer;
    const mls_transfer *t = &slot->job->transfer;
    const bool is_crc = strcasecmp(answer->checksum_type, "crc32c") == 0;
    const bool is_xxh = strncasecmp(answer->checksum_type, "xxhash", 6) == 0 && strlen(answer->checksum_type) <= 7;
    if (slot->ranged || !answer->checksum[0] ||
        !((is_crc && t->digest == MLS_TRANSFER_CRC32C) || (is_xxh && t->digest == MLS_TRANSFER_XXH64)))
        return true;
    if (slot->endpoint->dialect == MLS_HTTP_S3) {
        char want[9];
        if (strchr(answer->checksum, '-')) /* of an object in parts: a checksum of checksums */
            return true;
        mls_http_crc_base64(slot->crc, want);
        slot->done.flags |= MLS_COMPLETION_COMPARED;
        return strcmp(want, answer->checksum) == 0;
    }
    if (slot->endpoint->dialect != MLS_HTTP_AIS)
        return true;
    char *end;
    const uint64_t value = strtoull(answer->checksum, &end, 16);
    slot->done.flags |= MLS_COMPLETION_COMPARED;
    return !*end && value == slot->done.digest_value;
}

void mls_http_answer_end(mls_http_slot *slot)
{
    const mls_core_api *core = slot->worker->engine->config.core;
    const mls_transfer *t = &slot->job->transfer;
    if (t->op == MLS_TRANSFER_STAT && t->digest && (t->flags & MLS_TRANSFER_HAS_DIGEST)) {
        slot->done.digest_value = t->digest_value;
        slot->crc = (uint32_t)t->digest_value;
        if (!store_agrees(slot))
            mls_http_verdict(slot, MLS_KIND_CHECKSUM, -EBADMSG, "the checksum that the store has is not the one given");
    }
    if (t->op != MLS_TRANSFER_READ)
        return;
    if (slot->expected != MLS_WHOLE && slot->received < slot->expected) { /* a chunked body that ended as one should */
        refuse(slot, "the object is shorter than it should be");
        return;
    }
    if (slot->ncarry)
        slot->damaged += core->pattern_check(&slot->pattern, slot->carry, t->offset + slot->received - slot->ncarry,
                                             slot->ncarry, NULL, 0, NULL);
    if (!slot->ranged)
        slot->done.object_nbytes = slot->received;
    slot->done.damaged_blocks = slot->damaged < UINT32_MAX ? (uint32_t)slot->damaged : UINT32_MAX;
    if (t->digest == MLS_TRANSFER_CRC32C || t->digest == MLS_TRANSFER_CRC32)
        slot->done.digest_value = slot->crc;
    else if (t->digest == MLS_TRANSFER_XXH64)
        slot->done.digest_value = core->xxh64_digest(&slot->xxh);
    if (!store_agrees(slot))
        mls_http_verdict(slot, MLS_KIND_CHECKSUM, -EBADMSG, "the checksum of what came is not the store's");
    else if ((t->flags & MLS_TRANSFER_HAS_DIGEST) && t->digest && t->digest_value != slot->done.digest_value)
        mls_http_verdict(slot, MLS_KIND_CHECKSUM, -EBADMSG, "the checksum of what came is not the one that was given");
}
