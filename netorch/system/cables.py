"""The cables of hosts: pulled, put back, and waited for until they carry.

The bridge's end of the veth goes down, so the host's end loses its carrier and keeps all else. The
kernel acts on a carrier later, in a worker of its own (net/core/link_watch.c): until then a bridge
port forwards nothing and a NIC's queue drops everything. So this waits until both ends show it.
"""

import select
import socket
import struct
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path

from netorch.errors import KernelError, UsageError
from netorch.system import messages
from netorch.system.namespaces import in_namespace
from netorch.system.netlink import Netlink
from netorch.system.scope import Scope
from netorch.system.snapshot import links

_UP, _RUNNING = 0x1, 0x40
_LINKS = 1  # RTMGRP_LINK
_GETLINK = 18
_SECONDS = 10.0


def plug(scope: Scope, id: str, up: bool) -> None:
    """Put the cable `server:0` in, or pull it. Raises UsageError if there is none."""
    alias = scope.alias(f"veth:{id}")
    with Netlink() as netlink:
        found = [link for link in links(netlink) if link.alias == alias]
        if not found:
            raise UsageError(f"lab {scope.lab} has no link {id}")
        change = messages.link(found[0].index, attributes=(messages.up(up),))
        if error := netlink.send([[change]])[0]:
            raise KernelError(f"failed to change link {id}: {error.message}", error.errno)
    deadline = time.monotonic() + _SECONDS
    _await(None, {found[0].index}, up, deadline)
    _await(scope.namespace(id.rpartition(":")[0]), {found[0].peer}, up, deadline)


def await_all(scope: Scope) -> None:
    """Wait until all cables that are in carry, and the bridges with them."""
    near: set[int] = set()
    far: dict[Path, set[int]] = {}
    prefix = scope.alias("veth:")
    with Netlink() as netlink:
        for link in links(netlink):
            if link.alias.startswith(prefix) and link.up:
                near |= {link.index, link.master} - {0}
                host = link.alias.removeprefix(prefix).rpartition(":")[0]
                far.setdefault(scope.namespace(host), set()).add(link.peer)
    deadline = time.monotonic() + _SECONDS
    if near:
        _await(None, near, True, deadline)
    for namespace, indexes in far.items():
        _await(namespace, indexes, True, deadline)


def _await(namespace: Path | None, indexes: set[int], up: bool, deadline: float) -> None:
    """Wait for links to run, or not to; one that is down itself is not waited for."""
    with ExitStack() as stack:
        netlink = stack.enter_context(Netlink(namespace))
        listener = None
        while not _all(netlink, indexes, up):
            if listener is None:
                stack.enter_context(in_namespace(namespace) if namespace else nullcontext())
                listener = stack.enter_context(_listener())
                continue  # what happened before it listened is seen by looking again
            poll = select.poll()
            poll.register(listener, select.POLLIN)
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                return
            listener.recv(1 << 16)


def _listener() -> socket.socket:
    opened = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
    )
    opened.bind((0, _LINKS))
    return opened


def _all(netlink: Netlink, indexes: set[int], up: bool) -> bool:
    for body in netlink.dump(_GETLINK, bytes(16)):
        _family, _type, index, flags, _mask = struct.unpack_from("=BxHiII", body)
        if index in indexes and flags & _UP and bool(flags & _RUNNING) != up:
            return False
    return True
