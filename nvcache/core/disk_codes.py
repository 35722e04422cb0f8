"""Every code the disks part can answer with, in one table: what it means and what to do. It decides nothing; `disks` and `stripe` do.

docs/troubleshooting.md is generated from here. Codes never change meaning: D a disk is not used, N the node has no stripe, P a directory is not used,
W the stripe works but somebody should know, R it was repaired by making it anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class DiskCode(StrEnum):
    """The stable names."""

    D01 = "D01"
    D02 = "D02"
    D03 = "D03"
    D04 = "D04"
    D05 = "D05"
    D06 = "D06"
    D07 = "D07"
    D08 = "D08"
    D09 = "D09"
    D10 = "D10"
    D11 = "D11"
    D12 = "D12"
    D13 = "D13"
    D14 = "D14"
    D15 = "D15"
    D16 = "D16"
    D17 = "D17"
    D18 = "D18"
    N00 = "N00"
    N01 = "N01"
    N02 = "N02"
    N03 = "N03"
    N04 = "N04"
    N05 = "N05"
    N06 = "N06"
    N07 = "N07"
    N08 = "N08"
    N09 = "N09"
    P01 = "P01"
    P02 = "P02"
    P03 = "P03"
    P04 = "P04"
    P05 = "P05"
    P06 = "P06"
    W01 = "W01"
    W02 = "W02"
    W03 = "W03"
    W04 = "W04"
    R01 = "R01"


@dataclass(frozen=True, slots=True)
class DiskCodeFacts:
    """What a code means and what a person does about it."""

    meaning: str
    remedy: str


DISK_CODES: dict[DiskCode, DiskCodeFacts] = {
    DiskCode.D01: DiskCodeFacts(
        "it is not a whole local NVMe namespace: a partition, a hidden path of a multipath disk, or a disk behind a network",
        "nothing; such disks are never used",
    ),
    DiskCode.D02: DiskCodeFacts(
        "its model is a remote cloud disk",
        "nothing; remote disks are never used. If the node has no other, its local NVMe may have been turned into an ephemeral OS disk: "
        "create the node pool with a managed OS disk",
    ),
    DiskCode.D03: DiskCodeFacts(
        "its model is not on the list of local, disposable disks",
        "add the model to disk_models, only if what is on such disks may be lost at any time",
    ),
    DiskCode.D04: DiskCodeFacts("it is read-only, removable or has no size", "look at the kernel log; replace the disk or exclude its serial number"),
    DiskCode.D05: DiskCodeFacts("it is smaller than min_disk", "lower min_disk if the disk is meant to be used"),
    DiskCode.D06: DiskCodeFacts("it has partitions", "free it: whoever made the partitions must remove them; or exclude its serial number"),
    DiskCode.D07: DiskCodeFacts(
        "another array or volume is built on it",
        "if the node's image already stripes its disks (the mount point is in the message), use backend directory below that mount point; "
        "otherwise free the disk or exclude its serial number",
    ),
    DiskCode.D08: DiskCodeFacts(
        "it is mounted, used as swap, or the file behind a loop device", "unmount it or exclude its serial number; a mounted disk is never touched"
    ),
    DiskCode.D09: DiskCodeFacts(
        "something that nvcache did not make is on it",
        "look at what it is. If it may go: `nvcache disks wipe --serial SERIAL --yes-destroy`; otherwise exclude its serial number",
    ),
    DiskCode.D10: DiskCodeFacts(
        "it carries several signatures, or its two witnesses disagree about what is on it",
        "look at it with `wipefs DEVICE` (which only lists). If it may go: `nvcache disks wipe`",
    ),
    DiskCode.D11: DiskCodeFacts("it cannot be read", "look at the kernel log; the disk is failing or is gone"),
    DiskCode.D12: DiskCodeFacts(
        "another program or kernel subsystem holds it exclusively",
        "find out who: a mount in another mount namespace (another container), swap, an array, or a program that opened it",
    ),
    DiskCode.D13: DiskCodeFacts("another nvcache or udev works on it just now", "wait and try again; two disks parts on one node are a mistake"),
    DiskCode.D14: DiskCodeFacts(
        "the disks differ in size by more than 1 %",
        "exclude the odd one by its serial number, or set allow_unequal (the stripe uses them fully only in part)",
    ),
    DiskCode.D15: DiskCodeFacts(
        "fewer disks came up than expected_disks says", "look for the missing disk; lower expected_disks if the node really has fewer"
    ),
    DiskCode.D16: DiskCodeFacts(
        "it holds data without any signature that is known: a raw database may be on it",
        "if the data may go: `nvcache disks wipe --serial SERIAL --yes-destroy`; otherwise exclude its serial number",
    ),
    DiskCode.D17: DiskCodeFacts("its serial number is excluded by disk_exclude", "nothing, if that is as meant"),
    DiskCode.D18: DiskCodeFacts(
        "it failed while it was part of the stripe and is left out until the node restarts",
        "replace the node or the disk; the cache goes on without it",
    ),
    DiskCode.N00: DiskCodeFacts(
        "the node has no local NVMe disk that may be used",
        "look at the reason given for each disk; use backend directory where the disks are already mounted",
    ),
    DiskCode.N01: DiskCodeFacts(
        "members of the stripe are missing and on_lost is refuse",
        "bring the disks back, or set on_lost = rebuild: the cache is then made anew, empty",
    ),
    DiskCode.N02: DiskCodeFacts(
        "the stripe holds something that nvcache did not make",
        "look at it; if it may go: `nvcache disks teardown`, then `disks wipe` where that is asked for",
    ),
    DiskCode.N03: DiskCodeFacts(
        "a disk of an allowed model is refused, and require_all is set",
        "free the disk, exclude its serial number, wipe it by serial number, set require_all = false, or use backend directory",
    ),
    DiskCode.N04: DiskCodeFacts(
        "the stripe failed and processes still hold it", "end the processes shown (pods that loaded from it); it is tried again by itself"
    ),
    DiskCode.N05: DiskCodeFacts("an array or volume group named nvcache is there that is not ours", "rename or remove it; nvcache does not touch it"),
    DiskCode.N06: DiskCodeFacts(
        "a storage command or the disk does not answer",
        "look at the kernel log; the command is not started again while it hangs; a reboot may be needed",
    ),
    DiskCode.N07: DiskCodeFacts(
        "the mount point is taken: something else is mounted there, or several layers are",
        "unmount what is there (findmnt PATH), or choose another mount",
    ),
    DiskCode.N08: DiskCodeFacts(
        "a storage command failed, or the kernel does not show what it should have made",
        "look at the message and the kernel log; `nvcache disks ensure` may be repeated",
    ),
    DiskCode.N09: DiskCodeFacts(
        "the mounted file system carries no marker of this stripe, or another stripe's", "unmount it and look at what it is; nvcache does not use it"
    ),
    DiskCode.P01: DiskCodeFacts("the directory is not one nvcache may live in", "name an absolute path of its own, such as /mnt/nvme/nvcache"),
    DiskCode.P02: DiskCodeFacts(
        "the directory is on the node's root file system, or in a container that cannot tell whether it is",
        "mount a disk there, or set allow_os_disk and max_bytes to use it knowingly",
    ),
    DiskCode.P03: DiskCodeFacts("the file system is not xfs, ext4 or btrfs, or is read-only", "use a local file system, or set allow_any_filesystem"),
    DiskCode.P04: DiskCodeFacts(
        "the file system is shared with kubelet or the container runtime, or may be, or has too little room",
        "set max_bytes so that the eviction threshold stays free (10 % for kubelet, 15 % for images)",
    ),
    DiskCode.P05: DiskCodeFacts("the directory is not empty and was not made by nvcache", "name an empty directory"),
    DiskCode.P06: DiskCodeFacts("another file system is there than at the start", "find out who unmounted or re-made it, then restart nvcache"),
    DiskCode.W01: DiskCodeFacts(
        "allowed disks are not in the stripe",
        "the stripe is not grown; `disks teardown` and `disks ensure` make a new one of all (the cache is then empty)",
    ),
    DiskCode.W02: DiskCodeFacts(
        "the stripe was made with another backend or file system than is set",
        "it is used as it is; `disks teardown` and `disks ensure` make a new one",
    ),
    DiskCode.W03: DiskCodeFacts("the cloud's own list of local disks lacks this one", "check that the disk is local and disposable"),
    DiskCode.W04: DiskCodeFacts(
        "a queue setting is not as `[tuning]` wants it",
        "set a value that the kernel takes (the message says why this one is not), or leave it out; the stripe is used as it is",
    ),
    DiskCode.R01: DiskCodeFacts("members of the stripe were missing or failed; it was made anew, empty", "nothing; the models are fetched again"),
}
