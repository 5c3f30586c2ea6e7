/* What no storage does on demand: transfers cut short, EINTR, EAGAIN, a full queue, EINVAL at the first aligned I/O, EIO in
 * the middle. A backend of the tests' own does it, over real files. Exits 0 when all holds. `test_engine_faults DIR`
 * works in DIR, which must not be a tmpfs for the direct cases.
 */
#include "engine_support.h"

static const char *dir;

/* ---- the backend ---- */

enum fault { CUT = 1, INTERRUPT = 2, AGAIN = 4, FULL = 8, REFUSE_DIRECT = 16, FAIL = 32, SYNC_FAILS = 64, ODD = 128, SLOW = 256, DISTANT = 512 };

static _Atomic int faults;
static _Atomic unsigned cut, interrupted, again, full, refused, most_in_flight;

#define MOST 64

typedef struct state {
    mls_io *done[MOST];
    size_t ndone;
    unsigned calls;
} state;

static int fake_setup(void **out, unsigned depth, unsigned char *pool, size_t pool_nbytes, bool registration,
                      char *granted, size_t granted_size)
{
    (void)depth, (void)pool, (void)pool_nbytes, (void)registration;
    *out = calloc(1, sizeof(state));
    snprintf(granted, granted_size, "fake");
    return *out ? 0 : -ENOMEM;
}

static int64_t serve(const mls_io *io, unsigned call)
{
    int wanted = atomic_load(&faults);
    bool transfer = io->kind == MLS_IO_READ || io->kind == MLS_IO_WRITE;
    if (!transfer)
        return wanted & INTERRUPT && call % 2 ? -EINTR : wanted & SYNC_FAILS ? -EIO : fdatasync(io->fd) < 0 ? -errno : 0;
    if (wanted & REFUSE_DIRECT && fcntl(io->fd, F_GETFL) & O_DIRECT) {
        atomic_fetch_add(&refused, 1);
        return -EINVAL;
    }
    if (wanted & FAIL && io->offset >= 128 * KIB)
        return -EIO;
    if (wanted & INTERRUPT && call % 5 == 1) {
        atomic_fetch_add(&interrupted, 1);
        return -EINTR;
    }
    if (wanted & AGAIN && call % 7 == 2) {
        atomic_fetch_add(&again, 1);
        return -EAGAIN;
    }
    int64_t moved = io->kind == MLS_IO_READ ? mls_pread_all(io->fd, io->bytes, io->nbytes, io->offset, io->align)
                                            : mls_pwrite_all(io->fd, io->bytes, io->nbytes, io->offset);
    if (wanted & CUT && moved > 1 && call % 3) { /* what lies beyond counts as not transferred */
        int64_t part = wanted & ODD ? moved / 2 + 1 : moved / 2 / io->align * io->align;
        if (part >= 2 * (int64_t)io->align && part < moved) { /* less would be the end of the file, as the engine sees it */
            atomic_fetch_add(&cut, 1);
            if (io->kind == MLS_IO_READ)
                memset(io->bytes + part, 0xee, (size_t)(moved - part));
            return part;
        }
    }
    return moved;
}

static int fake_submit(void *opaque, mls_io *io)
{
    state *s = opaque;
    s->calls++;
    if (s->ndone == MOST || (atomic_load(&faults) & FULL && s->ndone && s->calls % 2)) {
        atomic_fetch_add(&full, 1);
        return -EAGAIN;
    }
    io->result = serve(io, s->calls);
    s->done[s->ndone++] = io;
    if (s->ndone > atomic_load(&most_in_flight))
        atomic_store(&most_in_flight, (unsigned)s->ndone);
    return 0;
}

/* The last one first, one at a time: completions come in any order. */
static size_t fake_reap(void *opaque, mls_io **done, size_t max)
{
    state *s = opaque;
    if (!s->ndone || !max)
        return 0;
    bool distant = atomic_load(&faults) & DISTANT; /* all at once after a while; slow: one after the other */
    if (distant || atomic_load(&faults) & SLOW)
        nanosleep(&(struct timespec){0, 2000000}, NULL); /* longer than what the engine calls slow */
    size_t count = 0;
    do
        done[count++] = s->done[--s->ndone];
    while (distant && s->ndone && count < max);
    return count;
}

static void fake_wake(void *opaque) { (void)opaque; }

