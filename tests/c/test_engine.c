/* The engine without Python: many files, several workers, both backends, both direct modes, and what happens meanwhile
 * (pause, cancel, figures read while running). Exits 0 when all holds. `test_engine DIR` works in DIR.
 */
#include "engine_support.h"

#include <pthread.h>
#include <sys/resource.h>

static const char *dir;

enum { FILES = 24, LARGE = 6 };

/* ---- many files, whole and back ---- */

static uint64_t size_of(unsigned i)
{
    static const uint64_t sizes[] = {0, 1, 511, 512, 4095, 4096, 4097, 65536, 65537, 300001, 1048576, 1048575};
    return sizes[i % (sizeof sizes / sizeof *sizes)];
}

static void test_files_come_back_byte_for_byte(const mls_config *config, int direct_mode)
{
    mls_engine *engine = engine_of(config);
    mls_op *ops[FILES];
    unsigned char *bytes[FILES], *back[FILES];
    for (unsigned i = 0; i < FILES; i++) {
        uint64_t nbytes = size_of(i);
        /* odd files are not aligned, so that they are staged */
        bytes[i] = aligned_alloc(4096, (nbytes + 8192) / 4096 * 4096);
        back[i] = aligned_alloc(4096, (nbytes + 8192) / 4096 * 4096);
        CHECK(bytes[i] && back[i]);
        bytes[i] += i % 2;
        stuff(bytes[i], 0, nbytes, i);
        ops[i] = op_of(MLS_OP_WRITE, path_of(dir, "whole", i), 1, 0, direct_mode);
        ops[i]->file_nbytes = nbytes;
        extent_of(ops[i], 0, 0, nbytes, bytes[i]);
        seal_and_submit(engine, ops[i]);
    }
    reap_all(engine);
    for (unsigned i = 0; i < FILES; i++) {
        CHECK(mls_op_is_done(ops[i]) && ops[i]->result.error == 0 && ops[i]->result.nbytes == size_of(i));
        CHECK(ops[i]->result.zero_copy_bytes + ops[i]->result.staged_bytes == size_of(i));
        check_file(path_of(dir, "whole", i), bytes[i], size_of(i));
        mls_op_unref(ops[i]);
        ops[i] = op_of(MLS_OP_READ, path_of(dir, "whole", i), 1, 0, direct_mode);
        extent_of(ops[i], 0, 0, size_of(i), back[i]);
        seal_and_submit(engine, ops[i]);
    }
    reap_all(engine);
    mls_counters sum;
    mls_engine_counters(engine, &sum);
    CHECK(sum.reads > 0 && sum.writes > 0 && sum.syncs >= FILES);
    for (unsigned i = 0; i < FILES; i++) {
        CHECK(ops[i]->result.error == 0 && memcmp(back[i], bytes[i], size_of(i)) == 0);
        mls_op_unref(ops[i]);
        free(bytes[i] - i % 2);
        free(back[i]);
    }
    mls_engine_free(engine);
}

/* ---- small extents that meet inside blocks, digests, late bytes ---- */

typedef struct late {
    mls_op *op;
    unsigned char bytes[16];
    unsigned calls;
} late;

/* The late bytes are the first group's digest, twice. */
static int supply(void *user)
{
    late *l = user;
    uint64_t digest = mls_op_digest(l->op, 0);
    memcpy(l->bytes, &digest, 8);
    memcpy(l->bytes + 8, &digest, 8);
    for (size_t i = 0; i < l->op->nextents; i++)
        if (l->op->extents[i].kind == MLS_EXTENT_LATE)
            l->op->extents[i].memory = l->bytes;
    l->calls++;
    return 0;
}

