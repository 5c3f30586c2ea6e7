#include "http_frame.h"

#include <stdlib.h>
#include <string.h>
#include <strings.h>

void mls_frame_begin(mls_http_frame *frame, bool is_head)
{
    *frame = (mls_http_frame){.is_head = is_head, .keep = true, .line = frame->line, .line_room = frame->line_room};
}

void mls_frame_free(mls_http_frame *frame)
{
    free(frame->line);
    *frame = (mls_http_frame){0};
}

static int fail(mls_http_frame *frame, const char *why)
{
    frame->state = MLS_FRAME_BAD;
    frame->keep = false;
    frame->error = why;
    return MLS_FRAME_ERROR;
}

/* ---- lines ---- */

static bool keep_line(mls_http_frame *frame, const char *data, size_t n)
{
    if (frame->nline + n > frame->line_room) {
        size_t room = frame->line_room ? frame->line_room : 512;
        while (room < frame->nline + n)
            room *= 2;
        char *larger = realloc(frame->line, room);
        if (!larger)
            return false;
        frame->line = larger;
        frame->line_room = room;
    }
    if (n)
        memcpy(frame->line + frame->nline, data, n);
    frame->nline += n;
    return true;
}

/* A whole line with its line end: of the data itself, unless its beginning came before. MORE, LINE or ERROR. */
static int take_line(mls_http_frame *frame, const char *data, size_t n, size_t *used, mls_frame_piece *line)
{
    if (frame->line_taken)
        frame->nline = 0;
    frame->line_taken = false;
    const char *start = data + *used, *end = n > *used ? memchr(start, '\n', n - *used) : NULL;
    const size_t some = end ? (size_t)(end + 1 - start) : n - *used;
    if (some > MLS_FRAME_MOST_HEAD - frame->nhead || frame->nline > MLS_FRAME_MOST_HEAD - frame->nhead - some)
        return fail(frame, "the answer's header is too long");
    *used += some;
    if (!end || frame->nline) {
        if (!keep_line(frame, start, some))
            return fail(frame, "no memory for a header line");
        if (!end)
            return MLS_FRAME_MORE;
        *line = (mls_frame_piece){frame->line, frame->nline};
        frame->line_taken = true;
    } else {
        *line = (mls_frame_piece){start, some};
    }
    frame->nhead += line->n;
    return MLS_FRAME_LINE;
}

/* Without its line end: LF, or CRLF. */
static size_t bare_length(const mls_frame_piece *line)
{
    return line->n >= 2 && line->at[line->n - 2] == '\r' ? line->n - 2 : line->n - 1;
}

static bool is_digit(char c) { return c >= '0' && c <= '9'; }

/* "HTTP/1.1 200 OK" */
static bool take_status(mls_http_frame *frame, const char *at, size_t n)
{
    if (n < 12 || memcmp(at, "HTTP/1.", 7) != 0 || (at[7] != '0' && at[7] != '1') || at[8] != ' ' || !is_digit(at[9]) ||
        !is_digit(at[10]) || !is_digit(at[11]) || (n > 12 && at[12] != ' ') || memchr(at, '\0', n) || memchr(at, '\r', n))
        return false;
    frame->status = (unsigned)(at[9] - '0') * 100 + (unsigned)(at[10] - '0') * 10 + (unsigned)(at[11] - '0');
    frame->keep = at[7] == '1';
    frame->sized = frame->chunked = false;
    return frame->status >= 100 && frame->status != 101; /* nobody asked for another protocol */
}

static bool is_token(const char *at, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (at[i] <= 0x20 || at[i] >= 0x7f || strchr("\"(),/:;<=>?@[\\]{}", at[i]))
            return false;
    return n != 0;
}

/* Digits only, and the same length if it is said twice. */
static bool take_length(mls_http_frame *frame, const char *at, size_t n)
{
    uint64_t value = 0;
    for (size_t i = 0; i < n; i++) {
        if (!is_digit(at[i]) || value > (INT64_MAX - 9) / 10)
            return false;
        value = 10 * value + (uint64_t)(at[i] - '0');
    }
    if (!n || (frame->sized && frame->length != value))
        return false;
    frame->sized = true;
    frame->length = value;
    return true;
}

/* Whether a list, as "close, TE", has the word. */
static bool has_word(const char *at, size_t n, const char *word)
{
    const char *end = at + n;
    const size_t nword = strlen(word);
    while (at < end) {
        const char *comma = memchr(at, ',', (size_t)(end - at)), *stop = comma ? comma : end;
        while (at < stop && (*at == ' ' || *at == '\t'))
            at++;
        const char *last = stop;
        while (last > at && (last[-1] == ' ' || last[-1] == '\t'))
            last--;
        if ((size_t)(last - at) == nword && strncasecmp(at, word, nword) == 0)
            return true;
        at = comma ? comma + 1 : end;
    }
    return false;
}

#define IS(name) (nname == sizeof name - 1 && strncasecmp(at, name, sizeof name - 1) == 0)

static const char *take_header(mls_http_frame *frame, const char *at, size_t n)
{
    const char *colon = memchr(at, ':', n), *end = at + n;
    const size_t nname = colon ? (size_t)(colon - at) : 0;
    if (!is_token(at, nname)) /* also a line that goes on with the one before, which nobody may send */
        return "a line of the answer's header is none";
    const char *value = colon + 1;
    while (value < end && (*value == ' ' || *value == '\t'))
        value++;
    while (end > value && (end[-1] == ' ' || end[-1] == '\t'))
        end--;
    const size_t nvalue = (size_t)(end - value);
    if (memchr(value, '\0', nvalue) || memchr(value, '\r', nvalue))
        return "a line of the answer's header is none";
    if (IS("Content-Length"))
        return take_length(frame, value, nvalue) ? NULL : "the answer's Content-Length is none";
    if (IS("Transfer-Encoding")) {
        if (frame->chunked || nvalue != 7 || strncasecmp(value, "chunked", 7) != 0)
            return "the answer has an encoding that was not asked for";
        frame->chunked = true;
    } else if (IS("Connection")) {
        if (has_word(value, nvalue, "close"))
            frame->keep = false;
        else if (has_word(value, nvalue, "keep-alive"))
            frame->keep = true; /* HTTP/1.0 */
    }
    return NULL;
}

