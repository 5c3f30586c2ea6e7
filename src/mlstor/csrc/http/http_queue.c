/* Jobs on their way to the workers, completions on their way back. */
#include "http_inner.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- jobs whose time has not come: a binary heap ---- */

static bool later_push(mls_http_engine *engine, mls_http_job *job)
{
    if (engine->nlater == engine->later_room) {
        const size_t room = engine->later_room ? 2 * engine->later_room : 256;
        mls_http_job **larger = realloc(engine->later, room * sizeof(mls_http_job *));
        if (!larger)
            return false;
        engine->later = larger;
        engine->later_room = room;
    }
    size_t at = engine->nlater++;
    while (at && engine->later[(at - 1) / 2]->transfer.not_before_ns > job->transfer.not_before_ns) {
        engine->later[at] = engine->later[(at - 1) / 2];
        at = (at - 1) / 2;
    }
    engine->later[at] = job;
    return true;
}

static mls_http_job *later_pop(mls_http_engine *engine)
{
    mls_http_job *top = engine->later[0], *moved = engine->later[--engine->nlater];
    size_t at = 0;
    for (size_t child = 1; child < engine->nlater; child = 2 * at + 1) {
        if (child + 1 < engine->nlater &&
            engine->later[child + 1]->transfer.not_before_ns < engine->later[child]->transfer.not_before_ns)
            child++;
        if (engine->later[child]->transfer.not_before_ns >= moved->transfer.not_before_ns)
            break;
        engine->later[at] = engine->later[child];
        at = child;
    }
    engine->later[at] = moved;
    return top;
}

/* ---- the queue ---- */

static void append(mls_http_job **first, mls_http_job **last, mls_http_job *job)
{
    job->next = NULL;
    if (*last)
        (*last)->next = job;
    else
        *first = job;
    *last = job;
}

static mls_http_job *pop(mls_http_job **first, mls_http_job **last)
{
    mls_http_job *job = *first;
    *first = job->next;
    if (!*first)
        *last = NULL;
    return job;
}

