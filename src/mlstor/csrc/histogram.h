/* Log-linear histogram of durations: 64 linear buckets per power of two, relative error below 1/64.
 *
 * The same buckets on every rank, so that adding histograms is adding arrays. Values from 2^34 ns (17.2 s) on share the
 * last bucket; sum, minimum and maximum stay exact.
 */
#ifndef MLS_HISTOGRAM_H
#define MLS_HISTOGRAM_H

#include <stdint.h>

#define MLS_HISTOGRAM_BUCKETS 1856u /* 29 groups of 64 */

/* One thread adds; any thread may read with mls_histogram_merge at any time. */
typedef struct mls_histogram {
    uint64_t count[MLS_HISTOGRAM_BUCKETS];
    uint64_t total;  /* values added */
    uint64_t sum_ns;
    uint64_t min_ns; /* UINT64_MAX while empty */
    uint64_t max_ns;
} mls_histogram;

/* Bucket of a duration. value < 64: value; else shift = msb(value) - 6, (shift << 6) + (value >> shift), at most 1855. */
uint32_t mls_histogram_index(uint64_t ns);

/* Smallest and greatest duration in ns of a bucket, both inclusive; the last one's upper bound is UINT64_MAX.
 * index < MLS_HISTOGRAM_BUCKETS.
 */
uint64_t mls_histogram_lower(uint32_t index);
uint64_t mls_histogram_upper(uint32_t index);

/* Make empty. Not while another thread adds. */
void mls_histogram_reset(mls_histogram *h);

/* Add one duration. One writer per histogram: relaxed loads and stores, no locked instruction. */
void mls_histogram_add(mls_histogram *h, uint64_t ns);

/* dst += src. src may be written meanwhile by its thread (its fields then differ by the values just being added); dst
 * belongs to the caller.
 */
void mls_histogram_merge(mls_histogram *dst, const mls_histogram *src);

#endif
