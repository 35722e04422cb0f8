"""Foreign things that somebody may have put on a disk, each with what a refusal must say of it. Shell for the guest; `$D` is the disk."""

from __future__ import annotations

from dataclasses import dataclass

_HOLD = "import os,sys,time; os.open(sys.argv[1], os.O_RDWR | os.O_EXCL); print(flush=True); time.sleep(600)"
_ARRAY = "mdadm --create /dev/md/theirs --run --homehost=any --name=theirs --level=1 --raid-devices=2 $D missing && udevadm settle"
_GPT = "printf 'label: gpt\\n,\\n' | sfdisk -q $D && udevadm settle"
_DD = "dd conv=notrunc,fsync status=none of=$D"
_LAST = "$(( $(blockdev --getsize64 $D) / 1048576 - 1 ))"  # the number of the last MiB
NETWORK_DISK = """
    modprobe -a nvmet-tcp nvme-tcp && mount -t configfs none /sys/kernel/config && cd /sys/kernel/config/nvmet
    mkdir subsystems/far subsystems/far/namespaces/1 ports/1
    echo 1 > subsystems/far/attr_allow_any_host
    echo -n 'Microsoft NVMe Direct Disk v2' > subsystems/far/attr_model
    echo -n FAR > subsystems/far/attr_serial
    truncate -s 512M /var/tmp/far
    echo -n /var/tmp/far > subsystems/far/namespaces/1/device_path
    echo 1 > subsystems/far/namespaces/1/enable
    for pair in trtype:tcp adrfam:ipv4 traddr:127.0.0.1 trsvcid:4420; do echo ${pair#*:} > ports/1/addr_${pair%:*}; done
    ln -s /sys/kernel/config/nvmet/subsystems/far ports/1/subsystems/far
    nvme connect -t tcp -a 127.0.0.1 -s 4420 -n far
"""  # an NVMe namespace behind a fabric (NVMe over TCP, from the kernel's own target), of an allowed model


@dataclass(frozen=True, slots=True)
class Foreign:
    """One thing: how it is made, how it is taken off its use (what it wrote may stay), and the code and words of the refusal.

    `needle` is what the refusal must name: what it is and whose.
    """

    name: str
    make: str
    code: str
    needle: str
    undo: str = "true"


ON_THE_DISK = (
    Foreign("gpt", "echo 'label: gpt' | sfdisk -q $D", "D09", "a gpt partition table"),
    Foreign("mbr", "echo 'label: dos' | sfdisk -q $D", "D09", "a dos partition table"),
    Foreign("ext4", "mkfs.ext4 -q -F -L precious $D", "D09", "ext4 (label precious"),
    Foreign("xfs", "mkfs.xfs -q -f -K -L precious $D", "D09", "xfs (label precious"),
    Foreign("our label on ext3", "mkfs.ext3 -q -F -L nvcache $D", "D09", "ext3 (label nvcache"),
    Foreign("lvm", "pvcreate -q $D && vgcreate -q theirs $D", "D09", "LVM2_member (volume group theirs", "vgremove -q -y theirs"),
    Foreign("lvm without group", "pvcreate -q $D", "D09", "LVM2_member (in no volume group"),
    Foreign("md", f"{_ARRAY} && mdadm --stop /dev/md/theirs", "D09", "linux_raid_member (array any:theirs, level 1", "mdadm --stop --scan"),
    Foreign(
        "luks",  # as much of a version 1 header as blkid wants
        rf"printf 'LUKS\xba\xbe\x00\x01aes' | {_DD} && printf 1d0f7c4a-7f5a-4f0e-9d5b-0d4a3a7f9b11 | {_DD} bs=1 seek=168",
        "D09",
        "crypto_LUKS",
    ),
    Foreign("swap", "mkswap -L theirs $D", "D09", "swap (label theirs"),
    Foreign(
        "two signatures",  # ext4 leaves its first KiB to others
        f"truncate -s 400M /tmp/x && mkfs.xfs -q /tmp/x && mkfs.ext4 -q -F $D && {_DD} if=/tmp/x bs=512 count=1",
        "D10",
        "several signatures",
        "rm /tmp/x",
    ),
    Foreign("raw data", f"printf 'a database' | {_DD} bs=1 seek=70000", "D16", "without a known signature"),
    Foreign("raw data at the end", f"printf 'a database' | {_DD} bs=1M seek={_LAST}", "D16", "without a known signature"),
)

IN_USE = (
    Foreign("partition", _GPT, "D06", "has partitions ({name}p1)"),
    Foreign(
        "mounted partition",
        f"{_GPT} && mkfs.ext4 -q ${{D}}p1 && mkdir -p /srv/theirs && mount -o ro ${{D}}p1 /srv/theirs",
        "D06",
        "has partitions ({name}p1), mounted at /srv/theirs",
        "umount /srv/theirs",
    ),
    Foreign(
        "mounted", "mkfs.xfs -q -f -K $D && mkdir -p /srv/theirs && mount -o ro $D /srv/theirs", "D08", "mounted at /srv/theirs", "umount /srv/theirs"
    ),
    Foreign("swap in use", "mkswap $D && swapon $D", "D08", "used as swap", "swapoff $D"),
    Foreign("loop", "modprobe loop; losetup /dev/loop0 $D", "D08", "behind the loop device loop0", "losetup -d /dev/loop0"),
    Foreign(
        "array, mounted",
        f"{_ARRAY} && mkfs.ext4 -q /dev/md/theirs && mkdir -p /mnt/aks && mount -o ro /dev/md/theirs /mnt/aks &&"
        " until grep -qx clean /sys/block/md*/md/array_state; do sleep 0.1; done",  # now neither ext4 nor md writes by itself
        "D07",
        "mounted at /mnt/aks in the host; with backend directory",
        "umount /mnt/aks && mdadm --stop --scan",
    ),
    Foreign(
        "volume",
        "pvcreate -q $D && vgcreate -q theirs $D && lvcreate -q -y -l 100%FREE -n data theirs",
        "D07",
        "in use by dm-0 (theirs-data)",
        "vgremove -q -y -f theirs",
    ),
    Foreign("mapping of a blank disk", "echo 0 2048 linear $D 0 | dmsetup create theirs", "D07", "in use by dm-0 (theirs)", "dmsetup remove theirs"),
    Foreign(
        "held exclusively",
        f"(setsid python3 -c '{_HOLD}' $D & echo $! > /tmp/holder) | read",
        "D12",
        "holds it exclusively",
        "kill $(cat /tmp/holder)",
    ),
    Foreign(
        "mounted in another namespace",
        "mkfs.ext4 -q -F $D && mkdir -p /srv/theirs && "
        "(unshare -m bash -c 'mount -o ro $0 /srv/theirs && echo && exec sleep 600' $D & echo $! > /tmp/holder) | read && "
        "! grep -q $D /proc/1/mountinfo",
        "D12",
        "holds it exclusively",
        "kill $(cat /tmp/holder); until ! pgrep -x sleep; do sleep 0.1; done",
    ),
    Foreign("read-only", "blockdev --setro $D", "D04", "read-only", "blockdev --setrw $D"),
)

ERASE = f"""
    sync; udevadm settle
    {_DD} if=/dev/zero bs=1M count=2
    {_DD} if=/dev/zero bs=1M count=1 seek={_LAST}
    blockdev --rereadpt $D; udevadm settle
"""
