"""What a pod imports: find, await and hold a model, bring it into the page cache, map it. Standard library only; it imports nothing else of nvcache.

    from nvcache import client

    path = client.resolve("org/name", default="org/name")      # ready: its directory; else the fallback, at once
    model = client.ensure("org/name", timeout=600)             # make it ready and wait
    with client.lease("org/name") as lease:                    # nobody removes it meanwhile
        tensors = client.load_safetensors(lease, "pt")         # all disks at once, then memory-mapped

`prefetch` alone brings the files into the page cache, for a loader that is not ours; `stream_safetensors` gives tensors while it reads.

`NVCACHE_URL`, `NVCACHE_SOCKET` and `NVCACHE_TOKEN_FILE` say where the daemon is. Errors are `Problem`, with the code of docs/errors.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nvcache.client.client import DAEMON_SECONDS, Client, Fallback
from nvcache.client.leases import Lease
from nvcache.client.load import load_safetensors, stream_safetensors
from nvcache.client.model import Model
from nvcache.client.pagecache import prefetch
from nvcache.client.reading import Prefetched
from nvcache.client.transport import Problem

__all__ = ["Client", "Lease", "Model", "Prefetched", "Problem", "ensure", "lease", "load_safetensors", "prefetch", "resolve", "stream_safetensors"]


def resolve(ref: str, default: Fallback | None = None) -> str | Fallback | None:
    """`Client.resolve` of the default daemon."""
    return Client().resolve(ref, default)


def ensure(
    ref: str,
    *,
    wait: bool = True,
    timeout: float | None = None,
    wait_daemon: float = DAEMON_SECONDS,
    on_progress: Callable[[Mapping[str, Any]], None] | None = None,
    **wish: object,
) -> Model:
    """`Client.ensure` of the default daemon."""
    return Client().ensure(ref, wait=wait, timeout=timeout, wait_daemon=wait_daemon, on_progress=on_progress, **wish)


def lease(ref: str, *, holder: str | None = None, ttl: float | None = None, adopt: bool = False) -> Lease:
    """`Client.lease` of the default daemon."""
    return Client().lease(ref, holder=holder, ttl=ttl, adopt=adopt)