static void wake(mls_http_worker *worker)
{
    const uint64_t one = 1;
    worker->wants_data = worker->wants_calls = false;
    while (write(worker->event, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

/* Those that have room and sleep, or soon will; at most `most`. */
static void wake_some_locked(mls_http_engine *engine, size_t most, bool for_call)
{
    for (unsigned i = 0; i < engine->started && most; i++)
        if (for_call ? engine->workers[i].wants_calls : engine->workers[i].wants_data) {
            wake(&engine->workers[i]);
            most--;
        }
}

void mls_http_wake_all(mls_http_engine *engine)
{
    pthread_mutex_lock(&engine->lock);
    for (unsigned i = 0; i < engine->started; i++)
        wake(&engine->workers[i]);
    pthread_mutex_unlock(&engine->lock);
}

void mls_http_submit(mls_http_engine *engine, mls_http_batch *batch)
{
    const uint64_t now = mls_http_now_ns();
    bool timed = false;
    pthread_mutex_lock(&engine->lock);
    const uint64_t epoch = atomic_load(&engine->epoch);
    for (size_t i = 0; i < batch->count; i++) {
        mls_http_job *job = &batch->jobs[i];
        job->submit_ns = now;
        job->epoch = epoch;
        /* Without memory for the heap it begins too early, which its times show. */
        if (job->transfer.not_before_ns > now && later_push(engine, job)) {
            timed = true;
            continue;
        }
        append(&engine->first, &engine->last, job);
        engine->queued++;
    }
    wake_some_locked(engine, timed ? engine->started : batch->count, false); /* all are to know the time */
    pthread_mutex_unlock(&engine->lock);
}

void mls_http_call_begin(mls_http_engine *engine, mls_http_call *call)
{
    pthread_mutex_lock(&engine->lock);
    call->job.submit_ns = mls_http_now_ns();
    if (call->spec.timeout_ns)
        call->deadline_ns = call->job.submit_ns + call->spec.timeout_ns;
    append(&engine->first_call, &engine->last_call, &call->job);
    wake_some_locked(engine, 1, true);
    pthread_mutex_unlock(&engine->lock);
}

mls_http_job *mls_http_take(mls_http_worker *worker)
{
    mls_http_engine *engine = worker->engine;
    mls_http_job *first = NULL, *last = NULL;
    unsigned calls = worker->call_room, room = worker->data_room;
    pthread_mutex_lock(&engine->lock);
    while (calls && engine->first_call) {
        append(&first, &last, pop(&engine->first_call, &engine->last_call));
        calls--;
    }
    while (engine->nlater && engine->later[0]->transfer.not_before_ns <= worker->now_ns) {
        append(&engine->first, &engine->last, later_pop(engine));
        engine->queued++;
    }
    worker->queue_due_ns = room && engine->nlater ? engine->later[0]->transfer.not_before_ns : MLS_NEVER;
    if (engine->queued && room) { /* not more than a fair share, so that the others have work too */
        size_t share = (engine->queued + engine->started - 1) / engine->started;
        for (share = share < room ? share : room; share; share--) {
            append(&first, &last, pop(&engine->first, &engine->last));
            engine->queued--;
        }
    }
    worker->wants_data = worker->data_room && !first && !engine->queued;
    worker->wants_calls = worker->call_room && !first;
    pthread_mutex_unlock(&engine->lock);
    return first;
}

/* ---- completions ---- */

static void push_locked(mls_http_engine *engine, const mls_completion *done, size_t count)
{
    if (engine->done_last + count > engine->done_room && engine->done_first) {
        memmove(engine->done, engine->done + engine->done_first,
                (engine->done_last - engine->done_first) * sizeof *done);
        engine->done_last -= engine->done_first;
        engine->done_first = 0;
    }
    if (engine->done_last + count > engine->done_room) {
        const size_t room = 2 * (engine->done_last + count);
        mls_completion *larger = realloc(engine->done, room * sizeof *done);
        if (!larger)
            abort(); /* a completion can't be dropped, and its caller would wait for ever */
        engine->done = larger;
        engine->done_room = room;
    }
    memcpy(engine->done + engine->done_last, done, count * sizeof *done);
    engine->done_last += count;
}

void mls_http_hand_back(mls_http_engine *engine, const mls_completion *done, size_t count)
{
    pthread_mutex_lock(&engine->done_lock);
    push_locked(engine, done, count);
    if (engine->done_wanted && engine->done_last - engine->done_first >= engine->done_wanted)
        pthread_cond_broadcast(&engine->done_ready);
    pthread_mutex_unlock(&engine->done_lock);
}

/* False when `deadline_ns` (0: none) has passed. */
static bool wait_until(pthread_cond_t *cond, pthread_mutex_t *lock, uint64_t deadline_ns)
{
    if (!deadline_ns) {
        pthread_cond_wait(cond, lock);
        return true;
    }
    struct timespec until = {(time_t)(deadline_ns / 1000000000u), (long)(deadline_ns % 1000000000u)};
    return pthread_cond_timedwait(cond, lock, &until) != ETIMEDOUT;
}

size_t mls_http_reap(mls_http_engine *engine, mls_completion *out, size_t max, size_t min, int64_t timeout_ns)
{
    const uint64_t deadline = timeout_ns < 0 ? 0 : mls_http_now_ns() + (uint64_t)timeout_ns;
    min = min < max ? min : max;
    pthread_mutex_lock(&engine->done_lock);
    while (engine->done_last - engine->done_first < min) {
        engine->done_wanted = min;
        if (!wait_until(&engine->done_ready, &engine->done_lock, deadline))
            break;
    }
    engine->done_wanted = 0;
    size_t count = engine->done_last - engine->done_first;
    count = count < max ? count : max;
    if (count)
        memcpy(out, engine->done + engine->done_first, count * sizeof *out);
    engine->done_first += count;
    if (engine->done_first == engine->done_last)
        engine->done_first = engine->done_last = 0;
    pthread_mutex_unlock(&engine->done_lock);
    return count;
}

bool mls_http_call_wait(mls_http_engine *engine, mls_http_call *call, int64_t timeout_ns)
{
    const uint64_t deadline = timeout_ns < 0 ? 0 : mls_http_now_ns() + (uint64_t)timeout_ns;
    pthread_mutex_lock(&engine->done_lock);
    while (!call->over && wait_until(&engine->call_over, &engine->done_lock, deadline))
        ;
    const bool over = call->over;
    pthread_mutex_unlock(&engine->done_lock);
    return over;
}

void mls_http_call_end(mls_http_engine *engine, mls_http_call *call)
{
    pthread_mutex_lock(&engine->done_lock);
    call->over = true;
    pthread_cond_broadcast(&engine->call_over);
    pthread_mutex_unlock(&engine->done_lock);
}

void mls_http_note_failure(mls_http_engine *engine, const mls_completion *done, char *url, const char *message)
{
    pthread_mutex_lock(&engine->done_lock);
    if (engine->nfailures < MLS_HTTP_MOST_FAILURES) {
        mls_http_failure *failure = &engine->failures[engine->nfailures++];
        *failure = (mls_http_failure){.tag = done->tag, .status = done->status, .kind = done->kind, .url = url};
        strncpy(failure->message, message, sizeof failure->message - 1);
        url = NULL;
    }
    pthread_mutex_unlock(&engine->done_lock);
    free(url);
}

size_t mls_http_failures(mls_http_engine *engine, mls_http_failure *out, size_t max)
{
    pthread_mutex_lock(&engine->done_lock);
    const size_t count = engine->nfailures < max ? engine->nfailures : max;
    memcpy(out, engine->failures, count * sizeof *out);
    engine->nfailures -= count;
    memmove(engine->failures, engine->failures + count, engine->nfailures * sizeof *out);
    pthread_mutex_unlock(&engine->done_lock);
    return count;
}

/* ---- stopping ---- */

static void hand_back_cancelled(mls_http_engine *engine, mls_http_job *job)
{
    const uint64_t now = mls_http_now_ns();
    const mls_completion done = {
        .tag = job->transfer.tag, .result = -ECANCELED, .submit_ns = job->submit_ns, .start_ns = now,
        .attempt_ns = now, .end_ns = now, .object_nbytes = MLS_WHOLE, .endpoint = job->transfer.endpoint,
        .op = job->transfer.op, .kind = MLS_KIND_CANCELLED,
    };
    atomic_fetch_sub(&job->batch->left, 1); /* the batch may be gone after this */
    mls_http_hand_back(engine, &done, 1);
}

/* Gives back what no worker has taken. */
void mls_http_drop_queue(mls_http_engine *engine)
{
    mls_http_job *first, *next;
    pthread_mutex_lock(&engine->lock);
    while (engine->nlater)
        append(&engine->first, &engine->last, later_pop(engine));
    first = engine->first;
    engine->first = engine->last = NULL;
    engine->queued = 0;
    pthread_mutex_unlock(&engine->lock);
    for (; first; first = next) {
        next = first->next;
        hand_back_cancelled(engine, first);
    }
}

void mls_http_cancel(mls_http_engine *engine)
{
    pthread_mutex_lock(&engine->lock);
    atomic_fetch_add(&engine->epoch, 1); /* workers break off what is older */
    pthread_mutex_unlock(&engine->lock);
    mls_http_drop_queue(engine);
    mls_http_wake_all(engine);
}
