"""What the first and the last MiB of a disk say by themselves: the second witness beside blkid. Pure; it reads no disk and decides nothing.

It is deliberately narrow: zeros (or all ones, as some SSDs read after a deallocation), the four things nvcache makes, and everything else. So it
knows fewer formats than blkid and refuses more.

Some tools write for a while before what they make can be recognised. So that a power cut in that time leaves no data of unknown owner, a disk proven
blank is claimed first: a block of our own in the last MiB names it by its serial number, and goes when the tool is done. It counts only where
nothing else is recognised.

Layouts: Linux md superblock 1.2 at 4 KiB (include/uapi/linux/raid/md_p.h), LVM2 label in one of the first four sectors, XFS superblock at 0,
ext4 superblock at 1 KiB.
"""

from __future__ import annotations

import hashlib
import struct
import uuid as uuids
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

ENDS = 1 << 20  # bytes looked at, and cleared, at each end of a disk
_MD_OFFSET = 4096
_MD_MAGIC = 0xA92B4EFC
_SECTOR = 512
CLAIM = 4096  # bytes of a claim, the first of the last `ENDS`
_CLAIM_MAGIC = b"nvcache: making something here\n"


class Kind(StrEnum):
    """What the bytes are."""

    BLANK = "blank"
    MD = "md"
    LVM = "lvm"
    XFS = "xfs"
    EXT4 = "ext4"
    CLAIM = "claim"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Content:
    """What a disk's ends hold. `uuid` in the notation that blkid uses for the kind.

    `label` is an array's full name for md, the serial number for a claim.
    """

    kind: Kind
    uuid: str | None = None
    label: str | None = None
    level: int | None = None  # md: 0 is raid0
    members: int | None = None  # md: how many the array has
    role: int | None = None  # md: this member's place
    events: int | None = None  # md


def recognise(head: bytes, tail: bytes) -> Content:
    """What the first and last `ENDS` bytes of a disk are; never raises."""
    if _uniform(head) and _uniform(tail):
        return Content(Kind.BLANK)
    found = [content for content in (_md(head), _lvm(head), _xfs(head), _ext4(head)) if content is not None]
    if found:
        return found[0] if len(found) == 1 else Content(Kind.UNKNOWN)
    return _claim(tail) or Content(Kind.UNKNOWN)


def claim(serial: str) -> bytes:
    """The block that claims the disk with this serial number."""
    body = (_CLAIM_MAGIC + serial.encode()).ljust(CLAIM - 32, b"\0")
    return body + hashlib.sha256(body).digest()


def is_claim(block: bytes) -> bool:
    """Whether a block is a whole claim, of any disk."""
    return len(block) == CLAIM and block.startswith(_CLAIM_MAGIC) and hashlib.sha256(block[:-32]).digest() == block[-32:]


def _claim(tail: bytes) -> Content | None:
    return Content(Kind.CLAIM, label=_text(tail[len(_CLAIM_MAGIC) : CLAIM - 32])) if is_claim(tail[:CLAIM]) else None


def _uniform(data: bytes) -> bool:
    return not data or (data[0] in (0x00, 0xFF) and data.count(data[0]) == len(data))


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "replace")


def _md(head: bytes) -> Content | None:
    if len(head) < _MD_OFFSET + 256:
        return None
    magic, major = struct.unpack_from("<II", head, _MD_OFFSET)
    if magic != _MD_MAGIC or major != 1:
        return None
    raw_uuid, raw_name = struct.unpack_from("<16s32s", head, _MD_OFFSET + 16)
    (level,) = struct.unpack_from("<i", head, _MD_OFFSET + 72)
    (members,) = struct.unpack_from("<I", head, _MD_OFFSET + 92)
    (number,) = struct.unpack_from("<I", head, _MD_OFFSET + 160)
    (events,) = struct.unpack_from("<Q", head, _MD_OFFSET + 200)
    return Content(Kind.MD, str(uuids.UUID(bytes=raw_uuid)), _text(raw_name), level, members, number, events)


def _lvm(head: bytes) -> Content | None:
    for sector in range(4):
        label = head[sector * _SECTOR : (sector + 1) * _SECTOR]
        if label[:8] == b"LABELONE" and label[24:32] == b"LVM2 001":
            (offset,) = struct.unpack_from("<I", label, 20)
            raw = label[offset : offset + 32]
            if len(raw) == 32:
                return Content(Kind.LVM, lvm_uuid(raw.decode("ascii", "replace")))
    return None


def lvm_uuid(plain: str) -> str:
    """32 characters in LVM's notation, 6-4-4-4-4-4-6."""
    cuts = (0, 6, 10, 14, 18, 22, 26, 32)
    return "-".join(plain[a:b] for a, b in pairwise(cuts))


def _xfs(head: bytes) -> Content | None:
    if len(head) < 120 or head[:4] != b"XFSB":
        return None
    return Content(Kind.XFS, str(uuids.UUID(bytes=head[32:48])), _text(head[108:120]))


def _ext4(head: bytes) -> Content | None:
    block = head[1024:2048]
    if len(block) < 1024 or block[0x38:0x3A] != b"\x53\xef":
        return None
    return Content(Kind.EXT4, str(uuids.UUID(bytes=block[0x68:0x78])), _text(block[0x78:0x88]))


def never_mounted(head: bytes) -> bool:
    """Whether a disk's first bytes are an ext4 file system's that was never mounted since it was made: nothing can be on it.

    By s_mtime and s_mnt_count of the superblock (kernel documentation, filesystems/ext4/super.rst).
    """
    block = head[1024:2048]
    mtime, mounts = struct.unpack_from("<IxxxxH", block, 0x2C) if _ext4(head) else (1, 1)
    return (mtime, mounts) == (0, 0)
