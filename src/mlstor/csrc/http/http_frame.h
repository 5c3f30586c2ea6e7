/* Where an HTTP/1.1 answer's lines and its body begin and end (RFC 9112), piece by piece as they come. Strict: what can be
 * read in two ways is an error. No libcurl, no sockets: a fuzzer may link it alone.
 */
#ifndef MLS_HTTP_FRAME_H
#define MLS_HTTP_FRAME_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MLS_FRAME_MOST_HEAD (64u << 10) /* status line and headers, or trailers; also one line */

enum mls_frame_state {
    MLS_FRAME_STATUS, MLS_FRAME_HEADERS, MLS_FRAME_LENGTH, MLS_FRAME_CHUNK_SIZE, MLS_FRAME_CHUNK, MLS_FRAME_CHUNK_END,
    MLS_FRAME_TRAILERS, MLS_FRAME_UNTIL_CLOSE, MLS_FRAME_DONE, MLS_FRAME_BAD,
};

enum mls_frame_event {
    MLS_FRAME_MORE, /* all was taken, and it goes on */
    MLS_FRAME_LINE, /* a line of the head, with its line end; the last one is empty */
    MLS_FRAME_BODY, /* bytes of the body, in place */
    MLS_FRAME_END,  /* the answer is complete; what is left of the data is not its own */
    MLS_FRAME_ERROR,
};

typedef struct mls_http_frame {
    int state;
    bool is_head;      /* of a HEAD: no body, whatever the headers say */
    bool keep;         /* the connection may be used again */
    bool sized, chunked;
    bool line_taken;   /* the kept line was given out and is to be forgotten */
    unsigned status;
    uint64_t left;     /* of the body or the chunk */
    uint64_t length;   /* Content-Length, if sized */
    size_t nhead;      /* bytes of lines so far */
    char *line;        /* what came of a line that is not complete */
    size_t nline, line_room;
    const char *error; /* what was wrong, or NULL */
} mls_http_frame;

typedef struct mls_frame_piece {
    const char *at;
    size_t n;
} mls_frame_piece;

/* Keeps the memory of an earlier answer; the struct is all zeros at first. */
void mls_frame_begin(mls_http_frame *frame, bool is_head);
void mls_frame_free(mls_http_frame *frame);

/* The next thing in data[*used, n); moves *used on. A LINE's bytes hold until the next call. */
int mls_frame_next(mls_http_frame *frame, const char *data, size_t n, size_t *used, mls_frame_piece *piece);

/* How many bytes of the body must come next: they may be received elsewhere, and are then told to mls_frame_skip.
 * UINT64_MAX: any number, until the end of the connection.
 */
uint64_t mls_frame_direct(const mls_http_frame *frame);
void mls_frame_skip(mls_http_frame *frame, uint64_t n);

/* The connection has ended. True if that is the answer's regular end. */
bool mls_frame_eof(mls_http_frame *frame);

static inline bool mls_frame_is_done(const mls_http_frame *frame) { return frame->state == MLS_FRAME_DONE; }
/* Nothing of the answer has come. */
static inline bool mls_frame_is_fresh(const mls_http_frame *frame)
{
    return frame->state == MLS_FRAME_STATUS && !frame->nhead && !frame->nline;
}

#endif
