/* Stamped pattern: contents that can be made and checked anywhere, block by block.
 *
 * A pattern is a pure function of (run id, checkpoint, file id, compressibility, byte offset). Each 4096-byte block, at
 * offsets that are multiples of 4096, begins with a 40-byte little-endian stamp
 *
 *   u32 magic | u16 version | u16 compressibility | u32 checkpoint | u32 check | u64 run_id | u64 file_id | u64 offset
 *
 * where `check` is a 32-bit mix of the other fields. The rest of the block is a keyed stream that does not compress;
 * with compressibility c the last c % of the block (rounded down to bytes, the stamp excepted) are zeros.
 */
#ifndef MLS_PATTERN_H
#define MLS_PATTERN_H

#include <stddef.h>
#include <stdint.h>

#define MLS_PATTERN_BLOCK_BYTES 4096u
#define MLS_PATTERN_STAMP_BYTES 40u
#define MLS_PATTERN_MAGIC 0x50534c4du /* "MLSP" in memory */
#define MLS_PATTERN_VERSION 1u
#define MLS_PATTERN_MAX_COMPRESSIBILITY 100u

/* What is wrong with a block. */
enum mls_damage_kind {
    MLS_DAMAGE_ZEROED = 1,       /* zeros where the pattern is not: the whole block, or 512 bytes or more of it */
    MLS_DAMAGE_OTHER_RUN,        /* a valid stamp of another run (an older one, as a rule) */
    MLS_DAMAGE_OTHER_CHECKPOINT, /* same run, another checkpoint */
    MLS_DAMAGE_OTHER_FILE,       /* same run and checkpoint, another file */
    MLS_DAMAGE_OTHER_OFFSET,     /* same file, but the block belongs elsewhere */
    MLS_DAMAGE_CORRUPT,          /* the stamp is right, or not in the range looked at; other bytes are wrong */
    MLS_DAMAGE_NO_STAMP,         /* the 40 bytes where the stamp belongs are not a valid stamp */
};

/* Made by mls_pattern_init, then constant: any number of threads may use it. */
typedef struct mls_pattern {
    uint64_t run_id;
    uint64_t file_id;
    uint32_t checkpoint;
    uint32_t compressibility; /* percent, 0..100 */
    uint64_t key;             /* of the stream: mix of the four above */
    uint32_t live_bytes;      /* of each block: stamp and stream; zeros follow */
} mls_pattern;

/* One damaged block. The found_* fields hold what a valid stamp in that place says, else 0. */
typedef struct mls_damage {
    uint64_t offset; /* in the file, of the first wrong byte; for OTHER_*, of the block (as far as it was looked at) */
    uint64_t nbytes; /* from there to the last wrong byte of the block; for OTHER_*, to the end of the block */
    uint32_t kind;   /* enum mls_damage_kind */
    uint32_t found_checkpoint;
    uint64_t found_run_id;
    uint64_t found_file_id;
    uint64_t found_offset;
} mls_damage;

/* Prepare a pattern. compressibility in percent, 0..100. Returns 0, or -EINVAL for more than 100. */
int mls_pattern_init(mls_pattern *p, uint64_t run_id, uint32_t checkpoint, uint64_t file_id,
                     uint32_t compressibility);

/* Write bytes [offset, offset + nbytes) of the pattern to dst. Any offset, length and alignment; fastest when dst is
 * a multiple of 64 and offset of 4096. Does not fail, takes no lock, allocates nothing.
 */
void mls_pattern_fill(const mls_pattern *p, void *dst, uint64_t offset, size_t nbytes);

/* Compare src with bytes [offset, offset + nbytes) of the pattern. Returns the number of damaged 4 KiB blocks and
 * describes the first `max` of them in out, in order of offset; *ndamage (may be NULL) says how many it described.
 * A first or last block that the range covers in part is judged by that part alone.
 */
size_t mls_pattern_check(const mls_pattern *p, const void *src, uint64_t offset, size_t nbytes, mls_damage *out,
                         size_t max, size_t *ndamage);

/* Short name of a damage kind ("zeroed", "other-run", ...), or "unknown". */
const char *mls_damage_kind_name(uint32_t kind);

/* Name of the instruction set in use: "avx2" or "baseline". Both make the same bytes. */
const char *mls_pattern_isa(void);

/* Use another instruction set, for tests and measurements; NULL chooses again by CPU. Returns 0, -EINVAL for a name
 * that does not exist, -ENOTSUP where this build or this CPU does not have it.
 */
int mls_pattern_set_isa(const char *name);

#endif
