#!/bin/bash
# Makes the guest's kernel, initrd and root disk in ./out: Debian 12 with the storage tools, the Python packages in ./site, and no systemd.
# Runs as root in an empty directory. $RECIPE is the folder of this file.
set -euo pipefail
packages=udev,kmod,mount,util-linux,procps,iproute2,busybox-static,python3,mdadm,lvm2,dmsetup,xfsprogs,e2fsprogs,fdisk,nvme-cli,fio
sources=/etc/apt/sources.list.d/debian.sources
[ -e $sources ] || sources=
mmdebstrap --variant=essential --mode=root --aptopt='APT::Install-Recommends "false"' --dpkgopt=force-unsafe-io \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    --include=$packages bookworm root $sources

# The kernel as Debian ships it, with the modules that storage in a virtual machine needs.
kernel=$(apt-cache depends linux-image-amd64 | sed -n 's/.*Depends: linux-image-\(6.*\)/\1/p')
apt-get -o APT::Sandbox::User=root download "linux-image-$kernel"
dpkg-deb -x linux-image-"$kernel"*.deb unpacked
cp "unpacked/boot/vmlinuz-$kernel" bzimage
mkdir -p root/usr/lib/modules
( cd unpacked/lib/modules
  cp -r --parents "$kernel"/modules.* "$kernel"/kernel/{lib,crypto,block,arch/x86/crypto,net/9p} \
      "$kernel"/kernel/drivers/{nvme,md,block,virtio,char} "$kernel"/kernel/fs/{9p,ext4,xfs,jbd2,mbcache.ko,fscache,netfs,configfs} \
      ../../../root/usr/lib/modules )
chroot root depmod "$kernel"

# What runs in it.
cp -r site/. root/usr/local/lib/python3.11/dist-packages
chroot root python3 -m compileall -q -j 2 /usr/local/lib/python3.11/dist-packages || true  # some packages ship templates that are no Python
install -m 755 "$RECIPE/init" root/sbin/guest-init
install -m 755 "$RECIPE/vmctl" "$RECIPE/nvcache" root/usr/local/bin
mkdir root/host
echo '127.0.0.1 localhost' > root/etc/hosts

# An initrd that loads just enough to mount the root disk.
mkdir -p early/{bin,dev,proc,sys,root,modules} out
cp root/bin/busybox early/bin
install -m 755 "$RECIPE/early" early/init
chroot root modprobe -S "$kernel" -a --show-depends virtio_pci virtio_blk virtio_console nvme ext4 crc32c_generic 9pnet_virtio 9p |
    awk '$1 == "insmod" && !seen[$2]++ { print $2 }' |
    while read -r module; do cp "root$module" early/modules; echo "/modules/${module##*/}"; done > early/order
( cd early; find . | ../root/bin/busybox cpio -o -H newc ) > out/initrd
mke2fs -q -t ext4 -O ^has_journal -m 0 -L guest-root -d root out/root.img 2G
