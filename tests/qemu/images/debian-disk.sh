#!/bin/sh
# A file system of a directory, without what is mounted below it, in a file that is there.
set -eu
mount --bind "$1" "$1/mnt"
mke2fs -q -t ext4 -L root -O ^has_journal -E root_owner=0:0 -d "$1/mnt" "$2"
umount "$1/mnt"
