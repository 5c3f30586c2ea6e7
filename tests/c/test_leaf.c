/* Tests of the C core's leaves: pattern, digests, histogram, platform. Exits 0 when all hold. */
#include "digest.h"
#include "histogram.h"
#include "pattern.h"
#include "platform.h"
#include "window.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* assert that stays under NDEBUG */
#define CHECK(condition)                                                        \
    do {                                                                        \
        if (!(condition)) {                                                     \
            fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
            exit(1);                                                            \
        }                                                                       \
    } while (0)

#define BLOCK 4096u

static const char *const isas[] = {"baseline", "avx2"};

static mls_pattern pattern(uint64_t run_id, uint32_t checkpoint, uint64_t file_id, uint32_t compressibility)
{
    mls_pattern p;
    CHECK(mls_pattern_init(&p, run_id, checkpoint, file_id, compressibility) == 0);
    return p;
}

static void test_stamp_layout_is_the_documented_one(void)
{
    const mls_pattern p = pattern(0x1122334455667788, 7, 9, 30);
    uint8_t block[BLOCK];
    mls_pattern_fill(&p, block, 5 * BLOCK, BLOCK);
    uint32_t magic, checkpoint, zeros = 0;
    uint16_t version, compressibility;
    uint64_t run_id, file_id, offset;
    memcpy(&magic, block, 4);
    memcpy(&version, block + 4, 2);
    memcpy(&compressibility, block + 6, 2);
    memcpy(&checkpoint, block + 8, 4);
    memcpy(&run_id, block + 16, 8);
    memcpy(&file_id, block + 24, 8);
    memcpy(&offset, block + 32, 8);
    CHECK(magic == MLS_PATTERN_MAGIC && version == MLS_PATTERN_VERSION && compressibility == 30);
    CHECK(checkpoint == 7 && run_id == 0x1122334455667788 && file_id == 9 && offset == 5 * BLOCK);
    while (zeros < BLOCK && block[BLOCK - 1 - zeros] == 0)
        zeros++;
    CHECK(zeros >= BLOCK * 30 / 100 && zeros < BLOCK * 30 / 100 + 8);
    mls_pattern refused;
    CHECK(mls_pattern_init(&refused, 1, 1, 1, 101) == -EINVAL);
}

static void test_instruction_sets_make_the_same_bytes(void)
{
    enum { NBYTES = 16 * 4096 };
    uint8_t *want = malloc(NBYTES), *got = malloc(NBYTES + 64);
    CHECK(want != NULL && got != NULL);
    for (uint32_t compressibility = 0; compressibility <= 100; compressibility++) {
        const mls_pattern p = pattern(1, 2, 3, compressibility);
        CHECK(mls_pattern_set_isa("baseline") == 0);
        mls_pattern_fill(&p, want, 0, NBYTES);
        for (size_t i = 0; i < sizeof isas / sizeof isas[0]; i++) {
            const int rc = mls_pattern_set_isa(isas[i]);
            if (rc == -ENOTSUP)
                continue;
            CHECK(rc == 0 && strcmp(mls_pattern_isa(), isas[i]) == 0);
            for (size_t shift = 0; shift < 64; shift += 21) { /* aligned and not */
                memset(got, 0xa5, NBYTES + 64);
                mls_pattern_fill(&p, got + shift, 0, NBYTES);
                CHECK(memcmp(got + shift, want, NBYTES) == 0);
                CHECK(mls_pattern_check(&p, got + shift, 0, NBYTES, NULL, 0, NULL) == 0);
            }
        }
    }
    CHECK(mls_pattern_set_isa("mmx") == -EINVAL);
    CHECK(mls_pattern_set_isa(NULL) == 0);
    free(want);
    free(got);
}

