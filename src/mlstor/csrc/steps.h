/* What becomes of an operation between its transfers: open, allocate, late bytes, tail, syncs, close, rename. */
#ifndef MLS_STEPS_H
#define MLS_STEPS_H

#include "worker.h"

/* Opens the file, decides the path, makes the units available. */
void mls_steps_open(mls_worker *worker, mls_op *op);

/* The first aligned direct I/O was refused: starts over, buffered, on the other crew. */
void mls_steps_fall_back(mls_worker *worker, mls_op *op, int error);

/* All units of a phase, or a sync, are done (`error`: the sync's): the next step, up to the end. */
void mls_steps_advance(mls_worker *worker, mls_op *op, int error);

/* A buffered block was transferred: start its write-back, or drop it from the cache, as the steps say. */
void mls_steps_settle(mls_op *op, uint64_t offset, uint64_t nbytes);

/* worker.c: hands over the ranges that are done. */
void mls_worker_flush_ranges(mls_worker *worker);

/* worker.c: submits a sync of `fd`; mls_steps_advance follows. */
void mls_worker_sync(mls_worker *worker, mls_op *op, int fd, int kind);

#endif
