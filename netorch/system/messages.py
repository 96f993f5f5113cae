"""rtnetlink messages: those about links and addresses put together here, routes by pyroute2.

pyroute2's message classes know every attribute there is. But importing them takes 12 ms, even below
a bare package of the same name instead of the real one, whose `__init__` imports every protocol
that it speaks and asyncio (a further 80 ms); that is as long as a small lab takes to be made.
So the attributes that links are made of stand in a table here, with the numbers and types that
pyroute2 has for them (tests/pure/test_netlink.py compares the bytes), and pyroute2 encodes what
few labs have. Its modules leave sys.modules afterwards: whoever imports pyroute2 later gets a
whole one of his own.

What a thousand taps have in common is encoded once, as a template; the three attributes in which
they differ (name, alias, MAC) are put behind it.
"""

import socket
import struct
import sys
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

from netorch.system.netlink import HEADER

NEWLINK, DELLINK, GETLINK = 16, 17, 18
NEWADDR, DELADDR, GETADDR = 20, 21, 22
NEWROUTE, DELROUTE, GETROUTE = 24, 25, 26
NEWNEIGH, DELNEIGH, GETNEIGH = 28, 29, 30
NEWLINKPROP, DELLINKPROP = 108, 109
EXCLUSIVE, CREATE, APPEND = 0x200, 0x400, 0x800

_IFF_UP = 0x1
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_IFALIAS, _IFLA_NET_NS_FD = 1, 3, 4, 20, 28
_IFLA_LINKINFO, _IFLA_INFO_KIND, _IFLA_INFO_DATA, _VETH_INFO_PEER = 18, 1, 2, 1
_IFLA_PROP_LIST, _IFLA_ALT_IFNAME, _NESTED = 52, 53, 0x8000
_IFA_ADDRESS, _IFA_LOCAL, _IFA_BROADCAST = 1, 2, 4
_STATIC = 4  # RTPROT_STATIC, what an administrator's routes have

# Number and type of what stands in `link`'s attributes; those without a type hold others.
_LINK_ATTRIBUTES: dict[str, tuple[int, str]] = {
    "IFLA_ADDRESS": (_IFLA_ADDRESS, "mac"),
    "IFLA_MTU": (_IFLA_MTU, "=I"),
    "IFLA_MASTER": (10, "=I"),
    "IFLA_GROUP": (27, "=I"),
    "IFLA_LINKINFO": (_IFLA_LINKINFO, ""),
    "IFLA_INFO_KIND": (_IFLA_INFO_KIND, "text"),
    "IFLA_INFO_DATA": (_IFLA_INFO_DATA, ""),
    "IFLA_BR_FORWARD_DELAY": (1, "=I"),
    "IFLA_BR_STP_STATE": (5, "=I"),
    "IFLA_AF_SPEC": (26, ""),
    "AF_INET": (socket.AF_INET, ""),
    "IFLA_INET_CONF": (1, ""),
    "FORWARDING": (1, "=I"),
    "AF_INET6": (socket.AF_INET6, ""),
    "IFLA_INET6_ADDR_GEN_MODE": (8, "=B"),
}

# An attribute as pyroute2 names it; a tuple of attributes as the value makes it a nested one.
Attribute = tuple[str, Any]
Attributes = tuple[Attribute, ...]


def up(on: bool) -> Attribute:
    """Up or down, to stand among the attributes of `link` (for the kernel it is a flag)."""
    return ("up", on)


def link(
    index: int,
    *,
    name: str = "",
    alias: str = "",
    mac: str = "",
    flags: int = 0,
    attributes: Attributes = (),
) -> bytearray:
    """RTM_NEWLINK: without CREATE in `flags` it changes the link `index`."""
    message = bytearray(_template(flags, attributes))
    struct.pack_into("=i", message, HEADER.size + 4, index)
    if name:
        message += _attribute(_IFLA_IFNAME, name.encode() + b"\0")
    if alias:
        message += _attribute(_IFLA_IFALIAS, alias.encode() + b"\0")
    if mac:
        message += _attribute(_IFLA_ADDRESS, _mac(mac))
    struct.pack_into("=I", message, 0, len(message))
    return message


def veth(
    *,
    index: int,
    name: str,
    peer: int,
    device: str,
    mac: str,
    namespace: int,
    attributes: Attributes,
) -> bytearray:
    """RTM_NEWLINK for a veth pair; `namespace` is a descriptor of the other end's.

    What describes the other end is put together here: pyroute2 takes 200 µs for it.
    """
    peer_end = struct.pack("=BxHiII", 0, 0, peer, 0, 0)
    peer_end += _attribute(_IFLA_IFNAME, device.encode() + b"\0")
    peer_end += _attribute(_IFLA_ADDRESS, _mac(mac))
    peer_end += _attribute(_IFLA_NET_NS_FD, struct.pack("=I", namespace))
    for mtu in (value for key, value in attributes if key == "IFLA_MTU"):
        peer_end += _attribute(_IFLA_MTU, struct.pack("=I", mtu))
    info = _attribute(_IFLA_INFO_KIND, b"veth")
    info += _attribute(_IFLA_INFO_DATA, _attribute(_VETH_INFO_PEER, peer_end))
    message = link(index, name=name, flags=CREATE | EXCLUSIVE, attributes=attributes)
    message += _attribute(_IFLA_LINKINFO, info)
    struct.pack_into("=I", message, 0, len(message))
    return message


