/* The loop of one worker: jobs in, sockets that are ready to libcurl, what is over out. */
#include "http_inner.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>
#include <unistd.h>

#define MOST_EVENTS 64
#define MOST_IDLE_CONNECTIONS 4096L /* as many as were needed at once stay; the servers close them in time */
#define SCRATCH_BYTES ((size_t)128 << 10) /* finds the L2 cache */
#define SWEEP_NS 1000000000u
#define GRACE_NS 5000000000u /* for the answer to a body that was sent when it was cancelled */
#define MOST_ROUNDS 4u /* between two looks at the sockets */

enum { TOKEN_EVENT = -1, TOKEN_TIMER = -2 };

/* ---- sockets ---- */

mls_http_socket *mls_http_socket_of(mls_http_worker *worker, int fd)
{
    const size_t index = (size_t)fd;
    if (index >= worker->nsockets) {
        const size_t count = (index + 1) * 2 < 64 ? 64 : (index + 1) * 2;
        mls_http_socket *larger = realloc(worker->sockets, count * sizeof *larger);
        if (!larger)
            return NULL;
        memset(larger + worker->nsockets, 0, (count - worker->nsockets) * sizeof *larger);
        worker->sockets = larger;
        worker->nsockets = count;
    }
    return &worker->sockets[index];
}

int mls_http_socket_made(void *user, curl_socket_t fd, curlsocktype purpose)
{
    mls_http_slot *slot = user;
    mls_http_worker *worker = slot->worker;
    mls_http_socket *socket = mls_http_socket_of(worker, fd);
    (void)purpose;
    if (!socket)
        return CURL_SOCKOPT_ERROR;
    *socket = (mls_http_socket){.is_connection = true};
    slot->done.flags |= MLS_COMPLETION_CONNECTED;
    mls_count(&worker->connections, 1);
    /* Until it stands, the time limit for connecting holds and not that for stalls. */
    slot->activity_ns = worker->now_ns + worker->engine->config.connect_timeout_ns;
    return CURL_SOCKOPT_OK;
}

static void forget_socket(mls_http_worker *worker, curl_socket_t fd, mls_http_socket *socket)
{
    if (socket->registered)
        epoll_ctl(worker->epoll, EPOLL_CTL_DEL, fd, NULL);
    socket->registered = socket->wanted = 0;
    socket->slot = NULL;
}

int mls_http_socket_closed(void *user, curl_socket_t fd)
{
    mls_http_worker *worker = user;
    mls_http_socket *socket = mls_http_socket_of(worker, fd);
    if (socket) {
        forget_socket(worker, fd, socket); /* a child may hold it too: epoll would tell of it for ever */
        *socket = (mls_http_socket){0};
    }
    return close(fd);
}

/* A connection that rests between two transfers stays registered: two system calls less for each transfer. Others
 * (of the resolver) are closed without our hearing of it, so that nothing may be remembered of them.
 */
static int on_socket(CURL *easy, curl_socket_t fd, int what, void *user, void *unused)
{
    mls_http_worker *worker = user;
    mls_http_socket *socket = mls_http_socket_of(worker, fd);
    (void)unused;
    if (!socket)
        return -1;
    socket->slot = NULL;
    if (what == CURL_POLL_REMOVE) {
        socket->wanted = 0;
        if (!socket->is_connection)
            forget_socket(worker, fd, socket);
        return 0;
    }
    curl_easy_getinfo(easy, CURLINFO_PRIVATE, (char **)&socket->slot);
    socket->wanted = (what & CURL_POLL_IN ? EPOLLIN : 0u) | (what & CURL_POLL_OUT ? EPOLLOUT : 0u);
    if (socket->wanted == socket->registered)
        return 0;
    struct epoll_event event = {.events = socket->wanted, .data.fd = fd};
    int error = epoll_ctl(worker->epoll, socket->registered ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, fd, &event);
    if (error && errno == ENOENT)
        error = epoll_ctl(worker->epoll, EPOLL_CTL_ADD, fd, &event);
    else if (error && errno == EEXIST)
        error = epoll_ctl(worker->epoll, EPOLL_CTL_MOD, fd, &event);
    socket->registered = error ? 0 : socket->wanted;
    return error ? -1 : 0;
}

static int on_timer(CURLM *multi, long timeout_ms, void *user)
{
    mls_http_worker *worker = user;
    (void)multi;
    worker->curl_due_ns = timeout_ms < 0    ? MLS_NEVER
                          : timeout_ms == 0 ? 0
                                            : mls_http_now_ns() + (uint64_t)timeout_ms * 1000000u;
    return 0;
}

