/* What becomes of an attempt that is over: another place, another attempt, or the end. */
#include "http_inner.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- what happened ---- */

static int os_error(const mls_http_slot *slot, int otherwise)
{
    long error = 0;
    curl_easy_getinfo(slot->easy, CURLINFO_OS_ERRNO, &error);
    return error ? -(int)error : otherwise;
}

static void judge_transport(mls_http_slot *slot, CURLcode code)
{
    const char *text = slot->curl_error[0] ? slot->curl_error : curl_easy_strerror(code);
    curl_off_t connect_us = 0;
    switch (code) {
    case CURLE_COULDNT_RESOLVE_HOST:
    case CURLE_COULDNT_RESOLVE_PROXY:
        mls_http_verdict(slot, MLS_KIND_RESOLVE, -EHOSTUNREACH, text);
        break;
    case CURLE_COULDNT_CONNECT:
        mls_http_verdict(slot, MLS_KIND_CONNECT, os_error(slot, -ECONNREFUSED), text);
        break;
    case CURLE_OPERATION_TIMEDOUT:
        curl_easy_getinfo(slot->easy, CURLINFO_PRETRANSFER_TIME_T, &connect_us);
        mls_http_verdict(slot, connect_us ? MLS_KIND_STALLED : MLS_KIND_CONNECT, -ETIMEDOUT, text);
        break;
    case CURLE_RECV_ERROR:
    case CURLE_SEND_ERROR:
    case CURLE_GOT_NOTHING:
        mls_http_verdict(slot, MLS_KIND_RESET, -ECONNRESET, text);
        break;
    case CURLE_PARTIAL_FILE:
        mls_http_verdict(slot, MLS_KIND_SHORT, -ENODATA, text);
        break;
    case CURLE_SSL_CONNECT_ERROR:
        if (os_error(slot, 0) == -ECONNRESET) {
            mls_http_verdict(slot, MLS_KIND_RESET, -ECONNRESET, text);
            break;
        }
        /* fall through */
    case CURLE_PEER_FAILED_VERIFICATION:
    case CURLE_SSL_CACERT_BADFILE:
    case CURLE_SSL_CERTPROBLEM:
    case CURLE_SSL_CIPHER:
    case CURLE_SSL_ISSUER_ERROR:
    case CURLE_SSL_CRL_BADFILE:
    case CURLE_SSL_INVALIDCERTSTATUS:
    case CURLE_SSL_PINNEDPUBKEYNOTMATCH:
    case CURLE_SSL_ENGINE_INITFAILED:
    case CURLE_USE_SSL_FAILED:
        mls_http_verdict(slot, MLS_KIND_TLS, -EPROTO, text);
        break;
    case CURLE_OUT_OF_MEMORY:
        mls_http_verdict(slot, MLS_KIND_SYSTEM, -ENOMEM, text);
        break;
    default:
        mls_http_verdict(slot, MLS_KIND_OTHER, -EIO, text);
        break;
    }
}

static int errno_of_status(unsigned status)
{
    switch (status) {
    case 401:
    case 403:
        return -EACCES;
    case 404:
    case 410:
        return -ENOENT;
    case 408:
    case 504:
        return -ETIMEDOUT;
    case 413:
        return -EFBIG;
    case 416:
        return -EINVAL;
    case 429:
    case 503:
        return -EBUSY;
    case 507:
        return -ENOSPC;
    default:
        return -EIO;
    }
}

static bool is_redirect(unsigned status)
{
    return status == 301 || status == 302 || status == 307 || status == 308;
}

static bool is_busy(unsigned status)
{
    return status == 429 || status == 500 || status == 502 || status == 503 || status == 504;
}

/* ---- once more ---- */

static bool is_worth_a_retry(const mls_http_slot *slot)
{
    switch (slot->verdict) {
    case MLS_KIND_CONNECT:
    case MLS_KIND_RESET:
    case MLS_KIND_STALLED:
    case MLS_KIND_SHORT:
    case MLS_KIND_RESOLVE: /* a name server may be busy too */
        return true;
    case MLS_KIND_OK: /* a call's answer */
    case MLS_KIND_HTTP:
        return is_busy(slot->answer.status);
    default:
        return false;
    }
}

