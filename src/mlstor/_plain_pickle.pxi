# Part of _io.pyx: whether a pickle does only what plain containers and dense tensors need, from its operations alone.

from libc.stdlib cimport malloc
from libc.string cimport memchr

#: What lies on the pickle's stack and in its memo.
cdef unsigned char VALUE = 0      # a number, a string, None, a tensor, a storage, its kind, a dtype
cdef unsigned char TUPLE = 1
cdef unsigned char LIST = 2
cdef unsigned char MAPPING = 3    # a dict
cdef unsigned char ORDERED = 4    # an OrderedDict
cdef unsigned char CLASS = 5      # that class itself
cdef unsigned char FUNCTION = 6   # to be called, and nothing else
cdef unsigned char MARK = 7
cdef dict PICKLED = {"value": VALUE, "OrderedDict": CLASS, "function": FUNCTION}


cdef struct Machine:
    unsigned char *stack
    Py_ssize_t depth
    unsigned char *memo
    Py_ssize_t kept


# Takes `count` values off; False if they are not there.
cdef bint take(Machine *machine, Py_ssize_t count) noexcept nogil:
    cdef Py_ssize_t i
    if machine.depth < count:
        return False
    for i in range(count):
        if machine.stack[machine.depth - 1 - i] >= FUNCTION:
            return False
    machine.depth -= count
    return True


# Takes the values above the last mark off, and it; how many, or -1.
cdef Py_ssize_t take_marked(Machine *machine) noexcept nogil:
    cdef Py_ssize_t count = 0
    while count < machine.depth and machine.stack[machine.depth - 1 - count] != MARK:
        count += 1
    if count == machine.depth or not take(machine, count):
        return -1
    machine.depth -= 1
    return count


cdef bint top_is(Machine *machine, unsigned char one, unsigned char other) noexcept nogil:
    return machine.depth > 0 and machine.stack[machine.depth - 1] in (one, other)


# An operation without an argument. False if it is none that is plain here.
cdef bint step(Machine *machine, unsigned char code) noexcept nogil:
    cdef Py_ssize_t count
    cdef unsigned char made
    if code in (c"N", 0x88, 0x89):  # None, True, False
        made = VALUE
    elif code == c"(":
        made = MARK
    elif code == c")":
        made = TUPLE
    elif code == c"]":
        made = LIST
    elif code == c"}":
        made = MAPPING
    elif code == c"t":
        if take_marked(machine) < 0:
            return False
        made = TUPLE
    elif code in (0x85, 0x86, 0x87):  # tuples of one, two and three
        if not take(machine, code - 0x84):
            return False
        made = TUPLE
    elif code == c"R":  # a call: its arguments, and what is called
        if not (top_is(machine, TUPLE, TUPLE) and take(machine, 1) and top_is(machine, CLASS, FUNCTION)):
            return False
        machine.depth -= 1
        made = ORDERED if machine.stack[machine.depth] == CLASS else VALUE
    elif code == c"Q":  # a reference
        if not (top_is(machine, TUPLE, TUPLE) and take(machine, 1)):
            return False
        made = VALUE
    elif code == c"s":  # an item
        return take(machine, 2) and top_is(machine, MAPPING, ORDERED)
    elif code == c"u":  # items
        count = take_marked(machine)
        return count >= 0 and count % 2 == 0 and top_is(machine, MAPPING, ORDERED)
    elif code == c"a":  # an element
        return take(machine, 1) and top_is(machine, LIST, LIST)
    elif code == c"e":  # elements
        return take_marked(machine) >= 0 and top_is(machine, LIST, LIST)
    elif code == c"b":  # attributes
        return top_is(machine, MAPPING, MAPPING) and take(machine, 1) and top_is(machine, ORDERED, ORDERED)
    else:
        return False
    machine.stack[machine.depth] = made
    machine.depth += 1
    return True


# Bytes that follow an operation; 0 for those without an argument.
cdef Py_ssize_t argument_nbytes(unsigned char code) noexcept nogil:
    if code in (c"K", c"q", c"h", 0x8A):  # BININT1, BINPUT, BINGET, LONG1
        return 1
    if code == c"M":  # BININT2
        return 2
    if code in (c"J", c"r", c"j", c"X"):  # BININT, LONG_BINPUT, LONG_BINGET, BINUNICODE
        return 4
    return 8 if code == c"G" else 0  # BINFLOAT


cdef bint with_argument(Machine *machine, unsigned char code, uint32_t number) noexcept nogil:
    if code in (c"q", c"r"):
        if number > machine.kept or not machine.depth or machine.stack[machine.depth - 1] == MARK:
            return False
        machine.memo[number] = machine.stack[machine.depth - 1]
        machine.kept += number == machine.kept
        return True
    if code in (c"h", c"j") and number >= machine.kept:
        return False
    machine.stack[machine.depth] = machine.memo[number] if code in (c"h", c"j") else VALUE
    machine.depth += 1
    return True


# The kind of what a GLOBAL names, or MARK; *at goes behind it.
cdef int named(const unsigned char[::1] data, Py_ssize_t *at, Py_ssize_t most, dict names) except -1:
    cdef Py_ssize_t start = at[0], end = min(data.shape[0], start + most)
    cdef const unsigned char *line
    for _ in range(2):
        line = <const unsigned char *>memchr(&data[at[0]], c"\n", end - at[0]) if at[0] < end else NULL
        if line == NULL:
            return MARK
        at[0] = line - &data[0] + 1
    return PICKLED.get(names.get(bytes(data[start : at[0] - 1])), MARK)


def is_plain_pickle(const unsigned char[::1] data not None, dict names not None):
    """Whether a pickle does no more than build plain containers, and tensors by calls of what `names` allows.

    Python's C unpickler may then read it in place of torch's restricted one. Plain are those of protocol 2's operations
    that picklers write for lists, tuples, mappings, strings, numbers and references. A run over the kinds of what is on
    the stack shows that items are set in mappings alone, elements appended to lists and attributes set on an
    ``OrderedDict`` from a dict, and that only what is named is called. The numbers of the memo follow each other: the
    unpickler takes memory for the highest one.

    Parameters
    ----------
    data
        Contiguous bytes. Two bytes of memory are taken for each.
    names : dict of bytes to {"value", "OrderedDict", "function"}
        By module and name with a line end between: an object that is only passed on; that class; what makes a value.

    Raises
    ------
    MemoryError
    """
    cdef Py_ssize_t at = 2, end = data.shape[0], nbytes, most = 1 + max(map(len, names), default=0)
    cdef uint32_t number, i
    cdef int kind
    cdef unsigned char code
    cdef Machine machine
    if end < 2 or data[0] != 0x80 or data[1] != 2:
        return False
    machine.depth = machine.kept = 0
    machine.stack = <unsigned char *>malloc(2 * <size_t>end)
    if machine.stack == NULL:
        raise MemoryError
    machine.memo = machine.stack + end
    try:
        while at < end:
            code = data[at]
            at += 1
            if code == c".":
                return at == end and machine.depth == 1 and take(&machine, 1)
            nbytes = argument_nbytes(code)
            if code == c"c":
                kind = named(data, &at, most, names)
                if kind == MARK:
                    return False
                machine.stack[machine.depth] = kind
                machine.depth += 1
            elif not nbytes:
                if not step(&machine, code):
                    return False
            else:
                if end - at < nbytes:
                    return False
                number = 0
                for i in range(4 if nbytes > 4 else nbytes):
                    number |= <uint32_t>data[at + i] << 8 * i
                at += nbytes
                if code == 0x8A or code == c"X":  # their text follows
                    if number > end - at:
                        return False
                    at += number
                if not with_argument(&machine, code, number):
                    return False
        return False
    finally:
        free(machine.stack)