/* ---- life ---- */

static int watch(mls_http_worker *worker, int fd, int token, uint32_t more)
{
    struct epoll_event event = {.events = EPOLLIN | more, .data.fd = token};
    return epoll_ctl(worker->epoll, EPOLL_CTL_ADD, fd, &event);
}

int mls_http_worker_open(mls_http_worker *worker)
{
    const mls_http_config *config = &worker->engine->config;
    worker->epoll = epoll_create1(EPOLL_CLOEXEC);
    worker->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    worker->timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    if (worker->epoll < 0 || worker->event < 0 || worker->timer < 0)
        return -errno;
    /* By edges: what is written to it need not be read. */
    if (watch(worker, worker->event, TOKEN_EVENT, EPOLLET) || watch(worker, worker->timer, TOKEN_TIMER, EPOLLET))
        return -errno;
    worker->multi = curl_multi_init();
    worker->nslots = config->in_flight + MLS_HTTP_CALL_SLOTS;
    worker->slots = calloc(worker->nslots, sizeof *worker->slots);
    if (!worker->multi || !worker->slots)
        return -ENOMEM;
    curl_multi_setopt(worker->multi, CURLMOPT_SOCKETFUNCTION, on_socket);
    curl_multi_setopt(worker->multi, CURLMOPT_SOCKETDATA, worker);
    curl_multi_setopt(worker->multi, CURLMOPT_TIMERFUNCTION, on_timer);
    curl_multi_setopt(worker->multi, CURLMOPT_TIMERDATA, worker);
    curl_multi_setopt(worker->multi, CURLMOPT_MAXCONNECTS, MOST_IDLE_CONNECTIONS);
    curl_multi_setopt(worker->multi, CURLMOPT_PIPELINING, (long)CURLPIPE_NOTHING);
    worker->curl_due_ns = worker->timer_ns = worker->queue_due_ns = MLS_NEVER;
    worker->random = (mls_http_now_ns() ^ (uint64_t)(uintptr_t)worker ^ (uint64_t)getpid() << 32) | 1; /* not zero */
    for (unsigned i = worker->nslots; i-- > 0;) {
        mls_http_slot *slot = &worker->slots[i];
        slot->worker = worker;
        slot->for_calls = i >= config->in_flight;
        mls_http_slot **list = slot->for_calls ? &worker->free_calls : &worker->free_data;
        slot->next = *list;
        *list = slot;
        int error = mls_http_slot_open(slot);
        if (error)
            return error;
    }
    worker->data_room = config->in_flight;
    worker->call_room = MLS_HTTP_CALL_SLOTS;
    worker->scratch_room = config->buffer_bytes ? config->buffer_bytes : SCRATCH_BYTES;
    worker->scratch = malloc(worker->scratch_room);
    return worker->scratch ? 0 : -ENOMEM;
}

void mls_http_worker_close(mls_http_worker *worker)
{
    for (unsigned i = 0; worker->slots && i < worker->nslots; i++)
        mls_http_slot_close(&worker->slots[i]);
    mls_http_wires_free(worker);
    if (worker->multi)
        curl_multi_cleanup(worker->multi); /* closes connections, and tells us of it */
    for (int i = 0; i < MLS_HTTP_DAYS; i++)
        mls_sigv4_wipe(&worker->days[i]);
    free(worker->slots);
    free(worker->sockets);
    free(worker->scratch);
    const int fds[] = {worker->epoll, worker->event, worker->timer};
    for (int i = 0; i < 3; i++)
        if (fds[i] >= 0)
            close(fds[i]);
}

/* ---- stopping, stalls, retries ---- */

void mls_http_break_off(mls_http_slot *slot, int kind, int error, const char *why)
{
    if (slot->wire)
        mls_http_wire_close(slot->wire);
    else if (slot->state == MLS_SLOT_RUNNING)
        curl_multi_remove_handle(slot->worker->multi, slot->easy);
    else if (slot->state == MLS_SLOT_RETRY)
        slot->worker->nretry--;
    slot->connecting = false;
    mls_http_verdict(slot, kind, error, why);
    mls_http_settle(slot, CURLE_OK);
}

/* Its body was sent whole: the server carries it out, whether we listen or not. */
static bool is_with_server(const mls_http_slot *slot)
{
    curl_off_t sent = 0;
    if (slot->state != MLS_SLOT_RUNNING || slot->connecting || slot->asked_shape != MLS_SHAPE_BODY || !slot->sent_nbytes)
        return false;
    if (slot->wire)
        return slot->wire->sent == slot->wire->request.n + slot->wire->body_nbytes;
    return curl_easy_getinfo(slot->easy, CURLINFO_SIZE_UPLOAD_T, &sent) == CURLE_OK &&
           (uint64_t)sent == slot->sent_nbytes;
}

