/* Arrays of files without Python, for the sanitizers: both backends, several batches at once, cancelled amidst, later. */
#include "engine_support.h"
#include "files.h"

#define FILES 120
#define ROOM (300 * KIB)

static char root[64];

static uint64_t size_of(size_t i)
{
    static const uint64_t sizes[] = {0, 1, 4096, 5000, 65536, 70001, 300 * KIB - 5};
    return sizes[i % (sizeof sizes / sizeof *sizes)];
}

typedef struct asked {
    mls_transfer transfers[FILES];
    char names[FILES * 16];
} asked;

static void ask(asked *out, int op, int memory)
{
    size_t at = 0;
    memset(out, 0, sizeof *out);
    for (size_t i = 0; i < FILES; i++) {
        mls_transfer *transfer = &out->transfers[i];
        int nbytes = sprintf(out->names + at, "d%zu/%zu", i % 5, i);
        transfer->tag = i;
        transfer->key_start = at;
        transfer->key_nbytes = (uint32_t)nbytes;
        transfer->op = (uint8_t)op;
        transfer->memory = (uint8_t)memory;
        transfer->object_nbytes = i % 2 ? size_of(i) : MLS_WHOLE;
        transfer->nbytes = op == MLS_TRANSFER_WRITE ? size_of(i) : MLS_WHOLE;
        transfer->place = memory == MLS_TRANSFER_BUFFER ? i * ROOM : i;
        transfer->room = ROOM;
        transfer->digest = (uint8_t)(i % 3);
        at += (size_t)nbytes;
    }
}

static mls_batch *submit(mls_files *files, const asked *all, const mls_files_memory *memory)
{
    for (size_t i = 0; i < FILES; i++)
        CHECK(!mls_files_refusal(&all->transfers[i], all->names, sizeof all->names, memory));
    mls_batch *batch = mls_files_submit(files, all->transfers, FILES, all->names, memory);
    CHECK(batch);
    return batch;
}

/* Every tag once per batch; how many were cancelled. */
static size_t reap(mls_files *files, size_t batches)
{
    mls_completion done[64];
    size_t seen[FILES] = {0}, left = batches * FILES, cancelled = 0;
    while (left) {
        size_t count = mls_files_reap(files, done, 64, 1, -1);
        for (size_t i = 0; i < count; i++) {
            size_t tag = (size_t)done[i].tag;
            seen[tag]++;
            cancelled += done[i].kind == MLS_KIND_CANCELLED;
            CHECK(done[i].kind == MLS_KIND_CANCELLED || done[i].kind == MLS_KIND_OK);
            CHECK(done[i].kind != MLS_KIND_OK || done[i].result == (int64_t)size_of(tag));
            CHECK(!done[i].damaged_blocks);
        }
        left -= count;
    }
    for (size_t i = 0; i < FILES; i++)
        CHECK(seen[i] == batches);
    return cancelled;
}

static void wait_done(mls_batch *batch)
{
    while (!mls_batch_is_done(batch))
        usleep(100);
    mls_batch_unref(batch);
}

static void test(int backend, int mode)
{
    int error;
    mls_config config = config_of(backend, 2, 4, 64 * KIB);
    mls_engine *engine = mls_engine_new(&config, &error);
    if (!engine && backend == MLS_BACKEND_URING) {
        printf("io_uring is refused here: not tested\n");
        return;
    }
    CHECK(engine);
    const mls_files_config how = {root, mode, MLS_STEP_RENAME, true};
    mls_files *files = mls_files_new(engine, &how, &error);
    CHECK(files);
    static asked all;
    mls_pattern pattern;
    mls_batch *batches[4];
    mls_pattern_init(&pattern, 9, 1, 0, 0);
    unsigned char *buffer = aligned_alloc(4096, FILES * ROOM);
    const mls_files_memory generated = {NULL, 0, &pattern, 0}, memory = {buffer, FILES * ROOM, NULL, 77};

    ask(&all, MLS_TRANSFER_WRITE, MLS_TRANSFER_PATTERN);
    mls_batch *batch = submit(files, &all, &generated);
    CHECK(reap(files, 1) == 0);
    wait_done(batch);

    ask(&all, MLS_TRANSFER_READ, MLS_TRANSFER_PATTERN);
    for (int i = 0; i < 4; i++)
        batches[i] = submit(files, &all, &generated);
    CHECK(reap(files, 4) == 0);
    for (int i = 0; i < 4; i++)
        wait_done(batches[i]);

    ask(&all, MLS_TRANSFER_READ, MLS_TRANSFER_BUFFER);
    for (int round = 0; round < 3; round++) {
        memset(buffer, 0xA5, FILES * ROOM);
        batch = submit(files, &all, &memory);
        CHECK(reap(files, 1) == 0);
        wait_done(batch);
        for (size_t i = 0; i < FILES; i++) {
            mls_pattern one;
            mls_pattern_init(&one, 9, 1, i, 0);
            CHECK(mls_pattern_check(&one, buffer + i * ROOM, 0, size_of(i), NULL, 0, NULL) == 0);
        }
    }

    for (int round = 0; round < 10; round++) { /* some now, some later, some never */
        uint64_t now = mls_now_ns();
        for (size_t i = 0; i < FILES; i++)
            all.transfers[i].not_before_ns = i % 3 == 0 ? 0 : i % 3 == 1 ? now + i * 20000 : now + 3600000000000u;
        batch = submit(files, &all, &memory);
        usleep((unsigned)round * 300);
        mls_files_cancel(files);
        CHECK(reap(files, 1) >= FILES / 3);
        wait_done(batch);
    }
    CHECK(mls_files_path(files, (char[MLS_REASON_BYTES]){0}) != MLS_PATH_DIRECT || mode == MLS_MODE_AUTO);

    batch = submit(files, &all, &memory); /* the engine ends under them */
    mls_files_cancel(files);
    mls_engine_free(engine);
    CHECK(mls_batch_is_done(batch));
    mls_batch_unref(batch);
    mls_files_unref(files);
    free(buffer);
}

int main(int argc, char **argv)
{
    char command[96];
    snprintf(root, sizeof root, "%s", argc > 1 ? argv[1] : "files-XXXXXX");
    CHECK(argc > 1 || mkdtemp(root));
    for (int backend = MLS_BACKEND_URING; backend <= MLS_BACKEND_THREADS; backend++)
        for (int mode = 0; mode < 2; mode++)
            test(backend, mode ? MLS_MODE_OFF : MLS_MODE_AUTO);
    snprintf(command, sizeof command, "rm -r '%s'", root);
    CHECK(system(command) == 0);
    printf("files: all tests passed\n");
    return 0;
}
