"""Taps: made by ioctl, since the kernel makes none by netlink (EOPNOTSUPP), and marked before they
are made to stay.

A tap lives as long as the descriptor that made it, until TUNSETPERSIST. Before that it gets its
alias, so that a run that is killed on the way leaves either nothing or a marked tap; everything
else comes when the descriptor is closed, since a port without a carrier is a fifth cheaper to
bring up and take down. Marks and settings go to the kernel in batches. IFF_TUN_EXCL refuses a tap
that is there already; the kernel would open it, whoever's it is.
"""

import fcntl
import os
import struct
from collections.abc import Sequence

from netorch.errors import KernelError
from netorch.resources import Tap
from netorch.system import changes, messages, removal
from netorch.system.changes import Wanted
from netorch.system.netlink import Netlink, Outcomes
from netorch.system.scope import Scope
from netorch.system.snapshot import Link, Snapshot

DEVICE = "/dev/net/tun"
TUNSETIFF, _TUNSETPERSIST, _TUNSETOWNER = 0x400454CA, 0x400454CB, 0x400454CC
_TUNSETIFINDEX = 0x400454DA
IFREQ = struct.Struct("16sH22x")
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_MULTI_QUEUE, _EXCLUSIVE = (
    0x0002,
    0x1000,
    0x4000,
    0x0100,
    0x8000,
)
# IFLA_TUN_: owner, vnet_hdr, multi_queue (<linux/if_link.h>)
_INFO_OWNER, _INFO_VNET_HDR, _INFO_MULTI_QUEUE = 1, 5, 7
_NEW_MTU = 1500  # drivers/net/tun.c takes Ethernet's
_AT_ONCE = 64  # open descriptors; many machines allow a process 1,024


def observe(link: Link, id: str, network: str, bridge: str) -> Tap:
    info = link.info
    return Tap(
        id=id,
        name=link.name,
        network=network,
        bridge=bridge,
        mac=link.mac,
        mtu=link.mtu,
        multi_queue=bool(info.get(_INFO_MULTI_QUEUE)),
        vnet_hdr=bool(info.get(_INFO_VNET_HDR)),
        owner=info.get(_INFO_OWNER, -1),
        up=link.up,
    )


def flags(tap: Tap) -> int:
    """The flags of TUNSETIFF; whoever opens a queue of the tap has to give the same."""
    chosen = IFF_TAP | IFF_NO_PI
    if tap.vnet_hdr:
        chosen |= IFF_VNET_HDR
    if tap.multi_queue:
        chosen |= IFF_MULTI_QUEUE
    return chosen


def create(
    netlink: Netlink, taps: Sequence[tuple[Tap, int]], snapshot: Snapshot, scope: Scope
) -> Outcomes:
    """Make taps, each with the index of its bridge (0 for none). What fails leaves nothing."""
    outcomes: Outcomes = []
    for start in range(0, len(taps), _AT_ONCE):
        outcomes += _create_some(netlink, taps[start : start + _AT_ONCE], snapshot, scope)
    return outcomes


def update(link: Link, tap: Tap, master: int, scope: Scope) -> list[bytearray]:
    wanted = Wanted(
        alias=scope.alias(tap.key),
        mac=tap.mac,
        mtu=tap.mtu,
        up=tap.up,
        group=scope.group,
        master=master,
        no_ipv6=True,
    )
    return changes.at_once(link, wanted)


def _create_some(
    netlink: Netlink, taps: Sequence[tuple[Tap, int]], snapshot: Snapshot, scope: Scope
) -> Outcomes:
    links = [_blank(tap, snapshot, scope) for tap, _ in taps]
    outcomes = _make_marked(netlink, [tap for tap, _ in taps], links)
    settings = [
        [] if error else update(link, tap, master, scope)
        for (tap, master), link, error in zip(taps, links, outcomes, strict=True)
    ]
    for place, error in enumerate(netlink.send(settings)):
        outcomes[place] = outcomes[place] or error
    removal.take_back(netlink, [link.index for link in links], outcomes)
    return outcomes


def _blank(tap: Tap, snapshot: Snapshot, scope: Scope) -> Link:
    """The tap as it is when it is new and marked."""
    ipv6 = 0 if snapshot.has_ipv6 else None
    index = changes.new_index(snapshot)
    return Link(index=index, alias=scope.alias(tap.key), mtu=_NEW_MTU, ipv6=ipv6)


def _make_marked(netlink: Netlink, taps: Sequence[Tap], links: Sequence[Link]) -> Outcomes:
    opened: list[int | KernelError] = []
    try:
        for tap, link in zip(taps, links, strict=True):
            opened.append(_attempt(tap, link.index))
        outcomes = netlink.send(
            [
                [messages.link(link.index, alias=link.alias)] if isinstance(fd, int) else []
                for link, fd in zip(links, opened, strict=True)
            ]
        )
        for place, fd in enumerate(opened):
            if isinstance(fd, KernelError):
                outcomes[place] = fd
            elif outcomes[place] is None:
                fcntl.ioctl(fd, _TUNSETPERSIST, 1)
        return outcomes
    finally:
        for fd in opened:
            if isinstance(fd, int):
                os.close(fd)


def _attempt(tap: Tap, index: int) -> int | KernelError:
    try:
        return _open(tap, index)
    except OSError as error:
        code = error.errno or 0
        return KernelError(os.strerror(code), code)


def _open(tap: Tap, index: int) -> int:
    """A descriptor whose closing takes the new tap away again."""
    fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _TUNSETIFINDEX, struct.pack("=I", index))
        fcntl.ioctl(fd, TUNSETIFF, IFREQ.pack(tap.name.encode(), flags(tap) | _EXCLUSIVE))
        fcntl.ioctl(fd, _TUNSETOWNER, tap.owner)
    except BaseException:
        os.close(fd)
        raise
    return fd
