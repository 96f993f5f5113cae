"""rtnetlink messages, encoded with pyroute2's message classes.

Of pyroute2 only the message classes are needed, and importing them the usual way runs the
package's `__init__`, which imports every protocol that it speaks and asyncio (a further 80 ms,
REFERENCE 6). So they are imported below a bare package of the same name, which leaves sys.modules
afterwards together with them: whoever imports pyroute2 later gets a whole one of his own.

Encoding one link takes pyroute2 about 100 µs, as much as the kernel takes to act on it. What a
thousand taps have in common is therefore encoded once, as a template; the three attributes in
which they differ (name, alias, MAC) are put behind it.
"""

import importlib
import importlib.util
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
_STATIC = 4  # RTPROT_STATIC, what an administrator's routes have

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
        message += _attribute(_IFLA_ADDRESS, bytes.fromhex(mac.replace(":", "")))
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
    peer_end += _attribute(_IFLA_ADDRESS, bytes.fromhex(mac.replace(":", "")))
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
    return _encode("link", DELLINK, 0, {"index": index}, [])


def delete_group(group: int) -> bytearray:
    """RTM_DELLINK for every link of a group at once."""
    return _encode("link", DELLINK, 0, {}, [("IFLA_GROUP", group)])


def address(kind: int, index: int, text: str) -> bytearray:
    """RTM_NEWADDR or RTM_DELADDR for `a.b.c.d/len` on the link `index`."""
    local, _, length = text.partition("/")
    attrs = [("IFA_LOCAL", local), ("IFA_ADDRESS", local)]
    if kind == NEWADDR and int(length) < 31:
        number = int.from_bytes(socket.inet_aton(local), "big") | (0xFFFFFFFF >> int(length))
        attrs.append(("IFA_BROADCAST", socket.inet_ntoa(number.to_bytes(4, "big"))))
    fields = {"family": socket.AF_INET, "prefixlen": int(length), "index": index}
    flags = CREATE | EXCLUSIVE if kind == NEWADDR else 0
    return _encode("address", kind, flags, fields, attrs)


def default_route(kind: int, index: int, gateway: str) -> bytearray:
    """RTM_NEWROUTE or RTM_DELROUTE for the default route by `gateway` over the link `index`.

    Appended, not replaced: a host with two networks may have a default route by each.
    """
    fields = {
        "family": socket.AF_INET,
        "table": 254,  # RT_TABLE_MAIN
        "proto": _STATIC,
        "type": 1,  # RTN_UNICAST
    }
    attrs = [("RTA_GATEWAY", gateway), ("RTA_OIF", index)]
    return _encode("route", kind, CREATE | APPEND if kind == NEWROUTE else 0, fields, attrs)


def warm() -> None:
    """Import and build all that the first message would: for processes that others are forked
    from.
    """
    info = ("IFLA_LINKINFO", (("IFLA_INFO_KIND", "bridge"),))
    link(1, attributes=(info, ("IFLA_GROUP", 1), ("IFLA_MASTER", 1), up(True)))
    veth(
        index=1,
        name="v",
        peer=2,
        device="v",
        mac="52:54:00:00:00:00",
        namespace=0,
        attributes=(("IFLA_MTU", 1500), ("IFLA_GROUP", 1)),
    )
    address(NEWADDR, 1, "192.0.2.1/24")
    default_route(NEWROUTE, 1, "192.0.2.1")


def _attribute(kind: int, value: bytes) -> bytes:
    length = 4 + len(value)
    return struct.pack("=HH", length, kind) + value + bytes(-length % 4)


@lru_cache(maxsize=256)
def _template(flags: int, attributes: Attributes) -> bytearray:
    fields = {}
    for _, on in [pair for pair in attributes if pair[0] == "up"]:
        fields = {"flags": _IFF_UP if on else 0, "change": _IFF_UP}
    rest = tuple(pair for pair in attributes if pair[0] != "up")
    return _encode("link", NEWLINK, flags, fields, _nested(rest)["attrs"])


def _nested(attributes: Attributes) -> dict[str, list[Attribute]]:
    return {
        "attrs": [
            (name, _nested(value) if isinstance(value, tuple) else value)
            for name, value in attributes
        ]
    }


def _encode(
    what: str, kind: int, flags: int, fields: dict[str, int], attrs: list[Attribute]
) -> bytearray:
    message = _classes()[what]()
    message["header"]["type"] = kind
    message["header"]["flags"] = flags
    for name, value in fields.items():
        message[name] = value
    message["attrs"] = attrs
    message.encode()
    return bytearray(message.data)


@cache
def _classes() -> dict[str, Any]:
    modules = _import_messages()
    nla = modules["pyroute2.netlink"].nla
    ifinfmsg = modules["pyroute2.netlink.rtnl.ifinfmsg"].ifinfmsg

    class Link(ifinfmsg):  # type: ignore[misc, valid-type]
        class af_spec_inet(ifinfmsg.af_spec_inet):  # type: ignore[misc, name-defined]
            # pyroute2's `inet` is flat, the form in which the kernel reports it; it takes it nested
            # (net/ipv4/devinet.c, inet_set_link_af), each number an attribute of its own.
            class inet(nla):  # type: ignore[misc, valid-type]
                prefix = "IFLA_"
                nla_map = (("IFLA_INET_UNSPEC", "none"), ("IFLA_INET_CONF", "conf"))

                class conf(nla):  # type: ignore[misc, valid-type]
                    nla_map = (("UNSPEC", "none"), ("FORWARDING", "uint32"))

    return {
        "link": Link,
        "address": modules["pyroute2.netlink.rtnl.ifaddrmsg"].ifaddrmsg,
        "route": modules["pyroute2.netlink.rtnl.rtmsg"].rtmsg,
    }


def _import_messages() -> dict[str, ModuleType]:
    names = ["pyroute2.netlink"]
    names += [f"pyroute2.netlink.rtnl.{name}" for name in ("ifinfmsg", "ifaddrmsg", "rtmsg")]
    if "pyroute2" in sys.modules:
        return {name: importlib.import_module(name) for name in names}
    spec = importlib.util.find_spec("pyroute2")
    if spec is None:
        raise ModuleNotFoundError("No module named 'pyroute2'", name="pyroute2")
    bare = ModuleType("pyroute2")
    bare.__path__ = list(spec.submodule_search_locations or ())
    sys.modules["pyroute2"] = bare
    try:
        return {name: importlib.import_module(name) for name in names}
    finally:
        for name in [n for n in sys.modules if n == "pyroute2" or n.startswith("pyroute2.")]:
            del sys.modules[name]
