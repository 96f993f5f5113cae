#!/bin/sh
# Makes a Debian with cloud-init, systemd-networkd, sshd and the guest agent: debian.sh DIRECTORY
# writes disk.raw, vmlinuz and initrd there. As root, or as who has subordinate ids (mmdebstrap's
# mode unshare: then whoever is root there must be able to write into the directory).
#
# What is left out or masked is what costs a guest under TCG time and no test asks for.
set -eu
out=$1
here=$(cd "$(dirname "$0")" && pwd)

kernel='/lib/modules/*/kernel'
set --
for path in /usr/share/doc /usr/share/man /usr/share/locale /usr/share/i18n /usr/share/info \
    /usr/lib/udev/hwdb.d /lib/udev/hwdb.d; do
    set -- "$@" --dpkgopt="path-exclude=$path/*"
done
set -- "$@" --dpkgopt="path-exclude=$kernel/*"
for path in drivers/block/virtio_blk drivers/char drivers/net/virtio_net drivers/net/net_failover \
    net/core drivers/virtio fs/ext4 fs/jbd2 fs/mbcache fs/isofs drivers/cdrom crypto/crc \
    arch/x86/crypto/crc lib; do
    set -- "$@" --dpkgopt="path-include=$kernel/$path*"
done

truncate -s 700M "$out/disk.raw"
chmod 666 "$out/disk.raw"
exec mmdebstrap --quiet --variant=minbase --format=null \
    --include=linux-image-cloud-amd64,systemd-sysv,cloud-init,openssh-server,qemu-guest-agent \
    --include=iproute2,zstd \
    --aptopt='Acquire::Languages "none"' --dpkgopt=force-unsafe-io "$@" \
    --essential-hook="$here/debian-initramfs.sh \"\$1\"" \
    --customize-hook="$here/debian-units.sh \"\$1\"" \
    --customize-hook="download /vmlinuz $out/vmlinuz" \
    --customize-hook="download /initrd.img $out/initrd" \
    --customize-hook="$here/debian-disk.sh \"\$1\" $out/disk.raw" \
    bookworm /dev/null