static void test_small_extents_digests_and_late_bytes(const mls_config *config, int direct_mode)
{
    enum { EXTENTS = 3000 };
    mls_engine *engine = engine_of(config);
    unsigned char *source = malloc(EXTENTS * 128), *want = calloc(1, EXTENTS * 160);
    mls_op *op = op_of(MLS_OP_WRITE, path_of(dir, "small", 0), EXTENTS + 1, 2, direct_mode);
    uint64_t at = 0, used = 0;
    uint32_t crcs[2] = {0, 0};
    CHECK(source && want);
    stuff(source, 0, EXTENTS * 128, 77);
    late l = {.op = op};
    for (unsigned i = 0; i < EXTENTS + 1; i++) {
        if (i == EXTENTS / 2) {
            extent_of(op, i, at, 16, NULL);
            op->extents[i].kind = MLS_EXTENT_LATE;
            at += 16;
            continue;
        }
        uint64_t nbytes = 1 + i * 7 % 127;
        at += i % 5 == 0 ? i % 29 : 0; /* a gap now and then */
        extent_of(op, i, at, nbytes, source + used);
        op->extents[i].group = i % 2;
        op->extents[i].digest = i % 2 ? MLS_DIGEST_CRC32C : MLS_DIGEST_CRC32;
        crcs[i % 2] = i % 2 ? mls_crc32c(crcs[1], source + used, nbytes) : mls_crc32(crcs[0], source + used, nbytes);
        memcpy(want + at, source + used, nbytes);
        at += nbytes;
        used += nbytes;
    }
    uint64_t late_at = op->extents[EXTENTS / 2].offset;
    op->file_nbytes = at + 3; /* the end is a gap */
    op->has_late = true;
    op->late = supply;
    op->user = &l;
    seal_and_submit(engine, op);
    CHECK(mls_engine_wait(engine, op, -1));
    uint64_t digest = crcs[0];
    memcpy(want + late_at, &digest, 8);
    memcpy(want + late_at + 8, &digest, 8);
    CHECK(op->result.error == 0 && l.calls == 1);
    CHECK(mls_op_digest(op, 0) == crcs[0] && mls_op_digest(op, 1) == crcs[1]);
    check_file(path_of(dir, "small", 0), want, at + 3);
    reap_all(engine);
    mls_op_unref(op);

    /* and back in other pieces, with a digest that needs file order */
    unsigned char *back = malloc(at + 3);
    size_t pieces = (at + 3) / 1000 + 1;
    CHECK(back);
    op = op_of(MLS_OP_READ, path_of(dir, "small", 0), pieces, 1, direct_mode);
    for (size_t i = 0; i < pieces; i++) {
        uint64_t from = i * 1000, to = from + 1000 < at + 3 ? from + 1000 : at + 3;
        extent_of(op, i, from, to - from, back + from);
        op->extents[i].digest = MLS_DIGEST_XXH64;
    }
    seal_and_submit(engine, op);
    reap_all(engine);
    mls_xxh64 x;
    mls_xxh64_reset(&x, 0);
    mls_xxh64_update(&x, want, at + 3);
    CHECK(op->result.error == 0 && memcmp(back, want, at + 3) == 0);
    CHECK(mls_op_digest(op, 0) == mls_xxh64_digest(&x));
    mls_op_unref(op);
    free(back);
    free(source);
    free(want);
    mls_engine_free(engine);
}

/* ---- large extents that lie right, late bytes before each ---- */

