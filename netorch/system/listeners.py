"""Far ends: what listens on a port for the time of the probes, where nobody else does.

An expectation is about the path. Where a service listens on the port already it is used; else
netorch listens itself, at the address that is probed. In a host, or at the place itself, that is a
socket: for TCP nobody has to accept (the kernel completes connections by itself, and the client's
token is seen by a Capture), for UDP a thread echoes. A guest's listener is a program started by
its agent, busybox's nc or python3, under `timeout`.

All are opened before the first probe and closed after the last; no connection outlives them.
"""

import errno
import select
import socket
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from netorch.errors import NetorchError
from netorch.system.guest_commands import Inside
from netorch.system.namespaces import in_namespace
from netorch.system.patience import Patience, Stopped

_IP_FREEBIND = 15  # <linux/in.h>: bind to an address that is not there, or not there yet
_BACKLOG = 4096
_AGES = 86400.0  # seconds; the echoing thread ends by Patience

# $1 port, $2 seconds. Prints "ready", "used" or "none", and then listens until it is ended.
_IN_GUEST = """
port=$(printf %04X "$1")
cat /proc/net/tcp /proc/net/tcp6 2>/dev/null |
    while read -r _ local _ state _; do
        case "$local $state" in *":$port 0A") exit 3 ;; esac
    done
[ $? != 3 ] || { echo used; exit; }
if nc --help 2>&1 | grep -q BusyBox; then
    timeout "$2" nc -ll -p "$1" -e true >/dev/null 2>&1 </dev/null & echo "ready $!"
elif command -v python3 >/dev/null; then
    timeout "$2" python3 -c 'import signal, socket, sys
s = socket.create_server(("", int(sys.argv[1])), backlog=128)
signal.pause()' "$1" >/dev/null 2>&1 </dev/null & echo "ready $!"
else
    echo none
fi
"""
_SECONDS = 10.0  # for a guest to start its listener


class End(NamedTuple):
    """Where something has to listen. `namespace` is a host's, None at the place itself."""

    protocol: str
    address: str
    port: int
    namespace: Path | None = None


class Listeners:
    """The listeners of a run; a context manager."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._stack = ExitStack()
        self._echoes: list[socket.socket] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def open(self, end: End) -> bool:
        """Listen there; False if somebody does already. Raises NetorchError."""
        kind = socket.SOCK_STREAM if end.protocol == "tcp" else socket.SOCK_DGRAM
        try:
            with ExitStack() as inside:
                if end.namespace is not None:
                    inside.enter_context(in_namespace(end.namespace))
                sock = socket.socket(socket.AF_INET, kind | socket.SOCK_CLOEXEC)
            with ExitStack() as unless_listening:
                unless_listening.enter_context(sock)
                sock.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
                if kind == socket.SOCK_STREAM:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # past TIME_WAIT
                sock.bind((end.address, end.port))
                if kind == socket.SOCK_STREAM:
                    sock.listen(_BACKLOG)
                unless_listening.pop_all()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise NetorchError(f"failed to listen at {end.address}: {error.strerror}") from error
        self._stack.enter_context(sock)
        if kind == socket.SOCK_DGRAM:
            sock.setblocking(False)
            self._echoes.append(sock)
        return True

    def open_in_guest(self, end: End, inside: Inside, seconds: float) -> bool:
        """As `open`, in a guest, for TCP; for so many seconds at most."""
        argv = ("/bin/sh", "-c", _IN_GUEST, "sh", str(end.port), str(int(seconds) + 1))
        done = inside.run(argv, _SECONDS)
        words = done.out.decode(errors="replace").split() if done else []
        if words[:1] == ["ready"]:
            self._stack.callback(inside.end, int(words[1]))
        elif words != ["used"]:
            raise NetorchError(
                f"guest {inside.guest} has neither busybox's nc nor python3 to listen with"
            )
        return words != ["used"]

    def echo(self) -> None:
        """Echo datagrams, in a thread, until the block ends, and all waiting with it."""
        if self._echoes:
            thread = threading.Thread(target=self._echo, name="echo")
            thread.start()
            self._stack.callback(thread.join)
            self._stack.callback(self._patience.stop)

    def _echo(self) -> None:
        with suppress(Stopped), select.epoll() as poll:
            by_number = {sock.fileno(): sock for sock in self._echoes}
            for number in by_number:
                poll.register(number, select.EPOLLIN)
            while self._patience.wait(time.monotonic() + _AGES, poll.fileno()):
                for number, _ in poll.poll(0):
                    with suppress(OSError):  # the sender has gone
                        data, sender = by_number[number].recvfrom(65535)
                        by_number[number].sendto(_reply(data), sender)


def _reply(data: bytes) -> bytes:
    """The echo; to busybox's tftp, which knows no echo, an error packet (RFC 1350, 5)."""
    return b"\0\5\0\0echo\0" if data.startswith(b"\0\1") else data