static void test_fill_stays_inside_its_range(void)
{
    const mls_pattern p = pattern(1, 2, 3, 0);
    static uint8_t whole[4 * BLOCK], part[4 * BLOCK + 2];
    mls_pattern_fill(&p, whole, 0, sizeof whole);
    static const size_t edges[] = {0, 1, 39, 40, 511, 4095, 4096, 4097, 8191, 8192, 12289, 16384};
    for (size_t i = 0; i < sizeof edges / sizeof edges[0]; i++) {
        for (size_t j = i; j < sizeof edges / sizeof edges[0]; j++) {
            const size_t n = edges[j] - edges[i];
            memset(part, 0x5a, sizeof part);
            mls_pattern_fill(&p, part + 1, edges[i], n);
            CHECK(memcmp(part + 1, whole + edges[i], n) == 0);
            CHECK(part[0] == 0x5a && part[n + 1] == 0x5a);
        }
    }
}

/* Check one block that holds `other`'s bytes for other_offset where p's for `offset` belong. */
static mls_damage misplaced(const mls_pattern *p, uint64_t offset, const mls_pattern *other, uint64_t other_offset)
{
    uint8_t block[BLOCK];
    mls_damage d;
    size_t described;
    mls_pattern_fill(other, block, other_offset, BLOCK);
    CHECK(mls_pattern_check(p, block, offset, BLOCK, &d, 1, &described) == 1 && described == 1);
    CHECK(d.found_run_id == other->run_id && d.found_checkpoint == other->checkpoint);
    CHECK(d.found_file_id == other->file_id && d.found_offset == other_offset);
    return d;
}

static void test_misplaced_blocks_are_told_by_the_first_field_that_differs(void)
{
    const mls_pattern p = pattern(10, 20, 30, 0), run = pattern(11, 21, 31, 0), checkpoint = pattern(10, 21, 31, 0),
                      file = pattern(10, 20, 31, 0), less = pattern(10, 20, 30, 50);
    mls_damage d = misplaced(&p, 3 * BLOCK, &run, 0);
    CHECK(d.kind == MLS_DAMAGE_OTHER_RUN && d.offset == 3 * BLOCK && d.nbytes == BLOCK);
    d = misplaced(&p, 3 * BLOCK, &checkpoint, 0);
    CHECK(d.kind == MLS_DAMAGE_OTHER_CHECKPOINT && d.offset == 3 * BLOCK && d.nbytes == BLOCK);
    d = misplaced(&p, 3 * BLOCK, &file, 0);
    CHECK(d.kind == MLS_DAMAGE_OTHER_FILE && d.offset == 3 * BLOCK && d.nbytes == BLOCK);
    d = misplaced(&p, 3 * BLOCK, &p, 4 * BLOCK);
    CHECK(d.kind == MLS_DAMAGE_OTHER_OFFSET && d.offset == 3 * BLOCK && d.nbytes == BLOCK);
    d = misplaced(&p, 3 * BLOCK, &less, 3 * BLOCK);
    CHECK(d.kind == MLS_DAMAGE_CORRUPT);
}

/* Damage bytes [from, to) of four blocks at file offset BLOCK with `value`, or by inverting for -1. */
static mls_damage damaged(size_t nbytes, size_t from, size_t to, int value)
{
    const mls_pattern p = pattern(10, 20, 30, 0);
    static uint8_t bytes[4 * BLOCK];
    mls_damage d;
    size_t described;
    mls_pattern_fill(&p, bytes, BLOCK, nbytes);
    for (size_t i = from; i < to; i++)
        bytes[i] = value < 0 ? (uint8_t)~bytes[i] : (uint8_t)value;
    CHECK(mls_pattern_check(&p, bytes, BLOCK, nbytes, &d, 1, &described) == 1 && described == 1);
    return d;
}

