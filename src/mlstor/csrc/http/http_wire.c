/* Requests over connections without TLS or proxy: libcurl makes them (names, several addresses, timeouts), and here they
 * are sent on and received from, a body straight to its place. libcurl's own way with a transfer costs more CPU than all
 * system calls for 64 KiB; what is not plain HTTP/1.1 stays with it.
 */
#include "http_inner.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#define MOST_IDLE 4096u
#define MOST_IDLE_NS UINT64_C(118000000000) /* CURLOPT_MAXAGE_CONN's default: beyond it something between may have forgotten */
#define HEAD_BYTES 2048u /* received first, so that little of a body must be copied to its place */
#define MOST_RECEIVES 16 /* before others have their turn */

bool mls_http_wire_fits(const mls_http_slot *slot)
{
    const mls_http_engine *engine = slot->worker->engine;
    return !slot->for_calls && slot->endpoint->plain && !engine->full_urls && !engine->config.libcurl_only &&
           slot->base.n > 7 && strncasecmp(slot->base.at, "http://", 7) == 0;
}

/* ---- idle wires ---- */

static mls_http_host *host_of(mls_http_slot *slot)
{
    mls_http_worker *worker = slot->worker;
    mls_http_host *host = worker->hosts;
    for (; host; host = host->next)
        if (host->nbase == slot->base.n && memcmp(host->base, slot->base.at, host->nbase) == 0)
            return host;
    host = malloc(sizeof *host + slot->base.n);
    if (!host)
        return NULL;
    *host = (mls_http_host){.next = worker->hosts, .worker = worker, .nbase = slot->base.n};
    memcpy(host->base, slot->base.at, slot->base.n);
    worker->hosts = host;
    return host;
}

static void leave_idle(mls_http_worker *worker, mls_http_wire *wire)
{
    if (wire->before)
        wire->before->next = wire->next;
    else
        wire->host->idle = wire->next;
    if (wire->next)
        wire->next->before = wire->before;
    wire->next = wire->before = NULL;
    worker->nidle--;
}

static void rest(mls_http_worker *worker, mls_http_wire *wire)
{
    wire->idle_ns = worker->now_ns;
    wire->before = NULL;
    wire->next = wire->host->idle;
    if (wire->next)
        wire->next->before = wire;
    wire->host->idle = wire;
    worker->nidle++;
}

static void wire_free(mls_http_worker *worker, mls_http_wire *wire)
{
    mls_http_socket *socket = mls_http_socket_of(worker, wire->fd); /* there is one: it was made with the wire */
    if (!wire->slot)
        leave_idle(worker, wire);
    else
        wire->slot->wire = NULL;
    epoll_ctl(worker->epoll, EPOLL_CTL_DEL, wire->fd, NULL); /* a child may hold it too */
    *socket = (mls_http_socket){0};
    close(wire->fd);
    if (wire->request.at)
        explicit_bzero(wire->request.at, wire->request.n); /* a signature, or a token */
    free(wire->request.at);
    mls_frame_free(&wire->frame);
    free(wire);
}

void mls_http_wire_close(mls_http_wire *wire) { wire_free(wire->host->worker, wire); }

void mls_http_wires_free(mls_http_worker *worker)
{
    for (unsigned i = 0; worker->slots && i < worker->nslots; i++)
        if (worker->slots[i].wire)
            wire_free(worker, worker->slots[i].wire);
    for (mls_http_host *host = worker->hosts, *next; host; host = next) {
        next = host->next;
        while (host->idle)
            wire_free(worker, host->idle);
        free(host);
    }
}

static bool watch(mls_http_wire *wire, mls_http_worker *worker, int how)
{
    struct epoll_event event = {.events = EPOLLIN | (wire->wants_out ? EPOLLOUT : 0u), .data.fd = wire->fd};
    return epoll_ctl(worker->epoll, how, wire->fd, &event) == 0;
}

/* ---- ends ---- */

