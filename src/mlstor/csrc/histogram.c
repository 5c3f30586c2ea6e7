#include "histogram.h"

#include <string.h>

#define LINEAR_BITS 6 /* 64 buckets per power of two */
#define LAST_BUCKET (MLS_HISTOGRAM_BUCKETS - 1)

static uint64_t load(const uint64_t *p)
{
    return __atomic_load_n(p, __ATOMIC_RELAXED);
}

static void store(uint64_t *p, uint64_t value)
{
    __atomic_store_n(p, value, __ATOMIC_RELAXED);
}

uint32_t mls_histogram_index(uint64_t ns)
{
    if (ns < 1u << LINEAR_BITS)
        return (uint32_t)ns;
    const uint32_t shift = 63u - (uint32_t)__builtin_clzll(ns) - LINEAR_BITS;
    const uint32_t index = (shift << LINEAR_BITS) + (uint32_t)(ns >> shift);
    return index < LAST_BUCKET ? index : LAST_BUCKET;
}

uint64_t mls_histogram_lower(uint32_t index)
{
    const uint32_t group = index >> LINEAR_BITS;
    if (group == 0)
        return index;
    return (uint64_t)((index & 63u) | 64u) << (group - 1);
}

uint64_t mls_histogram_upper(uint32_t index)
{
    return index < LAST_BUCKET ? mls_histogram_lower(index + 1) - 1 : UINT64_MAX;
}

void mls_histogram_reset(mls_histogram *h)
{
    memset(h, 0, sizeof *h);
    h->min_ns = UINT64_MAX;
}

void mls_histogram_add(mls_histogram *h, uint64_t ns)
{
    uint64_t *count = &h->count[mls_histogram_index(ns)];
    store(count, load(count) + 1);
    store(&h->total, load(&h->total) + 1);
    store(&h->sum_ns, load(&h->sum_ns) + ns);
    if (ns < load(&h->min_ns))
        store(&h->min_ns, ns);
    if (ns > load(&h->max_ns))
        store(&h->max_ns, ns);
}

void mls_histogram_merge(mls_histogram *dst, const mls_histogram *src)
{
    for (uint32_t i = 0; i < MLS_HISTOGRAM_BUCKETS; i++)
        dst->count[i] += load(&src->count[i]);
    dst->total += load(&src->total);
    dst->sum_ns += load(&src->sum_ns);
    const uint64_t min_ns = load(&src->min_ns), max_ns = load(&src->max_ns);
    if (min_ns < dst->min_ns)
        dst->min_ns = min_ns;
    if (max_ns > dst->max_ns)
        dst->max_ns = max_ns;
}
