/* Random orders of [0, n) that need no memory: the value at any position in constant time.
 *
 * A permutation is keyed by (seed, epoch). It is an alternating Feistel network on pairs (row, column) of a grid that
 * is only just larger than n, so that nearly no value lies outside and has to be walked on (Black and Rogaway, "Ciphers
 * with Arbitrary Finite Domains", 2002: the generalised Feistel cipher, with cycle walking). Not a cipher: the round
 * function mixes well, but keeps no secret.
 */
#ifndef MLS_PERMUTE_H
#define MLS_PERMUTE_H

#include <stddef.h>
#include <stdint.h>

#define MLS_PERMUTE_MOST_ROUNDS 24
#define MLS_PERMUTE_MOST (UINT64_C(1) << 63)

/* Made by mls_permutation_init, then constant: any number of threads may use it. */
typedef struct mls_permutation {
    uint64_t n;
    uint64_t rows, columns; /* n <= rows * columns < n + rows; both below 2^32 */
    uint64_t reciprocal;    /* of columns, times 2^64 */
    unsigned rounds;
    uint64_t keys[MLS_PERMUTE_MOST_ROUNDS];
} mls_permutation;

/* n from 1 to MLS_PERMUTE_MOST, else -EINVAL. The same three numbers give the same order on every machine, for ever: a
 * saved position depends on it.
 */
int mls_permutation_init(mls_permutation *p, uint64_t n, uint64_t seed, uint64_t epoch);

/* out[i] = the value at position (start + i * step) modulo n. The positions themselves stay below 2^64. */
void mls_permute_array(const mls_permutation *p, uint64_t *out, uint64_t start, uint64_t step, size_t count);

/* The same with replacement: an independent draw from [0, n) at each position; those of positions n and beyond go on.
 * One value is likelier than another by a factor of at most 1 + n / 2^64.
 */
int mls_draw_array(uint64_t n, uint64_t seed, uint64_t epoch, uint64_t *out, uint64_t start, uint64_t step,
                   size_t count);

#endif
