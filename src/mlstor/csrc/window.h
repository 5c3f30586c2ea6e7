/* How many bytes a worker keeps in flight where the user gave no depth: as few as the storage needs for its rate, since
 * staging memory that is used again soon is still in the caches.
 */
#ifndef MLS_WINDOW_H
#define MLS_WINDOW_H

#include <stdbool.h>
#include <stdint.h>

typedef struct mls_window {
    uint64_t bytes;          /* may be in flight now; 0: no limit */
    uint64_t narrow_bytes;   /* without a trial under way */
    uint64_t most_bytes;
    uint64_t unsettled_bytes; /* of transfers that began under another window, or before a rest */
    uint64_t begin_ns, took_bytes, took_count, took_ns; /* of the transfers that are being measured */
    double narrow_rate, narrow_sum, wide_sum;
    unsigned pairs;          /* of rates of the trial under way, narrow and wide */
    unsigned pause, patience; /* measurements until the next trial; after one more that fails */
    bool trying;
} mls_window;

/* begin_bytes 0: no limit, and none of the others does anything. */
void mls_window_init(mls_window *window, uint64_t begin_bytes, uint64_t most_bytes);
/* A transfer is done. */
void mls_window_note(mls_window *window, uint64_t nbytes, uint64_t took_ns, uint64_t now_ns);
/* Nothing was in flight for a while: what is being measured begins anew. */
void mls_window_rest(mls_window *window);

#endif
