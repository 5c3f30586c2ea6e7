#include "permute.h"

#include <errno.h>
#include <stdbool.h>

/* Eight rounds leave nothing to be seen where the halves are large. On small grids each does less: of six objects the
 * orders' likelihoods differ by 30 % after 8 rounds, by 2 % after 16, by nothing that could be measured after 24.
 */
#define ROUNDS 8
#define SMALL_BELOW (1u << 16)

#define LANES 4 /* positions at a time in an array: one alone would wait for its own multiplications */

#define GOLDEN UINT64_C(0x9e3779b97f4a7c15) /* 2^64 over the golden ratio: splitmix64's increment */

/* splitmix64's output function (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014). */
static inline uint64_t mix(uint64_t z)
{
    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return z ^ z >> 31;
}

/* floor(x * most / 2^64): x scaled to [0, most) */
static inline uint64_t scale(uint64_t x, uint64_t most)
{
    return (uint64_t)((unsigned __int128)x * most >> 64);
}

/* One key of (seed, epoch): those of neighbours, or of one swapped for the other, have nothing in common. */
static uint64_t key_of(uint64_t seed, uint64_t epoch)
{
    return mix(mix(seed + GOLDEN) + epoch * GOLDEN + GOLDEN);
}

static uint64_t root_above(uint64_t n)
{
    uint64_t root = 0;
    for (uint64_t bit = UINT64_C(1) << 31; bit > 0; bit >>= 1) {
        if ((root + bit) * (root + bit) <= n)
            root += bit;
    }
    return root * root < n ? root + 1 : root;
}

int mls_permutation_init(mls_permutation *p, uint64_t n, uint64_t seed, uint64_t epoch)
{
    if (n < 1 || n > MLS_PERMUTE_MOST)
        return -EINVAL;
    const uint64_t rows = root_above(n);
    const uint64_t columns = (n + rows - 1) / rows;
    *p = (mls_permutation){
        .n = n,
        .rows = rows,
        .columns = columns,
        .reciprocal = UINT64_MAX / columns,
        .rounds = n < SMALL_BELOW ? MLS_PERMUTE_MOST_ROUNDS : ROUNDS,
    };
    uint64_t key = key_of(seed, epoch);
    for (unsigned i = 0; i < p->rounds; i++)
        p->keys[i] = mix(key += GOLDEN);
    return 0;
}

/* What a round adds to one half: a number below most that depends on the other half and the round's key. Only the upper
 * half of x counts for much in scale, and there the second multiplication leaves what is best mixed.
 */
static inline uint64_t amount(uint64_t half, uint64_t key, uint64_t most)
{
    uint64_t x = (half ^ key) * UINT64_C(0xd6e8feb86659fd93);
    x = (x ^ x >> 32) * UINT64_C(0xbf58476d1ce4e5b9);
    return scale(x, most);
}

static inline uint64_t add(uint64_t half, uint64_t more, uint64_t most)
{
    const uint64_t sum = half + more;
    return sum >= most ? sum - most : sum;
}

/* Each of the values, all within the grid, once through the network. */
static inline void pass(const mls_permutation *p, uint64_t *values, int lanes)
{
    const uint64_t rows = p->rows, columns = p->columns;
    uint64_t row[LANES], column[LANES];

    for (int i = 0; i < lanes; i++) {
        row[i] = scale(values[i], p->reciprocal); /* value / columns, or one less */
        column[i] = values[i] - row[i] * columns;
        const bool less = column[i] >= columns;
        row[i] += less;
        column[i] -= less ? columns : 0;
    }
    for (unsigned r = 0; r < p->rounds; r += 2) {
        for (int i = 0; i < lanes; i++)
            row[i] = add(row[i], amount(column[i], p->keys[r], rows), rows);
        for (int i = 0; i < lanes; i++)
            column[i] = add(column[i], amount(row[i], p->keys[r + 1], columns), columns);
    }
    for (int i = 0; i < lanes; i++)
        values[i] = row[i] * columns + column[i];
}

/* The value at a position, or what follows a value outside [0, n): its cycle comes back to [0, n). */
static uint64_t walk(const mls_permutation *p, uint64_t value)
{
    do {
        pass(p, &value, 1);
    } while (value >= p->n);
    return value;
}

void mls_permute_array(const mls_permutation *p, uint64_t *out, uint64_t start, uint64_t step, size_t count)
{
    uint64_t position = start;
    size_t i = 0;

    for (; i + LANES <= count; i += LANES) {
        for (int lane = 0; lane < LANES; lane++, position += step)
            out[i + (size_t)lane] = position < p->n ? position : position % p->n;
        pass(p, out + i, LANES);
        for (int lane = 0; lane < LANES; lane++) {
            if (out[i + (size_t)lane] >= p->n)
                out[i + (size_t)lane] = walk(p, out[i + (size_t)lane]);
        }
    }
    for (; i < count; i++, position += step)
        out[i] = walk(p, position % p->n);
}

int mls_draw_array(uint64_t n, uint64_t seed, uint64_t epoch, uint64_t *out, uint64_t start, uint64_t step,
                   size_t count)
{
    if (n < 1 || n > MLS_PERMUTE_MOST)
        return -EINVAL;
    /* Unlike the permutation's keys: a draw of the same seed and epoch is to tell nothing about that. */
    const uint64_t key = mix(key_of(seed, epoch) ^ UINT64_C(0x6472617773206f66));
    uint64_t position = start;
    for (size_t i = 0; i < count; i++, position += step)
        out[i] = scale(mix(mix(position * GOLDEN + key) + key), n);
    return 0;
}