static const mls_backend fake = {
    .name = "fake", .setup = fake_setup, .submit = fake_submit, .reap = fake_reap, .wake = fake_wake, .close = free,
    .max_depth = 32,
};

static mls_engine *fake_engine(unsigned workers, int wanted)
{
    mls_config config = config_of(MLS_BACKEND_AUTO, workers, 6, 32 * KIB);
    int error = 0;
    atomic_store(&faults, wanted);
    mls_engine *engine = mls_engine_new_on(&config, &fake, &error);
    CHECK(engine && error == 0);
    CHECK(strcmp(mls_engine_backend(engine), "fake") == 0);
    return engine;
}

/* ---- tests ---- */

typedef struct late {
    mls_op *op;
    uint64_t bytes;
    unsigned calls;
} late;

static int supply(void *user)
{
    late *l = user;
    l->bytes = mls_op_digest(l->op, 0);
    l->calls++;
    for (size_t i = 0; i < l->op->nextents; i++)
        if (l->op->extents[i].kind == MLS_EXTENT_LATE)
            l->op->extents[i].memory = (unsigned char *)&l->bytes;
    return 0;
}

/* Writes a late header and a body in uneven pieces, reads it back in others; contents and digests as without faults. */
static void round_trip(mls_engine *engine, uint64_t nbytes, int direct_mode, int alg, bool with_late, int *path_taken)
{
    const uint64_t head = with_late ? 8 : 0;
    size_t pieces = nbytes / 7001 + 1;
    unsigned char *want = malloc(head + nbytes), *back = aligned_alloc(4096, (head + nbytes + 4096) / 4096 * 4096);
    CHECK(want && back);
    stuff(want, 0, head + nbytes, (uint32_t)nbytes);
    mls_op *op = op_of(MLS_OP_WRITE, path_of(dir, "fault", 0), pieces + with_late, 1, direct_mode);
    op->file_nbytes = head + nbytes;
    for (size_t i = 0; i < pieces; i++) {
        uint64_t from = i * 7001, to = from + 7001 < nbytes ? from + 7001 : nbytes;
        extent_of(op, i, head + from, to - from, want + head + from);
        op->extents[i].digest = (uint8_t)alg;
    }
    late l = {.op = op};
    if (with_late) {
        extent_of(op, pieces, 0, 8, NULL);
        op->extents[pieces].kind = MLS_EXTENT_LATE;
        op->has_late = true;
        op->late = supply;
        op->user = &l;
    }
    seal_and_submit(engine, op);
    reap_all(engine);
    uint64_t digest = alg == MLS_DIGEST_CRC32 ? mls_crc32(0, want + head, nbytes) : mls_crc32c(0, want + head, nbytes);
    if (alg == MLS_DIGEST_XXH64) {
        mls_xxh64 x;
        mls_xxh64_reset(&x, 0);
        mls_xxh64_update(&x, want + head, nbytes);
        digest = mls_xxh64_digest(&x);
    }
    CHECK(op->result.error == 0 && mls_op_digest(op, 0) == digest && l.calls == with_late);
    if (with_late)
        memcpy(want, &digest, 8);
    check_file(path_of(dir, "fault", 0), want, head + nbytes);
    *path_taken = op->result.direct;
    mls_op_unref(op);

    op = op_of(MLS_OP_READ, path_of(dir, "fault", 0), 2, 1, direct_mode);
    uint64_t middle = (head + nbytes) / 3;
    extent_of(op, 0, 0, middle, back);
    extent_of(op, 1, middle, head + nbytes - middle, back + middle);
    op->extents[0].digest = op->extents[1].digest = (uint8_t)alg;
    seal_and_submit(engine, op);
    reap_all(engine);
    CHECK(op->result.error == 0 && memcmp(back, want, head + nbytes) == 0);
    if (!with_late)
        CHECK(mls_op_digest(op, 0) == digest);
    mls_op_unref(op);
    free(want);
    free(back);
}

