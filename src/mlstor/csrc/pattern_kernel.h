/* The loops of pattern.c for one instruction set; pattern.c includes this once per set, with these defined:
 *
 *   KERNEL(name)       the name with the set's suffix
 *   KERNEL_TARGET      function attribute that turns the set on
 *   KERNEL_LANES       64-bit lanes of its vectors (2 or 4)
 *
 * Each 64-byte line is 8 lanes of xorshift64; even lines come from generator a, odd ones from b, so that one's latency
 * hides the other's. Shifts, additions and XOR only: SSE2 and AVX2 do not multiply 64-bit lanes.
 */
#define LINE_VECTORS (8 / KERNEL_LANES)
#define KERNEL_INLINE KERNEL_TARGET static inline __attribute__((always_inline))

typedef uint64_t KERNEL(vec) __attribute__((vector_size(8 * KERNEL_LANES), may_alias));
typedef uint64_t KERNEL(loose) __attribute__((vector_size(8 * KERNEL_LANES), may_alias, aligned(1)));

KERNEL_INLINE void KERNEL(seed)(KERNEL(vec) *state, uint64_t key, const uint64_t *lane_constants)
{
    UNROLL
    for (int i = 0; i < LINE_VECTORS; i++) {
        KERNEL(vec) v = *(const KERNEL(loose) *)(lane_constants + i * KERNEL_LANES) + key;
        v ^= v >> 31;
        v += v << 18;
        v ^= v >> 27;
        v += v << 11;
        v ^= v >> 33;
        v += v << 21;
        state[i] = v | 1; /* xorshift never leaves zero */
    }
}

KERNEL_INLINE void KERNEL(next)(KERNEL(vec) *state)
{
    UNROLL
    for (int i = 0; i < LINE_VECTORS; i++) {
        KERNEL(vec) v = state[i];
        v ^= v << 13;
        v ^= v >> 7;
        v ^= v << 17;
        state[i] = v;
    }
}

KERNEL_INLINE void KERNEL(put)(uint8_t *dst, const KERNEL(vec) *line)
{
    UNROLL
    for (int i = 0; i < LINE_VECTORS; i++)
        *(KERNEL(loose) *)(dst + i * 8 * KERNEL_LANES) = line[i];
}

/* Store a pair of lines at dst + at, or add to `wrong` where they differ from the bytes at src + at. */
KERNEL_INLINE void KERNEL(pair)(const KERNEL(vec) *even, const KERNEL(vec) *odd, uint8_t *dst, const uint8_t *src,
                                size_t at, KERNEL(vec) *wrong, int comparing)
{
    if (!comparing) {
        KERNEL(put)(dst + at, even);
        KERNEL(put)(dst + at + 64, odd);
        return;
    }
    UNROLL
    for (int i = 0; i < LINE_VECTORS; i++) {
        const KERNEL(loose) *got = (const KERNEL(loose) *)(src + at + i * 8 * KERNEL_LANES);
        wrong[i] |= even[i] ^ got[0];
        wrong[i] |= odd[i] ^ got[LINE_VECTORS];
    }
}

/* The same lines of the next block: the processor's own prefetch ends with each page, and the memory has often been the
 * device's since it was used last. Measured on memory that is in no cache: a fifth less time. */
KERNEL_INLINE void KERNEL(prefetch)(const uint8_t *block, size_t at, int comparing)
{
    const uint8_t *ahead = block + at + MLS_PATTERN_BLOCK_BYTES;
    if (comparing) { /* the builtin takes constants only */
        __builtin_prefetch(ahead, 0, 3);
        __builtin_prefetch(ahead + 64, 0, 3);
    } else {
    }
}

/* Make one block at dst, or compare it with what lies at src: returns whether it differs. */
KERNEL_INLINE int KERNEL(block)(const mls_pattern *p, uint8_t *dst, const uint8_t *src, uint64_t offset,
                                int comparing)
{
    const uint64_t key = block_key(p->key, offset);
    const uint32_t npairs = p->live_bytes / 128;
    KERNEL(vec) a[LINE_VECTORS], b[LINE_VECTORS], first[LINE_VECTORS], wrong[LINE_VECTORS];
    uint64_t stamp[8] = {0};

    make_stamp(p, key, offset, stamp);
    KERNEL(seed)(a, key, LANE_CONSTANTS);
    KERNEL(seed)(b, key, LANE_CONSTANTS + 8);
    KERNEL(next)(a);
    KERNEL(next)(b);
    UNROLL
    for (int i = 0; i < LINE_VECTORS; i++) {
        const KERNEL(vec) beyond = *(const KERNEL(loose) *)(BEYOND_STAMP + i * KERNEL_LANES);
        first[i] = *(const KERNEL(loose) *)(stamp + i * KERNEL_LANES) | (a[i] & beyond);
        wrong[i] = (KERNEL(vec)){0};
    }

    if (npairs > 0)
        KERNEL(pair)(first, b, dst, src, 0, wrong, comparing);
    for (uint32_t i = 1; i < npairs; i++) {
        KERNEL(next)(a);
        KERNEL(next)(b);
        KERNEL(prefetch)(comparing ? src : dst, (size_t)i * 128, comparing);
        KERNEL(pair)(a, b, dst, src, (size_t)i * 128, wrong, comparing);
    }

    int differs = 0;
    if (comparing) {
        UNROLL
        for (int i = 1; i < LINE_VECTORS; i++)
            wrong[0] |= wrong[i];
        uint64_t any = 0;
        UNROLL
        for (int i = 0; i < KERNEL_LANES; i++)
            any |= wrong[0][i];
        differs = any != 0;
    }
    if (npairs == BLOCK_PAIRS)
        return differs;

    /* compressible: the last, partial pair of lines, then zeros */
    uint8_t last[128];
    if (npairs > 0) {
        KERNEL(next)(a);
        KERNEL(next)(b);
    }
    KERNEL(put)(last, npairs > 0 ? a : first);
    KERNEL(put)(last + 64, b);
    const size_t partial_bytes = p->live_bytes % 128;
    if (comparing)
        return differs || memcmp(src + npairs * 128, last, partial_bytes) != 0 ||
               !all_zero(src + p->live_bytes, MLS_PATTERN_BLOCK_BYTES - p->live_bytes);
    memcpy(dst + npairs * 128, last, partial_bytes);
    memset(dst + p->live_bytes, 0, MLS_PATTERN_BLOCK_BYTES - p->live_bytes);
    return 0;
}

KERNEL_TARGET static void KERNEL(fill)(const mls_pattern *p, uint8_t *dst, uint64_t offset, size_t nblocks)
{
    for (size_t i = 0; i < nblocks; i++, dst += MLS_PATTERN_BLOCK_BYTES, offset += MLS_PATTERN_BLOCK_BYTES)
        KERNEL(block)(p, dst, NULL, offset, 0);
}

/* How many whole blocks at src are right before the first that is not. */
KERNEL_TARGET static size_t KERNEL(compare)(const mls_pattern *p, const uint8_t *src, uint64_t offset, size_t nblocks)
{
    size_t i = 0;
    while (i < nblocks && !KERNEL(block)(p, NULL, src, offset, 1)) {
        i++;
        src += MLS_PATTERN_BLOCK_BYTES;
        offset += MLS_PATTERN_BLOCK_BYTES;
    }
    return i;
}

#undef LINE_VECTORS
#undef KERNEL_INLINE
#undef KERNEL
#undef KERNEL_TARGET
#undef KERNEL_LANES
