"""Guest images and the overlays that keep them unwritten.

An overlay is a qcow2 file that holds what the guest writes; all else is read from the base image.
It is a resource of its own: a guest that is started again, even with other memory, finds its disk
as it left it. What it is an overlay of stands in its header.
"""

import fcntl
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from netorch.errors import ImageError, MissingError
from netorch.planner import Update
from netorch.resources import Guest, Overlay, Resource
from netorch.system import saved
from netorch.system.scope import Scope
from netorch.system.starting import Child, program, start

_QCOW2 = b"QFI\xfb"
_BACKING_FORMAT = 0xE2792ACA
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


def backing(path: Path) -> tuple[str, str]:
    """What a qcow2 image is an overlay of, and that one's format; both "" if it stands alone.

    As its header has it (docs/interop/qcow2.txt): backing_file_offset, backing_file_size, and, for
    the format, the header extension 0xE2792ACA.
    """
    with path.open("rb") as image:
        header = image.read(1 << 16)
    version, offset, size = struct.unpack_from(">4xIQI", header)
    if not offset:
        return "", ""
    at = struct.unpack_from(">I", header, 100)[0] if version >= 3 else 72
    image_format = ""
    while at + 8 <= min(offset, len(header)):
        kind, length = struct.unpack_from(">II", header, at)
        if kind == _BACKING_FORMAT:
            image_format = os.fsdecode(header[at + 8 : at + 8 + length])
        if kind == 0:
            break
        at += 8 + (length + 7 & ~7)
    return os.fsdecode(header[offset : offset + size]), image_format


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


def outdated(scope: Scope, guest: Guest) -> bool:
    """Was the image written to after the guest's overlay? Then the overlay means nothing."""
    try:
        overlay = overlay_path(scope, guest.name).stat()
    except FileNotFoundError:
        return False
    return os.stat(guest.image).st_mtime > overlay.st_mtime


class Overlays:
    """The adapter for overlays. One that an interrupted run left half made has another suffix."""

    kinds: tuple[type[Resource], ...] = (Overlay,)

    def __init__(self, scope: Scope) -> None:
        self._scope = scope

    def observe(self) -> Iterable[Overlay]:
        for path in sorted(self._scope.disks.glob("*.qcow2")):
            image, image_format = backing(path)
            yield Overlay(guest=path.stem, image=image, format=image_format)

    def check(self, wanted: Sequence[Resource]) -> list[str]:
        if wanted and program("qemu-img") is None:
            return ["qemu-img is not installed: install qemu-utils (Fedora: qemu-img)"]
        return []

    def create(self, wanted: Sequence[Resource], done: Callable[[Resource], None]) -> None:
        overlays = [overlay for overlay in wanted if isinstance(overlay, Overlay)]
        qemu_img = program("qemu-img")
        if qemu_img is None:
            raise MissingError("qemu-img is not installed", "install qemu-utils (Fedora: qemu-img)")
        self._scope.disks.mkdir(mode=0o700, parents=True, exist_ok=True)
        children = [(overlay, self._begin(qemu_img, overlay)) for overlay in overlays]
        for overlay, child in children:
            self._finish(overlay, child)
            done(overlay)

    def update(self, wanted: Sequence[Update], done: Callable[[Resource], None]) -> None:
        raise AssertionError("an overlay has no live field")

    def delete(self, unwanted: Sequence[Resource], done: Callable[[Resource], None]) -> None:
        for overlay in unwanted:
            assert isinstance(overlay, Overlay)
            saved.drop(self._scope, overlay.guest)  # it is nothing without this disk
            path = overlay_path(self._scope, overlay.guest)
            path.unlink(missing_ok=True)
            _unfinished(path).unlink(missing_ok=True)
            done(overlay)

    def _begin(self, qemu_img: str, overlay: Overlay) -> Child:
        path = _unfinished(overlay_path(self._scope, overlay.guest))
        words = ["-b", overlay.image, "-F", overlay.format, str(path)]
        log = self._scope.run / "qemu-img.log"
        return start(self._scope, None, [qemu_img, "create", "-q", "-f", "qcow2", *words], log=log)

    def _finish(self, overlay: Overlay, child: Child) -> None:
        path = overlay_path(self._scope, overlay.guest)
        try:
            if child.exit_status() != 0:
                raise ImageError(
                    f"failed to create the disk of guest {overlay.guest}: {child.output()}"
                )
        finally:
            child.close()
        _unfinished(path).rename(path)


def _unfinished(overlay: Path) -> Path:
    return overlay.with_suffix(".new")


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
