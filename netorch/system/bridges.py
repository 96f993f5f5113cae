"""Bridges in messages.

The MAC is in the message that makes the bridge: otherwise the bridge takes the lowest of its
ports' and changes it as they come and go. The MTU is set once more after that, from one less,
because only a change makes the kernel take it for the user's and stop following the ports
(BROPT_MTU_SET_BY_USER, net/bridge/br_device.c).
"""

from collections.abc import Sequence

from netorch.resources import Bridge
from netorch.system import changes, messages, removal
from netorch.system.changes import Wanted
from netorch.system.netlink import Netlink, Outcomes
from netorch.system.scope import Scope
from netorch.system.snapshot import Link, Snapshot, uplink_mark

MAX_PORTS = 1023  # BR_MAX_PORTS less the port number that is not used, net/bridge/br_private.h
_FORWARD_DELAY, _STP_STATE = 1, 5  # IFLA_BR_
_LEAST_STP_DELAY = (
    200  # in hundredths of a second; with less the kernel refuses to turn STP on or off
)


def observe(link: Link, network: str, snapshot: Snapshot) -> Bridge:
    return Bridge(
        network=network,
        name=link.name,
        mac=link.mac,
        mtu=link.mtu,
        addresses=snapshot.own(link),
        forwarding=bool(link.forwarding),
        stp=bool(link.info.get(_STP_STATE)),
        uplink=_uplink(link, snapshot),
        up=link.up,
    )


def create(
    netlink: Netlink, snapshot: Snapshot, wanted: Sequence[Bridge], scope: Scope
) -> Outcomes:
    """Make bridges. What fails leaves nothing behind."""
    indexes = [changes.new_index(snapshot) for _ in wanted]
    outcomes = netlink.send(
        [
            _creation(bridge, index, snapshot, scope)
            for bridge, index in zip(wanted, indexes, strict=True)
        ]
    )
    removal.take_back(netlink, indexes, outcomes)
    return outcomes


def update(link: Link, bridge: Bridge, snapshot: Snapshot, scope: Scope) -> list[bytearray]:
    """The messages for what differs; an address or setting that stays is not touched."""
    restp = []
    if link.info.get(_STP_STATE, 0) != bridge.stp:
        # One by one: the kernel sets the delay first, and refuses 0 as long as STP is on.
        for attribute in sorted(_stp(bridge.stp), reverse=not bridge.stp):
            data = (("IFLA_INFO_KIND", "bridge"), ("IFLA_INFO_DATA", (attribute,)))
            restp.append(messages.link(link.index, attributes=(("IFLA_LINKINFO", data),)))
    current = snapshot.own(link)
    return restp + _settle(link, bridge, current, scope)


def _creation(bridge: Bridge, index: int, snapshot: Snapshot, scope: Scope) -> list[bytearray]:
    group = scope.group + 1
    mtu = bridge.mtu - 1
    first = messages.link(
        index,
        name=bridge.name,
        mac=bridge.mac,
        flags=messages.CREATE | messages.EXCLUSIVE,
        attributes=(
            ("IFLA_MTU", mtu),
            ("IFLA_GROUP", group),
            ("IFLA_LINKINFO", (("IFLA_INFO_KIND", "bridge"), ("IFLA_INFO_DATA", _stp(bridge.stp)))),
        ),
    )
    ipv6 = 0 if snapshot.has_ipv6 else None
    made = Link(index=index, mac=bridge.mac, mtu=mtu, group=group, kind="bridge", ipv6=ipv6)
    return [first, *_settle(made, bridge, (), scope)]


def _settle(link: Link, bridge: Bridge, current: tuple[str, ...], scope: Scope) -> list[bytearray]:
    wanted = Wanted(
        alias=scope.alias(bridge.key),
        mac=bridge.mac,
        mtu=bridge.mtu,
        up=bridge.up,
        group=scope.group + 1,
        master=link.master,
        forwarding=bridge.forwarding,
        no_ipv6=not bridge.uplink,
    )
    return [
        *changes.configure(link, wanted),
        *changes.readdress(link.index, current, bridge.addresses),
        *changes.activate(link, wanted),
    ]


def _uplink(link: Link, snapshot: Snapshot) -> str:
    mark = uplink_mark(link)
    if mark is None:
        return ""
    port = snapshot.links.get(mark.index)
    return port.name if port else mark.name


def _stp(on: bool) -> tuple[tuple[str, int], ...]:
    delay = _LEAST_STP_DELAY if on else 0
    return (("IFLA_BR_FORWARD_DELAY", delay), ("IFLA_BR_STP_STATE", int(on)))
