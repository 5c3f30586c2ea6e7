/* Completions of arrays (ranges, files) on their way to the caller. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "engine.h"

struct mls_done_queue {
    pthread_mutex_t lock;
    pthread_cond_t ready;
    size_t item_nbytes;
    unsigned char *done;  /* items [first, last) are waiting */
    size_t first, last, capacity;
    size_t wanted;        /* a caller waits for so many */
};

mls_done_queue *mls_done_queue_new(size_t item_nbytes)
{
    pthread_condattr_t attr;
    mls_done_queue *queue = calloc(1, sizeof *queue);
    if (!queue)
        return NULL;
    pthread_mutex_init(&queue->lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&queue->ready, &attr);
    pthread_condattr_destroy(&attr);
    queue->item_nbytes = item_nbytes;
    queue->capacity = 1024;
    queue->done = malloc(queue->capacity * item_nbytes);
    if (!queue->done) {
        mls_done_queue_free(queue);
        return NULL;
    }
    return queue;
}

void mls_done_queue_free(mls_done_queue *queue)
{
    pthread_mutex_destroy(&queue->lock);
    pthread_cond_destroy(&queue->ready);
    free(queue->done);
    free(queue);
}

void mls_done_queue_push(mls_done_queue *queue, const void *done, size_t count)
{
    const size_t nbytes = queue->item_nbytes;
    pthread_mutex_lock(&queue->lock);
    if (queue->last + count > queue->capacity && queue->first) {
        memmove(queue->done, queue->done + queue->first * nbytes, (queue->last - queue->first) * nbytes);
        queue->last -= queue->first;
        queue->first = 0;
    }
    if (queue->last + count > queue->capacity) {
        size_t capacity = 2 * (queue->last + count);
        unsigned char *larger = realloc(queue->done, capacity * nbytes);
        if (!larger)
            abort(); /* a completion can't be dropped, and its caller would wait for ever */
        queue->done = larger;
        queue->capacity = capacity;
    }
    memcpy(queue->done + queue->last * nbytes, done, count * nbytes);
    queue->last += count;
    if (queue->wanted && queue->last - queue->first >= queue->wanted)
        pthread_cond_broadcast(&queue->ready);
    pthread_mutex_unlock(&queue->lock);
}

size_t mls_done_queue_pop(mls_done_queue *queue, void *out, size_t max, size_t min, int64_t timeout_ns)
{
    uint64_t deadline = timeout_ns < 0 ? 0 : mls_now_ns() + (uint64_t)timeout_ns;
    struct timespec until = {(time_t)(deadline / 1000000000u), (long)(deadline % 1000000000u)};
    min = min < max ? min : max;
    pthread_mutex_lock(&queue->lock);
    while (queue->last - queue->first < min) {
        queue->wanted = min;
        if (!deadline)
            pthread_cond_wait(&queue->ready, &queue->lock);
        else if (pthread_cond_timedwait(&queue->ready, &queue->lock, &until) == ETIMEDOUT)
            break;
    }
    queue->wanted = 0;
    size_t count = queue->last - queue->first < max ? queue->last - queue->first : max;
    memcpy(out, queue->done + queue->first * queue->item_nbytes, count * queue->item_nbytes);
    queue->first += count;
    if (queue->first == queue->last)
        queue->first = queue->last = 0;
    pthread_mutex_unlock(&queue->lock);
    return count;
}
