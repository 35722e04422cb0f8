"""The claim on an ingest: its folder, open and locked, so that one task at a time touches the files in it. It reads and writes none of them.

The lock is a flock: the kernel drops it with the process that held it, however that ended. Who holds it reaches the files through the descriptor.
"""

from __future__ import annotations

import fcntl
import os
import threading
from contextlib import suppress
from pathlib import Path
from time import monotonic

from nvcache.errors import Code, DiskError
from nvcache.store.folders import DIRECTORY

PATIENCE = 15.0  # seconds an open waits for another task to let go: a killed worker may take that long to leave a slow disk
POLL = 0.05


def claim(folder: Path) -> int:
    """Make the folder if it is not there and claim it; close the descriptor to let go.

    Raises OSError, `DiskError` (disk-stalled) when another task does not let go within `PATIENCE`.
    """
    until = monotonic() + PATIENCE
    never = threading.Event()
    while True:
        with suppress(FileExistsError):
            folder.mkdir(0o700)
        with suppress(FileNotFoundError):  # the one who had it removed it just now
            home = try_claim(folder)
            if home is not None:
                return home
        if monotonic() >= until:
            raise DiskError(Code.DISK_STALLED, f"cannot open the ingest {folder.name}: another task still writes it")
        never.wait(POLL)


def try_claim(folder: Path) -> int | None:
    """Claim the folder at once; None while another task has it. Raises OSError, FileNotFoundError when there is none."""
    home = os.open(folder, DIRECTORY)
    try:
        fcntl.flock(home, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The one who had it may have removed it, and a third made another: a lock on the old one would keep nobody out.
        mine = _there(home, folder)
    except BlockingIOError:
        mine = False
    except BaseException:
        os.close(home)
        raise
    if mine:
        return home
    os.close(home)
    return None


def empty(home: int) -> None:
    """Remove the files of a claimed ingest, the journal before the data it speaks of. Raises OSError."""
    for name in ("journal", "data"):
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=home)


def remove(home: int, folder: Path) -> None:
    """Remove a claimed ingest; the claim is still to be closed. A folder that took the place of the claimed one stays. Raises OSError."""
    empty(home)
    with suppress(FileNotFoundError):
        if _there(home, folder):
            folder.rmdir()


def _there(home: int, folder: Path) -> bool:
    return os.path.samestat(os.fstat(home), os.lstat(folder))
