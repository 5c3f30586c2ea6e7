"""Run a command under a seccomp filter that refuses io_uring, as container runtimes do:

python tests/seccomp.py EPERM mlstor doctor
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
RET_ALLOW, RET_ERRNO = 0x7FFF0000, 0x00050000
# Classic BPF on struct seccomp_data, whose first word is the number of the call.
LD_NR, JGE, JGT, RET = 0x20, 0x35, 0x25, 0x06
IO_URING_SETUP, IO_URING_REGISTER = 425, 427  # the same on every architecture; io_uring_enter is 426


def refuse_io_uring(error: int, first: int = IO_URING_SETUP) -> None:
    """Make the io_uring calls of this process from `first` on, and of what it becomes, fail with `error`.

    Can't be undone.
    """
    program = b"".join(
        struct.pack("=HBBI", *instruction)
        for instruction in (
            (LD_NR, 0, 0, 0),
            (JGE, 0, 2, first),
            (JGT, 1, 0, IO_URING_REGISTER),
            (RET, 0, 0, RET_ERRNO | error),
            (RET, 0, 0, RET_ALLOW),
        )
    )
    code = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0)):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "prctl refused the seccomp filter")


if __name__ == "__main__":
    refuse_io_uring(getattr(errno, sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