def alternative_name(kind: int, index: int, name: str) -> bytearray:
    """RTM_NEWLINKPROP or RTM_DELLINKPROP: one more name of a link, of up to 127 bytes."""
    inner = _attribute(_IFLA_ALT_IFNAME, name.encode() + b"\0")
    body = struct.pack("=BxHiII", 0, 0, index, 0, 0)
    body += _attribute(_IFLA_PROP_LIST | _NESTED, inner)
    flags = CREATE | EXCLUSIVE | APPEND if kind == NEWLINKPROP else 0
    return bytearray(HEADER.pack(HEADER.size + len(body), kind, flags, 0, 0) + body)


def delete_link(index: int) -> bytearray:
    return _link(DELLINK, 0, index, 0, 0, b"")


def delete_group(group: int) -> bytearray:
    """RTM_DELLINK for every link of a group at once."""
    return _link(DELLINK, 0, 0, 0, 0, _packed((("IFLA_GROUP", group),)))


def address(kind: int, index: int, text: str) -> bytearray:
    """RTM_NEWADDR or RTM_DELADDR for `a.b.c.d/len` on the link `index`."""
    local, _, length = text.partition("/")
    packed = socket.inet_aton(local)
    attributes = _attribute(_IFA_LOCAL, packed) + _attribute(_IFA_ADDRESS, packed)
    if kind == NEWADDR and int(length) < 31:
        number = int.from_bytes(packed, "big") | (0xFFFFFFFF >> int(length))
        attributes += _attribute(_IFA_BROADCAST, number.to_bytes(4, "big"))
    body = struct.pack("=BBBBi", socket.AF_INET, int(length), 0, 0, index) + attributes
    flags = CREATE | EXCLUSIVE if kind == NEWADDR else 0
    return bytearray(HEADER.pack(HEADER.size + len(body), kind, flags, 0, 0) + body)


def default_route(kind: int, index: int, gateway: str) -> bytearray:
    """RTM_NEWROUTE or RTM_DELROUTE for the default route by `gateway` over the link `index`.

    Appended, not replaced: a host with two networks may have a default route by each.
    """
    message = _route_message()()
    message["header"]["type"] = kind
    message["header"]["flags"] = CREATE | APPEND if kind == NEWROUTE else 0
    message["family"] = socket.AF_INET
    message["table"] = 254  # RT_TABLE_MAIN
    message["proto"] = _STATIC
    message["type"] = 1  # RTN_UNICAST
    message["attrs"] = [("RTA_GATEWAY", gateway), ("RTA_OIF", index)]
    message.encode()
    return bytearray(message.data)


def warm() -> None:
    """Import all that a message may need: for processes that others are forked from."""
    default_route(NEWROUTE, 1, "192.0.2.1")


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def _attribute(kind: int, value: bytes) -> bytes:
    length = 4 + len(value)
    return struct.pack("=HH", length, kind) + value + bytes(-length % 4)


def _link(kind: int, flags: int, index: int, up: int, change: int, attributes: bytes) -> bytearray:
    body = struct.pack("=BxHiII", 0, 0, index, up, change) + attributes
    return bytearray(HEADER.pack(HEADER.size + len(body), kind, flags, 0, 0) + body)


def _packed(attributes: Attributes) -> bytes:
    packed = b""
    for name, value in attributes:
        number, form = _LINK_ATTRIBUTES[name]
        if isinstance(value, tuple):
            inner = _packed(value)
        elif form == "text":
            inner = value.encode() + b"\0"
        elif form == "mac":
            inner = _mac(value)
        else:
            inner = struct.pack(form, value)
        packed += _attribute(number, inner)
    return packed


@lru_cache(maxsize=256)
def _template(flags: int, attributes: Attributes) -> bytearray:
    up = change = 0
    for _, on in [pair for pair in attributes if pair[0] == "up"]:
        up, change = _IFF_UP if on else 0, _IFF_UP
    rest = tuple(pair for pair in attributes if pair[0] != "up")
    return _link(NEWLINK, flags, 0, up, change, _packed(rest))


@cache
def _route_message() -> Any:
    """pyroute2's class of RTM_NEWROUTE and its like."""

    import importlib.util  # few labs have routes

    name = "pyroute2.netlink.rtnl.rtmsg"
    if "pyroute2" in sys.modules:
        return importlib.import_module(name).rtmsg
    spec = importlib.util.find_spec("pyroute2")
    if spec is None:
        raise ModuleNotFoundError("No module named 'pyroute2'", name="pyroute2")
    bare = ModuleType("pyroute2")
    bare.__path__ = list(spec.submodule_search_locations or ())
    sys.modules["pyroute2"] = bare
    try:
        return importlib.import_module(name).rtmsg
    finally:
        for name in [n for n in sys.modules if n == "pyroute2" or n.startswith("pyroute2.")]:
            del sys.modules[name]
