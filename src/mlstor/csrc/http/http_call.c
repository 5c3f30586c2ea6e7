/* Control requests: one at a time for their caller, among the transfers for the workers. */
#include "http_inner.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* The literal for a method, so that it outlives the call; NULL for one that isn't known. */
static const char *method_named(const char *name)
{
    static const char *const methods[] = {"GET", "HEAD", "PUT", "POST", "DELETE", "PATCH"};
    for (size_t i = 0; i < sizeof methods / sizeof methods[0]; i++)
        if (strcmp(name, methods[i]) == 0)
            return methods[i];
    return NULL;
}

static const char *check(const mls_http_engine *engine, const mls_http_call_spec *spec)
{
    if (spec->endpoint >= atomic_load(&engine->nendpoints))
        return "there is no such endpoint";
    if (!method_named(spec->method))
        return "the method is one of GET, HEAD, PUT, POST, DELETE, PATCH";
    if (strcmp(spec->method, "HEAD") == 0 && spec->body_nbytes)
        return "a HEAD has no body";
    if (!mls_http_is_visible(spec->query, strlen(spec->query)))
        return "a query is escaped text without spaces";
    return spec->nheaders > MLS_HTTP_MOST_HEADERS ? "a request takes at most 16 headers" : NULL;
}

mls_http_call *mls_http_call_new(mls_http_engine *engine, const mls_http_call_spec *spec, const char **why)
{
    *why = check(engine, spec);
    mls_http_call *call = *why ? NULL : calloc(1, sizeof *call);
    if (!call)
        return NULL;
    call->spec = *spec;
    call->spec.method = method_named(spec->method);
    call->job = (mls_http_job){.call = call, .transfer = {.endpoint = spec->endpoint, .object_nbytes = MLS_WHOLE}};
    call->spec.nheaders = 0;
    for (; call->spec.nheaders < spec->nheaders; call->spec.nheaders++) {
        const size_t i = call->spec.nheaders;
        if (mls_http_header_parse(spec->headers[i], &call->headers[i], why) < 0) {
            mls_http_call_free(call);
            return NULL;
        }
    }
    return call;
}

void mls_http_call_cancel(mls_http_engine *engine, mls_http_call *call)
{
    bool queued = false;
    atomic_store(&call->cancelled, true);
    pthread_mutex_lock(&engine->lock);
    mls_http_job *before = NULL;
    for (mls_http_job *job = engine->first_call; job; before = job, job = job->next) {
        if (job != &call->job)
            continue;
        queued = true;
        *(before ? &before->next : &engine->first_call) = job->next;
        if (engine->last_call == job)
            engine->last_call = before;
        break;
    }
    atomic_fetch_add(&engine->call_epoch, 1);
    pthread_mutex_unlock(&engine->lock);
    if (!queued) {
        mls_http_wake_all(engine);
        return;
    }
    call->done.kind = MLS_KIND_CANCELLED;
    call->done.result = -ECANCELED;
    mls_http_call_end(engine, call);
}

void mls_http_call_answer(const mls_http_call *call, mls_http_answer *out)
{
    *out = (mls_http_answer){
        .kind = call->done.kind,
        .status = call->done.status,
        .error = call->done.kind == MLS_KIND_OK ? 0 : (int)call->done.result,
        .headers = call->answer_headers.at,
        .headers_nbytes = call->answer_headers.n,
        .body = (const uint8_t *)call->answer_body.at,
        .body_nbytes = call->answer_body.n,
        .url = call->url ? call->url : "",
        .message = call->message,
    };
}

void mls_http_call_free(mls_http_call *call)
{
    if (!call)
        return;
    for (size_t i = 0; i < call->spec.nheaders; i++)
        mls_http_header_free(&call->headers[i]);
    free(call->answer_headers.at);
    free(call->answer_body.at);
    free(call->url);
    free(call);
}

const char *mls_http_libcurl(void)
{
    static char text[64];
    const curl_version_info_data *info = curl_version_info(CURLVERSION_NOW);
    if (!text[0]) {
        strncpy(text, info->version, 24);
        strcat(text, " ");
        strncat(text, info->ssl_version ? info->ssl_version : "without TLS", 32);
    }
    return text;
}
