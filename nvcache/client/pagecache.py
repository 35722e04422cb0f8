"""Brings a model into the page cache with all disks at work, so that mapping it afterwards finds the bytes there. It keeps no bytes itself.

The page cache is charged to the cgroup that first touches it, so this belongs into the process or pod that loads the model.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from nvcache.client.leases import Lease
from nvcache.client.model import Model
from nvcache.client.order import Order, in_order
from nvcache.client.reading import Prefetched, Progress, reading, within


def prefetch(
    path: str | os.PathLike[str] | Lease | Model,
    *,
    threads: int | None = None,
    order: Order = "index",
    limit_bytes: int | None = None,
    on_progress: Progress | None = None,
) -> Prefetched:
    """Bring a file, every file of a model's directory, or what a lease or model is at, into the page cache; returns when the bytes are there.

    Files come in `order`: "index", the shards as the index file lists them; "name"; or a sequence of names to begin with. Everything else follows by
    name. Reads at most `limit_bytes`, and never more than this process may still use (limits of its cgroups and of the machine, less a margin);
    what is in the page cache already is neither read again nor pushed out. `on_progress` is called after each piece, and once a second at least.
    Raises OSError when a file cannot be read, TimeoutError (an OSError) when its disk has stopped answering, ValueError for fewer than one thread,
    an unknown order, or a model that is not ready.
    """
    directory = directory_of(path)
    files = within(lambda: in_order(directory, order))
    if not files:
        raise FileNotFoundError(errno.ENOENT, "no file is in it", str(directory))
    with reading(files, threads=threads, limit_bytes=limit_bytes) as begun:
        begun.wait(on_progress=on_progress)
        return begun.report()


def directory_of(path: str | os.PathLike[str] | Lease | Model) -> Path:
    """Where the model is. Raises ValueError for a lease that is not held and a model that is not ready."""
    if isinstance(path, Lease) and not path.path:
        raise ValueError(f"cannot load {path.entry}: the lease is not held")
    if isinstance(path, Model) and not path.path:
        raise ValueError(f"cannot load {path.ref}: it is {path.state}")
    found = os.fspath(path.path or "" if isinstance(path, Lease | Model) else path)
    if "://" in found:
        raise ValueError(f"cannot load {found}: it is a reference; give the directory, which `resolve` or `lease` tells")
    return Path(found)
