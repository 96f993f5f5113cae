"""Who has an image open, by the locks that every QEMU takes (block/file-posix.c).

Byte 100 + N of the file is locked for permission N that somebody uses, byte 200 + N for one that he
does not share with others. A writer needs that nobody writes and that everybody shares writing; a
reader needs that nobody writes. QEMU holds these rules by itself, so two of them never have one
disk; asking before the first change names who has it.
"""

import fcntl
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from netorch.system.images import open_image
from netorch.system.places import marked_processes

_F_OFD_GETLK = 36
_WRITE = 1  # BLK_PERM_WRITE is 1 << 1
_USED, _NOT_SHARED = 100, 200
_FLOCK = "hhqqi4x"  # struct flock of a 64-bit Linux


def conflict(lab: str, path: Path, writing: bool) -> str:
    """Who keeps others from reading the image, or from writing to it, as a sentence; "" if nobody
    does.

    The lab's own processes don't count: a guest that is made again has its disk until then. From
    inside a private place, processes outside can't be looked at, so `labs.prepare` asks before.
    Raises ImageError.
    """
    wanted = [_USED + _WRITE, *([_NOT_SHARED + _WRITE] if writing else [])]
    if not _locked(path, wanted):
        return ""
    having = list(_having(path, wanted))
    own = {pid for pid, marks in marked_processes() if marks["NETORCH_LAB"] == lab}
    strangers = [pid for pid in having if pid not in own]
    if having and not strangers:
        return ""
    user = _words(strangers[0]) if strangers else "another process"
    if writing:
        return f"image {path} is in use by {user}: shut that down, or leave out persistent"
    return f"image {path} is being written to by {user}: shut that down, or use a copy"


def _locked(path: Path, wanted: Sequence[int]) -> bool:
    with open(open_image(path, writable=False), "rb") as image:
        for byte in wanted:
            asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
            answer = fcntl.fcntl(image, _F_OFD_GETLK, asked)
            if struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK:
                return True
    return False


def _having(path: Path, wanted: Sequence[int]) -> Iterator[int]:
    """The processes that hold one of these locks, as far as they may be looked at."""
    image = path.stat()
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            for fd in os.scandir(f"/proc/{name}/fd"):
                found = os.stat(fd.path)
                same = (found.st_dev, found.st_ino) == (image.st_dev, image.st_ino)
                if same and _holds(f"/proc/{name}/fdinfo/{fd.name}", wanted):
                    yield int(name)
                    break
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue  # gone, or not ours to look at


def _holds(fdinfo: str, wanted: Sequence[int]) -> bool:
    """proc(5): `lock: 1: OFDLCK ADVISORY READ -1 08:01:1234 101 101`, the last two from and to."""
    for line in Path(fdinfo).read_text().splitlines():
        if line.startswith("lock:"):
            *_, first, last = line.split()
            end = float("inf") if last == "EOF" else int(last)
            if any(int(first) <= byte <= end for byte in wanted):
                return True
    return False


def _words(pid: int) -> str:
    """`process 4711 (qemu-system-x86)`, with the guest where it is netorch's."""
    try:
        command = Path(f"/proc/{pid}/comm").read_text().strip()
        environment = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
    except OSError:  # it has just ended
        return f"process {pid}"
    lab = next((e.partition("=")[2] for e in environment if e.startswith("NETORCH_LAB=")), "")
    return f"process {pid} ({command}{f' of lab {lab}' if lab else ''})"
