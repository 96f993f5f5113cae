"""VNC viewers from outside: a listening socket here, and whoever connects is handed to QEMU.

QEMU gets the accepted connection itself (QMP: getfd, add_client). So no byte of a picture passes
through netorch, and it does not matter where the guest's own display is: in the namespace of a
private place, or on a Unix socket that a viewer can't open. Viewers stay connected when this ends.
"""

import os
import select
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from netorch.errors import KernelError, NetorchError, UsageError
from netorch.system.qmp import Qmp

FIRST_PORT = 5900  # of display 0; RFC 6143, 4
_DISPLAYS = 100


def own_display(qmp: Qmp, guest: str) -> str:
    """Where QEMU itself listens: HOST:PORT, or "" for its Unix socket. Raises UsageError."""
    found = qmp.ask("query-vnc")
    if not found["enabled"]:  # add_client would say nothing then, and keep the viewer waiting
        raise UsageError(f"guest {guest} has no VNC display", "write `vnc = true` in its table")
    return "" if found["family"] == "unix" else f"{found['host']}:{found['service']}"


@contextmanager
def listening(where: str) -> Iterator[socket.socket]:
    """A socket for viewers: on loopback at the port `where`, or the first free one of VNC's if that
    is "", else at a path, for this user alone. Raises KernelError.
    """
    if where and not where.isdecimal():
        with _at_path(Path(where)) as listener:
            yield listener
        return
    ports = [int(where)] if where else [*range(FIRST_PORT, FIRST_PORT + _DISPLAYS), 0]
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for port in ports:
            try:
                listener.bind(("127.0.0.1", port))
                break
            except (OSError, OverflowError) as error:
                if port == ports[-1]:
                    raise _refused(f"127.0.0.1:{port}", error) from error
        listener.listen()
        yield listener


def hand_over(listener: socket.socket, qmp: Path, guest: str, pidfd: int) -> None:
    """Give QEMU every viewer that connects, for ever. Raises NetorchError when the guest ends."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    poll.register(pidfd, select.POLLIN)
    while True:
        if any(fd == pidfd for fd, _event in poll.poll()):
            raise NetorchError(f"guest {guest} has ended")
        viewer, _address = listener.accept()
        with viewer, Qmp(qmp, guest) as session:
            session.ready()
            session.ask("getfd", {"fdname": "viewer"}, [viewer.fileno()])
            session.ask("add_client", {"protocol": "vnc", "fdname": "viewer"})


@contextmanager
def _at_path(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        os.fchmod(listener.fileno(), 0o600)  # the mode of the file that bind makes
        try:
            listener.bind(str(path))
        except OSError as error:
            raise _refused(str(path), error) from error
        try:
            listener.listen()
            yield listener
        finally:
            path.unlink(missing_ok=True)


def _refused(where: str, error: OSError | OverflowError) -> KernelError:
    reason = error.strerror if isinstance(error, OSError) else None
    number = error.errno if isinstance(error, OSError) else None
    return KernelError(f"failed to listen on {where}: {reason or error}", number or 0)
