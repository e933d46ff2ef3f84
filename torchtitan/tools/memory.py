"""The C library's allocator, tuned for tensors on the CPU."""

import ctypes
import platform

# Names of malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8


def tune_malloc() -> bool:
    """Keep freed memory in the process, so that the next tensor does not fault its pages in again.

    By default glibc maps every large block anew and gives it back when it is freed: encoding speech spends a third of
    its time on page faults then. One arena serves all threads, since only the main arena can hold large blocks. The
    cost is that memory of up to 2 GB is not returned to the system. Call it early; a second call changes nothing.

    Returns:
        whether it took effect: True with glibc, False elsewhere, where nothing is changed.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    mallopt(_M_ARENA_MAX, 1)
    # glibc before 2.35 refuses more than 32 MB.
    done = mallopt(_M_MMAP_THRESHOLD, 1 << 30) or mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    return bool(done and mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1) and mallopt(_M_TOP_PAD, 256 << 20))