static void test_faults_that_are_made_good(void)
{
    static const int wanted[] = {0, CUT, CUT | ODD, INTERRUPT, AGAIN, FULL, CUT | ODD | INTERRUPT | AGAIN | FULL};
    static const int algs[] = {MLS_DIGEST_CRC32, MLS_DIGEST_CRC32C, MLS_DIGEST_XXH64};
    static const uint64_t sizes[] = {0, 1, 511, 4096, 32768, 300000, 1048577};
    for (size_t w = 0; w < sizeof wanted / sizeof *wanted; w++) {
        for (unsigned workers = 1; workers <= 3; workers += 2) {
            mls_engine *engine = fake_engine(workers, wanted[w]);
            for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
                for (size_t a = 0; a < 3; a++) {
                    int path;
                    round_trip(engine, sizes[s], MLS_MODE_OFF, algs[a], false, &path);
                    round_trip(engine, sizes[s], MLS_MODE_AUTO, algs[a], false, &path);
                    if (algs[a] != MLS_DIGEST_XXH64)
                        round_trip(engine, sizes[s], MLS_MODE_AUTO, algs[a], true, &path);
                }
            mls_counters sum;
            mls_engine_counters(engine, &sum);
            CHECK((sum.retried > 0) == ((wanted[w] & (CUT | INTERRUPT | AGAIN)) != 0));
            mls_engine_free(engine);
        }
    }
    CHECK(cut > 0 && interrupted > 0 && again > 0 && full > 0);
}

/* Refused at the first aligned transfer: once per mount, then buffered, whatever has been digested and supplied before. */
static void test_direct_refused_at_the_first_transfer(void)
{
    static const int algs[] = {MLS_DIGEST_CRC32, MLS_DIGEST_XXH64};
    for (unsigned workers = 1; workers <= 3; workers += 2) {
        for (int with_late = 0; with_late < 2; with_late++) {
            for (int a = 0; a < 2 - with_late; a++) {
                static const uint64_t sizes[] = {20000, 700000}; /* with late bytes: the first is a late unit only */
                for (size_t s = 0; s < 2; s++) {
                    mls_engine *engine = fake_engine(workers, REFUSE_DIRECT);
                    unsigned before = atomic_load(&refused);
                    int path;
                    round_trip(engine, sizes[s], MLS_MODE_AUTO, algs[a], with_late, &path);
                    round_trip(engine, sizes[s], MLS_MODE_AUTO, algs[a], with_late, &path);
                    CHECK(path == MLS_PATH_BUFFERED);
                    CHECK(atomic_load(&refused) <= before + 1); /* 0 where open has refused */
                    mls_engine_free(engine);
                }
            }
        }
    }
}

static void test_direct_required_and_refused(void)
{
    unsigned char *bytes = calloc(1, 100000);
    mls_engine *engine = fake_engine(2, REFUSE_DIRECT);
    mls_op *op = op_of(MLS_OP_WRITE, path_of(dir, "required", 0), 1, 0, MLS_MODE_REQUIRE);
    struct stat st;
    CHECK(bytes);
    op->file_nbytes = 100000;
    extent_of(op, 0, 0, 100000, bytes);
    seal_and_submit(engine, op);
    reap_all(engine);
    CHECK(op->result.error == EINVAL || op->result.error == EOPNOTSUPP);
    CHECK(op->result.reason[0] && stat(path_of(dir, "required", 0), &st) < 0);
    mls_op_unref(op);
    mls_engine_free(engine);
    free(bytes);
}

static void test_errors_that_stay(void)
{
    static const struct {
        int fault, stage;
    } cases[] = {{FAIL, MLS_STAGE_TRANSFER}, {SYNC_FAILS, MLS_STAGE_SYNC}, {FAIL | CUT | FULL, MLS_STAGE_TRANSFER}};
    unsigned char *bytes = calloc(1, MIB);
    struct stat st;
    CHECK(bytes);
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        for (int alg = MLS_DIGEST_NONE; alg <= MLS_DIGEST_XXH64; alg += MLS_DIGEST_XXH64) {
            mls_engine *engine = fake_engine(3, cases[c].fault);
            mls_op *op = op_of(MLS_OP_WRITE, path_of(dir, "fails", 0), 1, 1, MLS_MODE_AUTO);
            op->file_nbytes = MIB;
            extent_of(op, 0, 0, MIB, bytes);
            op->extents[0].digest = (uint8_t)alg;
            seal_and_submit(engine, op);
            reap_all(engine);
            CHECK(op->result.error == EIO && op->result.stage == cases[c].stage);
            CHECK(cases[c].stage != MLS_STAGE_TRANSFER || op->result.error_offset >= 128 * KIB);
            CHECK(stat(path_of(dir, "fails", 0), &st) < 0); /* nothing was renamed */
            mls_op_unref(op);

            int fd = open(path_of(dir, "whole", 0), O_RDWR | O_CREAT, 0666);
            CHECK(fd >= 0 && ftruncate(fd, (off_t)MIB) == 0 && close(fd) == 0);
            op = op_of(MLS_OP_READ, path_of(dir, "whole", 0), 1, 1, MLS_MODE_AUTO);
            extent_of(op, 0, 0, MIB, bytes);
            op->extents[0].digest = (uint8_t)alg;
            seal_and_submit(engine, op);
            reap_all(engine);
            CHECK(op->result.error == (cases[c].fault & FAIL ? EIO : 0));
            mls_op_unref(op);
            mls_engine_free(engine);
        }
    }
    free(bytes);
}