static void test_large_extents_beside_late_bytes(const mls_config *config, int direct_mode)
{
    enum { RECORDS = 5, NBYTES = (1 << 20) + 333, STRIDE = (1 << 20) + 3 * 4096 };
    mls_engine *engine = engine_of(config);
    unsigned char *memory = aligned_alloc(4096, RECORDS * STRIDE), *want = calloc(1, RECORDS * STRIDE);
    mls_op *op = op_of(MLS_OP_WRITE, path_of(dir, "records", 0), 2 * RECORDS, 1, direct_mode);
    CHECK(memory && want);
    late l = {.op = op};
    uint64_t crc = 0;
    for (unsigned i = 0; i < RECORDS; i++) {
        uint64_t begin = (uint64_t)i * STRIDE + 4096 + 64;
        extent_of(op, 2 * i, begin - 64, 16, NULL);
        op->extents[2 * i].kind = MLS_EXTENT_LATE;
        stuff(memory + begin, begin, NBYTES, i);
        memcpy(want + begin, memory + begin, NBYTES);
        extent_of(op, 2 * i + 1, begin, NBYTES, memory + begin); /* memory is as the file */
        op->extents[2 * i + 1].digest = MLS_DIGEST_CRC32_CRC32C;
        crc = mls_crc(MLS_DIGEST_CRC32_CRC32C, crc, memory + begin, NBYTES);
    }
    op->file_nbytes = RECORDS * STRIDE;
    op->has_late = true;
    op->late = supply;
    op->user = &l;
    seal_and_submit(engine, op);
    CHECK(mls_engine_wait(engine, op, -1));
    CHECK(op->result.error == 0 && l.calls == 1 && mls_op_digest(op, 0) == crc);
    for (unsigned i = 0; i < RECORDS; i++) {
        memcpy(want + (uint64_t)i * STRIDE + 4096, &crc, 8);
        memcpy(want + (uint64_t)i * STRIDE + 4096 + 8, &crc, 8);
    }
    check_file(path_of(dir, "records", 0), want, RECORDS * STRIDE);
    CHECK(op->result.zero_copy_bytes >= RECORDS * ((uint64_t)NBYTES - 2 * 4096));
    CHECK(op->result.staged_bytes <= RECORDS * 4 * (uint64_t)4096);
    for (size_t i = 0; i + 1 < op->nunits - op->nlate; i++)
        CHECK(op->units[i].offset + op->units[i].nbytes <= op->units[i + 1].offset);
    reap_all(engine);
    mls_op_unref(op);
    mls_engine_free(engine);
    free(memory);
    free(want);
}

/* ---- patterns, pause and resume, figures, all while it runs ---- */

typedef struct meddler {
    mls_engine *engine;
    _Atomic bool stop;
    unsigned long rounds;
} meddler;

static void *meddle(void *argument)
{
    meddler *m = argument;
    mls_counters before = {0}, now;
    mls_histogram *h = malloc(sizeof *h);
    CHECK(h);
    while (!atomic_load(&m->stop)) {
        mls_engine_pause(m->engine);
        CHECK(mls_engine_user_memory(m->engine) == 0);
        mls_engine_pause(m->engine); /* another thread forks as well */
        mls_engine_resume(m->engine);
        CHECK(mls_engine_user_memory(m->engine) == 0);
        mls_engine_resume(m->engine);
        mls_engine_counters(m->engine, &now);
        CHECK(now.written_bytes >= before.written_bytes && now.read_bytes >= before.read_bytes);
        before = now;
        for (int timing = 0; timing < MLS_TIMINGS; timing++)
            mls_engine_histogram(m->engine, timing, h);
        m->rounds++;
        usleep(500);
    }
    free(h);
    return NULL;
}

static void test_patterns_survive_pauses_and_lookers_on(const mls_config *config, int direct_mode)
{
    mls_engine *engine = engine_of(config);
    mls_op *ops[LARGE];
    meddler m = {.engine = engine};
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, meddle, &m) == 0);
    for (int reading = 0; reading < 2; reading++) {
        for (unsigned i = 0; i < LARGE; i++) {
            uint64_t nbytes = 2 * MIB + i * 1001;
            ops[i] = op_of(reading ? MLS_OP_READ : MLS_OP_WRITE, path_of(dir, "pattern", i), 1, 0, direct_mode);
            ops[i]->file_nbytes = nbytes;
            extent_of(ops[i], 0, 0, nbytes, NULL);
            ops[i]->extents[0].kind = MLS_EXTENT_PATTERN;
            CHECK(mls_pattern_init(&ops[i]->extents[0].pattern, 5, 1, i, 0) == 0);
            seal_and_submit(engine, ops[i]);
        }
        reap_all(engine);
        for (unsigned i = 0; i < LARGE; i++) {
            CHECK(ops[i]->result.error == 0 && ops[i]->result.damaged_blocks == 0);
            CHECK(ops[i]->result.nbytes == 2 * MIB + i * 1001);
            mls_op_unref(ops[i]);
        }
    }
    atomic_store(&m.stop, true);
    pthread_join(thread, NULL);
    CHECK(m.rounds > 0);

    /* one byte, one block, and a file of another */
    int fd = open(path_of(dir, "pattern", 0), O_RDWR);
    static const unsigned char zeros[4096];
    CHECK(fd >= 0 && pwrite(fd, zeros, 4096, 40960) == 4096 && pwrite(fd, "\0\1", 2, 8192 + 100) == 2);
    close(fd);
    CHECK(rename(path_of(dir, "pattern", 1), path_of(dir, "pattern", 2)) == 0);
    for (unsigned i = 0; i <= 2; i += 2) {
        ops[i] = op_of(MLS_OP_READ, path_of(dir, "pattern", i), 1, 0, direct_mode);
        extent_of(ops[i], 0, 0, MIB, NULL);
        ops[i]->extents[0].kind = MLS_EXTENT_PATTERN;
        CHECK(mls_pattern_init(&ops[i]->extents[0].pattern, 5, 1, i, 0) == 0);
        seal_and_submit(engine, ops[i]);
    }
    reap_all(engine);
    CHECK(ops[0]->result.damaged_blocks == 2 && ops[2]->result.damaged_blocks == MIB / 4096);
    CHECK(ops[2]->result.ndamage == MLS_MAX_DAMAGE && ops[2]->result.damage[0].kind == MLS_DAMAGE_OTHER_FILE);
    CHECK(ops[2]->result.damage[0].found_file_id == 1);
    mls_op_unref(ops[0]);
    mls_op_unref(ops[2]);
    mls_engine_free(engine);
}

