"""What an interface has at layer 3, and the messages that take it to another interface.

Nothing is translated. A holding is the kernel's own dump of an interface's addresses and routes;
what goes back to the kernel are the same bytes with another interface index. So labels, scopes,
lifetimes, metrics, source hints, nexthops and whatever a later kernel adds survive unread. What is
changed, and why:

- The flags that the kernel derives (permanent, tentative, secondary, link down) are left out.
- Lifetimes are what was left of them at the dump; those of IPv6 routes have another attribute on
  the way in (RTA_EXPIRES, in seconds) than on the way out (RTA_CACHEINFO, in clock ticks).
- An IPv6 address is added without duplicate address detection, since until now it was in use on
  the same wire, and the detection would keep it silent for a second. A second message clears the
  flag.
- A label stays as it is, `eth1` or `eth1:web`, on the bridge as well: it is how the addresses
  that moved there are told from those of the bridge's own, whose label is the bridge's name.

Known neighbours come along. Otherwise the first packet on the other interface asks for its
neighbour's MAC, the answer may come in by the wrong one of the two, and the kernel asks again only
after a second.

Not part of it: the table `local` and IPv6 link-local addresses that the kernel makes for each
interface by itself (unless addr_gen_mode is none: then someone else has made them).
"""

import socket
import struct
from collections.abc import Collection, Iterable, Iterator
from ipaddress import ip_address

import msgspec

from netorch.system.messages import (
    APPEND,
    CREATE,
    DELADDR,
    DELNEIGH,
    DELROUTE,
    EXCLUSIVE,
    GETADDR,
    GETNEIGH,
    GETROUTE,
    NEWADDR,
    NEWNEIGH,
    NEWROUTE,
)
from netorch.system.netlink import HEADER, Netlink

_ADDRESS = struct.Struct("=BBBBi")  # ifaddrmsg: family, prefix length, flags, scope, index
_ROUTE = struct.Struct("=8BI")  # rtmsg: family, lengths, tos, table, protocol, scope, type, flags
_ATTRIBUTE = struct.Struct("=HH")
_NEIGHBOUR = struct.Struct("=B3xiHBB")  # ndmsg: family, index, state, flags, type
_HOP = struct.Struct("=HBBi")  # rtnexthop: length, flags, hops, index
_REPLACE = 0x100
# <linux/if_addr.h>
_IFA_ADDRESS, _IFA_LOCAL, _IFA_LABEL, _IFA_CACHEINFO, _IFA_FLAGS = 1, 2, 3, 6, 8
_NODAD = 0x02
_KEPT_FLAGS = 0x02 | 0x10 | 0x100 | 0x200 | 0x400  # nodad, home, mngtmpaddr, noprefixroute, mcauto
# <linux/rtnetlink.h>
_RTA_DST, _RTA_IIF, _RTA_OIF, _RTA_PRIORITY, _RTA_PREFSRC = 1, 3, 4, 6, 7
_RTA_GATEWAY, _RTA_MULTIPATH, _RTA_CACHEINFO, _RTA_TABLE, _RTA_VIA = 5, 9, 12, 15, 18
_RTA_EXPIRES, _RTA_NH_ID = 23, 30
_ONLINK = 4
# <linux/neighbour.h>
_NDA_DST, _NDA_LLADDR = 1, 2
_KNOWN, _STALE, _PERMANENT = 0x02 | 0x04 | 0x08 | 0x10, 0x04, 0x80
_LOCAL_TABLE = 255
_TICKS = 100  # USER_HZ, in which the kernel tells when a route expires

Attributes = list[tuple[int, bytes]]


class Route(msgspec.Struct, frozen=True):
    """A route as it was dumped; `first` of those to the same destination with the same metric."""

    body: bytes
    first: bool