/* The transfer is over, with the verdict that it has; the wire is kept if it may be. */
static void end(mls_http_wire *wire)
{
    mls_http_slot *slot = wire->slot;
    mls_http_worker *worker = slot->worker;
    const bool sent = wire->sent == wire->request.n + wire->body_nbytes;
    slot->state = MLS_SLOT_FREE; /* until it goes on */
    if (sent && wire->frame.keep && mls_frame_is_done(&wire->frame) && worker->nidle < MOST_IDLE) {
        slot->wire = NULL;
        wire->slot = NULL;
        wire->body = NULL;
        wire->used = true;
        rest(worker, wire);
    } else {
        wire_free(worker, wire);
    }
    mls_http_settle(slot, CURLE_OK);
}

static void fail(mls_http_wire *wire, int kind, int error, const char *why)
{
    wire->frame.keep = false;
    if (wire->slot->verdict == MLS_KIND_OK)
        mls_http_verdict(wire->slot, kind, error, why);
    end(wire);
}

/* The server had closed a connection that rested: no attempt of ours, and once more by a new one. */
static void start_afresh(mls_http_wire *wire)
{
    mls_http_slot *slot = wire->slot;
    wire_free(slot->worker, wire);
    mls_http_slot_connect(slot);
}

static void broken(mls_http_wire *wire, int error)
{
    char text[96] = "the server closed the connection";
    if (wire->used && mls_frame_is_fresh(&wire->frame))
        start_afresh(wire);
    else
        fail(wire, MLS_KIND_RESET, -ECONNRESET, error ? strerror_r(error, text, sizeof text) : text);
}

/* ---- sending ---- */

static bool add_text(mls_bytes *bytes, const char *text) { return mls_bytes_add(bytes, text, strlen(text)); }

/* The lines were made for libcurl, to which "Name:" means none, and "Name;" one without a value. */
static bool add_line(mls_bytes *bytes, const char *line)
{
    const size_t n = strlen(line);
    if (line[n - 1] == ':')
        return true;
    if (line[n - 1] == ';' && !memchr(line, ':', n))
        return mls_bytes_add(bytes, line, n - 1) && mls_bytes_add(bytes, ":\r\n", 3);
    return mls_bytes_add(bytes, line, n) && mls_bytes_add(bytes, "\r\n", 2);
}

static bool write_request(mls_http_wire *wire, const mls_http_slot *slot)
{
    mls_bytes *out = &wire->request;
    char length[64];
    out->n = 0;
    const size_t nhost = slot->base.n - 8; /* "http://" before it and a slash after */
    bool fine = add_text(out, mls_http_method_of(slot)) && add_text(out, " ") &&
                mls_bytes_add(out, slot->target.at, slot->target.n) && add_text(out, " HTTP/1.1\r\nHost: ") &&
                mls_bytes_add(out, slot->base.at + 7, nhost) && add_text(out, "\r\nUser-Agent: mlstor\r\nAccept: */*\r\n");
    for (size_t i = 0; i < slot->nlines && fine; i++)
        fine = add_line(out, slot->lines[i].data);
    wire->body = NULL;
    wire->body_nbytes = wire->sent = 0;
    if (slot->asked_shape == MLS_SHAPE_BODY) {
        wire->body = slot->body;
        wire->body_nbytes = slot->sent_nbytes;
        snprintf(length, sizeof length, "Content-Length: %llu\r\n", (unsigned long long)wire->body_nbytes);
        fine = fine && add_text(out, length);
    }
    return fine && add_text(out, "\r\n");
}

