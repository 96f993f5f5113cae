"""Taps from qemu-bridge-helper, for whoever may not make any.

The helper is QEMU's, installed setuid root. It looks for the bridge in /etc/qemu/bridge.conf, and
if that allows it, makes a tap, puts it on the bridge and passes its descriptor back over a socket
(qemu-bridge-helper.c). The tap is not persistent: it goes with the last descriptor, the guest's.
So it carries no mark, and needs none.
"""

import os
import socket
from pathlib import Path

from netorch.errors import MissingError, NetorchError
from netorch.system.scope import Scope
from netorch.system.starting import start

# Where Debian, Fedora and a build of one's own have it.
_PATHS = (
    "/usr/lib/qemu/qemu-bridge-helper",
    "/usr/libexec/qemu-bridge-helper",
    "/usr/local/libexec/qemu-bridge-helper",
)


def installed() -> str | None:
    """The helper's path; None if it is not installed."""
    return next((path for path in _PATHS if os.access(path, os.X_OK)), None)


def open_tap(scope: Scope, bridge: str, log: Path) -> int:
    """A descriptor of a new tap on `bridge`. Raises MissingError, or NetorchError if refused."""
    helper = installed()
    if helper is None:
        raise MissingError("qemu-bridge-helper is not installed", "it comes with QEMU")
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            words = [helper, "--use-vnet", f"--br={bridge}", f"--fd={theirs.fileno()}"]
            child = start(scope, None, words, log=log, pass_fds=[theirs.fileno()])
        _data, fds, _flags, _address = socket.recv_fds(ours, 1, 1)
    try:
        child.exit_status()
        if not fds:
            raise NetorchError(
                f"failed to get a tap on {bridge} from {helper}: {child.output()}",
                f"as root: chmod u+s {helper}, and `allow {bridge}` in /etc/qemu/bridge.conf",
            )
    finally:
        child.close()
    os.set_inheritable(fds[0], False)
    return fds[0]
