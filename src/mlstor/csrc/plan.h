/* Extents -> units, and the movement of bytes between a unit's transfer buffer and what its extents name. */
#ifndef MLS_PLAN_H
#define MLS_PLAN_H

#include "operation.h"

/* Cuts the sealed extents of `op` into op->units, at multiples of its block size: from the file's begin, or where `op` is
 * serial and not direct, from its own first byte. Of several extents a large one that can be transferred as it lies gets
 * units of its own, and late bytes make no more of their block late than the pages that they lie in. Bytes from `limit` on
 * (the tail of a direct write, else UINT64_MAX) are left out. Units that hold late bytes come last. 0 or -ENOMEM. */
int mls_plan_units(mls_op *op, uint64_t limit);

/* The memory from which, or into which, all of `unit` can be transferred as it is, or NULL. `mem_align` and
 * `offset_align` are 1 where the file is not direct. */
void *mls_plan_zero_copy(const mls_op *op, const mls_unit *unit, uint32_t mem_align, uint32_t offset_align);

/* Puts bytes [offset, offset+nbytes) of the file together in `buffer`; gaps become zeros. With `digest` the groups take
 * in what is not late; with `late_bytes` the late extents' bytes are copied too. `buffer` NULL: digests only. */
void mls_plan_gather(mls_op *op, uint32_t first_extent, uint64_t offset, uint64_t nbytes, unsigned char *buffer,
                     bool digest, bool late_bytes);

/* Hands `buffer`, which holds bytes of the file from `buffer_offset` on, to the extents of `unit`: copied unless it was
 * read in place, compared with the pattern, taken into digests. */
void mls_plan_scatter(mls_op *op, const mls_unit *unit, const unsigned char *buffer, uint64_t buffer_offset,
                      bool in_place);

/* The first extent that ends after `offset`, or nextents. */
size_t mls_plan_find(const mls_op *op, uint64_t offset);

#endif