/* 0: all is on its way, or as much as fits; else -errno. */
static int push(mls_http_wire *wire)
{
    mls_http_worker *worker = wire->slot->worker;
    const uint64_t all = wire->request.n + wire->body_nbytes;
    while (wire->sent < all) {
        const bool in_head = wire->sent < wire->request.n;
        const uint64_t of_body = in_head ? 0 : wire->sent - wire->request.n;
        struct iovec parts[2] = {
            {wire->request.at + wire->sent, in_head ? wire->request.n - wire->sent : 0},
            {(void *)(uintptr_t)(wire->body + of_body), wire->body_nbytes - of_body},
        };
        const struct msghdr message = {
            .msg_iov = in_head ? parts : parts + 1, .msg_iovlen = in_head && wire->body_nbytes ? 2 : 1,
        };
        const ssize_t n = sendmsg(wire->fd, &message, MSG_NOSIGNAL);
        if (n > 0)
            wire->sent += (uint64_t)n;
        else if (errno == EAGAIN)
            break;
        else if (errno != EINTR)
            return -errno;
    }
    if (wire->wants_out == (wire->sent < all))
        return 0;
    wire->wants_out = wire->sent < all;
    return watch(wire, worker, EPOLL_CTL_MOD) ? 0 : -errno;
}

static void begin(mls_http_wire *wire, mls_http_slot *slot)
{
    wire->slot = slot;
    slot->wire = wire;
    slot->state = MLS_SLOT_RUNNING;
    slot->activity_ns = slot->worker->now_ns;
    mls_frame_begin(&wire->frame, slot->asked_shape == MLS_SHAPE_HEAD);
    if (!write_request(wire, slot)) {
        fail(wire, MLS_KIND_SYSTEM, -ENOMEM, "the request can't be made");
        return;
    }
    const int error = push(wire);
    if (error)
        broken(wire, -error);
}

bool mls_http_wire_send(mls_http_slot *slot)
{
    mls_http_worker *worker = slot->worker;
    mls_http_host *host = host_of(slot);
    while (host && host->idle) {
        mls_http_wire *wire = host->idle;
        if (worker->now_ns > wire->idle_ns + MOST_IDLE_NS) {
            wire_free(worker, wire);
            continue;
        }
        leave_idle(worker, wire);
        begin(wire, slot);
        return true;
    }
    return false;
}

/* libcurl closes its descriptor when the handle is removed, and keeps nothing of the connection. */
static mls_http_wire *adopt(mls_http_slot *slot)
{
    mls_http_worker *worker = slot->worker;
    curl_socket_t theirs = CURL_SOCKET_BAD;
    curl_easy_getinfo(slot->easy, CURLINFO_ACTIVESOCKET, &theirs);
    const int fd = theirs == CURL_SOCKET_BAD ? -1 : fcntl(theirs, F_DUPFD_CLOEXEC, 0);
    curl_multi_remove_handle(worker->multi, slot->easy);
    mls_http_socket *socket = fd < 0 ? NULL : mls_http_socket_of(worker, fd);
    mls_http_wire *wire = socket ? calloc(1, sizeof *wire) : NULL;
    if (wire) {
        wire->fd = fd;
        wire->host = host_of(slot);
        if (wire->host && watch(wire, worker, EPOLL_CTL_ADD)) {
            *socket = (mls_http_socket){.wire = wire};
            return wire;
        }
    }
    free(wire);
    if (fd >= 0)
        close(fd);
    return NULL;
}

void mls_http_wire_connected(mls_http_slot *slot)
{
    mls_http_wire *wire = adopt(slot);
    slot->connecting = false;
    if (wire) {
        begin(wire, slot);
        return;
    }
    slot->state = MLS_SLOT_FREE;
    mls_http_verdict(slot, MLS_KIND_SYSTEM, -ENOMEM, "no memory or descriptor for a connection");
    mls_http_settle(slot, CURLE_OK);
}

/* ---- receiving ---- */

enum { GOES_ON, OVER }; /* OVER: the slot has been settled */

