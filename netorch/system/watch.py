"""Waiting for files to change and processes to end: inotify and pidfds under one poll."""

import ctypes
import os
import select
import struct
from pathlib import Path
from types import TracebackType
from typing import Self

from netorch.system.processes import Marked

# <sys/inotify.h>
_IN_MODIFY = 0x2
_IN_MOVED_TO = 0x80
_IN_CREATE = 0x100
_EVENT = struct.Struct("iIII")  # wd, mask, cookie, length of the name that follows

_libc = ctypes.CDLL(None, use_errno=True)


class Watch:
    """A set of directories and processes. Events from before a `wait` are not lost."""

    def __init__(self) -> None:
        self._inotify = _libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if self._inotify < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self._directories: dict[int, Path] = {}
        self._pidfds: dict[int, str] = {}
        self._poll = select.poll()
        self._poll.register(self._inotify, select.POLLIN)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for descriptor in (self._inotify, *self._pidfds):
            os.close(descriptor)

    def directory(self, path: Path) -> None:
        """Hear of the files in a directory. Raises OSError."""
        mask = ctypes.c_uint32(_IN_MODIFY | _IN_MOVED_TO | _IN_CREATE)
        number = _libc.inotify_add_watch(self._inotify, os.fsencode(path), mask)
        if number < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
        self._directories[number] = path

    def process(self, process: Marked, name: str) -> None:
        """Hear of the end of a process by `name`; at once, if it has ended already."""
        try:
            pidfd = os.pidfd_open(process.pid)
        except ProcessLookupError:
            # Any pidfd of a process that has ended is readable; so is the end of an empty pipe.
            pidfd, closed = os.pipe2(os.O_CLOEXEC)
            os.close(closed)
        self._pidfds[pidfd] = name
        self._poll.register(pidfd, select.POLLIN)

    def wait(self, seconds: float) -> tuple[set[Path], set[str]]:
        """The files that changed and the processes that ended; both empty after `seconds`."""
        changed: set[Path] = set()
        ended: set[str] = set()
        for descriptor, _event in self._poll.poll(max(0.0, seconds) * 1000):
            if descriptor == self._inotify:
                changed |= self._changed()
            else:
                self._poll.unregister(descriptor)
                ended.add(self._pidfds[descriptor])
        return changed, ended

    def _changed(self) -> set[Path]:
        events = os.read(self._inotify, 65536)
        changed = set()
        position = 0
        while position < len(events):
            number, _mask, _cookie, length = _EVENT.unpack_from(events, position)
            position += _EVENT.size
            name = os.fsdecode(events[position : position + length].rstrip(b"\0"))
            position += length
            if number in self._directories:
                changed.add(self._directories[number] / name)
        return changed