static uint64_t random_below(mls_http_worker *worker, uint64_t most)
{
    uint64_t x = worker->random; /* xorshift64*, by Vigna: enough to keep clients apart */
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    worker->random = x;
    return most ? x * 0x2545f4914f6cdd1du % most : 0;
}

/* What the server asks for, in seconds; 0: nothing. */
static uint64_t retry_after_s(const mls_http_slot *slot)
{
    const char *text = slot->answer.retry_after;
    if (text[0] >= '0' && text[0] <= '9')
        return strtoull(text, NULL, 10);
    const time_t at = text[0] ? curl_getdate(text, NULL) : -1, now = time(NULL);
    return at > now ? (uint64_t)(at - now) : 0;
}

/* Full jitter over an exponential, capped; never less than the server asks for, up to the cap. */
static uint64_t backoff(mls_http_slot *slot)
{
    const mls_http_config *config = &slot->worker->engine->config;
    uint64_t most = config->backoff_ns;
    for (unsigned i = 1; i < slot->done.attempts && most < config->backoff_most_ns; i++)
        most *= 2;
    most = most < config->backoff_most_ns ? most : config->backoff_most_ns;
    uint64_t wait = random_below(slot->worker, most + 1);
    const uint64_t asked_s = retry_after_s(slot);
    if (asked_s) {
        const uint64_t cap = config->backoff_most_ns;
        const uint64_t asked = asked_s < cap / 1000000000u + 1 ? asked_s * 1000000000u : cap;
        const uint64_t least = asked < cap ? asked : cap;
        wait = wait > least ? wait : least;
    }
    return wait;
}

static bool is_given_up(const mls_http_slot *slot, uint64_t until)
{
    const mls_http_engine *engine = slot->worker->engine;
    const mls_http_job *job = slot->job;
    if (atomic_load(&engine->stopping) || slot->done.attempts >= engine->config.tries)
        return true;
    if (job->call)
        return atomic_load(&job->call->cancelled) || (job->call->deadline_ns && until >= job->call->deadline_ns);
    return job->epoch != atomic_load(&engine->epoch);
}

/* ---- the end ---- */

/* Of the last place asked, without a redirect's query, which may hold a signature. */
static char *url_of(const mls_http_slot *slot)
{
    const size_t nbase = slot->base.n ? slot->base.n - 1 : 0; /* both have the slash */
    const size_t ntarget = slot->redirects ? strcspn(slot->target.at, "?") : slot->target.n;
    char *url = malloc(nbase + ntarget + 1);
    if (url) {
        memcpy(url, slot->base.at, nbase);
        memcpy(url + nbase, slot->target.at, ntarget);
        url[nbase + ntarget] = '\0';
    }
    return url;
}

static void describe_failure(const mls_http_slot *slot, char *out, size_t room)
{
    out[0] = '\0';
    if (slot->verdict == MLS_KIND_HTTP && slot->nrefusal)
        mls_http_refusal_text(slot->refusal, slot->nrefusal, out, room);
    if (!out[0])
        snprintf(out, room, "%s", slot->why);
}

static void end_call(mls_http_slot *slot)
{
    mls_http_call *call = slot->job->call;
    call->done = slot->done;
    call->url = url_of(slot);
    if (slot->verdict != MLS_KIND_OK)
        describe_failure(slot, call->message, sizeof call->message);
    mls_http_call_end(slot->worker->engine, call);
}

