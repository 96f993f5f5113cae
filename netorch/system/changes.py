"""From what a link is to what it should be: the messages for the difference, and none for no
difference.

A new link is made by one message and brought to its state by these, starting from what the first
one is known to have made. So a link that an interrupted run left half made, an update and a
creation are the same code, and doing it twice is silent.
"""

import errno
import os
from collections.abc import Sequence

import msgspec

from netorch.errors import KernelError
from netorch.system import messages
from netorch.system.messages import Attributes
from netorch.system.scope import Scope
from netorch.system.snapshot import Link, Snapshot

_NO_ADDRESS = 1  # IN6_ADDR_GEN_MODE_NONE
_IPV6_MINIMUM = (
    1280  # an interface with a smaller MTU has no IPv6 to be configured (net/ipv6/addrconf.c)
)


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """A link as it should be; what `forwarding` is None for, or `no_ipv6` False, stays as it is."""

    alias: str
    mac: str
    mtu: int
    up: bool
    group: int = 0
    master: int = 0
    forwarding: bool | None = None
    no_ipv6: bool = False


def new_index(snapshot: Snapshot) -> int:
    """An interface index for a link that is to be made, far from those that the kernel gives out
    itself.

    A link of a known index can be marked and configured in the very call that makes it, and if it
    can't be made because its name is taken, the messages that follow hit nothing: they name an
    index that is not there.
    """
    while True:
        index = 1 << 29 | int.from_bytes(os.urandom(4), "big") >> 3
        if index not in snapshot.links:
            return index


def bridge_index(
    snapshot: Snapshot, name: str, scope: Scope, external: bool = False
) -> int | KernelError:
    """The index of the bridge `name`, 0 for none (""), or why there is none.

    It has to be the lab's own, or, if `external`, a bridge that isn't.
    """
    if not name:
        return 0
    link = snapshot.by_name.get(name)
    if link is not None and external:
        if link.kind == "bridge" and not link.alias.startswith("netorch:"):
            return link.index
        return KernelError(f"{name} is not a bridge of somebody else's", errno.EINVAL)
    if link is not None and link.alias.startswith(scope.alias("bridge:")):
        return link.index
    if link is not None:
        return KernelError(f"{name} is not the lab's own bridge", errno.EEXIST)
    return KernelError(f"there is no bridge {name}", errno.ENODEV)


def at_once(link: Link, wanted: Wanted) -> list[bytearray]:
    """All of it in one message, for a link that has no carrier while it is new.

    The kernel comes to the IPv6 setting last, when the link is up: with a carrier it would have an
    address by then.
    """
    return _message(link, wanted, _settings(link, wanted) + _membership(link, wanted), marks=True)


def configure(link: Link, wanted: Wanted) -> list[bytearray]:
    """First half: marks and settings, while a new link is still down."""
    return _message(link, wanted, _settings(link, wanted), marks=True)


def activate(link: Link, wanted: Wanted) -> list[bytearray]:
    """Second half: group, bridge and up, in one message since each costs a round of notices."""
    return _message(link, wanted, _membership(link, wanted), marks=False)


def readdress(index: int, current: Sequence[str], wanted: Sequence[str]) -> list[bytearray]:
    """Addresses keep their order: the first of a network is the one that its packets leave with.

    Removed from the last on, since the kernel takes a network's other addresses away with its
    first.
    """
    kept = 0
    while kept < min(len(current), len(wanted)) and current[kept] == wanted[kept]:
        kept += 1
    away = [messages.address(messages.DELADDR, index, text) for text in reversed(current[kept:])]
    return away + [messages.address(messages.NEWADDR, index, text) for text in wanted[kept:]]


def _settings(link: Link, wanted: Wanted) -> Attributes:
    attributes: Attributes = ()
    if link.mtu != wanted.mtu:
        attributes += (("IFLA_MTU", wanted.mtu),)
    families: Attributes = ()
    if wanted.forwarding is not None and link.forwarding is not wanted.forwarding:
        conf = (("FORWARDING", int(wanted.forwarding)),)
        families += (("AF_INET", (("IFLA_INET_CONF", conf),)),)
    if wanted.no_ipv6 and link.ipv6 not in (None, _NO_ADDRESS) and wanted.mtu >= _IPV6_MINIMUM:
        families += (("AF_INET6", (("IFLA_INET6_ADDR_GEN_MODE", _NO_ADDRESS),)),)
    return (*attributes, ("IFLA_AF_SPEC", families)) if families else attributes


def _membership(link: Link, wanted: Wanted) -> Attributes:
    attributes: Attributes = ()
    if link.group != wanted.group:
        attributes += (("IFLA_GROUP", wanted.group),)
    if link.master != wanted.master:
        attributes += (("IFLA_MASTER", wanted.master),)
    if link.up != wanted.up:
        attributes += (messages.up(wanted.up),)
    return attributes


def _message(link: Link, wanted: Wanted, attributes: Attributes, *, marks: bool) -> list[bytearray]:
    alias = wanted.alias if marks and link.alias != wanted.alias else ""
    mac = wanted.mac if marks and link.mac != wanted.mac else ""
    if not (attributes or alias or mac):
        return []
    return [messages.link(link.index, alias=alias, mac=mac, attributes=attributes)]
