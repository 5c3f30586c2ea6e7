# Declarations of csrc, nothing else.
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

cdef extern from "digest.h" nogil:
    enum: MLS_DIGEST_NONE, MLS_DIGEST_CRC32, MLS_DIGEST_CRC32C, MLS_DIGEST_XXH64, MLS_DIGEST_CRC32_CRC32C
    bint mls_digest_combines(int alg)
    uint64_t mls_crc(int alg, uint64_t crc, const void *p, size_t n)
    uint64_t mls_crc_shift(int alg, uint64_t crc, uint64_t nbytes)
    const char *mls_digest_impl(int alg)

cdef extern from "pattern.h" nogil:
    ctypedef struct mls_pattern:
        pass
    ctypedef struct mls_damage:
        uint64_t offset, nbytes
        uint32_t kind, found_checkpoint
        uint64_t found_run_id, found_file_id, found_offset
    int mls_pattern_init(mls_pattern *p, uint64_t run_id, uint32_t checkpoint, uint64_t file_id,
                         uint32_t compressibility)
    void mls_pattern_fill(const mls_pattern *p, void *dst, uint64_t offset, size_t nbytes)
    size_t mls_pattern_check(const mls_pattern *p, const void *src, uint64_t offset, size_t nbytes, mls_damage *out,
                             size_t max, size_t *ndamage)
    const char *mls_damage_kind_name(uint32_t kind)
    const char *mls_pattern_isa()

cdef extern from "core_api.h" nogil:
    const char *MLS_CORE_API_CAPSULE
    ctypedef struct mls_core_api:
        int (*pattern_of)(void *object, mls_pattern *out) noexcept
    void mls_core_api_init(mls_core_api *api)

cdef extern from "histogram.h" nogil:
    enum: MLS_HISTOGRAM_BUCKETS
    ctypedef struct mls_histogram:
        uint64_t count[1856]
        uint64_t total, sum_ns, min_ns, max_ns

cdef extern from "permute.h" nogil:
    ctypedef struct mls_permutation:
        pass
    int mls_permutation_init(mls_permutation *p, uint64_t n, uint64_t seed, uint64_t epoch)
    void mls_permute_array(const mls_permutation *p, uint64_t *out, uint64_t start, uint64_t step, size_t count)
    int mls_draw_array(uint64_t n, uint64_t seed, uint64_t epoch, uint64_t *out, uint64_t start, uint64_t step,
                       size_t count)

cdef extern from "platform.h" nogil:
    enum: MLS_DIRECT_NO, MLS_DIRECT_YES, MLS_DIRECT_UNKNOWN
    ctypedef struct mls_alignment:
        uint32_t mem_align, offset_align, read_offset_align
        int direct_supported
        uint32_t blksize, logical_block, physical_block
        uint64_t dev, mnt_id, fs_magic
        const char *fs_name
        const char *source
    int mls_probe_alignment(int fd, mls_alignment *out)
    int mls_resident(int fd, uint64_t offset, uint64_t nbytes, uint64_t *resident_bytes)
    int mls_evict(int fd)

cdef extern from "file.h" nogil:
    enum: MLS_MODE_AUTO, MLS_MODE_REQUIRE, MLS_MODE_OFF
    enum: MLS_PATH_BUFFERED, MLS_PATH_DIRECT, MLS_PATH_UNVERIFIED
    ctypedef struct mls_latches:
        pass
    ctypedef struct mls_file:
        bint direct
        mls_alignment align
        uint64_t nbytes
        char reason[160]
    mls_file *mls_file_new(const char *path)
    void mls_file_ref(mls_file *file)
    void mls_file_unref(mls_file *file)
    int mls_file_path(const mls_file *file)
    uint64_t mls_now_ns()
    int mls_file_open(mls_file *file, bint write, bint temporary, int mode, mls_latches *latches)

cdef extern from "operation.h" nogil:
    enum: MLS_OP_WRITE, MLS_OP_READ, MLS_OP_RANGES
    enum: MLS_EXTENT_MEMORY, MLS_EXTENT_PATTERN, MLS_EXTENT_DROP, MLS_EXTENT_LATE
    enum: MLS_ESHORT, MLS_ELATE, MLS_ECANCELED, MLS_MAX_DAMAGE
    ctypedef struct mls_extent:
        uint64_t offset, nbytes
        unsigned char *memory
        mls_pattern pattern
        uint32_t group
        unsigned char kind, digest
    ctypedef struct mls_range:
        uint64_t tag, offset, nbytes, dest
    ctypedef struct mls_unit:
        uint64_t offset
        uint32_t nbytes, first_extent, nextents
    ctypedef struct mls_result:
        int error, stage
        uint64_t error_offset
        uint64_t start_ns, open_ns, data_ns, sync_ns, commit_ns, end_ns
        uint64_t nbytes, zero_copy_bytes, staged_bytes, file_nbytes
        int threads, direct
        char reason[160]
        mls_alignment align
        size_t ndamage
        uint64_t damaged_blocks
        mls_damage damage[16]
    ctypedef struct mls_op:
        int kind
        uint32_t steps
        uint64_t file_nbytes, block_bytes
        int direct_mode
        bint serial, has_late
        uint64_t bytes_per_s
        mls_extent *extents
        size_t nextents, ngroups
        uint64_t *tags
        mls_range_queue *ranges_queue
        uint64_t region_id
        unsigned char *region
        uint64_t region_nbytes
        mls_file **files
        mls_unit *units
        size_t nunits
        int (*late)(void *user) noexcept nogil
        void *user
        mls_result result
    mls_op *mls_op_new(int kind, const char *path, mls_file *file, size_t nextents, size_t ngroups)
    void mls_op_unref(mls_op *op)
    int mls_op_seal(mls_op *op, size_t *bad)
    bint mls_op_is_done(const mls_op *op)
    uint64_t mls_op_digest(const mls_op *op, size_t group)