void mls_http_finish(mls_http_slot *slot)
{
    mls_http_worker *worker = slot->worker;
    mls_completion *done = &slot->done;
    done->end_ns = mls_http_now_ns();
    done->kind = slot->verdict;
    if (slot->verdict != MLS_KIND_OK)
        done->result = slot->verdict_errno;
    else if (done->op == MLS_TRANSFER_READ)
        done->result = (int64_t)slot->received;
    else if (done->op == MLS_TRANSFER_WRITE)
        done->result = (int64_t)slot->body_nbytes;
    mls_http_identity_put(slot->identity);
    slot->identity = NULL;
    slot->state = MLS_SLOT_FREE;
    if (slot->for_calls) {
        end_call(slot);
        slot->next = worker->free_calls;
        worker->free_calls = slot;
        worker->call_room++;
    } else {
        if (slot->verdict != MLS_KIND_OK && slot->verdict != MLS_KIND_CANCELLED) {
            char message[256];
            describe_failure(slot, message, sizeof message);
            mls_http_note_failure(worker->engine, done, url_of(slot), message);
        }
        worker->done[worker->ndone++] = *done;
        atomic_fetch_sub(&slot->job->batch->left, 1); /* the batch may be gone after this */
        slot->next = worker->free_data;
        worker->free_data = slot;
        worker->data_room++;
        if (worker->ndone == sizeof worker->done / sizeof worker->done[0])
            mls_http_flush_done(worker);
    }
    slot->job = NULL;
}

/* The endpoint whose server it was, for figures per target. */
static void note_server(mls_http_slot *slot)
{
    const mls_http_engine *engine = slot->worker->engine;
    if (!slot->foreign)
        return;
    const unsigned count = atomic_load(&engine->nendpoints);
    for (unsigned i = 0; i < count; i++)
        if (strcmp(engine->endpoints[i]->base, slot->base.at) == 0) {
            slot->done.endpoint = i;
            return;
        }
}

/* True if the transfer goes on at another place. */
static bool goes_on(mls_http_slot *slot)
{
    const unsigned status = slot->answer.status;
    if (slot->endpoint->follow && is_redirect(status) && slot->answer.location[0]) {
        slot->done.redirect_ns = mls_http_now_ns() - slot->done.attempt_ns;
        if (++slot->redirects > MLS_HTTP_MOST_REDIRECTS) {
            mls_http_verdict(slot, MLS_KIND_REDIRECT, -ELOOP, "too many redirects");
            return false;
        }
        if (!mls_http_slot_follow(slot)) {
            mls_http_verdict(slot, MLS_KIND_REDIRECT, -ELOOP, "a redirect to where it can't be followed");
            return false;
        }
        mls_http_slot_send(slot);
        return true;
    }
    if (slot->asked_empty && status / 100 == 2) { /* no redirect: the body belongs here */
        slot->done.redirect_ns = mls_http_now_ns() - slot->done.attempt_ns;
        slot->asked_empty = false;
        mls_http_slot_send(slot);
        return true;
    }
    return false;
}

void mls_http_settle(mls_http_slot *slot, CURLcode code)
{
    mls_http_worker *worker = slot->worker;
    if (slot->verdict == MLS_KIND_OK && code != CURLE_OK)
        judge_transport(slot, code);
    if (slot->verdict == MLS_KIND_OK) {
        if (slot->asked_shape == MLS_SHAPE_BODY)
            mls_count(&worker->sent_bytes, slot->sent_nbytes);
        if (goes_on(slot))
            return;
    }
    if (slot->verdict == MLS_KIND_OK && !slot->job->call) {
        const unsigned status = slot->answer.status;
        if (status / 100 == 2) {
            mls_http_answer_end(slot);
        } else {
            char why[48];
            snprintf(why, sizeof why, "the server answered with status %u", status);
            mls_http_verdict(slot, MLS_KIND_HTTP, errno_of_status(status), why);
        }
    }
    note_server(slot);
    if (is_worth_a_retry(slot)) {
        if (slot->done.first_kind == MLS_KIND_OK) {
            slot->done.first_kind = slot->verdict == MLS_KIND_OK ? MLS_KIND_HTTP : slot->verdict;
            slot->done.first_status = (uint16_t)slot->answer.status;
        }
        const uint64_t until = mls_http_now_ns() + backoff(slot);
        if (!is_given_up(slot, until)) {
            slot->retry_ns = until;
            slot->state = MLS_SLOT_RETRY;
            worker->nretry++;
            mls_count(&worker->retries, 1);
            return;
        }
    } else if (slot->verdict != MLS_KIND_OK && slot->done.first_kind == MLS_KIND_OK) {
        slot->done.first_kind = slot->verdict;
        slot->done.first_status = (uint16_t)slot->answer.status;
    }
    mls_http_finish(slot);
}
