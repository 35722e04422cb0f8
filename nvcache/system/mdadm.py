"""Makes, assembles and stops the md array, by mdadm. It finds and judges nothing: whether it worked is read from the kernel, not from exit statuses.

Never `--run` or `--force`: mdadm asks before it writes over something, its standard input is empty, and that is a no.
"""

from __future__ import annotations

from collections.abc import Sequence

from nvcache.core.disks import NAME
from nvcache.system.run import Finished, Tools
from nvcache.system.sysfs import Kernel

_LINK = f"/dev/md/{NAME}"
_ANY = range(256)


def create(tools: Tools, kernel: Kernel, members: Sequence[str], *, chunk_kib: int = 512) -> Finished:
    """Make a raid0 of the nodes `members` (two at least), in this order; its data begins at 1 MiB of each.

    Raises `DiskError`: tool-missing, tool-failed, tool-stalled.
    """
    options = (
        "--metadata=1.2",
        "--level=0",
        "--data-offset=1M",
        f"--chunk={chunk_kib}K",
        "--homehost=any",
        f"--name={NAME}",
        f"--raid-devices={len(members)}",
    )
    return tools.run("mdadm", "--create", _LINK, *options, *members, timeout=120, accept=_ANY, env=_env(kernel))


def assemble(tools: Tools, kernel: Kernel, uuid: str, members: Sequence[str]) -> Finished:
    """Start the array `uuid` from the nodes `members`, all of them. Raises `DiskError`: tool-missing, tool-failed, tool-stalled."""
    return tools.run("mdadm", "--assemble", _LINK, f"--uuid={uuid}", "--homehost=any", *members, timeout=120, accept=_ANY, env=_env(kernel))


def stop(tools: Tools, kernel: Kernel, node: str) -> Finished:
    """Stop the array at `node`; it stays when somebody uses it. Raises `DiskError`: tool-missing, tool-failed, tool-stalled."""
    return tools.run("mdadm", "--stop", node, timeout=60, accept=_ANY, env=_env(kernel))


def _env(kernel: Kernel) -> dict[str, str]:
    """Without udev's rules for md, mdadm would wait four seconds for a link that nobody makes."""
    return {} if kernel.md_rules() else {"MDADM_NO_UDEV": "1"}
