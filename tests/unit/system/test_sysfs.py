"""The kernel's view: recorded machines read back, odd trees made up, and this machine's own loop devices."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nvcache.core.disks import Holder, Mount
from nvcache.core.stripe import ArrayFacts
from nvcache.system.sysfs import Kernel, parse_mountinfo
from tests.support.recorded import build, machine

NVME = {
    "dev": "259:0\n",
    "size": "2097152\n",
    "ro": "0\n",
    "removable": "0\n",
    "device/model": "M \n",
    "device/serial": " S\n",
    "device/transport": "pcie\n",
}


def line(number: str, point: str, source: str = "none", *, kind: str = "ext4", root: str = "/", optional: str = "") -> str:
    return f"36 25 {number} {root} {point} rw,noatime {optional}- {kind} {source} rw,errors=continue\n"


def test_blank_disks(tmp_path: Path) -> None:
    disks = machine("blank", tmp_path).disks()
    assert [disk.name for disk in disks] == ["nvme0n1", "nvme1n1", "nvme2n1", "nvme3n1"]
    assert {(disk.size, disk.model, disk.transport) for disk in disks} == {(1 << 30, "Microsoft NVMe Direct Disk v2", "pcie")}
    assert sorted(disk.serial for disk in disks) == ["NVME0000", "NVME0001", "NVME0002", "NVME0003"]
    assert all(disk.node == f"{tmp_path}/dev/{disk.name}" and disk.number.startswith("259:") for disk in disks)
    for disk in disks:
        assert not any((disk.holders, disk.mounts, disk.swap, disk.loop, disk.partitions, disk.hidden, disk.read_only, disk.removable))
        assert disk.vendor_listed is None
        assert (disk.probe, disk.content, disk.exclusive, disk.pv) == (None, None, None, None)


def test_partitions_mounts_swap_loops_and_mappings_count_for_the_disk(tmp_path: Path) -> None:
    parted, looped, swap, mapped = machine("partition-in-use", tmp_path).disks()
    assert parted.partitions == ("nvme0n1p1", "nvme0n1p2", "nvme0n1p3")
    assert parted.mounts == ("/tmp/a b",)
    assert (parted.swap, parted.loop) == (True, "loop1")
    assert parted.holders == (Holder("dm-1", "dm", identity="part", label="part"),)
    assert (looped.loop, looped.mounts, looped.holders) == ("loop0", (), ())
    assert (swap.swap, swap.mounts) == (True, ())
    assert mapped.holders == (Holder("dm-0", "dm", identity="odd", label="odd", mounts=("/tmp/odd",)),)
    assert mapped.mounts == ()


def test_an_array_and_its_mount(tmp_path: Path) -> None:
    kernel = machine("md-mounted", tmp_path)
    (array,) = kernel.arrays()
    members = ("nvme0n1", "nvme1n1", "nvme2n1", "nvme3n1")
    assert array == ArrayFacts("md127", f"{tmp_path}/dev/md127", "9:127", "clean", "raid0", members, 4)
    for disk in kernel.disks():
        (holder,) = disk.holders
        assert (holder.name, holder.kind, holder.mounts, disk.mounts) == ("md127", "md", ("/tmp/m",), ())
        assert holder.identity is not None
        assert len(holder.identity) == 36
    mount = next(mount for mount in kernel.mounts() if mount.point == "/tmp/m")
    assert (mount.number, mount.filesystem, mount.root) == ("9:127", "xfs", "/")
    assert {"noatime", "nodev", "nosuid", "sunit=1024"} <= set(mount.options)


def test_an_inactive_array(tmp_path: Path) -> None:
    kernel = machine("inactive", tmp_path)
    (array,) = kernel.arrays()
    assert (array.state, array.level, array.members, array.raid_disks) == ("inactive", "", ("nvme0n1", "nvme1n1"), 0)
    assert kernel.disks()[0].holders == (Holder("md127", "md"),)  # the kernel tells no UUID of it


def test_a_member_that_was_pulled_is_still_a_member(tmp_path: Path) -> None:
    kernel = machine("member-gone", tmp_path)
    (array,) = kernel.arrays()
    assert array.state == "clean"  # it does not know yet
    assert {*array.members} - {disk.name for disk in kernel.disks()} == {"nvme3n1"}


def test_a_striped_volume(tmp_path: Path) -> None:
    disks = machine("lvm", tmp_path).disks()
    assert {disk.holders for disk in disks} == {(Holder("dm-0", "dm", identity="nvcache-cache", label="nvcache-cache"),)}


def test_a_faulty_member(tmp_path: Path) -> None:
    states = {"md/dev-nvme0n1/state": "in_sync\n", "md/dev-nvme1n1/state": "faulty,in_sync\n"}
    kernel = build(tmp_path, {"md0": {"dev": "9:0\n", "md/array_state": "broken\n", "md/level": "raid0\n", "md/raid_disks": "2\n", **states}})
    (array,) = kernel.arrays()
    assert (array.state, array.members, array.faulty) == ("broken", ("nvme0n1", "nvme1n1"), ("nvme1n1",))


def test_holders_are_followed_to_the_mount(tmp_path: Path) -> None:
    """A disk, an array on its partition, a partition of the array, a mapping on that, mounted; and a swap beside it."""
    tree = {
        "nvme0n1": {**NVME, "nvme0n1p1/partition": "1\n"},
        "nvme0n1p1": {"dev": "259:1\n", "partition": "1\n", "holders/md5": ""},
        "md5": {"dev": "9:5\n", "md/array_state": "clean\n", "md/uuid": "0f0f0f0f-0000-0000-0000-000000000001\n", "md5p1/partition": "1\n"},
        "md5p1": {"dev": "259:9\n", "partition": "1\n", "holders/dm-3": "", "holders/dm-4": ""},
        "dm-3": {"dev": "253:3\n", "dm/name": "deep\n"},
        "dm-4": {"dev": "253:4\n", "dm/name": "swap\n"},
    }
    (disk,) = build(
        tmp_path, tree, line("253:3", "/deep") + line("253:3", "/deep/er", root="/part"), "Filename\n/dev/dm-4 partition 1 0 -2\n"
    ).disks()
    assert disk.holders == (Holder("md5", "md", "0f0f0f0f-0000-0000-0000-000000000001", None, ("/deep", "/deep/er", "[SWAP]")),)
    assert (disk.mounts, disk.swap) == ((), False)


def test_a_holder_of_two_partitions_is_named_once_and_a_circle_ends(tmp_path: Path) -> None:
    tree = {
        "nvme0n1": {**NVME, "nvme0n1p1/partition": "1\n", "nvme0n1p2/partition": "2\n"},
        "nvme0n1p1": {"dev": "259:1\n", "partition": "1\n", "holders/dm-0": ""},
        "nvme0n1p2": {"dev": "259:2\n", "partition": "2\n", "holders/dm-0": ""},
        "dm-0": {"dev": "253:0\n", "dm/name": "both\n", "holders/dm-0": ""},
    }
    (disk,) = build(tmp_path, tree).disks()
    assert disk.holders == (Holder("dm-0", "dm", "both", "both"),)


def test_mounts_are_matched_by_number_not_by_name(tmp_path: Path) -> None:
    tree = {"nvme0n1": NVME, "nvme1n1": {**NVME, "dev": "259:10\n"}}
    first, second = build(tmp_path, tree, line("259:10", "/data", "/dev/root") + line("259:100", "/other")).disks()
    assert (first.mounts, second.mounts) == ((), ("/data",))


def test_a_file_system_with_a_number_of_its_own_is_known_by_its_source(tmp_path: Path) -> None:
    (disk,) = build(
        tmp_path, {"nvme0n1": NVME}, line("0:45", "/data", "/dev/nvme0n1", kind="btrfs") + line("0:46", "/x", "nvme0n1", kind="tmpfs")
    ).disks()
    assert disk.mounts == ("/data",)


def test_octal_escapes(tmp_path: Path) -> None:
    (disk,) = build(tmp_path, {"nvme0n1": NVME}, line("259:0", r"/a\040b\011c\012d\134e\043f")).disks()
    assert disk.mounts == ("/a b\tc\nd\\e#f",)


def test_optional_fields_and_odd_lines_of_mountinfo() -> None:
    text = line("8:1", "/a", optional="shared:7 master:2 propagate_from:1 ") + "36 25\n\n" + line("8:2", "/-", "-", root="/-")
    assert parse_mountinfo(text.encode()) == [
        (Mount("8:1", "/a", "ext4", "/", ("rw", "noatime", "rw", "errors=continue")), "none"),
        (Mount("8:2", "/-", "ext4", "/-", ("rw", "noatime", "rw", "errors=continue")), "-"),
    ]


@given(st.binary() | st.lists(st.sampled_from([b"36", b"-", b"8:1", b"\\040", b"/a", b"rw", b"\xff"]), max_size=14).map(b" ".join))
def test_whatever_mountinfo_says(text: bytes) -> None:
    for mount, source in parse_mountinfo(text):
        assert isinstance(mount, Mount)
        assert isinstance(source, str)


def test_mountinfo_of_process_1_or_else_our_own(tmp_path: Path) -> None:
    kernel = build(tmp_path, {"nvme0n1": NVME})
    (tmp_path / "proc/self").mkdir()
    (tmp_path / "proc/self/mountinfo").write_text(line("259:0", "/ours"))
    assert [mount.point for mount in kernel.mounts()] == ["/ours"]
    (tmp_path / "proc/1/mountinfo").write_text(line("259:0", "/host"))
    assert [mount.point for mount in kernel.mounts()] == ["/host"]


@pytest.mark.parametrize("path", ["/dev/nvme0n1", "/dev/nvme0n1p1"])
def test_a_swap_is_the_disk_or_a_partition(tmp_path: Path, path: str) -> None:
    tree = {"nvme0n1": {**NVME, "nvme0n1p1/partition": "1\n"}, "nvme0n1p1": {"dev": "259:1\n", "partition": "1\n"}}
    (disk,) = build(tmp_path, tree, swaps=f"Filename Type Size Used Priority\n{path} partition 1 0 -2\n/swap\\040file file 1 0 -3\n").disks()
    assert disk.swap


def test_a_file_named_like_a_disk_is_none(tmp_path: Path) -> None:
    tree = {"nvme0n1": NVME, "loop7": {"dev": "7:7\n", "loop/backing_file": "/images/nvme0n1\n"}}
    (disk,) = build(tmp_path, tree, swaps="Filename\n/images/nvme0n1 file 1 0 -2\n").disks()
    assert (disk.loop, disk.swap) == (None, False)


def test_what_is_not_a_namespace_is_not_a_disk(tmp_path: Path) -> None:
    names = ("nvme0n1", "nvme10n12", "nvme0c1n1", "nvme0n1p1", "sda", "nvme", "nvme0", "xnvme0n1")
    tree = {name: {**NVME, "dev": f"259:{at}\n"} for at, name in enumerate(names)}
    tree["nvme0c1n1"]["hidden"] = "1\n"
    disks = {disk.name: disk for disk in build(tmp_path, tree).disks()}
    assert set(disks) == {"nvme0n1", "nvme10n12", "nvme0c1n1"}
    assert disks["nvme0c1n1"].hidden
    assert not disks["nvme0n1"].hidden


def test_flags(tmp_path: Path) -> None:
    (disk,) = build(tmp_path, {"nvme0n1": {**NVME, "ro": "1\n", "removable": "1\n", "partition": "1\n"}}).disks()
    assert (disk.read_only, disk.removable, disk.partition) == (True, True, True)


@pytest.mark.parametrize(("controllers", "transport"), [({"nvme0": "pcie"}, "pcie"), ({"nvme0": "pcie", "nvme1": "tcp"}, "pcie,tcp"), ({}, "")])
def test_a_multipath_disk_has_its_controllers_transport(tmp_path: Path, controllers: dict[str, str], transport: str) -> None:
    """Its `device` is the subsystem, which has a model and a serial number but no transport; the controllers are below it."""
    tree = {"nvme0n1": {key: value for key, value in NVME.items() if key != "device/transport"}}
    tree["nvme0n1"] |= {f"device/{name}/transport": f"{kind}\n" for name, kind in controllers.items()}
    (disk,) = build(tmp_path, tree).disks()
    assert (disk.transport, disk.model, disk.serial) == (transport, "M", "S")


def test_the_clouds_own_list(tmp_path: Path) -> None:
    tree = {"nvme0n1": NVME, "nvme1n1": {**NVME, "dev": "259:1\n"}}
    kernel = build(tmp_path, tree)
    links = tmp_path / "dev/disk/azure/local/by-serial"
    links.mkdir(parents=True)
    (tmp_path / "dev/nvme1n1").touch()
    (links / "S").symlink_to("../../../../nvme1n1")
    assert [disk.vendor_listed for disk in kernel.disks()] == [False, True]


def test_a_machine_without_anything(tmp_path: Path) -> None:
    kernel = Kernel(sys=tmp_path / "sys", proc=tmp_path / "proc", dev=tmp_path / "dev", run=tmp_path / "run")
    assert (kernel.disks(), kernel.arrays(), kernel.mounts(), kernel.swaps(), kernel.loops()) == ((), (), (), (), ())
    assert not kernel.udev_running()
    assert kernel.device(str(tmp_path)) is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(values=st.lists(st.binary(max_size=30), min_size=12, max_size=12), swaps=st.binary(max_size=80))
def test_whatever_sysfs_says(tmp_path_factory: pytest.TempPathFactory, values: list[bytes], swaps: bytes) -> None:
    folder = tmp_path_factory.mktemp("tree")
    kernel = build(folder, {"nvme0n1": {**NVME, "hidden": ""}, "md0": {"dev": "9:0", "md/level": "", "md/raid_disks": "", "md/array_state": ""}})
    files = sorted(file for file in (folder / "sys/class/block").rglob("*") if file.is_file())
    for file, value in zip(files, values, strict=False):
        file.write_bytes(value)
    (folder / "proc/swaps").write_bytes(swaps)
    (disk,), (array,) = kernel.disks(), kernel.arrays()
    assert disk.size >= 0
    assert array.raid_disks >= 0


@pytest.mark.parametrize("folder", ["usr/lib", "lib", "etc", "run"])
def test_md_rules_of_the_host(tmp_path: Path, folder: str) -> None:
    kernel = build(tmp_path, {})
    rules = tmp_path / "proc/1/root" / folder / "udev/rules.d"
    rules.mkdir(parents=True)
    (tmp_path / "proc/1/root/usr").mkdir(exist_ok=True)
    (tmp_path / "run/udev/control").touch()
    assert not kernel.md_rules()
    (rules / "63-md-raid-arrays.rules").touch()
    assert kernel.md_rules()
    (tmp_path / "run/udev/control").unlink()
    assert not kernel.md_rules()  # rules that nobody carries out


def test_what_is_no_device(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in ("/dev/null", str(tmp_path), str(tmp_path / "file"), str(tmp_path / "nothing")):
        assert Kernel().device(path) is None