/* With an automatic depth as much is in flight as the window allows; more stays so only where it gives more. */
static void test_the_window_opens_on_distant_storage_only(void)
{
    unsigned char *bytes = calloc(1, 4 * MIB);
    CHECK(bytes);
    const struct { int fault; unsigned least, most; } cases[] = {{0, 1, 2}, {SLOW, 1, 4}, {DISTANT, 8, 8}};
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        mls_config config = config_of(MLS_BACKEND_AUTO, 1, 8, 32 * KIB);
        int error = 0;
        config.window_bytes = 64 * KIB;
        atomic_store(&faults, cases[c].fault);
        atomic_store(&most_in_flight, 0);
        mls_engine *engine = mls_engine_new_on(&config, &fake, &error);
        CHECK(engine);
        mls_op *op = op_of(MLS_OP_WRITE, path_of(dir, "window", 0), 1, 0, MLS_MODE_AUTO);
        op->file_nbytes = 4 * MIB;
        extent_of(op, 0, 0, 4 * MIB, bytes);
        seal_and_submit(engine, op);
        reap_all(engine);
        CHECK(op->result.error == 0);
        unsigned most = atomic_load(&most_in_flight);
        CHECK(most >= cases[c].least && most <= cases[c].most);
        mls_op_unref(op);
        mls_engine_free(engine);
    }
    free(bytes);
}

/* An automatic block is 1 MiB, or what the file system prefers, within the engine's slots. */
static void test_the_automatic_block(void)
{
    unsigned char *bytes = calloc(1, 8 * MIB);
    CHECK(bytes);
    mls_config config = config_of(MLS_BACKEND_AUTO, 1, 2, 4 * MIB);
    int error = 0;
    config.automatic_block = true;
    atomic_store(&faults, 0);
    mls_engine *engine = mls_engine_new_on(&config, &fake, &error);
    CHECK(engine);
    mls_op *op = op_of(MLS_OP_WRITE, path_of(dir, "block", 0), 1, 0, MLS_MODE_AUTO);
    op->file_nbytes = 8 * MIB;
    extent_of(op, 0, 0, 8 * MIB, bytes);
    seal_and_submit(engine, op);
    reap_all(engine);
    CHECK(op->result.error == 0 && op->result.align.blksize <= MIB && op->block_bytes == MIB);
    mls_op_unref(op);
    mls_engine_free(engine);
    free(bytes);
}

static void test_an_engine_of_nothing_is_refused(void)
{
    for (int lacks = 0; lacks < 3; lacks++) {
        mls_config config = config_of(MLS_BACKEND_AUTO, lacks != 0, lacks != 1, lacks != 2 ? 32 * KIB : 0);
        int error = 0;
        CHECK(!mls_engine_new(&config, &error) && error == -EINVAL);
    }
}

int main(int argc, char **argv)
{
    char template[] = "/var/tmp/mlstor-faults-XXXXXX";
    dir = argc > 1 ? argv[1] : mkdtemp(template);
    CHECK(dir);
    test_faults_that_are_made_good();
    test_direct_refused_at_the_first_transfer();
    test_direct_required_and_refused();
    test_errors_that_stay();
    test_the_window_opens_on_distant_storage_only();
    test_the_automatic_block();
    test_an_engine_of_nothing_is_refused();
    if (argc == 1) {
        char command[600];
        snprintf(command, sizeof command, "rm -rf '%s'", dir);
        CHECK(system(command) == 0);
    }
    puts("engine under faults: all tests passed");
    return 0;
}
