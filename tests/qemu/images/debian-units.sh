#!/bin/sh
# Settings: cloud-init does what the tests look at, and nothing runs that they don't.
set -eu
root=$1
cat >"$root/etc/cloud/cloud.cfg.d/90_test.cfg" <<X
datasource_list: [NoCloud]
datasource: {NoCloud: {user-data: '#cloud-config', meta-data: {dsmode: local}}}
ssh_genkeytypes: [ed25519]
cloud_init_modules: [set_hostname, users-groups, ssh]
no_ssh_fingerprints: true
X
systemctl --root="$root" --quiet enable systemd-networkd
systemctl --root="$root" --quiet mask \
    cloud-init.service cloud-config.service cloud-final.service cloud-init-hotplugd.socket \
    apt-daily.timer apt-daily-upgrade.timer fstrim.timer e2scrub_all.timer dpkg-db-backup.timer \
    systemd-tmpfiles-clean.timer e2scrub_reap.service systemd-networkd-wait-online.service \
    systemd-timesyncd.service systemd-pstore.service systemd-update-utmp.service \
    systemd-update-utmp-runlevel.service getty-static.service kmod-static-nodes.service \
    modprobe@configfs.service modprobe@dm_mod.service modprobe@drm.service \
    modprobe@efi_pstore.service modprobe@fuse.service modprobe@loop.service \
    dev-hugepages.mount dev-mqueue.mount sys-kernel-debug.mount sys-kernel-tracing.mount
rm -f "$root"/etc/ssh/ssh_host_* "$root"/etc/systemd/system/getty.target.wants/*
: >"$root/etc/machine-id"
rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/*