/* ---- cancel, errors, the end of an engine with work in it ---- */

static void *cancel_soon(void *argument)
{
    mls_op **op = argument;
    usleep(300);
    mls_engine_cancel((mls_engine *)op[0]->user, op[0]);
    mls_engine_cancel((mls_engine *)op[1]->user, op[1]);
    return NULL;
}

static void test_cancelled_writes_leave_nothing(const mls_config *config, int direct_mode)
{
    mls_engine *engine = engine_of(config);
    struct stat st;
    unsigned cancelled = 0;
    for (unsigned round = 0; round < 8; round++) {
        mls_op *ops[2];
        pthread_t thread;
        for (unsigned i = 0; i < 2; i++) {
            ops[i] = op_of(MLS_OP_WRITE, path_of(dir, "cancel", 2 * round + i), 1, 0, direct_mode);
            ops[i]->file_nbytes = 4 * MIB;
            extent_of(ops[i], 0, 0, 4 * MIB, NULL);
            ops[i]->extents[0].kind = MLS_EXTENT_PATTERN;
            CHECK(mls_pattern_init(&ops[i]->extents[0].pattern, 5, 1, i, 0) == 0);
            ops[i]->user = engine;
            seal_and_submit(engine, ops[i]);
        }
        CHECK(pthread_create(&thread, NULL, cancel_soon, ops) == 0);
        CHECK(mls_engine_wait(engine, ops[0], -1) && mls_engine_wait(engine, ops[1], -1));
        pthread_join(thread, NULL);
        for (unsigned i = 0; i < 2; i++) {
            int found = stat(path_of(dir, "cancel", 2 * round + i), &st);
            int error = ops[i]->result.error;
            CHECK(error == 0 || error == MLS_ECANCELED);
            CHECK(error ? true : found == 0 && st.st_size == (off_t)(4 * MIB));
            cancelled += error == MLS_ECANCELED;
            mls_op_unref(ops[i]);
        }
        reap_all(engine);
    }
    CHECK(cancelled > 0);
    mls_engine_free(engine);
}

static void test_an_engine_ends_with_work_in_it(const mls_config *config, int direct_mode)
{
    mls_op *ops[FILES];
    for (unsigned round = 0; round < 4; round++) {
        mls_engine *engine = engine_of(config);
        for (unsigned i = 0; i < FILES; i++) {
            ops[i] = op_of(MLS_OP_WRITE, path_of(dir, "end", i), 1, 0, direct_mode);
            ops[i]->file_nbytes = MIB;
            extent_of(ops[i], 0, 0, MIB, NULL);
            ops[i]->extents[0].kind = MLS_EXTENT_PATTERN;
            CHECK(mls_pattern_init(&ops[i]->extents[0].pattern, 5, 1, i, 0) == 0);
            seal_and_submit(engine, ops[i]);
        }
        usleep(round * 700);
        mls_engine_free(engine);
        for (unsigned i = 0; i < FILES; i++) {
            CHECK(mls_op_is_done(ops[i]));
            CHECK(ops[i]->result.error == 0 || ops[i]->result.error == MLS_ECANCELED);
            mls_op_unref(ops[i]);
        }
    }
}