/* The empty line was read: how the body ends. */
static const char *end_head(mls_http_frame *frame)
{
    const unsigned status = frame->status;
    if (status < 200) { /* its bytes still count: there is no end of them otherwise */
        frame->state = MLS_FRAME_STATUS;
        return NULL;
    }
    frame->nhead = 0;
    if (frame->chunked && frame->sized)
        return "the answer has both a length and chunks";
    frame->left = frame->sized ? frame->length : 0;
    if (frame->is_head || status == 204 || status == 304)
        frame->state = MLS_FRAME_DONE;
    else if (frame->chunked)
        frame->state = MLS_FRAME_CHUNK_SIZE;
    else if (frame->sized)
        frame->state = frame->left ? MLS_FRAME_LENGTH : MLS_FRAME_DONE;
    else
        frame->state = MLS_FRAME_UNTIL_CLOSE;
    if (frame->state == MLS_FRAME_UNTIL_CLOSE)
        frame->keep = false;
    return NULL;
}

/* Hexadecimal digits, then nothing or ";" and extensions. */
static bool take_chunk_size(mls_http_frame *frame, const char *at, size_t n)
{
    size_t i = 0;
    uint64_t value = 0;
    for (; i < n; i++) {
        const char c = at[i], lower = (char)(c | 0x20);
        const int digit = is_digit(c) ? c - '0' : lower >= 'a' && lower <= 'f' ? lower - 'a' + 10 : -1;
        if (digit < 0)
            break;
        if (value > (uint64_t)INT64_MAX >> 5)
            return false;
        value = value << 4 | (uint64_t)digit;
    }
    if (!i)
        return false;
    while (i < n && (at[i] == ' ' || at[i] == '\t'))
        i++;
    if (i < n && at[i] != ';')
        return false;
    frame->left = value;
    frame->nhead = 0;
    frame->state = value ? MLS_FRAME_CHUNK : MLS_FRAME_TRAILERS;
    return true;
}

/* A line in any state but that of a body. LINE: one for the caller; MORE: go on. */
static int on_line(mls_http_frame *frame, const mls_frame_piece *line)
{
    const size_t n = bare_length(line);
    const char *why = NULL;
    switch (frame->state) {
    case MLS_FRAME_STATUS:
        frame->state = MLS_FRAME_HEADERS;
        return take_status(frame, line->at, n) ? MLS_FRAME_LINE : fail(frame, "the answer is not HTTP/1.1");
    case MLS_FRAME_HEADERS:
        why = n ? take_header(frame, line->at, n) : end_head(frame);
        return why ? fail(frame, why) : MLS_FRAME_LINE;
    case MLS_FRAME_CHUNK_SIZE:
        return take_chunk_size(frame, line->at, n) ? MLS_FRAME_MORE : fail(frame, "the length of a chunk is none");
    case MLS_FRAME_CHUNK_END:
        frame->nhead = 0;
        frame->state = MLS_FRAME_CHUNK_SIZE;
        return n ? fail(frame, "a chunk is longer than it says") : MLS_FRAME_MORE;
    default: /* trailers, which nobody looks at */
        if (!n)
            frame->state = MLS_FRAME_DONE;
        return MLS_FRAME_MORE;
    }
}

/* ---- all ---- */

uint64_t mls_frame_direct(const mls_http_frame *frame)
{
    if (frame->state == MLS_FRAME_UNTIL_CLOSE)
        return UINT64_MAX;
    return frame->state == MLS_FRAME_LENGTH || frame->state == MLS_FRAME_CHUNK ? frame->left : 0;
}

void mls_frame_skip(mls_http_frame *frame, uint64_t n)
{
    if (frame->state == MLS_FRAME_UNTIL_CLOSE)
        return;
    frame->left -= n;
    if (!frame->left)
        frame->state = frame->state == MLS_FRAME_CHUNK ? MLS_FRAME_CHUNK_END : MLS_FRAME_DONE;
}

int mls_frame_next(mls_http_frame *frame, const char *data, size_t n, size_t *used, mls_frame_piece *piece)
{
    for (;;) {
        if (frame->state == MLS_FRAME_DONE)
            return MLS_FRAME_END;
        if (frame->state == MLS_FRAME_BAD)
            return MLS_FRAME_ERROR;
        if (*used == n)
            return MLS_FRAME_MORE;
        const uint64_t body = mls_frame_direct(frame);
        if (body) {
            *piece = (mls_frame_piece){data + *used, body < n - *used ? (size_t)body : n - *used};
            *used += piece->n;
            mls_frame_skip(frame, piece->n);
            return MLS_FRAME_BODY;
        }
        int event = take_line(frame, data, n, used, piece);
        if (event == MLS_FRAME_LINE)
            event = on_line(frame, piece);
        else if (event == MLS_FRAME_MORE)
            return event;
        if (event != MLS_FRAME_MORE)
            return event;
    }
}

bool mls_frame_eof(mls_http_frame *frame)
{
    if (frame->state == MLS_FRAME_UNTIL_CLOSE)
        frame->state = MLS_FRAME_DONE;
    frame->keep = false;
    return frame->state == MLS_FRAME_DONE;
}
