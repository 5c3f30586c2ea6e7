#include "plan.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* A digest follows its copy in pieces that stay in the second-level cache. */
#define HOT_BYTES ((uint64_t)256 << 10)
#define PAGE_BYTES ((uint64_t)4096)
/* From here on a copy costs more than the two transfers that spare it. */
#define LARGE_BYTES ((uint64_t)256 << 10)
#define SHORT_BYTES ((uint64_t)64 << 10)

static uint64_t min_u64(uint64_t a, uint64_t b) { return a < b ? a : b; }
static uint64_t max_u64(uint64_t a, uint64_t b) { return a > b ? a : b; }

size_t mls_plan_find(const mls_op *op, uint64_t offset)
{
    size_t low = 0, high = op->nextents;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (op->extents[middle].offset + op->extents[middle].nbytes <= offset)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static bool unit_is_late(const mls_op *op, const mls_unit *unit)
{
    for (uint32_t i = 0; i < unit->nextents; i++)
        if (op->extents[unit->first_extent + i].kind == MLS_EXTENT_LATE)
            return true;
    return false;
}

/* Stable: the units without late bytes first. */
static int late_units_last(mls_op *op)
{
    mls_unit *late = malloc(op->nunits * sizeof *late);
    size_t kept = 0;
    if (!late)
        return -ENOMEM;
    for (size_t i = 0; i < op->nunits; i++) {
        if (unit_is_late(op, &op->units[i]))
            late[op->nlate++] = op->units[i];
        else
            op->units[kept++] = op->units[i];
    }
    memcpy(op->units + kept, late, op->nlate * sizeof *late);
    free(late);
    return 0;
}

/* A stretch of the file, from and to multiples of a page, that is to be cut out. */
struct stretch {
    uint64_t begin, end;
    bool late;
};

/* Where the extent can be transferred as it lies: its whole pages, if they are many. */
static bool lies_right(const mls_op *op, const mls_extent *extent, uint64_t page, uint64_t limit, struct stretch *out)
{
    uint64_t mem_align = op->file && op->file->direct ? op->file->align.mem_align : 1;
    if (extent->kind != MLS_EXTENT_MEMORY || extent->nbytes < LARGE_BYTES ||
        ((uintptr_t)extent->memory - extent->offset) % mem_align)
        return false;
    *out = (struct stretch){(extent->offset + page - 1) / page * page,
                            min_u64(extent->offset + extent->nbytes, limit) / page * page, false};
    return out->begin < out->end;
}

/* Adds to the sorted stretches. What lies between them and is short goes with the late pages beside it: it costs less to
 * copy than a transfer of its own. */
static size_t add_stretch(struct stretch *all, size_t count, struct stretch next)
{
    struct stretch *last = count ? &all[count - 1] : NULL;
    bool near = last && next.begin < last->end + SHORT_BYTES;
    if (near && last->late && next.late) {
        last->end = max_u64(last->end, next.end);
        return count;
    }
    if (near && last->late)
        last->end = next.begin;
    else if (near && next.late)
        next.begin = last->end;
    all[count] = next;
    return count + 1;
}

/* In file order; NULL for want of memory. */
static struct stretch *find_stretches(const mls_op *op, uint64_t limit, size_t *count)
{
    struct stretch *all = malloc((op->nextents + 1) * sizeof *all), next;
    const mls_alignment *align = op->file ? &op->file->align : NULL;
    uint64_t page = PAGE_BYTES;
    if (align)
        page = max_u64(page, op->kind == MLS_OP_WRITE ? align->offset_align : align->read_offset_align);
    *count = 0;
    if (!all || op->nextents < 2 || op->serial)
        return all;
    for (size_t i = 0; i < op->nextents; i++) {
        const mls_extent *extent = &op->extents[i];
        if (extent->kind == MLS_EXTENT_LATE)
            next = (struct stretch){extent->offset / page * page,
                                    (extent->offset + extent->nbytes + page - 1) / page * page, true};
        else if (!lies_right(op, extent, page, limit, &next))
            continue;
        *count = add_stretch(all, *count, next);
    }
    return all;
}

int mls_plan_units(mls_op *op, uint64_t limit)
{
    size_t nstretches, count = 0, at = 0;
    struct stretch *stretches = find_stretches(op, limit, &nstretches);
    size_t capacity = 2 * nstretches + 1;
    for (size_t i = 0; i < op->nextents; i++)
        capacity += op->extents[i].nbytes / op->block_bytes + 2;
    free(op->units);
    op->units = malloc(capacity * sizeof *op->units);
    op->nunits = op->nlate = 0;
    if (!op->units || !stretches) {
        free(stretches);
        return -ENOMEM;
    }
    /* Where nothing need be aligned, the blocks of a serial operation count from its first byte, as a loop's would. */
    uint64_t origin = op->serial && op->nextents && op->file && !op->file->direct ? op->extents[0].offset : 0;
    uint64_t room_end = 0; /* of the last unit */
    for (size_t i = 0; i < op->nextents; i++) {
        uint64_t position = op->extents[i].offset;
        uint64_t end = min_u64(position + op->extents[i].nbytes, limit);
        while (position < end) {
            if (position < room_end) { /* another extent beside those of the last unit */
                mls_unit *unit = &op->units[count - 1];
                unit->nbytes = (uint32_t)(min_u64(end, room_end) - unit->offset);
                unit->nextents = (uint32_t)(i - unit->first_extent + 1);
            } else {
                while (at < nstretches && stretches[at].end <= position)
                    at++;
                uint64_t cut = at == nstretches ? UINT64_MAX
                                                : position < stretches[at].begin ? stretches[at].begin : stretches[at].end;
                room_end = min_u64(cut, origin + ((position - origin) / op->block_bytes + 1) * op->block_bytes);
                uint64_t nbytes = min_u64(end, room_end) - position;
                op->units[count++] = (mls_unit){position, (uint32_t)nbytes, (uint32_t)i, 1};
            }
            position = min_u64(end, room_end);
        }
    }
    free(stretches);
    op->nunits = count;
    return op->has_late ? late_units_last(op) : 0;
}

void *mls_plan_zero_copy(const mls_op *op, const mls_unit *unit, uint32_t mem_align, uint32_t offset_align)
{
    const mls_extent *extent = &op->extents[unit->first_extent];
    if (unit->nextents != 1 || (extent->kind != MLS_EXTENT_MEMORY && extent->kind != MLS_EXTENT_LATE))
        return NULL;
    unsigned char *memory = extent->memory + (unit->offset - extent->offset);
    if ((uintptr_t)memory % mem_align || unit->offset % offset_align || unit->nbytes % offset_align)
        return NULL;
    return memory;
}

/* One piece of one extent goes into its group. `done` bytes of the extent precede it. */
static void digest_end(mls_op *op, const mls_extent *extent, uint64_t done, uint64_t nbytes, uint64_t crc)
{
    uint64_t after = extent->group_after + (extent->nbytes - done - nbytes);
    uint64_t shifted = mls_crc_shift(extent->digest, crc, after);
    atomic_fetch_xor_explicit(&op->groups[extent->group].crc, shifted, memory_order_relaxed);
}

static uint64_t digest_update(mls_op *op, const mls_extent *extent, uint64_t crc, const void *bytes, size_t nbytes)
{
    if (mls_digest_combines(extent->digest))
        return mls_crc(extent->digest, crc, bytes, nbytes);
    if (extent->digest == MLS_DIGEST_XXH64)
        mls_xxh64_update(&op->groups[extent->group].xxh64, bytes, nbytes);
    return 0;
}

/* Bytes [offset, offset+nbytes) of one extent -> buffer, or only -> digest. */
static void gather_piece(mls_op *op, const mls_extent *extent, uint64_t offset, uint64_t nbytes, unsigned char *buffer,
                         bool digest)
{
    uint64_t inside = offset - extent->offset;
    unsigned char scratch[MLS_PATTERN_BLOCK_BYTES];
    uint64_t crc = 0;
    digest = digest && extent->digest != MLS_DIGEST_NONE && extent->kind != MLS_EXTENT_LATE;
    if (!buffer && !digest)
        return;
    for (uint64_t done = 0; done < nbytes;) {
        uint64_t step = min_u64(nbytes - done, digest ? HOT_BYTES : nbytes);
        const unsigned char *bytes;
        if (extent->kind == MLS_EXTENT_PATTERN) {
            unsigned char *into = buffer ? buffer + done : scratch;
            step = buffer ? step : min_u64(step, sizeof scratch);
            mls_pattern_fill(&extent->pattern, into, offset + done, step);
            bytes = into;
        } else {
            bytes = extent->memory + inside + done;
            if (buffer && bytes != buffer + done)
                memcpy(buffer + done, bytes, step);
        }
        if (digest)
            crc = digest_update(op, extent, crc, bytes, step);
        done += step;
    }
    if (digest && mls_digest_combines(extent->digest))
        digest_end(op, extent, inside, nbytes, crc);
}

void mls_plan_gather(mls_op *op, uint32_t first_extent, uint64_t offset, uint64_t nbytes, unsigned char *buffer,
                     bool digest, bool late_bytes)
{
    uint64_t position = offset, end = offset + nbytes;
    for (size_t i = first_extent; i < op->nextents && op->extents[i].offset < end; i++) {
        const mls_extent *extent = &op->extents[i];
        uint64_t from = max_u64(extent->offset, offset);
        uint64_t to = min_u64(extent->offset + extent->nbytes, end);
        if (from >= to || (extent->kind == MLS_EXTENT_LATE && !late_bytes))
            continue;
        if (buffer && from > position)
            memset(buffer + (position - offset), 0, from - position);
        gather_piece(op, extent, from, to - from, buffer ? buffer + (from - offset) : NULL, digest);
        position = to;
    }
    if (buffer && position < end)
        memset(buffer + (position - offset), 0, end - position);
}

static void compare_piece(mls_op *op, const mls_extent *extent, const unsigned char *bytes, uint64_t offset, size_t nbytes)
{
    mls_damage found[MLS_MAX_DAMAGE];
    size_t nfound = 0;
    size_t damaged = mls_pattern_check(&extent->pattern, bytes, offset, nbytes, found, MLS_MAX_DAMAGE, &nfound);
    if (!damaged)
        return;
    pthread_mutex_lock(&op->lock);
    op->result.damaged_blocks += damaged;
    for (size_t i = 0; i < nfound && op->result.ndamage < MLS_MAX_DAMAGE; i++)
        op->result.damage[op->result.ndamage++] = found[i];
    pthread_mutex_unlock(&op->lock);
}

void mls_plan_scatter(mls_op *op, const mls_unit *unit, const unsigned char *buffer, uint64_t buffer_offset,
                      bool in_place)
{
    uint64_t end = unit->offset + unit->nbytes;
    for (uint32_t i = 0; i < unit->nextents; i++) {
        const mls_extent *extent = &op->extents[unit->first_extent + i];
        uint64_t from = max_u64(extent->offset, unit->offset);
        uint64_t to = min_u64(extent->offset + extent->nbytes, end);
        if (from >= to)
            continue;
        const unsigned char *bytes = buffer + (from - buffer_offset);
        uint64_t inside = from - extent->offset, nbytes = to - from;
        uint64_t crc = 0;
        for (uint64_t done = 0; done < nbytes;) {
            uint64_t step = min_u64(nbytes - done, extent->digest ? HOT_BYTES : nbytes);
            if (extent->kind == MLS_EXTENT_MEMORY && !in_place)
                memcpy(extent->memory + inside + done, bytes + done, step);
            else if (extent->kind == MLS_EXTENT_PATTERN)
                compare_piece(op, extent, bytes + done, from + done, step);
            crc = digest_update(op, extent, crc, bytes + done, step);
            done += step;
        }
        if (mls_digest_combines(extent->digest))
            digest_end(op, extent, inside, nbytes, crc);
    }
}
