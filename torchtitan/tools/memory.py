"""The C library's allocator, tuned for tensors on the CPU."""

import ctypes
import platform

# Constants of malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8


def tune_malloc() -> bool:
    """Keep freed memory in the process, so that the next tensor causes no page faults.

    By default, glibc maps every large block anew and returns it when it is freed. Encoding speech then spends a third
    of its time on page faults. All threads share one arena, because only the main arena can have large blocks. In
    return, up to 2 GB of memory stay in the process. Call it early; a second call changes nothing.

    Returns:
        whether it had an effect: True with glibc, else False.
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
