"""Who is behind which address: bridges' forwarding tables, ARP tables, and the way to an address.

Numbers are those of <linux/neighbour.h> and <linux/rtnetlink.h>.
"""

import socket
import struct
from collections.abc import Iterator

import msgspec

from netorch.errors import KernelError
from netorch.system.netlink import Netlink
from netorch.system.snapshot import attributes, parse_route

_GETROUTE, _GETNEIGHBOUR = 26, 30
_NEIGHBOUR = struct.Struct("=BxxxiHBB")  # ndmsg: family, index, state, flags, type
_ROUTE = struct.Struct("=8BI")
_DESTINATION, _MAC, _MASTER = 1, 2, 9  # NDA_
_ROUTE_DESTINATION = 1  # RTA_DST
_STATES = {
    0x01: "incomplete",
    0x02: "reachable",
    0x04: "stale",
    0x08: "delay",
    0x10: "probe",
    0x20: "failed",
    0x40: "noarp",
    0x80: "permanent",
}
_ANSWERED = (0x80, 0x02, 0x10, 0x08, 0x04)  # the surest first


class Learned(msgspec.Struct, frozen=True):
    """An entry of a bridge's forwarding table: the port that frames to `mac` leave by."""

    bridge: int
    port: int
    mac: str


class Way(msgspec.Struct, frozen=True):
    """How a machine sends to an address: by which device, through which gateway ("": directly).

    `error` is the reason why it can't, "" if it can.
    """

    device: str = ""
    gateway: str = ""
    error: str = ""


def learned(netlink: Netlink) -> list[Learned]:
    """The forwarding tables of all bridges."""
    found = []
    for index, _, values in _neighbours(netlink, socket.AF_BRIDGE):
        if _MAC in values and _MASTER in values:
            bridge = struct.unpack("=I", values[_MASTER])[0]
            found.append(Learned(bridge, index, values[_MAC].hex(":")))
    return found


def arp(netlink: Netlink) -> dict[str, str]:
    """The state of every IPv4 neighbour that was asked for, by address: reachable, failed, ..."""
    return {
        socket.inet_ntoa(values[_DESTINATION]): _STATES.get(state, "unknown")
        for _, state, values in _neighbours(netlink, socket.AF_INET)
        if _DESTINATION in values
    }


def addresses(netlink: Netlink) -> dict[tuple[int, str], str]:
    """The IPv4 address of each neighbour that has answered, by device and MAC; where one has more,
    that which was confirmed last.
    """
    ranked: dict[tuple[int, str], tuple[int, str]] = {}
    for index, state, values in _neighbours(netlink, socket.AF_INET):
        if state in _ANSWERED and _DESTINATION in values and _MAC in values:
            place = (index, values[_MAC].hex(":"))
            entry = (_ANSWERED.index(state), socket.inet_ntoa(values[_DESTINATION]))
            ranked[place] = min(ranked.get(place, entry), entry)
    return {place: address for place, (_, address) in ranked.items()}


def way(netlink: Netlink, address: str, names: dict[int, str]) -> Way:
    """What the kernel does with a packet to `address`; `names` are those of the links by index."""
    destination = struct.pack("=HH4s", 8, _ROUTE_DESTINATION, socket.inet_aton(address))
    request = _ROUTE.pack(socket.AF_INET, 32, *[0] * 6, 0) + destination
    try:
        route = parse_route(netlink.get(_GETROUTE, request))
    except KernelError as error:
        return Way(error=error.message)
    device = names.get(route.links[0], "") if route.links else ""
    return Way(device=device, gateway=route.gateway)


def _neighbours(netlink: Netlink, family: int) -> Iterator[tuple[int, int, dict[int, memoryview]]]:
    """(interface index, state, attributes) of every neighbour of a family."""
    for body in netlink.dump(_GETNEIGHBOUR, _NEIGHBOUR.pack(family, 0, 0, 0, 0)):
        _, index, state, _, _ = _NEIGHBOUR.unpack_from(body)
        yield index, state, dict(attributes(body[_NEIGHBOUR.size :]))
