"""What passes an interface of a lab while a block runs."""

import os
import select
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from netorch import wire
from netorch.starter import Connection
from netorch.system.packets import Ring, pcap

FRAMES = 4096  # 8 MiB
_FEW = 512  # of a recorder that nobody empties


class Capture:
    """A capture. It has begun when the block is entered, and holds every frame until it is left.

    `count` frames were captured so far and `dropped` ones were too fast for it; `pcap()` is a whole
    file of them. A frame is kept up to 1,980 bytes, so large ones that offloading makes are cut.
    """

    def __init__(
        self,
        connection: Connection,
        host: str,
        device: str,
        path: str | os.PathLike[str] | None = None,
        *,
        watched: bool = True,
    ) -> None:
        """`path`: save the file there at the end. Not `watched`: the first 512 frames are kept."""
        self._connection = connection
        self._where = host, device
        self._path = path
        self._watched = watched
        self._records = bytearray()
        self._lock = threading.Lock()
        self._ring: Ring | None = None
        self._count = self._dropped = 0

    def __enter__(self) -> Self:
        host, device = self._where
        frames = FRAMES if self._watched else _FEW
        _, (fd,) = self._connection.ask(wire.Packets(host=host, device=device, frames=frames))
        self._ring = Ring(fd, frames)
        if self._watched:
            self._stop = os.eventfd(0, os.EFD_CLOEXEC)
            self._thread = threading.Thread(target=self._empty, daemon=True, name="netorch capture")
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._watched:
            os.eventfd_write(self._stop, 1)
            self._thread.join()
            os.close(self._stop)
        self._take()
        with self._lock:
            ring, self._ring = self._ring, None
            assert ring is not None
            ring.close()
        if self._path is not None:
            self.save(self._path)

    @property
    def count(self) -> int:
        self._take()
        return self._count

    @property
    def dropped(self) -> int:
        self._take()
        return self._dropped

    def pcap(self) -> bytes:
        """A file with what was captured so far."""
        self._take()
        return pcap(bytes(self._records))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write that file."""
        Path(path).write_bytes(self.pcap())
        return Path(path)

    def _take(self) -> None:
        with self._lock:
            if self._ring is not None:
                self._records += self._ring.take()
                self._count = self._ring.count
                self._dropped = self._ring.lost()

    def _empty(self) -> None:
        """Keep the ring from filling up; in a thread."""
        assert self._ring is not None
        poll = select.poll()
        poll.register(self._ring.fileno(), select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        while all(fd != self._stop for fd, _event in poll.poll()):
            self._take()