static void test_kinds_and_ranges_of_damage(void)
{
    mls_damage d = damaged(4 * BLOCK, 2 * BLOCK + 100, 2 * BLOCK + 103, -1);
    CHECK(d.kind == MLS_DAMAGE_CORRUPT && d.offset == 3 * BLOCK + 100 && d.nbytes == 3);
    CHECK(d.found_run_id == 10 && d.found_offset == 3 * BLOCK);
    d = damaged(4 * BLOCK, 2 * BLOCK + 12, 2 * BLOCK + 13, -1); /* in the stamp */
    CHECK(d.kind == MLS_DAMAGE_NO_STAMP && d.offset == 3 * BLOCK + 12 && d.nbytes == 1 && d.found_run_id == 0);
    d = damaged(4 * BLOCK, BLOCK, 2 * BLOCK, 0);
    CHECK(d.kind == MLS_DAMAGE_ZEROED && d.offset == 2 * BLOCK);
    d = damaged(4 * BLOCK, BLOCK + 512, 2 * BLOCK, 0); /* a torn write */
    CHECK(d.kind == MLS_DAMAGE_ZEROED && d.offset >= 2 * BLOCK + 512 && d.offset < 2 * BLOCK + 520);
    d = damaged(4 * BLOCK, BLOCK, 2 * BLOCK, 0xff);
    CHECK(d.kind == MLS_DAMAGE_NO_STAMP && d.offset == 2 * BLOCK);
    d = damaged(BLOCK + 20, BLOCK + 3, BLOCK + 4, -1); /* stamp cut by the end of the file */
    CHECK(d.kind == MLS_DAMAGE_CORRUPT && d.offset == 2 * BLOCK + 3 && d.nbytes == 1);
    d = damaged(BLOCK + 20, BLOCK, BLOCK + 20, 0);
    CHECK(d.kind == MLS_DAMAGE_ZEROED && d.offset == 2 * BLOCK);
    CHECK(strcmp(mls_damage_kind_name(MLS_DAMAGE_ZEROED), "zeroed") == 0);
    CHECK(strcmp(mls_damage_kind_name(0), "unknown") == 0);
}

static void test_all_damaged_blocks_are_counted_and_the_first_described(void)
{
    const mls_pattern p = pattern(1, 1, 1, 0);
    enum { NBLOCKS = 9 };
    static uint8_t bytes[NBLOCKS * BLOCK];
    mls_damage d[3];
    size_t described;
    mls_pattern_fill(&p, bytes, 0, sizeof bytes);
    for (size_t i = 0; i < NBLOCKS; i += 2)
        bytes[i * BLOCK + 1000] ^= 1;
    CHECK(mls_pattern_check(&p, bytes, 0, sizeof bytes, d, 3, &described) == 5 && described == 3);
    for (uint64_t i = 0; i < 3; i++)
        CHECK(d[i].offset == 2 * i * BLOCK + 1000 && d[i].nbytes == 1);
}

static void test_known_digests(void)
{
    static uint8_t zeros[32], long_text[101];
    CHECK(mls_crc32(0, "123456789", 9) == 0xcbf43926);
    CHECK(mls_crc32c(0, "123456789", 9) == 0xe3069283);
    CHECK(mls_crc32c(0, zeros, 32) == 0x8a9136aa); /* RFC 3720, B.4 */
    CHECK(mls_crc32(0, "", 0) == 0 && mls_crc32c(0, "", 0) == 0);

    mls_xxh64 x;
    mls_xxh64_reset(&x, 0);
    CHECK(mls_xxh64_digest(&x) == 0xef46db3751d8e999);
    mls_xxh64_update(&x, "a", 1);
    CHECK(mls_xxh64_digest(&x) == 0xd24ec4f1a98c6e5b);
    mls_xxh64_update(&x, "bc", 2);
    CHECK(mls_xxh64_digest(&x) == 0x44bc2cf5ad770999);
    /* the sanity buffer of the reference implementation: bytes of a 32-bit prime's powers */
    uint32_t generator = 2654435761u;
    for (size_t i = 0; i < sizeof long_text; i++) {
        long_text[i] = (uint8_t)(generator >> 24);
        generator *= generator;
    }
    mls_xxh64_reset(&x, 0);
    mls_xxh64_update(&x, long_text, sizeof long_text);
    CHECK(mls_xxh64_digest(&x) == 0x0eab543384f878ad);
    mls_xxh64_reset(&x, 2654435761u);
    mls_xxh64_update(&x, long_text, sizeof long_text);
    CHECK(mls_xxh64_digest(&x) == 0xcaa65939306f1e21);
}

