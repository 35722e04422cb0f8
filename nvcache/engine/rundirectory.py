"""Makes the run directory and the one above it, where the disks process and the daemon leave each other word. It changes nothing that somebody set.

::

    /run/nvcache          root:GID 3775   the daemon may add files here; what root put here it can neither rename nor replace (the sticky bit)
    /run/nvcache/disks    root:root 0755  the run directory: root's alone to write

The kubelet makes the upper one for whichever pod comes first, as root's and 0755, and an init container of the daemon's pod may give it away first.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nvcache.engine.lock import FOLDER

PLAIN, SHARED = 0o755, 0o3775
OURS = frozenset({"pods", "serve.json", "nvcache.sock", "admin.sock"})  # what the upper directory may hold besides the run directory


def make_run_directory(run_directory: Path, group: int | None) -> None:
    """Have both directories; the upper one is shared with `group`, the daemon's (None: it stays as it is). Raises OSError.

    It is shared only if it is as `mkdir` leaves it: our own, 0755, and with nothing in it but what is nvcache's, for it may be /var/lib as well.
    Another mode or owner was somebody's choice, and so is a link: those stay.
    """
    upper = run_directory.parent
    _make(upper)
    if group is not None and not upper.is_symlink():
        with _opened(upper) as handle:
            facts = os.fstat(handle)
            as_made = (facts.st_uid, stat.S_IMODE(facts.st_mode)) == (os.geteuid(), PLAIN)
            if as_made and {path.name for path in upper.iterdir()} <= OURS | {run_directory.name}:
                os.fchown(handle, -1, group)
                os.fchmod(handle, SHARED)
    _make(run_directory)


def _make(path: Path) -> None:
    """Have it; one that was not there is ours and 0755, whatever the umask and the directory above say: the daemon is another user."""
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        return
    with _opened(path) as handle:
        os.fchown(handle, -1, os.getegid())
        os.fchmod(handle, PLAIN)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    handle = os.open(path, FOLDER)
    try:
        yield handle
    finally:
        os.close(handle)