cdef extern from "engine.h" nogil:
    enum: MLS_BACKEND_AUTO, MLS_BACKEND_URING, MLS_BACKEND_THREADS
    enum: MLS_TIME_READ, MLS_TIME_WRITE, MLS_TIME_SYNC, MLS_TIME_OPEN, MLS_TIME_COMMIT, MLS_TIMINGS
    ctypedef struct mls_config:
        int backend
        unsigned workers, depth
        uint64_t block_bytes
        bint automatic_block
        uint64_t window_bytes
        bint huge_pages, registration
    ctypedef struct mls_counters:
        uint64_t read_bytes, written_bytes, reads, writes, syncs, busy_ns, wait_ns
        uint64_t zero_copy_bytes, staged_bytes, retried
    ctypedef struct mls_engine:
        pass
    ctypedef struct mls_range_done:
        uint64_t tag
        int64_t result
        uint64_t latency_ns, end_ns
    ctypedef struct mls_range_queue:
        pass
    mls_engine *mls_engine_new(const mls_config *config, int *error)
    void mls_engine_free(mls_engine *engine)
    const char *mls_engine_backend(const mls_engine *engine)
    const char *mls_engine_granted(const mls_engine *engine)
    unsigned mls_engine_workers(const mls_engine *engine)
    mls_latches *mls_engine_latches(mls_engine *engine)
    int mls_engine_submit(mls_engine *engine, mls_op **ops, size_t count)
    size_t mls_engine_reap(mls_engine *engine, mls_op **ops, size_t max, size_t min, int64_t timeout_ns)
    bint mls_engine_wait(mls_engine *engine, mls_op *op, int64_t timeout_ns)
    void mls_engine_cancel(mls_engine *engine, mls_op *op)
    bint mls_engine_drain(mls_engine *engine, int64_t timeout_ns)
    size_t mls_engine_in_flight(mls_engine *engine)
    void mls_engine_pause(mls_engine *engine)
    void mls_engine_resume(mls_engine *engine)
    void mls_engine_counters(mls_engine *engine, mls_counters *sum)
    bint mls_engine_reset_histograms(mls_engine *engine)
    void mls_engine_histogram(mls_engine *engine, int timing, mls_histogram *sum)
    mls_range_queue *mls_range_queue_new()
    void mls_range_queue_free(mls_range_queue *queue)
    size_t mls_range_queue_pop(mls_range_queue *queue, mls_range_done *out, size_t max, size_t min, int64_t timeout_ns)

cdef extern from "transfer.h" nogil:
    enum: MLS_TRANSFER_READ, MLS_TRANSFER_BUFFER, MLS_KIND_SHORT, MLS_KIND_LENGTH, MLS_KIND_CHECKSUM
    ctypedef struct mls_transfer:
        uint8_t op, memory
    ctypedef struct mls_completion:
        pass

cdef extern from "files.h" nogil:
    ctypedef struct mls_files:
        pass
    ctypedef struct mls_batch:
        pass
    ctypedef struct mls_file_failure:
        uint64_t tag
        int kind, error, stage
        char *key
    ctypedef struct mls_files_config:
        const char *root
        int mode
        uint32_t write_steps
        bint evict
    ctypedef struct mls_files_memory:
        unsigned char *buffer
        uint64_t nbytes
        const mls_pattern *pattern
        uint64_t region_id
    mls_files *mls_files_new(mls_engine *engine, const mls_files_config *config, int *error)
    void mls_files_unref(mls_files *files)
    void mls_files_close(mls_files *files)
    const char *mls_files_refusal(const mls_transfer *transfer, const char *names, size_t names_nbytes,
                                  const mls_files_memory *memory)
    mls_batch *mls_files_submit(mls_files *files, const mls_transfer *transfers, size_t count, const char *names,
                                const mls_files_memory *memory)
    bint mls_batch_is_done(const mls_batch *batch)
    void mls_batch_unref(mls_batch *batch)
    size_t mls_files_reap(mls_files *files, mls_completion *out, size_t max, size_t min, int64_t timeout_ns)
    void mls_files_cancel(mls_files *files)
    size_t mls_files_failures(mls_files *files, mls_file_failure *out, size_t max)
    int mls_files_path(mls_files *files, char *reason)
    uint64_t mls_files_ended(const mls_files *files)

cdef extern from *:
    """
    #ifndef MLS_LIBURING_VERSION
    #define MLS_LIBURING_VERSION ""
    #endif
    #ifndef MLS_ISAL_VERSION
    #define MLS_ISAL_VERSION ""
    #endif
    #include "backend.h"
    #ifndef MLS_HAVE_LIBURING
    typedef struct {
        int error;
        uint32_t flags, features;
        int registration_error;
        bool ring_fd_registered;
    } mls_uring_probe;
    static void mls_uring_probe_run(mls_uring_probe *probe) { memset(probe, 0, sizeof *probe); probe->error = -1; }
    #endif
    """
    const char *MLS_LIBURING_VERSION
    const char *MLS_ISAL_VERSION
    ctypedef struct mls_uring_probe:
        int error
        uint32_t flags, features
        int registration_error
        bint ring_fd_registered
    void mls_uring_probe_run(mls_uring_probe *probe) nogil
