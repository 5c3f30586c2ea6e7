#include "operation.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "files.h"

mls_op *mls_op_new(int kind, const char *path, mls_file *file, size_t nextents, size_t ngroups)
{
    mls_op *op = calloc(1, sizeof *op);
    if (!op)
        return NULL;
    op->kind = kind;
    op->dir_fd = -1;
    pthread_mutex_init(&op->lock, NULL);
    atomic_init(&op->refs, 1);
    op->nextents = nextents;
    op->ngroups = ngroups;
    op->extents = calloc(nextents ? nextents : 1, sizeof *op->extents);
    op->groups = calloc(ngroups ? ngroups : 1, sizeof *op->groups);
    if (file) {
        op->file = file;
        mls_file_ref(file);
    } else if (path) {
        op->file = mls_file_new(path);
    }
    if (!op->extents || !op->groups || (!op->file && kind != MLS_OP_FILES)) {
        mls_op_unref(op);
        return NULL;
    }
    return op;
}

void mls_op_ref(mls_op *op) { atomic_fetch_add_explicit(&op->refs, 1, memory_order_relaxed); }

void mls_op_unref(mls_op *op)
{
    if (atomic_fetch_sub_explicit(&op->refs, 1, memory_order_acq_rel) != 1)
        return;
    if (op->file)
        mls_file_unref(op->file);
    for (size_t i = 0; op->files && i < op->nunits; i++)
        mls_file_unref(op->files[i]);
    free(op->files);
    if (op->batch)
        mls_batch_unref(op->batch);
    pthread_mutex_destroy(&op->lock);
    free(op->extents);
    free(op->groups);
    free(op->units);
    free(op->tags);
    free(op);
}

static int by_offset(const void *a, const void *b)
{
    const mls_extent *x = a, *y = b;
    return x->offset < y->offset ? -1 : x->offset > y->offset;
}

int mls_op_seal(mls_op *op, size_t *bad)
{
    size_t kept = 0;
    for (size_t i = op->nextents; i-- > 0;) { /* backwards: what follows in the group */
        mls_extent *extent = &op->extents[i];
        if (extent->digest == MLS_DIGEST_NONE)
            continue;
        mls_group *group = &op->groups[extent->group];
        extent->group_after = group->nbytes;
        group->nbytes += extent->nbytes;
        group->digest = extent->digest;
        op->ordered = op->ordered || extent->digest == MLS_DIGEST_XXH64;
    }
    if (op->ordered) { /* a digest that does not combine sees the bytes in file order only */
        op->serial = true;
        for (size_t g = 0; g < op->ngroups; g++)
            mls_xxh64_reset(&op->groups[g].xxh64, 0);
        for (size_t i = 0; i < op->nextents; i++) {
            if (op->extents[i].digest != MLS_DIGEST_XXH64)
                continue;
            mls_group *group = &op->groups[op->extents[i].group];
            if (op->extents[i].offset < group->sealed_offset) {
                *bad = i;
                return -EINVAL;
            }
            group->sealed_offset = op->extents[i].offset;
        }
    }
    for (size_t i = 0; i < op->nextents; i++)
        if (op->extents[i].nbytes)
            op->extents[kept++] = op->extents[i];
    op->nextents = kept;
    if (op->kind == MLS_OP_RANGES)
        return 0;
    qsort(op->extents, op->nextents, sizeof *op->extents, by_offset);
    for (size_t i = 1; i < op->nextents; i++) {
        if (op->extents[i - 1].offset + op->extents[i - 1].nbytes > op->extents[i].offset) {
            *bad = i;
            return -EINVAL;
        }
    }
    return 0;
}

void mls_op_fail(mls_op *op, int error, int stage, uint64_t offset)
{
    pthread_mutex_lock(&op->lock);
    int before = atomic_load(&op->failed);
    /* blocks behind the end of a short file may be found missing before the one that holds it */
    bool nearer = before == MLS_ESHORT && error == MLS_ESHORT && offset < op->result.error_offset;
    bool too_late = op->ended || (op->published && error == MLS_ECANCELED);
    if (!too_late && (!before || nearer)) {
        op->result.error = error;
        op->result.stage = stage;
        op->result.error_offset = offset;
        atomic_store(&op->failed, error);
    }
    pthread_mutex_unlock(&op->lock);
}

bool mls_op_is_done(const mls_op *op) { return atomic_load(&op->done); }

uint64_t mls_op_digest(const mls_op *op, size_t group)
{
    const mls_group *g = &op->groups[group];
    return g->digest == MLS_DIGEST_XXH64 ? mls_xxh64_digest(&g->xxh64) : atomic_load(&g->crc);
}