/* What the server has whole is waited for a little: what became of it is known then, and an upload of which it is a
   part can be aborted without a part that is written after that. */
static void cancel_slots(mls_http_worker *worker, bool all)
{
    const uint64_t epoch = worker->epoch;
    for (unsigned i = 0; i < worker->nslots; i++) {
        mls_http_slot *slot = &worker->slots[i];
        if (slot->state == MLS_SLOT_FREE)
            continue;
        const mls_http_job *job = slot->job;
        if (!all && !(job->call ? atomic_load(&job->call->cancelled) : job->epoch < epoch))
            continue;
        if (!all && !job->call && (slot->leave_ns || is_with_server(slot)))
            slot->leave_ns = slot->leave_ns ? slot->leave_ns : worker->now_ns + GRACE_NS;
        else
            mls_http_break_off(slot, MLS_KIND_CANCELLED, -ECANCELED, "cancelled");
    }
}

/* A server may think about a request for as long as its caller is ready to wait: S3 completes an upload in minutes. */
static uint64_t patience_ns(const mls_http_config *config, const mls_http_slot *slot)
{
    const mls_http_call *call = slot->job->call;
    return call && call->spec.timeout_ns > config->stall_timeout_ns ? call->spec.timeout_ns : config->stall_timeout_ns;
}

/* Once a second: what was cancelled a while ago, and what has not moved for too long. */
static void sweep(mls_http_worker *worker)
{
    const mls_http_config *config = &worker->engine->config;
    const uint64_t pause = config->stall_timeout_ns / 4;
    for (unsigned i = 0; i < worker->nslots; i++) {
        mls_http_slot *slot = &worker->slots[i];
        if (slot->state == MLS_SLOT_RUNNING && slot->leave_ns && worker->now_ns > slot->leave_ns)
            mls_http_break_off(slot, MLS_KIND_CANCELLED, -ECANCELED, "cancelled");
        else if (slot->state == MLS_SLOT_RUNNING && worker->now_ns > slot->activity_ns + patience_ns(config, slot))
            mls_http_break_off(slot, MLS_KIND_STALLED, -ETIMEDOUT, "nothing moved for the stall timeout");
    }
    worker->sweep_ns = worker->now_ns + (pause < SWEEP_NS ? pause : SWEEP_NS);
}

static uint64_t retry_due(mls_http_worker *worker, bool begin)
{
    uint64_t due = MLS_NEVER;
    for (unsigned i = 0; worker->nretry && i < worker->nslots; i++) {
        mls_http_slot *slot = &worker->slots[i];
        if (slot->state != MLS_SLOT_RETRY)
            continue;
        if (begin && slot->retry_ns <= worker->now_ns) {
            worker->nretry--;
            mls_http_slot_attempt(slot);
        } else if (slot->retry_ns < due) {
            due = slot->retry_ns;
        }
    }
    return due;
}

/* ---- the loop ---- */

void mls_http_flush_done(mls_http_worker *worker)
{
    if (worker->ndone)
        mls_http_hand_back(worker->engine, worker->done, worker->ndone);
    worker->ndone = 0;
}

/* False: there was none, and whoever submits will wake this worker. */
static bool begin_jobs(mls_http_worker *worker)
{
    mls_http_job *job = mls_http_take(worker), *next;
    const bool any = job != NULL;
    for (; job; job = next) {
        mls_http_slot **list = job->call ? &worker->free_calls : &worker->free_data, *slot = *list;
        next = job->next;
        *list = slot->next;
        *(job->call ? &worker->call_room : &worker->data_room) -= 1;
        mls_http_slot_begin(slot, job);
    }
    return any;
}

static bool settle_all(mls_http_worker *worker)
{
    bool any = false;
    int left;
    for (CURLMsg *message; (message = curl_multi_info_read(worker->multi, &left));) {
        if (message->msg != CURLMSG_DONE)
            continue;
        const CURLcode code = message->data.result; /* gone once the handle is removed */
        CURL *easy = message->easy_handle;
        mls_http_slot *slot = NULL;
        curl_easy_getinfo(easy, CURLINFO_PRIVATE, (char **)&slot);
        if (slot->connecting && code == CURLE_OK) {
            mls_http_wire_connected(slot);
        } else {
            curl_multi_remove_handle(worker->multi, easy);
            slot->state = MLS_SLOT_FREE; /* until it goes on */
            slot->connecting = false;
            mls_http_settle(slot, code);
        }
        any = true;
    }
    return any;
}