static void test_crc_of_a_whole_from_its_parts(void)
{
    const mls_pattern p = pattern(4, 4, 4, 0);
    enum { NBYTES = 100000 };
    static uint8_t bytes[NBYTES];
    mls_pattern_fill(&p, bytes, 0, NBYTES);
    static const size_t cuts[] = {0, 1, 7, 8, 4096, 12288, 12289, 50000, NBYTES};
    for (size_t i = 0; i < sizeof cuts / sizeof cuts[0]; i++) {
        const size_t a = cuts[i], b = NBYTES - a;
        CHECK((mls_crc_shift(MLS_DIGEST_CRC32, mls_crc32(0, bytes, a), b) ^ mls_crc32(0, bytes + a, b)) ==
              mls_crc32(0, bytes, NBYTES));
        CHECK((mls_crc_shift(MLS_DIGEST_CRC32C, mls_crc32c(0, bytes, a), b) ^ mls_crc32c(0, bytes + a, b)) ==
              mls_crc32c(0, bytes, NBYTES));
        CHECK(mls_crc32(mls_crc32(0, bytes, a), bytes + a, b) == mls_crc32(0, bytes, NBYTES));
        CHECK(mls_crc32c(mls_crc32c(0, bytes, a), bytes + a, b) == mls_crc32c(0, bytes, NBYTES));
    }
    /* far shifts add up */
    const uint64_t both = mls_crc(MLS_DIGEST_CRC32_CRC32C, 0, bytes, 5000);
    CHECK(both == ((uint64_t)mls_crc32c(0, bytes, 5000) << 32 | mls_crc32(0, bytes, 5000)));
    CHECK((mls_crc_shift(MLS_DIGEST_CRC32_CRC32C, mls_crc(MLS_DIGEST_CRC32_CRC32C, 0, bytes, 1234), 5000 - 1234) ^
           mls_crc(MLS_DIGEST_CRC32_CRC32C, 0, bytes + 1234, 5000 - 1234)) == both);
    const uint64_t far_once = mls_crc_shift(MLS_DIGEST_CRC32, 0x12345678, (1ull << 40) + 12345);
    CHECK(far_once == mls_crc_shift(MLS_DIGEST_CRC32, mls_crc_shift(MLS_DIGEST_CRC32, 0x12345678, 1ull << 40), 12345));
}

static void test_histogram_buckets_are_adjoining_and_narrow(void)
{
    uint64_t next = 0;
    for (uint32_t i = 0; i < MLS_HISTOGRAM_BUCKETS; i++) {
        const uint64_t lower = mls_histogram_lower(i), upper = mls_histogram_upper(i);
        CHECK(lower == next && upper >= lower);
        CHECK(mls_histogram_index(lower) == i && mls_histogram_index(upper) == i);
        if (i < MLS_HISTOGRAM_BUCKETS - 1)
            CHECK((upper - lower) * 64 < lower || upper == lower);
        next = upper + 1;
    }
    CHECK(next == 0); /* the last bucket ends at UINT64_MAX */
}

enum { NADDED = 200000 };

static void *adder(void *arg)
{
    for (uint64_t i = 0; i < NADDED; i++)
        mls_histogram_add(arg, i);
    return NULL;
}

static void test_histogram_may_be_read_while_it_is_written(void)
{
    static mls_histogram h, sum;
    pthread_t thread;
    mls_histogram_reset(&h);
    CHECK(pthread_create(&thread, NULL, adder, &h) == 0);
    uint64_t before = 0;
    do {
        mls_histogram_reset(&sum);
        mls_histogram_merge(&sum, &h);
        CHECK(sum.total >= before);
        before = sum.total;
    } while (before < NADDED);
    CHECK(pthread_join(thread, NULL) == 0);
    mls_histogram_merge(&sum, &h);
    CHECK(sum.sum_ns >= h.sum_ns && sum.min_ns == 0 && sum.max_ns == NADDED - 1);
    uint64_t counted = 0;
    for (uint32_t i = 0; i < MLS_HISTOGRAM_BUCKETS; i++)
        counted += h.count[i];
    CHECK(counted == NADDED && h.total == NADDED && h.sum_ns == (uint64_t)NADDED * (NADDED - 1) / 2);
}