class Holding(msgspec.Struct, frozen=True, kw_only=True):
    """The addresses and routes of the interface `index`, in the order of the kernel's lists."""

    index: int
    addresses: tuple[bytes, ...] = ()
    routes: tuple[Route, ...] = ()
    neighbours: tuple[bytes, ...] = ()

    def taken(self, index: int) -> Iterator[bytearray]:
        """The messages that take all of it from the interface `index`."""
        routes = sorted(self.routes, key=lambda route: not _has_gateway(route.body))
        for route in routes:
            yield _message(DELROUTE, 0, _route(route.body, self.index, index))
        for body in self.neighbours:
            if _NEIGHBOUR.unpack_from(body)[2] & _PERMANENT:  # the kernel forgets the others
                yield _message(DELNEIGH, 0, _neighbour(body, index))
        for body in reversed(self.addresses):
            yield _message(DELADDR, 0, _removal(body, index))

    def given(self, index: int) -> Iterator[bytearray]:
        """The messages that give all of it to the interface `index`."""
        for body in self.addresses:
            if body[0] == socket.AF_INET:
                yield _message(NEWADDR, CREATE | EXCLUSIVE, _address(body, index))
        for body in reversed(self.addresses):  # the kernel puts a new IPv6 address first
            if body[0] == socket.AF_INET6:
                flags = CREATE | EXCLUSIVE
                yield _message(NEWADDR, flags, _address(body, index, _NODAD))
                yield _message(NEWADDR, _REPLACE, _address(body, index))
        for body in self.neighbours:
            yield _message(NEWNEIGH, CREATE | _REPLACE, _neighbour(body, index))
        for route in sorted(self.routes, key=lambda route: _has_gateway(route.body)):
            append = not route.first and route.body[0] == socket.AF_INET
            flags = CREATE | (APPEND if append else 0)
            yield _message(NEWROUTE, flags, _route(route.body, self.index, index))

    def without(self, other: "Holding") -> "Holding":
        """What of this `other` doesn't have."""
        addresses = {_identity(body) for body in other.addresses}
        routes = {_timeless(r.body, other.index) for r in other.routes}
        return Holding(
            index=self.index,
            addresses=tuple(b for b in self.addresses if _identity(b) not in addresses),
            routes=tuple(r for r in self.routes if _timeless(r.body, self.index) not in routes),
        )

    def __bool__(self) -> bool:
        return bool(self.addresses or self.routes)

    @property
    def nexthop_objects(self) -> bool:
        """Is there a route by a nexthop object? The object belongs to the interface and would go
        with it.
        """
        return any(_RTA_NH_ID in dict(_attributes(route.body[12:])) for route in self.routes)


def look(
    netlink: Netlink, index: int, *, own: Collection[str] = (), link_local: bool = False
) -> Holding:
    """What the interface has, but for the IPv4 addresses `own` (a.b.c.d) and their routes.

    Routes of other interfaces whose source is one of the addresses belong to it too: the kernel
    removes them with the address. `link_local`: with the IPv6 link-local addresses.
    """
    addresses = []
    for view in netlink.dump(GETADDR, _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0)):
        body = bytes(view)
        at = _ADDRESS.unpack_from(body)[4]
        local = _text(_identity(body)[2])
        if at == index and local not in own and (link_local or not _is_link_local(local)):
            addresses.append(body)
    sources = {_identity(body)[2] for body in addresses}
    routes = []
    seen: set[tuple[object, ...]] = set()
    for family in (socket.AF_INET, socket.AF_INET6):
        for view in netlink.dump(GETROUTE, _ROUTE.pack(family, *[0] * 7, 0)):
            body = bytes(view)
            attributes = dict(_attributes(body[_ROUTE.size :]))
            if _table(body, attributes) == _LOCAL_TABLE:
                continue
            key = _key(body, attributes)
            route = Route(body, key not in seen)
            seen.add(key)
            source = attributes.get(_RTA_PREFSRC, b"")
            if source and _text(source) in own:
                continue
            if (index in _links(attributes) and not _is_kernels(body, attributes, link_local)) or (
                source in sources
            ):
                routes.append(route)
    return Holding(
        index=index,
        addresses=tuple(addresses),
        routes=tuple(routes),
        neighbours=tuple(_neighbours(netlink, index)),
    )


