/* What the C tests of the engine share: checks, contents, temporary files, a backend that misbehaves on demand. */
#ifndef ENGINE_SUPPORT_H
#define ENGINE_SUPPORT_H

#include "engine.h"
#include "worker.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* assert that stays under NDEBUG */
#define CHECK(condition)                                                            \
    do {                                                                            \
        if (!(condition)) {                                                         \
            fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
            exit(1);                                                                \
        }                                                                           \
    } while (0)

#define KIB ((uint64_t)1 << 10)
#define MIB ((uint64_t)1 << 20)
#define DURABLE (MLS_STEP_PREALLOCATE | MLS_STEP_FDATASYNC | MLS_STEP_RENAME | MLS_STEP_FSYNC_DIR)

/* Bytes that differ at every offset and between files. */
static inline void stuff(unsigned char *bytes, uint64_t offset, uint64_t nbytes, uint32_t seed)
{
    for (uint64_t i = 0; i < nbytes; i++)
        bytes[i] = (unsigned char)(((offset + i) * 2654435761u + seed * 40503u) >> 11);
}

static inline mls_config config_of(int backend, unsigned workers, unsigned depth, uint64_t block_bytes)
{
    return (mls_config){.backend = backend, .workers = workers, .depth = depth, .block_bytes = block_bytes,
                        .huge_pages = false, .registration = true};
}

static inline mls_engine *engine_of(const mls_config *config)
{
    int error = 0;
    mls_engine *engine = mls_engine_new(config, &error);
    if (!engine)
        fprintf(stderr, "no engine: %s\n", strerror(-error));
    CHECK(engine);
    return engine;
}

static inline mls_op *op_of(int kind, const char *path, size_t nextents, size_t ngroups, int direct_mode)
{
    mls_op *op = mls_op_new(kind, path, NULL, nextents, ngroups);
    CHECK(op);
    op->direct_mode = direct_mode;
    op->steps = kind == MLS_OP_WRITE ? DURABLE : 0;
    return op;
}

static inline void extent_of(mls_op *op, size_t i, uint64_t offset, uint64_t nbytes, unsigned char *memory)
{
    op->extents[i].offset = offset;
    op->extents[i].nbytes = nbytes;
    op->extents[i].memory = memory;
    op->extents[i].kind = memory ? MLS_EXTENT_MEMORY : MLS_EXTENT_DROP;
}

static inline void seal_and_submit(mls_engine *engine, mls_op *op)
{
    size_t bad = 0;
    CHECK(mls_op_seal(op, &bad) == 0);
    CHECK(mls_engine_submit(engine, &op, 1) == 0);
}

/* Waits for everything and takes it off the engine's list. */
static inline void reap_all(mls_engine *engine)
{
    mls_op *ops[16];
    CHECK(mls_engine_drain(engine, -1));
    for (size_t count; (count = mls_engine_reap(engine, ops, 16, 0, 0)) > 0;)
        for (size_t i = 0; i < count; i++)
            mls_op_unref(ops[i]);
    CHECK(mls_engine_in_flight(engine) == 0);
}

static inline const char *path_of(const char *dir, const char *stem, unsigned number)
{
    static char path[4][512];
    static unsigned turn;
    char *out = path[turn++ % 4];
    snprintf(out, sizeof path[0], "%s/%s%u", dir, stem, number);
    return out;
}

/* The file holds `want`, no byte more. */
static inline void check_file(const char *path, const unsigned char *want, uint64_t nbytes)
{
    struct stat st;
    unsigned char *got = malloc(nbytes + 1);
    int fd = open(path, O_RDONLY);
    CHECK(got && fd >= 0 && fstat(fd, &st) == 0);
    CHECK((uint64_t)st.st_size == nbytes);
    CHECK(mls_pread_all(fd, got, nbytes, 0, 1) == (int64_t)nbytes);
    CHECK(memcmp(got, want, nbytes) == 0);
    close(fd);
    free(got);
}

#endif
