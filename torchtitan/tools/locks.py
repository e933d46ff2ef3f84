"""A folder that one process at a time works in."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchtitan.tools.errors import UserError


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder for as long as this one lives, or leaves the block.

    The system gives the lock back however a process ends. Where a file system has no locks, there is none.

    Raises:
        UserError: another process has the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
    except OSError:  # whoever writes there says so
        yield
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            raise UserError(f"{folder}: {holder} works in this folder; wait for it, or choose another one.") from None
        except OSError:
            pass
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield
