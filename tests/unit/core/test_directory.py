"""Which directories may hold the store when somebody else mounted the disk."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given as given_any
from hypothesis import strategies as st

from nvcache.core.directory import EVICTION, DirectoryFacts, DirectoryRules, Ground, Neighbours, neighbours, refused_directory
from nvcache.core.disk_codes import DiskCode
from nvcache.core.disks import Mount

DATA = Mount("9:0", "/mnt/nvme", "xfs", options=("rw", "noatime"))
ROOT = Mount("8:1", "/", "ext4", options=("rw",))
GOOD = DirectoryFacts("/mnt/nvme/nvcache", "/mnt/nvme/nvcache", DATA, Neighbours(Ground.OTHER), free=900, total=1000)
ON_ROOT = replace(GOOD, mount=ROOT, beside=Neighbours(Ground.ROOT))


def beside(*sharers: str, unseen: tuple[str, ...] = ()) -> DirectoryFacts:
    """A directory that has others on its file system."""
    return replace(GOOD, beside=Neighbours(Ground.OTHER, sharers, unseen))


RULES = DirectoryRules()


def test_a_directory_of_its_own_is_used() -> None:
    assert refused_directory(GOOD, RULES) is None
    assert refused_directory(replace(GOOD, entries=("blobs", "format.json"), ours=True), RULES) is None


@pytest.mark.parametrize(
    "real", ["/", "/etc", "/etc/nvcache", "/usr/share", "/var", "/var/lib", "/var/lib/kubelet/nvcache", "/home/somebody", "/dev/shm"]
)
def test_directories_of_the_system_are_refused(real: str) -> None:
    refused = refused_directory(replace(GOOD, real=real), RULES)
    assert refused is not None
    assert refused[0] is DiskCode.P01


@pytest.mark.parametrize(
    ("facts", "rules", "code"),
    [
        (replace(GOOD, real=None), RULES, DiskCode.P01),
        (replace(GOOD, mount=None), RULES, DiskCode.P01),
        (ON_ROOT, RULES, DiskCode.P02),
        (ON_ROOT, DirectoryRules(allow_os_disk=True), DiskCode.P02),
        (replace(GOOD, mount=replace(DATA, filesystem="tmpfs")), RULES, DiskCode.P03),
        (replace(GOOD, mount=replace(DATA, options=("ro",))), DirectoryRules(allow_any_filesystem=True), DiskCode.P03),
        (replace(GOOD, entries=("photos",)), RULES, DiskCode.P05),
        (beside("kubelet"), RULES, DiskCode.P04),
        (beside("kubelet"), DirectoryRules(max_bytes=901), DiskCode.P04),
        (beside("kubelet", "container runtime"), DirectoryRules(max_bytes=851), DiskCode.P04),
        (GOOD, DirectoryRules(min_free=901), DiskCode.P04),
        (replace(GOOD, beside=Neighbours(Ground.UNKNOWN)), RULES, DiskCode.P02),
        (replace(GOOD, beside=Neighbours(Ground.CONTAINER)), RULES, DiskCode.P02),
        (replace(GOOD, beside=Neighbours(Ground.UNKNOWN)), DirectoryRules(max_bytes=100), DiskCode.P02),
        (beside(unseen=("container runtime",)), RULES, DiskCode.P04),
        (beside(unseen=("container runtime",)), DirectoryRules(max_bytes=851), DiskCode.P04),
    ],
)
def test_refusals(facts: DirectoryFacts, rules: DirectoryRules, code: DiskCode) -> None:
    refused = refused_directory(facts, rules)
    assert refused is not None
    assert refused[0] is code
    assert refused[1]


@pytest.mark.parametrize(
    ("facts", "rules"),
    [
        (ON_ROOT, DirectoryRules(allow_os_disk=True, max_bytes=100)),
        (replace(GOOD, mount=replace(DATA, filesystem="zfs")), DirectoryRules(allow_any_filesystem=True)),
        (beside("kubelet", "container runtime"), DirectoryRules(max_bytes=850)),
        (beside("kubelet", unseen=("container runtime",)), DirectoryRules(max_bytes=850)),
        (replace(GOOD, beside=Neighbours(Ground.UNKNOWN)), DirectoryRules(allow_os_disk=True, max_bytes=100)),
    ],
)
def test_what_the_operator_may_allow(facts: DirectoryFacts, rules: DirectoryRules) -> None:
    assert refused_directory(facts, rules) is None


# -- what can be told of the node

HOST = (ROOT, Mount("8:1", "/var/lib/kubelet", "ext4", "/var/lib/kubelet"), DATA)
STORE = Mount("9:0", "/var/lib/nvcache/mnt", "xfs", "/nvcache", ("rw",))
LAYERS = Mount("0:55", "/", "overlay")


def given(point: str, number: str, root: str, filesystem: str = "ext4") -> Mount:
    """A file that the kubelet or the runtime mounts into a container, from `root` of the file system `number`."""
    return Mount(number, point, filesystem, root)


def kubelet(number: str, home: str = "/var/lib/kubelet") -> tuple[Mount, ...]:
    """What a kubelet makes."""
    at = f"{home}/pods/6d3a"
    return (given("/etc/hosts", number, f"{at}/etc-hosts"), given("/dev/termination-log", number, f"{at}/containers/nvcache/1f"))


def runtime(number: str, home: str = "/var/lib/containerd", filesystem: str = "ext4") -> tuple[Mount, ...]:
    """What a container runtime makes."""
    at = f"{home}/io.containerd.grpc.v1.cri/sandboxes/9c"
    return (given("/etc/resolv.conf", number, f"{at}/resolv.conf", filesystem), given("/etc/hostname", number, f"{at}/hostname", filesystem))


def in_container(*witnesses: Mount, store: Mount = STORE, top: Mount = LAYERS) -> Neighbours:
    """What is told of `store` there."""
    return neighbours(store, (top, Mount("0:5", "/dev", "tmpfs"), *witnesses, store), None)


def test_on_the_host_its_own_mounts_tell() -> None:
    assert neighbours(DATA, HOST, HOST) == Neighbours(Ground.OTHER)
    assert neighbours(ROOT, HOST, HOST) == Neighbours(Ground.ROOT, ("kubelet", "container runtime"))
    striped = (ROOT, DATA, Mount("9:0", "/var/lib/containerd", "xfs", "/containerd"))
    assert neighbours(DATA, striped, striped) == Neighbours(Ground.OTHER, ("container runtime",))
    assert neighbours(STORE, (LAYERS, STORE), HOST) == Neighbours(Ground.OTHER), "a container that shares the host's processes"
    assert neighbours(replace(STORE, number="8:1"), (LAYERS,), HOST).ground is Ground.ROOT
    assert neighbours(STORE, HOST, ()).ground is Ground.UNKNOWN


def test_in_a_container_the_kubelet_s_mounts_tell() -> None:
    on_disk = replace(STORE, number="8:1", filesystem="ext4", root="/mnt/nvcache")
    assert in_container(*kubelet("8:1"), *runtime("8:1")) == Neighbours(Ground.OTHER)
    assert in_container(*kubelet("8:1"), *runtime("8:1"), store=on_disk) == Neighbours(Ground.ROOT, ("kubelet", "container runtime"))
    assert in_container(*kubelet("8:1"), *runtime("9:0", "/containerd")) == Neighbours(Ground.OTHER, ("container runtime",))


@pytest.mark.parametrize("home", ["/var/snap/microk8s/common/var/lib/kubelet", "/ostree/deploy/fedora-coreos/var/lib/kubelet", "/@/var/lib/kubelet"])
def test_a_root_file_system_is_known_by_its_var(home: str) -> None:
    assert in_container(*kubelet("8:1", home), *runtime("8:1")).ground is Ground.OTHER
    assert in_container(*kubelet("9:0", home), *runtime("9:0", "/containerd")).ground is Ground.ROOT


def test_a_kubelet_on_a_disk_of_its_own_tells_nothing_of_the_root_file_system() -> None:
    own_disk = kubelet("9:0", "/kubelet")
    assert in_container(*own_disk, *runtime("9:0", "/containerd")) == Neighbours(Ground.UNKNOWN, ("kubelet", "container runtime"))
    elsewhere = replace(STORE, number="8:1")
    assert in_container(*own_disk, *runtime("9:0", "/containerd"), store=elsewhere) == Neighbours(Ground.UNKNOWN)
    assert in_container(*own_disk, *runtime("8:1"), store=elsewhere) == Neighbours(Ground.ROOT, ("container runtime",)), "the runtime's tell it then"


def test_files_in_memory_are_no_witnesses() -> None:
    crio = runtime("0:24", "/containers/storage/overlay-containers/9c/userdata", "tmpfs")
    assert in_container(*kubelet("8:1"), *crio) == Neighbours(Ground.OTHER, (), ("container runtime",))
    assert in_container(*crio) == Neighbours(Ground.UNKNOWN, (), ("kubelet", "container runtime"))
    assert in_container() == Neighbours(Ground.UNKNOWN, (), ("kubelet", "container runtime"))


def test_a_path_that_nothing_is_mounted_on_lies_in_the_container() -> None:
    assert in_container(*kubelet("8:1"), *runtime("8:1"), store=LAYERS).ground is Ground.CONTAINER
    same_disk = replace(LAYERS, number="9:0", filesystem="btrfs")  # the runtime's layers are on the disk that the store is on
    assert in_container(*kubelet("8:1"), *runtime("8:1"), top=same_disk).ground is Ground.ROOT


NUMBERS = st.sampled_from(["8:1", "9:0", "259:3"])
ROOTS = st.sampled_from(["/", "/var/lib/kubelet/pods/1/etc-hosts", "/kubelet/pods/1/etc-hosts", "/var/lib/containerd/x", "/containers/x"])
POINTS = st.sampled_from(["/etc/hosts", "/dev/termination-log", "/etc/resolv.conf", "/etc/hostname", "/etc/other", "/etc/hosts/x"])
KINDS = st.sampled_from(["ext4", "xfs", "tmpfs", "overlay"])
SEEN = st.lists(st.builds(Mount, number=NUMBERS, point=POINTS, filesystem=KINDS, root=ROOTS), max_size=6)


@given_any(SEEN, NUMBERS, NUMBERS, st.booleans(), st.sampled_from([None, 100, 10_000]))
def test_what_cannot_be_known_is_never_accepted_silently(seen: list[Mount], number: str, top: str, allowed: bool, most: int | None) -> None:
    store = replace(STORE, number=number)
    told = neighbours(store, (Mount(top, "/", "ext4"), *seen, store), None)
    refused = refused_directory(replace(GOOD, mount=store, beside=told), DirectoryRules(allow_os_disk=allowed, max_bytes=most))
    disks = [mount for mount in seen if mount.filesystem in ("ext4", "xfs") and mount.point.count("/") == 2 and not mount.point.endswith("other")]
    proven = any("/var/" in mount.root for mount in disks) and not any("/var/" in mount.root and mount.number == number for mount in disks)
    assert (told.ground is Ground.OTHER) == (proven and number != top)
    if told.ground is not Ground.OTHER and not (allowed and most):
        assert refused is not None
    assert set(told.sharers).isdisjoint(told.unseen)
    assert set(told.sharers) | set(told.unseen) <= EVICTION.keys()
    if refused is None:
        assert most is not None or not (told.sharers or told.unseen)
        assert all(mount.number != number for mount in disks) or most is not None