static void test_errors_name_their_stage(const mls_config *config, int direct_mode)
{
    mls_engine *engine = engine_of(config);
    unsigned char *bytes = malloc(100000);
    CHECK(bytes);
    mls_op *absent = op_of(MLS_OP_READ, path_of(dir, "no/such/file", 0), 1, 0, direct_mode);
    extent_of(absent, 0, 0, 10, bytes);
    mls_op *nowhere = op_of(MLS_OP_WRITE, path_of(dir, "no/such/dir", 0), 1, 0, direct_mode);
    extent_of(nowhere, 0, 0, 10, bytes);
    nowhere->file_nbytes = 10;
    int fd = open(path_of(dir, "brief", 0), O_RDWR | O_CREAT, 0666);
    CHECK(fd >= 0 && ftruncate(fd, 50000) == 0 && close(fd) == 0);
    mls_op *brief = op_of(MLS_OP_READ, path_of(dir, "brief", 0), 1, 0, direct_mode);
    extent_of(brief, 0, 0, 100000, bytes);
    seal_and_submit(engine, absent);
    seal_and_submit(engine, nowhere);
    seal_and_submit(engine, brief);
    reap_all(engine);
    CHECK(absent->result.error == ENOENT && absent->result.stage == MLS_STAGE_OPEN);
    CHECK(nowhere->result.error == ENOENT && nowhere->result.stage == MLS_STAGE_OPEN);
    CHECK(brief->result.error == MLS_ESHORT && brief->result.error_offset == 50000);
    mls_op_unref(absent);
    mls_op_unref(nowhere);
    mls_op_unref(brief);

    mls_op *overlap = op_of(MLS_OP_WRITE, path_of(dir, "overlap", 0), 2, 0, direct_mode);
    size_t bad = 9;
    extent_of(overlap, 0, 100, 10, bytes);
    extent_of(overlap, 1, 95, 10, bytes);
    CHECK(mls_op_seal(overlap, &bad) == -EINVAL && bad == 1);
    mls_op_unref(overlap);
    free(bytes);
    mls_engine_free(engine);
}

static void test_more_files_than_descriptors(const mls_config *config, int direct_mode)
{
    enum { TINY = 1500 };
    mls_engine *engine = engine_of(config);
    mls_op **ops = calloc(TINY, sizeof *ops);
    CHECK(ops);
    struct rlimit before, few;
    CHECK(getrlimit(RLIMIT_NOFILE, &before) == 0);
    few = before;
    few.rlim_cur = 128;
    CHECK(setrlimit(RLIMIT_NOFILE, &few) == 0);
    for (unsigned i = 0; i < TINY; i++) { /* 0 to 2 bytes: no unit, a tail at most */
        ops[i] = op_of(MLS_OP_WRITE, path_of(dir, "tiny", i), 1, 0, direct_mode);
        ops[i]->steps = MLS_STEP_RENAME;
        ops[i]->file_nbytes = i % 3;
        extent_of(ops[i], 0, 0, i % 3, (unsigned char *)"ab");
        size_t bad;
        CHECK(mls_op_seal(ops[i], &bad) == 0);
    }
    CHECK(mls_engine_submit(engine, ops, TINY) == 0);
    reap_all(engine);
    for (unsigned i = 0; i < TINY; i++) {
        CHECK(ops[i]->result.error == 0);
        check_file(path_of(dir, "tiny", i), (const unsigned char *)"ab", i % 3);
        CHECK(unlink(path_of(dir, "tiny", i)) == 0);
        mls_op_unref(ops[i]);
    }
    free(ops);
    mls_engine_free(engine);
    CHECK(setrlimit(RLIMIT_NOFILE, &before) == 0);
}

/* ---- ranges ---- */

