"""Retries after temporary errors."""

import errno
import itertools
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from torchtitan.tools.errors import first_line
from torchtitan.tools.logging import logger

T = TypeVar("T")

# Seconds before the second try. Each further wait is twice as long.
FIRST_WAIT = 1.0
RETRIES = 5
# Permanent errors: a loop of links, a file name that is too long.
_LASTING = (errno.ELOOP, errno.ENAMETOOLONG)
# The hub's client has its own error types. These modules are only loaded if the client is.
_CLIENTS = ("httpx", "httpx2")


def may_pass(error: BaseException) -> bool:
    """Whether an error may be temporary: network and file system yes; missing, forbidden or damaged files no."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status in (408, 429)
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:  # the hub did not answer
        return may_pass(error.__cause__)
    if isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)):
        return False
    if type(error).__name__ == "OfflineModeIsEnabled" or getattr(error, "errno", None) in _LASTING:
        return False
    kinds = tuple(sys.modules[name].HTTPError for name in _CLIENTS if name in sys.modules)
    return isinstance(error, (OSError, *kinds))


def retried(what: str, action: Callable[[], T], retries: int = RETRIES) -> T:
    """The result of ``action``, which is tried again up to ``retries`` times after temporary errors.

    A warning names each error and the time until the next try.
    """
    for attempt in itertools.count():
        try:
            return action()
        except Exception as error:
            if attempt >= retries or not may_pass(error):
                raise
            wait = FIRST_WAIT * 2**attempt
            logger.warning(f"{what}: {first_line(error)}; trying again in {wait:g} s ({attempt + 1} of {retries})")
            time.sleep(wait)
    raise AssertionError("unreachable")