def _neighbours(netlink: Netlink, index: int) -> Iterator[bytes]:
    """Those whose MAC is known, but for the kernel's own (multicast)."""
    for view in netlink.dump(GETNEIGH, _NEIGHBOUR.pack(socket.AF_UNSPEC, 0, 0, 0, 0)):
        body = bytes(view)
        family, at, state, _, _ = _NEIGHBOUR.unpack_from(body)
        ours = at == index and family in (socket.AF_INET, socket.AF_INET6)
        if ours and state & (_KNOWN | _PERMANENT):
            yield body


def link_locals(netlink: Netlink, index: int) -> list[bytearray]:
    """The messages that take the IPv6 link-local addresses from an interface."""
    dump = netlink.dump(GETADDR, _ADDRESS.pack(socket.AF_INET6, 0, 0, 0, 0))
    bodies = [bytes(view) for view in dump if _ADDRESS.unpack_from(view)[4] == index]
    local = [body for body in bodies if _is_link_local(_text(_identity(body)[2]))]
    return [_message(DELADDR, 0, _removal(body, index)) for body in local]


def describe(message: bytes) -> str:
    """An address or a route of one of these messages, in words."""
    _, kind, *_ = HEADER.unpack_from(message)
    body = bytes(message[HEADER.size :])
    if kind in (NEWADDR, DELADDR):
        return f"address {_text(_identity(body)[2])}/{body[1]}"
    if kind in (NEWROUTE, DELROUTE):
        attributes = dict(_attributes(body[_ROUTE.size :]))
        to = f"{_text(attributes[_RTA_DST])}/{body[1]}" if _RTA_DST in attributes else "default"
        by = f" via {_text(attributes[_RTA_GATEWAY])}" if _RTA_GATEWAY in attributes else ""
        return f"route {to}{by} of table {_table(body, attributes)}"
    if kind in (NEWNEIGH, DELNEIGH):
        attributes = dict(_attributes(body[_NEIGHBOUR.size :]))
        return f"neighbour {_text(attributes[_NDA_DST])}"
    return "its place in the bridge"


def _address(body: bytes, index: int, more_flags: int = 0) -> bytes:
    family, length, flags, scope, _ = _ADDRESS.unpack_from(body)
    made: Attributes = []
    for kind, value in _attributes(body[_ADDRESS.size :]):
        if kind == _IFA_FLAGS:
            flags = struct.unpack("=I", value)[0]
        elif kind == _IFA_CACHEINFO:
            made.append(
                (kind, value[:8] + bytes(8))
            )  # preferred and valid; stamps are the kernel's
        else:
            made.append((kind, value))
    made.append((_IFA_FLAGS, struct.pack("=I", flags & _KEPT_FLAGS | more_flags)))
    return _ADDRESS.pack(family, length, 0, scope, index) + _packed(made)


def _removal(body: bytes, index: int) -> bytes:
    family, length, _, scope, _ = _ADDRESS.unpack_from(body)
    named = (_IFA_ADDRESS, _IFA_LOCAL, _IFA_LABEL)
    kept = [pair for pair in _attributes(body[_ADDRESS.size :]) if pair[0] in named]
    return _ADDRESS.pack(family, length, 0, scope, index) + _packed(kept)


def _identity(body: bytes) -> tuple[int, int, bytes]:
    """Family, prefix length and local address."""
    attributes = dict(_attributes(body[_ADDRESS.size :]))
    return body[0], body[1], attributes.get(_IFA_LOCAL, attributes[_IFA_ADDRESS])


def _neighbour(body: bytes, index: int) -> bytes:
    """Those that the kernel has learned go as stale: used at once, and verified then."""
    family, _, state, flags, kind = _NEIGHBOUR.unpack_from(body)
    kept = [p for p in _attributes(body[_NEIGHBOUR.size :]) if p[0] in (_NDA_DST, _NDA_LLADDR)]
    state = state if state & _PERMANENT else _STALE
    return _NEIGHBOUR.pack(family, index, state, flags, kind) + _packed(kept)