static void test_ranges(const mls_config *config, int direct_mode)
{
    enum { RANGES = 2000, MOST = 9000, BATCH = 250 };
    mls_engine *engine = engine_of(config);
    uint64_t nbytes = 3 * MIB + 17;
    unsigned char *want = malloc(nbytes), *got = malloc((size_t)RANGES * MOST);
    bool *seen = calloc(RANGES, sizeof *seen);
    CHECK(want && got && seen);
    stuff(want, 0, nbytes, 3);
    mls_op *op = op_of(MLS_OP_WRITE, path_of(dir, "ranges", 0), 1, 0, direct_mode);
    op->file_nbytes = nbytes;
    extent_of(op, 0, 0, nbytes, want);
    seal_and_submit(engine, op);
    reap_all(engine);
    CHECK(op->result.error == 0);
    mls_op_unref(op);
    mls_file *file = mls_file_new(path_of(dir, "ranges", 0));
    mls_range_queue *queue = mls_range_queue_new();
    CHECK(file && queue && mls_file_open(file, false, false, direct_mode, mls_engine_latches(engine)) == 0);
    for (unsigned first = 0; first < RANGES; first += BATCH) {
        op = mls_op_new(MLS_OP_RANGES, NULL, file, BATCH, 0);
        CHECK(op);
        op->units = calloc(BATCH, sizeof *op->units);
        op->tags = calloc(BATCH, sizeof *op->tags);
        op->nunits = BATCH;
        op->ranges_queue = queue;
        for (unsigned i = 0; i < BATCH; i++) {
            unsigned tag = first + i;
            uint64_t length = 1 + tag * 37 % (MOST - 1), offset = tag * 99991ull % nbytes; /* some go past the end */
            op->tags[i] = tag;
            op->units[i] = (mls_unit){offset, (uint32_t)length, i, 1};
            extent_of(op, i, offset, length, got + (size_t)tag * MOST);
        }
        seal_and_submit(engine, op);
        mls_op_unref(op);
    }
    for (unsigned left = RANGES; left;) {
        mls_range_done done[100];
        size_t count = mls_range_queue_pop(queue, done, 100, 1, -1);
        CHECK(count > 0 && count <= left);
        left -= (unsigned)count;
        for (size_t i = 0; i < count; i++) {
            uint64_t tag = done[i].tag, length = 1 + tag * 37 % (MOST - 1), offset = tag * 99991ull % nbytes;
            CHECK(tag < RANGES && !seen[tag]);
            seen[tag] = true;
            if (offset + length > nbytes) {
                CHECK(done[i].result == -MLS_ESHORT);
            } else {
                CHECK(done[i].result == (int64_t)length && memcmp(got + tag * MOST, want + offset, length) == 0);
            }
        }
    }
    mls_range_done none;
    CHECK(mls_range_queue_pop(queue, &none, 1, 1, 1000000) == 0);
    mls_engine_free(engine);
    mls_file_unref(file);
    mls_range_queue_free(queue);
    free(want);
    free(got);
    free(seen);
}

int main(int argc, char **argv)
{
    char template[] = "/var/tmp/mlstor-engine-XXXXXX";
    dir = argc > 1 ? argv[1] : mkdtemp(template);
    CHECK(dir);
    static const int backends[] = {MLS_BACKEND_AUTO, MLS_BACKEND_THREADS};
    for (size_t b = 0; b < 2; b++) {
        for (int mode = MLS_MODE_AUTO; mode <= MLS_MODE_OFF; mode += MLS_MODE_OFF) {
            mls_config config = config_of(backends[b], 3, 4, 64 * KIB);
            test_files_come_back_byte_for_byte(&config, mode);
            test_small_extents_digests_and_late_bytes(&config, mode);
            test_large_extents_beside_late_bytes(&config, mode);
            test_patterns_survive_pauses_and_lookers_on(&config, mode);
            test_cancelled_writes_leave_nothing(&config, mode);
            test_an_engine_ends_with_work_in_it(&config, mode);
            test_errors_name_their_stage(&config, mode);
            test_more_files_than_descriptors(&config, mode);
            test_ranges(&config, mode);
        }
    }
    if (argc == 1) {
        char command[600];
        snprintf(command, sizeof command, "rm -rf '%s'", dir);
        CHECK(system(command) == 0);
    }
    puts("engine: all tests passed");
    return 0;
}
