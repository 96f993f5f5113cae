"""A guest's serial console on this terminal.

The terminal is raw while the console is open, so that every key goes to the guest, and one key
leaves. What the guest wrote before is shown first, from the log that QEMU keeps. Input that is not
a terminal (a pipe) is sent as it is; at its end the console stays open until the guest closes it or
`escape` arrives.
"""

import contextlib
import os
import select
import socket
import termios
import tty
from collections.abc import Iterator
from pathlib import Path

from netorch.errors import UsageError, not_running
from netorch.system.qmp import connect

_TAIL = 2000  # bytes of the log that are shown on entry
_CHUNK = 65536


def console(path: Path, escape: str = "ctrl-]", log: Path | None = None) -> int:
    """Connect this terminal with a serial socket; 0 once left with `escape`, 1 if QEMU ended.

    Raises UsageError if no QEMU listens there.
    """
    key = _key(escape)
    try:
        guest = connect(path)
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise not_running(path.parent.name) from error
    with guest, _raw(0) as is_terminal:
        guest.settimeout(None)
        if is_terminal:
            _say(f"[console of {path.parent.name}; {escape} leaves]")
        if log is not None:
            _write(_tail(log))
        left = _exchange(guest, key)
        if is_terminal:
            _say("[left]" if left else "[the guest is gone]")
    return 0 if left else 1


def _exchange(guest: socket.socket, key: bytes) -> bool:
    """Copy both ways; True when the person leaves, False when the guest does."""
    poll = select.poll()
    poll.register(guest, select.POLLIN)
    poll.register(0, select.POLLIN)
    while True:
        for fd, _event in poll.poll():
            if fd == 0:
                typed = os.read(0, _CHUNK)
                before, leave, _after = typed.partition(key)
                guest.sendall(before)
                if leave:
                    return True
                if not typed:
                    poll.unregister(0)
            else:
                shown = guest.recv(_CHUNK)
                if not shown:
                    return False
                _write(shown)


@contextlib.contextmanager
def _raw(fd: int) -> Iterator[bool]:
    """The terminal `fd` in raw mode while the block runs; False if it is none."""
    if not os.isatty(fd):
        yield False
        return
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd)
        yield True
    finally:
        termios.tcsetattr(fd, termios.TCSAFLUSH, before)


def _key(name: str) -> bytes:
    """The byte of a key like `ctrl-]`."""
    character = name.removeprefix("ctrl-")
    if len(character) != 1 or character == name or not "@" <= character.upper() <= "_":
        raise UsageError(
            f"no such key: {name!r}", "one of ctrl-a to ctrl-z, ctrl-], ctrl-^, ctrl-_"
        )
    return bytes([ord(character.upper()) & 0x1F])


def _tail(log: Path) -> bytes:
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            tail = file.read()
    except FileNotFoundError:
        return b""
    return tail if size <= _TAIL else tail.partition(b"\n")[2]


def _write(data: bytes) -> None:
    while data:
        data = data[os.write(1, data) :]


def _say(text: str) -> None:
    os.write(2, f"\r\n{text}\r\n".encode())