def _route(body: bytes, old: int, new: int) -> bytes:
    *fields, flags = _ROUTE.unpack_from(body)
    made: Attributes = []
    for kind, value in _attributes(body[_ROUTE.size :]):
        if kind == _RTA_OIF:
            value = _swapped(value, old, new)
        elif kind == _RTA_MULTIPATH:
            value = _hops(value, old, new)
        if kind == _RTA_CACHEINFO:
            expires = struct.unpack_from("=8xi", value)[0]
            if expires > 0:
                made.append((_RTA_EXPIRES, struct.pack("=I", max(1, expires // _TICKS))))
        elif kind != _RTA_IIF:
            made.append((kind, value))
    return _ROUTE.pack(*fields, flags & _ONLINK) + _packed(made)


def _timeless(body: bytes, index: int) -> bytes:
    """The route, whatever its interface's index is and however long it lasts."""
    kept = [pair for pair in _attributes(body[_ROUTE.size :]) if pair[0] != _RTA_CACHEINFO]
    return _route(body[: _ROUTE.size] + _packed(kept), index, 0)


def _hops(value: bytes, old: int, new: int) -> bytes:
    made = bytearray(value)
    at = 0
    while at + _HOP.size <= len(made):
        length, flags, weight, index = _HOP.unpack_from(made, at)
        _HOP.pack_into(made, at, length, flags & _ONLINK, weight, new if index == old else index)
        at += max(length + 3 & ~3, _HOP.size)
    return bytes(made)


def _links(attributes: dict[int, bytes]) -> Iterator[int]:
    """The interfaces that a route leaves by."""
    if _RTA_OIF in attributes:
        yield struct.unpack("=i", attributes[_RTA_OIF])[0]
    hops = attributes.get(_RTA_MULTIPATH, b"")
    at = 0
    while at + _HOP.size <= len(hops):
        length, _, _, index = _HOP.unpack_from(hops, at)
        yield index
        at += max(length + 3 & ~3, _HOP.size)


def _is_kernels(body: bytes, attributes: dict[int, bytes], link_local: bool) -> bool:
    """Is it the kernel's route to an interface's own IPv6 link-local addresses?"""
    to = attributes.get(_RTA_DST, b"")
    return body[0] == socket.AF_INET6 and bool(to) and _is_link_local(_text(to)) and not link_local


def _key(body: bytes, attributes: dict[int, bytes]) -> tuple[object, ...]:
    """What the routes that stand in one list of the kernel have in common."""
    kinds = (_RTA_DST, _RTA_PRIORITY)
    values = (attributes.get(kind) for kind in kinds)
    return (body[:4], _table(body, attributes), *values)  # family, lengths, tos


def _table(body: bytes, attributes: dict[int, bytes]) -> int:
    return struct.unpack("=I", attributes[_RTA_TABLE])[0] if _RTA_TABLE in attributes else body[4]


def _has_gateway(body: bytes) -> bool:
    kinds = {kind for kind, _ in _attributes(body[_ROUTE.size :])}
    return bool(kinds & {_RTA_GATEWAY, _RTA_VIA, _RTA_MULTIPATH})


def _is_link_local(address: str) -> bool:
    return ip_address(address).is_link_local and ":" in address


def _text(address: bytes) -> str:
    return str(ip_address(address))


def _swapped(value: bytes, old: int, new: int) -> bytes:
    return struct.pack("=i", new) if value == struct.pack("=i", old) else value


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        yield kind & 0x3FFF, data[at + 4 : at + length]
        at += max(length + 3 & ~3, 4)


def _packed(attributes: Iterable[tuple[int, bytes]]) -> bytes:
    return b"".join(
        _ATTRIBUTE.pack(4 + len(value), kind) + value + bytes(-len(value) % 4)
        for kind, value in attributes
    )


def _message(kind: int, flags: int, body: bytes) -> bytearray:
    return bytearray(HEADER.pack(HEADER.size + len(body), kind, flags, 0, 0) + body)
