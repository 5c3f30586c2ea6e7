# Part of _io.pyx: random orders of [0, n), by position.


cdef size_t order_count(_View view, uint64_t start, uint64_t step) except? 0:
    """How many numbers the buffer takes, if their positions stay below 2^64."""
    if view.view.len % sizeof(uint64_t) or <uintptr_t>view.view.buf % sizeof(uint64_t):
        raise ValueError(f"out has {view.view.len} bytes; give a buffer of aligned 64-bit numbers")
    cdef size_t count = view.view.len // sizeof(uint64_t)
    if count and int(start) + int(step) * (count - 1) > UINT64_MAX:
        raise ValueError(f"position {start} + {step} * {count - 1} is beyond 2^64")
    return count


def permute(out, uint64_t n, uint64_t seed, uint64_t epoch=0, uint64_t start=0, uint64_t step=1):
    """Fills `out` with the values of a random permutation of [0, n) at positions start, start + step, ...

    Constant time and no memory per value, whatever `n` is; see csrc/permute.h. The order depends on `n`, `seed` and
    `epoch` alone, and is the same on every machine and in every version.

    Parameters
    ----------
    out : buffer of uint64
    n : int
        1 to 2^63.
    seed, epoch : int
        64 bits each. Any two pairs give unlike orders.
    start, step : int
        Positions; those from `n` on begin again with position 0 of the same epoch.

    Raises
    ------
    ValueError
        If `n` is out of range, `out` holds no 64-bit numbers, or a position is beyond 2^64.
    """
    cdef _View view = _View(out, True)
    cdef size_t count = order_count(view, start, step)
    cdef mls_permutation order
    if mls_permutation_init(&order, n, seed, epoch) < 0:
        raise ValueError(f"n is 1 to 2^63, not {n}")
    with nogil:
        mls_permute_array(&order, <uint64_t *>view.view.buf, start, step, count)


def draw(out, uint64_t n, uint64_t seed, uint64_t epoch=0, uint64_t start=0, uint64_t step=1):
    """Fills `out` with independent draws from [0, n), with replacement; parameters and errors as for `permute`.

    A draw depends on `n`, `seed`, `epoch` and its position alone. One value is likelier than another by a factor of at
    most 1 + n / 2^64.
    """
    cdef _View view = _View(out, True)
    cdef size_t count = order_count(view, start, step)
    cdef int status
    with nogil:
        status = mls_draw_array(n, seed, epoch, <uint64_t *>view.view.buf, start, step, count)
    if status < 0:
        raise ValueError(f"n is 1 to 2^63, not {n}")
