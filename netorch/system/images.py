"""Disk images: what stands in their headers, read without QEMU, which might follow it.

A qcow2 header can name other files: a backing file, which its reader goes on in, and an external
data file. Whoever could write the image could name any file there, so netorch hands QEMU only
those that the topology names (`disk_checks`), and reads headers by itself.
"""

import os
import stat
import struct
from pathlib import Path
from typing import NamedTuple

from netorch.errors import ImageError

_QCOW2 = b"QFI\xfb"
_BACKING_FORMAT = 0xE2792ACA
_EXTERNAL_DATA = 1 << 2

# Formats that QEMU knows and netorch doesn't, by where their mark is (block/*.c of QEMU).
_OTHERS = (
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0, b"QED\0", "qed"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
)


class Header(NamedTuple):
    """What a qcow2 file says of itself (docs/interop/qcow2.txt). `backing` is "" without one."""

    size: int
    backing: str
    backing_format: str
    encrypted: bool
    external_data: bool


def image_format(path: Path) -> str:
    """The format by the first bytes: `qcow2`, another one that is known, else `raw`.

    Raises ImageError if they can't be read.
    """
    start = _read(path, 512)
    if start[:4] == _QCOW2:
        return "qcow" if start[4:8] == b"\0\0\0\1" else "qcow2"
    found = (name for at, mark, name in _OTHERS if start[at : at + len(mark)] == mark)
    return next(found, "raw")


def header(path: Path) -> Header:
    """The header of a qcow2 file. Raises ImageError if there is none."""
    text = _read(path, 1 << 16)
    if text[:4] != _QCOW2 or len(text) < 72:
        raise ImageError(f"image {path} is not a qcow2 file")
    version, offset, length, size, encryption = struct.unpack_from(">4xIQI4xQI", text)
    features = struct.unpack_from(">Q", text, 72)[0] if version >= 3 else 0
    backing = os.fsdecode(text[offset : offset + length]) if offset else ""
    at = struct.unpack_from(">I", text, 100)[0] if version >= 3 else 72
    backing_format = ""
    while at + 8 <= min(offset, len(text)):
        kind, extent = struct.unpack_from(">II", text, at)
        if kind == _BACKING_FORMAT:
            backing_format = os.fsdecode(text[at + 8 : at + 8 + extent])
        if kind == 0:
            break
        at += 8 + (extent + 7 & ~7)
    return Header(size, backing, backing_format, encryption != 0, bool(features & _EXTERNAL_DATA))


def virtual_size(path: Path, image_format: str) -> int:
    """The size in bytes of the disk that is in the image, in whole sectors. Raises ImageError."""
    if image_format == "qcow2":
        return header(path).size
    try:
        with path.open("rb") as image:
            return image.seek(0, os.SEEK_END) + 511 & ~511
    except OSError as error:
        raise ImageError(f"failed to read image {path}: {error.strerror}") from error


def is_block_device(descriptor: int) -> bool:
    return stat.S_ISBLK(os.fstat(descriptor).st_mode)


def open_image(path: Path, writable: bool, exclusive: bool = False) -> int:
    """A descriptor of an image file or block device. Raises ImageError.

    `exclusive`: only if this machine's kernel has a block device in no use of its own.
    """
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
    try:
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            kind = "a directory" if stat.S_ISDIR(mode) else "no regular file or block device"
            raise ImageError(f"failed to open image {path}: it is {kind}")
        if exclusive and stat.S_ISBLK(mode):
            os.close(os.open(path, flags | os.O_EXCL))  # open(2): EBUSY where it is mounted
        return os.open(path, flags)
    except OSError as error:
        what = "write to" if writable else "read"
        raise ImageError(f"failed to {what} image {path}: {error.strerror}") from error


def _read(path: Path, length: int) -> bytes:
    try:
        with open(open_image(path, writable=False), "rb") as image:
            return image.read(length)
    except OSError as error:
        raise ImageError(f"failed to read image {path}: {error.strerror}") from error