/* First use of lazily built tables and of the dispatch, by several threads at once (for ThreadSanitizer). */
static void *first_user(void *arg)
{
    (void)arg;
    uint8_t block[BLOCK];
    const mls_pattern p = pattern(1, 1, 1, 0);
    mls_pattern_fill(&p, block, 0, BLOCK);
    CHECK(mls_pattern_check(&p, block, 0, BLOCK, NULL, 0, NULL) == 0);
    CHECK(mls_crc32(0, "123456789", 9) == 0xcbf43926 && mls_crc32c(0, "123456789", 9) == 0xe3069283);
    CHECK(mls_crc_shift(MLS_DIGEST_CRC32C, 0, 5) == 0);
    return NULL;
}

static void test_first_use_by_several_threads(void)
{
    pthread_t threads[4];
    for (size_t i = 0; i < 4; i++)
        CHECK(pthread_create(&threads[i], NULL, first_user, NULL) == 0);
    for (size_t i = 0; i < 4; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
}

static int is_power_of_two(uint32_t n)
{
    return n != 0 && (n & (n - 1)) == 0;
}

static void test_probe_and_page_cache_of_a_file(void)
{
    char path[] = "test_leaf.XXXXXX";
    static uint8_t bytes[10 * BLOCK + 5];
    const int fd = mkstemp(path);
    CHECK(fd >= 0 && unlink(path) == 0);
    memset(bytes, 1, sizeof bytes);
    CHECK(write(fd, bytes, sizeof bytes) == (ssize_t)sizeof bytes);

    mls_alignment a;
    CHECK(mls_probe_alignment(fd, &a) == 0);
    CHECK(is_power_of_two(a.mem_align) && is_power_of_two(a.offset_align) && is_power_of_two(a.read_offset_align));
    CHECK(a.offset_align >= a.physical_block && a.dev != 0 && a.fs_magic != 0 && a.fs_name[0] != '\0');

    /* mapped pages stay, whatever else on the machine drops caches */
    volatile uint8_t *const map = mmap(NULL, sizeof bytes, PROT_READ, MAP_SHARED, fd, 0);
    CHECK(map != MAP_FAILED);
    for (size_t i = 0; i < sizeof bytes; i += BLOCK)
        CHECK(map[i] == 1);
    uint64_t resident = 0;
    CHECK(mls_resident(fd, 0, 0, &resident) == 0 && resident == sizeof bytes);
    CHECK(mls_resident(fd, 0, 100, &resident) == 0 && resident == 100);
    CHECK(munmap((void *)(uintptr_t)map, sizeof bytes) == 0);
    CHECK(mls_resident(fd, sizeof bytes, 100, &resident) == 0 && resident == 0);
    CHECK(mls_evict(fd) == 0);
    CHECK(mls_resident(fd, 0, 0, &resident) == 0);
    if (a.direct_supported == MLS_DIRECT_YES) /* tmpfs and its like cannot drop anything */
        CHECK(resident == 0);
    CHECK(close(fd) == 0);
    CHECK(mls_probe_alignment(fd, &a) == -EBADF && mls_resident(fd, 0, 0, &resident) == -EBADF);
    CHECK(mls_evict(fd) == -EBADF);
    CHECK(strcmp(mls_fs_name(0x58465342), "xfs") == 0 && strcmp(mls_fs_name(1), "unknown") == 0);
}

/* The window after `nbytes` of storage that answers after `latency_ns` and gives `bytes_per_ns` at most. Every other
 * measurement or so finds it `unsteady` percent slower. Returns what was in flight on average, in MiB. */
static double window_on(mls_window *window, uint64_t nbytes, double latency_ns, double bytes_per_ns, unsigned unsteady)
{
    const uint64_t transfer_bytes = 1 << 20;
    double now = 1e9, sum = 0;
    unsigned random = 12345;
    for (uint64_t i = 0; i < nbytes / transfer_bytes; i++) {
        double rate = (double)window->bytes / latency_ns;
        rate = rate < bytes_per_ns ? rate : bytes_per_ns;
        random = random * 1664525 + 1013904223;
        rate *= 1 - unsteady / 100.0 * (double)(random >> 16) / 65536;
        now += (double)transfer_bytes / rate;
        sum += (double)window->bytes;
        mls_window_note(window, transfer_bytes, (uint64_t)((double)window->bytes / rate), (uint64_t)now);
    }
    return sum / (double)(nbytes / transfer_bytes) / (1 << 20);
}

static void test_the_window_is_as_wide_as_the_storage_needs(void)
{
    const uint64_t mib = 1 << 20, gib = 1 << 30;
    mls_window window;
    mls_window_init(&window, 2 * mib, 32 * mib);
    window_on(&window, 4 * gib, 1e5, 3, 0); /* near and fast */
    CHECK(window.bytes == 2 * mib);
    mls_window_init(&window, 2 * mib, 32 * mib);
    CHECK(window_on(&window, 16 * gib, 1e6, 0.3, 0) < 2.2); /* near, at its limit: a trial now and then */
    mls_window_init(&window, 2 * mib, 32 * mib);
    CHECK(window_on(&window, 16 * gib, 1e6, 0.3, 60) < 2.5); /* the same, unsteady */
    mls_window_init(&window, 2 * mib, 32 * mib);
    window_on(&window, gib / 2, 2e7, 2, 0); /* distant: 40 MB would be needed */
    CHECK(window.narrow_bytes == 32 * mib && window.bytes == 32 * mib);
    mls_window_init(&window, 2 * mib, 32 * mib);
    window_on(&window, 2 * gib, 6e6, 2, 0); /* less distant: 12 MB are */
    CHECK(window.narrow_bytes == 16 * mib);
    mls_window_init(&window, 0, 32 * mib);
    CHECK(window_on(&window, gib, 6e6, 2, 0) == 0);
}

static void test_a_rest_is_not_taken_for_slow_storage(void)
{
    const uint64_t mib = 1 << 20;
    mls_window window;
    uint64_t now = 1000;
    mls_window_init(&window, 2 * mib, 32 * mib);
    for (int i = 0; i < 4000; i++) {
        if (i % 4 == 0) { /* without this, the rests would count as time of a slow and a fast half */
            mls_window_rest(&window);
            now += 1000000000;
        }
        mls_window_note(&window, mib, 5000000, now += 2500000);
    }
    CHECK(window.took_bytes == 0 || window.took_count < 4);
    CHECK(window.bytes == 2 * mib && !window.trying);
}

int main(void)
{
    test_first_use_by_several_threads(); /* before any other */
    test_stamp_layout_is_the_documented_one();
    test_instruction_sets_make_the_same_bytes();
    test_fill_stays_inside_its_range();
    test_misplaced_blocks_are_told_by_the_first_field_that_differs();
    test_kinds_and_ranges_of_damage();
    test_all_damaged_blocks_are_counted_and_the_first_described();
    test_known_digests();
    test_crc_of_a_whole_from_its_parts();
    test_histogram_buckets_are_adjoining_and_narrow();
    test_histogram_may_be_read_while_it_is_written();
    test_the_window_is_as_wide_as_the_storage_needs();
    test_a_rest_is_not_taken_for_slow_storage();
    test_probe_and_page_cache_of_a_file();
    printf("leaf: ok (pattern %s, crc32 %s, crc32c %s)\n", mls_pattern_isa(), mls_digest_impl(MLS_DIGEST_CRC32),
           mls_digest_impl(MLS_DIGEST_CRC32C));
    return 0;
}
