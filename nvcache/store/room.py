"""Measures the store: what its parts take and what the file system has left. It promises and removes nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass

from nvcache.store.blobs import Blobs
from nvcache.store.files import disk_errors
from nvcache.store.layout import Layout

_SECTOR = 512  # the unit of st_blocks, whatever the file system's block is (stat(2))


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes on the disk: blobs, quarantine, and ingests by key (what is allocated to them); `free` and `total` of the file system."""

    blobs: int
    quarantined: int
    ingests: dict[str, int]
    free: int
    total: int

    @property
    def used(self) -> int:
        """All of the store's own."""
        return self.blobs + self.quarantined + sum(self.ingests.values())


def measure(layout: Layout, blobs: Blobs) -> Measured:
    """Look at the disk. Raises `DiskError`."""
    with disk_errors(f"measure the store {layout.root}"):
        room = os.statvfs(layout.root)
    return Measured(
        blobs=blobs.used_bytes(),
        quarantined=blobs.quarantined_bytes(),
        ingests=allocated(layout),
        free=room.f_bavail * room.f_frsize,
        total=room.f_blocks * room.f_frsize,
    )


def allocated(layout: Layout) -> dict[str, int]:
    """Ingest key → bytes its data has on the disk, reserved ones included. Raises `DiskError`."""
    found: dict[str, int] = {}
    with disk_errors("list the ingests"):
        for child in os.scandir(layout.ingest):
            if child.path in (str(layout.plans), str(layout.receipts)):
                continue
            try:
                found[child.name] = os.lstat(f"{child.path}/data").st_blocks * _SECTOR
            except (FileNotFoundError, NotADirectoryError):
                found[child.name] = 0
    return found