static int take(mls_http_wire *wire, const char *data, size_t n)
{
    mls_http_slot *slot = wire->slot;
    mls_frame_piece piece;
    size_t used = 0, taken = 0;
    for (;;) {
        switch (mls_frame_next(&wire->frame, data, n, &used, &piece)) {
        case MLS_FRAME_MORE:
            return GOES_ON;
        case MLS_FRAME_LINE:
            taken = mls_http_on_header((char *)(uintptr_t)piece.at, 1, piece.n, slot);
            break;
        case MLS_FRAME_BODY:
            taken = mls_http_on_body((char *)(uintptr_t)piece.at, 1, piece.n, slot);
            break;
        case MLS_FRAME_END:
            if (used < n)
                wire->frame.keep = false; /* it says more than it was asked */
            if (wire->used && !wire->frame.keep && slot->answer.status == 408)
                start_afresh(wire); /* sent before the request came: a server's word for closing what rests */
            else
                end(wire);
            return OVER;
        default:
            fail(wire, MLS_KIND_OTHER, -EIO, wire->frame.error);
            return OVER;
        }
        if (taken != piece.n) { /* refused, with a verdict */
            fail(wire, MLS_KIND_SYSTEM, -EIO, "the answer was refused");
            return OVER;
        }
    }
}

/* Where the next bytes of the body belong, and how many; NULL if they have no place, or must be looked at first. */
static uint8_t *place_of(const mls_http_slot *slot, uint64_t direct, size_t piece_bytes, size_t *room)
{
    const mls_transfer *t = &slot->job->transfer;
    if (!slot->judged || slot->sink != MLS_SINK_MEMORY)
        return NULL;
    uint64_t most = t->room - slot->received;
    if (slot->expected != MLS_WHOLE && slot->expected - slot->received < most)
        most = slot->expected - slot->received;
    most = most < direct ? most : direct;
    if (t->digest && most > piece_bytes)
        most = piece_bytes; /* it is read again, and then still in the cache */
    if (!most)
        return NULL;
    *room = (size_t)most;
    return slot->job->batch->memory + t->place + slot->received;
}

/* GOES_ON with *drained: nothing more has come. */
static int receive(mls_http_wire *wire, bool *drained)
{
    mls_http_slot *slot = wire->slot;
    mls_http_worker *worker = slot->worker;
    const bool has_place = !slot->judged && slot->job->transfer.memory == MLS_TRANSFER_BUFFER;
    size_t room = has_place && worker->scratch_room > HEAD_BYTES ? HEAD_BYTES : worker->scratch_room;
    uint8_t *place = place_of(slot, mls_frame_direct(&wire->frame), worker->scratch_room, &room);
    const ssize_t n = recv(wire->fd, place ? place : worker->scratch, room, 0);
    *drained = n < (ssize_t)room;
    if (n > 0 && !place)
        return take(wire, (char *)worker->scratch, (size_t)n);
    if (n > 0) {
        mls_frame_skip(&wire->frame, (uint64_t)n);
        if (mls_http_on_body((char *)place, 1, (size_t)n, slot) != (size_t)n)
            fail(wire, MLS_KIND_SYSTEM, -EIO, "the answer was refused");
        else if (mls_frame_is_done(&wire->frame))
            end(wire);
        else
            return GOES_ON;
        return OVER;
    }
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
        *drained = errno == EAGAIN;
        return GOES_ON;
    }
    if (n < 0)
        broken(wire, errno);
    else if (mls_frame_eof(&wire->frame))
        end(wire);
    else if (!slot->judged)
        broken(wire, 0);
    else
        fail(wire, MLS_KIND_SHORT, -ENODATA, "the connection was closed before the end of the body");
    return OVER;
}

void mls_http_wire_event(mls_http_wire *wire, uint32_t events)
{
    mls_http_slot *slot = wire->slot;
    if (!slot) { /* nothing may come while it rests: the server closes it */
        mls_http_wire_close(wire);
        return;
    }
    slot->activity_ns = slot->worker->now_ns;
    if (events & EPOLLOUT && !(events & EPOLLERR)) {
        const int error = push(wire);
        if (error && !(events & EPOLLIN)) { /* otherwise there may be an answer that says why */
            broken(wire, -error);
            return;
        }
    }
    bool drained = !(events & (EPOLLIN | EPOLLERR | EPOLLHUP));
    for (int i = 0; i < MOST_RECEIVES && !drained; i++)
        if (receive(wire, &drained) == OVER)
            return;
}
