"""The taps of many network namespaces, read without changing any.

A socket stays in the network namespace that it was made in, so all it takes is to be there once.
Root goes there by itself. Anybody else may only after he has entered the user namespace that owns
it, from which there is no way back: so a forked child goes, makes a socket in each namespace of
that owner, and passes them back. A namespace that may not be entered has no view.
"""

import contextlib
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from typing import NoReturn

import msgspec

from netorch.system import namespaces, neighbours
from netorch.system.netlink import Netlink, open_socket
from netorch.system.snapshot import Link, links

_TYPE, _PERSIST, _MULTI_QUEUE, _QUEUES, _IDLE = 3, 6, 7, 8, 9  # IFLA_TUN_
_IFF_TAP = 2


class View(msgspec.Struct):
    """A network namespace: its links, its taps by name, the labs whose mark is on any link, and
    what its bridges and its ARP table have learned.
    """

    links: dict[int, Link]
    taps: dict[str, Link] = {}
    tuns: frozenset[str] = frozenset()  # of layer 3: not taps
    macs: dict[int, list[str]] = {}  # by port
    addresses: dict[tuple[int, str], str] = {}  # by device and MAC


def views(spaces: Mapping[int, int], current: int) -> dict[int, View]:
    """What can be seen of the namespaces behind these descriptors, by inode."""
    seen = {}
    for inode, netlink in _sockets(spaces, current):
        with netlink:
            seen[inode] = _view(netlink)
    return seen


def queues(tap: Link) -> tuple[int, int]:
    """How many queues of a tap are open, and how many of these are idle: the kernel counts those of
    a multi-queue tap, and one that has a single queue has a carrier while it is open
    (drivers/net/tun.c, tun_attach and __tun_detach).
    """
    info = tap.info
    if info.get(_MULTI_QUEUE):
        idle = info.get(_IDLE, 0)
        return info.get(_QUEUES, 0) + idle, idle
    return int(tap.carrier), 0


def _view(netlink: Netlink) -> View:
    view = View({link.index: link for link in links(netlink)})
    tuns = {link.name: link for link in view.links.values() if link.kind == "tun"}
    view.taps = {name: link for name, link in tuns.items() if link.info.get(_TYPE) == _IFF_TAP}
    view.tuns = frozenset(tuns) - frozenset(view.taps)
    if view.taps:
        for entry in neighbours.learned(netlink):
            view.macs.setdefault(entry.port, []).append(entry.mac)
        view.addresses = neighbours.addresses(netlink)
    return view


def _sockets(spaces: Mapping[int, int], current: int) -> Iterator[tuple[int, Netlink]]:
    refused: dict[int, list[int]] = {}
    owners: dict[int, int] = {}
    with contextlib.ExitStack() as closing:
        for inode, fd in spaces.items():
            try:
                opened = Netlink(None if inode == current else fd)
            except PermissionError:
                with contextlib.suppress(PermissionError):  # of nobody that we could become
                    owner = namespaces.owner_of(fd)
                    closing.callback(os.close, owner)
                    number = os.fstat(owner).st_ino
                    owners.setdefault(number, owner)
                    refused.setdefault(number, []).append(inode)
                continue
            yield inode, opened
        for number, inodes in refused.items():
            yield from _from_inside(owners[number], {inode: spaces[inode] for inode in inodes})


def _from_inside(owner: int, spaces: Mapping[int, int]) -> Iterator[tuple[int, Netlink]]:
    """Sockets in namespaces of one owner, made by a child that enters the owner's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if child == 0:
        ours.close()
        _go_and_open(owner, spaces.items(), theirs)
    theirs.close()
    with ours:
        try:
            while (got := socket.recv_fds(ours, 32, 1))[0]:
                yield int(got[0]), Netlink.over(socket.socket(fileno=got[1][0]))
        finally:
            ours.close()
            os.waitpid(child, 0)


def _go_and_open(owner: int, spaces: Iterable[tuple[int, int]], out: socket.socket) -> NoReturn:
    """The child's part. What it may not enter it leaves out."""
    try:
        namespaces.setns(owner, namespaces.NEWUSER)
        for inode, fd in spaces:
            with contextlib.suppress(PermissionError):
                namespaces.setns(fd, namespaces.NEWNET)
                with open_socket() as opened:
                    socket.send_fds(out, [str(inode).encode()], [opened.fileno()])
    except OSError:
        pass  # refused altogether, or nobody listens any more
    finally:
        os._exit(0)
