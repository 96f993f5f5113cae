"""Guest images and the overlays that keep them unwritten.

An overlay is a qcow2 file that holds what the guest writes; all else is read from the base image.
An overlay that is there is used again, so that a guest that was powered off finds its disk as it
left it, unless it belongs to another base or the base was written to since: then its content means
nothing any more.
"""

import fcntl
import os
import struct
from pathlib import Path

from netorch.errors import ImageError, MissingError
from netorch.resources import Guest
from netorch.system.processes import Child, program, start
from netorch.system.scope import Scope

_QCOW2 = b"QFI\xfb"
_F_OFD_GETLK = 36
# QEMU, block/file-posix.c: byte 100 + N is locked for permission N; BLK_PERM_WRITE is 1 << 1.
_LOCKED_FOR_WRITING = 101
_FLOCK = "hhqqi4x"  # struct flock of a 64-bit Linux


def image_format(path: Path) -> str:
    """`qcow2` or `raw`, by the first four bytes. Raises ImageError if it can't be read."""
    try:
        with path.open("rb") as image:
            return "qcow2" if image.read(4) == _QCOW2 else "raw"
    except OSError as error:
        raise ImageError(f"failed to read image {path}: {error.strerror}") from error


def backing_file(path: Path) -> str:
    """The file that a qcow2 image is an overlay of, as its header has it; "" if it stands alone."""
    with path.open("rb") as image:
        # docs/interop/qcow2.txt: magic, version, backing_file_offset (8), backing_file_size (4)
        offset, size = struct.unpack(">8xQI", image.read(20))
        image.seek(offset)
        return os.fsdecode(image.read(size)) if offset else ""


def writer(path: Path) -> str:
    """Who has the image open for writing, "" if nobody has: `process 4711 (qemu-system-x86)`."""
    with path.open("rb") as image:
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, _LOCKED_FOR_WRITING, 1, 0)
        answer = fcntl.fcntl(image, _F_OFD_GETLK, asked)
        if struct.unpack(_FLOCK, answer)[0] == fcntl.F_UNLCK:
            return ""
        wanted = os.fstat(image.fileno())
    return _who_has(wanted) or "another process"


def overlay_path(scope: Scope, guest: str) -> Path:
    return scope.disks / f"{guest}.qcow2"


def begin_overlay(scope: Scope, guest: Guest, log: Path) -> Child | None:
    """Start making the guest's overlay; None if it has one. To be finished by `finish_overlay`."""
    overlay = overlay_path(scope, guest.name)
    if _fits(overlay, Path(guest.image)):
        return None
    qemu_img = program("qemu-img")
    if qemu_img is None:
        raise MissingError("qemu-img is not installed", "install qemu-utils (Fedora: qemu-img)")
    scope.disks.mkdir(mode=0o700, parents=True, exist_ok=True)
    image_options = ["-b", guest.image, "-F", guest.format, str(_unfinished(overlay))]
    return start(scope, None, [qemu_img, "create", "-q", "-f", "qcow2", *image_options], log=log)


def finish_overlay(scope: Scope, guest: str, child: Child) -> None:
    """Wait for qemu-img and put the overlay in its place. Raises ImageError."""
    overlay = overlay_path(scope, guest)
    try:
        if child.exit_status() != 0:
            raise ImageError(f"failed to create the disk of guest {guest}: {child.output()}")
    finally:
        child.close()
    _unfinished(overlay).rename(overlay)


def remove_overlay(scope: Scope, guest: str) -> None:
    overlay = overlay_path(scope, guest)
    overlay.unlink(missing_ok=True)
    _unfinished(overlay).unlink(missing_ok=True)


def _unfinished(overlay: Path) -> Path:
    return overlay.with_suffix(".new")


def _fits(overlay: Path, base: Path) -> bool:
    """Is `overlay` there, over this base, and was the base not written to since?"""
    try:
        newer = overlay.stat().st_mtime >= base.stat().st_mtime
        return newer and backing_file(overlay) == str(base)
    except FileNotFoundError:
        return False


def _who_has(wanted: os.stat_result) -> str:
    """The process that has the file open, in words; "" if none that may be looked at has."""
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            for fd in os.scandir(f"/proc/{name}/fd"):
                found = os.stat(fd.path)
                if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                    return f"process {name} ({Path(f'/proc/{name}/comm').read_text().strip()})"
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue  # gone, or not ours to look at
    return ""