/* The timer descriptor has finer steps than epoll's milliseconds. */
static void arm_timer(mls_http_worker *worker, uint64_t due_ns)
{
    if (due_ns == worker->timer_ns)
        return;
    struct itimerspec at = {0};
    if (due_ns != MLS_NEVER) {
        at.it_value.tv_sec = (time_t)(due_ns / 1000000000u);
        at.it_value.tv_nsec = (long)(due_ns % 1000000000u);
    }
    timerfd_settime(worker->timer, TFD_TIMER_ABSTIME, &at, NULL);
    worker->timer_ns = due_ns;
}

/* Milliseconds until libcurl, or the sweep, wants to be called; never early. */
static int pause_ms(const mls_http_worker *worker)
{
    const bool busy = worker->data_room + worker->call_room < worker->nslots;
    uint64_t due = worker->curl_due_ns;
    if (busy && worker->sweep_ns < due)
        due = worker->sweep_ns;
    if (due == MLS_NEVER)
        return -1;
    if (due <= worker->now_ns)
        return 0;
    const uint64_t ms = (due - worker->now_ns + 999999) / 1000000u;
    return ms < 60000 ? (int)ms : 60000;
}

static void wait_for_events(mls_http_worker *worker, bool may_sleep)
{
    struct epoll_event events[MOST_EVENTS];
    const uint64_t retry = retry_due(worker, false), queue = worker->queue_due_ns;
    int running;
    arm_timer(worker, retry < queue ? retry : queue);
    const uint64_t before = mls_http_now_ns();
    mls_count(&worker->busy_ns, before - worker->now_ns);
    worker->now_ns = before;
    const int count = epoll_wait(worker->epoll, events, MOST_EVENTS, may_sleep ? pause_ms(worker) : 0);
    worker->now_ns = mls_http_now_ns();
    mls_count(&worker->wait_ns, worker->now_ns - before);
    for (int i = 0; i < count; i++) {
        const int fd = events[i].data.fd;
        if (fd == TOKEN_TIMER)
            worker->timer_ns = MLS_NEVER;
        if (fd < 0)
            continue;
        mls_http_socket *socket = &worker->sockets[fd];
        if (socket->wire) {
            mls_http_wire_event(socket->wire, events[i].events);
            continue;
        }
        if (!socket->wanted) { /* a resting connection: libcurl finds out when it wants to use it again */
            forget_socket(worker, fd, socket);
            continue;
        }
        if (socket->slot)
            socket->slot->activity_ns = worker->now_ns;
        const int mask = (events[i].events & EPOLLIN ? CURL_CSELECT_IN : 0) |
                         (events[i].events & EPOLLOUT ? CURL_CSELECT_OUT : 0) |
                         (events[i].events & (EPOLLERR | EPOLLHUP) ? CURL_CSELECT_IN | CURL_CSELECT_ERR : 0);
        curl_multi_socket_action(worker->multi, fd, mask, &running);
    }
}

void *mls_http_worker_main(void *arg)
{
    mls_http_worker *worker = arg;
    mls_http_engine *engine = worker->engine;
    unsigned rounds = 0;
    int running;
    worker->now_ns = mls_http_now_ns();
    while (!atomic_load(&engine->stopping)) {
        const uint64_t epoch = atomic_load(&engine->epoch), call_epoch = atomic_load(&engine->call_epoch);
        if (epoch != worker->epoch || call_epoch != worker->call_epoch) {
            worker->epoch = epoch;
            worker->call_epoch = call_epoch;
            cancel_slots(worker, false);
        }
        retry_due(worker, true);
        if (worker->now_ns >= worker->sweep_ns)
            sweep(worker); /* before jobs are taken: it makes room */
        const bool begun = begin_jobs(worker);
        if (worker->curl_due_ns <= worker->now_ns) {
            worker->curl_due_ns = MLS_NEVER;
            curl_multi_socket_action(worker->multi, CURL_SOCKET_TIMEOUT, 0, &running);
        }
        /* There is room now, or more to do at once; but answers that come at once must not keep the others from theirs. */
        const bool more = settle_all(worker) || begun || worker->curl_due_ns <= worker->now_ns;
        if (more && ++rounds < MOST_ROUNDS)
            continue;
        rounds = 0;
        mls_http_flush_done(worker);
        wait_for_events(worker, !more);
    }
    cancel_slots(worker, true);
    mls_http_flush_done(worker);
    return NULL;
}
