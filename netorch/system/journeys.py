"""The way that a packet takes through a lab, as the lab was asked for: pure, nothing observed.

A journey has a source and a target. Each end in the lab is a node at one of its NICs; the target
may also be the machine that the lab is on ("gateway" is its address in the source's network), or
an address outside. What is in between follows: nothing but the bridge where both are in one
network, the machine's routing otherwise.
"""

from collections.abc import Iterator, Sequence
from ipaddress import AddressValueError, IPv4Address, IPv4Interface

import msgspec

from netorch.errors import UsageError
from netorch.model import Topology
from netorch.resources import Bridge, DhcpClient, Dnsmasq, Guest, Namespace, Record, Tap, Veth
from netorch.state import State
from netorch.system.leases import Lease


class End(msgspec.Struct, frozen=True, kw_only=True):
    """A node at one of its NICs. `address` is the one that it should have, "" where nobody
    knows.
    """

    node: str
    mac: str
    port: Tap | Veth
    dhcp: bool
    address: str

    @property
    def is_guest(self) -> bool:
        return isinstance(self.port, Tap)

    @property
    def network(self) -> str:
        return self.port.network

    @property
    def bridge(self) -> str:
        return self.port.bridge


class Journey(msgspec.Struct, frozen=True, kw_only=True):
    """`target` is None for this machine itself (`here`) and for what is not of the lab."""

    source: End
    target: End | None
    address: str  # of the target
    routed: bool  # through this machine
    here: bool  # to this machine
    seen_as: str  # the source's address for the target


def plan(
    desired: State, leases: Sequence[Lease], own: Sequence[str], source: str, target: str
) -> Journey:
    """The journey from the node `source` to a node, "gateway" or an address.

    `own` are this machine's addresses. Raises UsageError for a name that the lab doesn't have.
    """
    starts = _ends(desired, leases, source)
    if target == source:
        raise UsageError(f"{source} always reaches itself", "name another target")
    if target in _nodes(desired):
        start, end = _nearest(starts, _ends(desired, leases, target))
        return _journey(desired, start, end, end.address, own)
    if target == "gateway":
        start = starts[0]
        return _journey(desired, start, None, _gateway(desired, start), own)
    try:
        address = str(IPv4Address(target))
    except AddressValueError as error:
        known = ", ".join(_nodes(desired))
        raise UsageError(
            f"{target!r} is no guest or host of this lab, and no IPv4 address",
            f'one of {known}, "gateway" or an address',
        ) from error
    for node in _nodes(desired):
        there = [end for end in _all_ends(desired, leases, node) if end.address == address]
        if there:
            start, end = _nearest(starts, there)
            return _journey(desired, start, end, address, own)
    near = [start for start in starts if _is_within(desired, start, address)]
    return _journey(desired, (near or starts)[0], None, address, own)


def network_of(desired: State, name: str) -> Bridge | None:
    """The bridge of a network; None where it is not the lab's own."""
    bridge = desired.get(f"bridge:{name}")
    return bridge if isinstance(bridge, Bridge) else None


def _journey(
    desired: State, source: End, target: End | None, address: str, own: Sequence[str]
) -> Journey:
    here = target is None and address in own
    one_bridge = target is not None and target.bridge == source.bridge
    on_link = target is None and _is_within(desired, source, address)
    routed = not (here or one_bridge or on_link)
    seen_as = source.address
    if routed and target is not None and _is_hidden(desired, source):
        bridge = network_of(desired, target.network)
        seen_as = bridge.addresses[0].partition("/")[0] if bridge and bridge.addresses else ""
    return Journey(
        source=source, target=target, address=address, routed=routed, here=here, seen_as=seen_as
    )


def _nodes(desired: State) -> list[str]:
    guests = [guest.name for guest in desired.of(Guest)]
    return guests + [namespace.host for namespace in desired.of(Namespace)]


def _ends(desired: State, leases: Sequence[Lease], node: str) -> list[End]:
    """The node's ends, those with a way out of their network first."""
    if node not in _nodes(desired):
        known = ", ".join(_nodes(desired)) or "none"
        raise UsageError(f"there is no guest or host {node!r} in this lab", f"there are: {known}")
    ends = list(_all_ends(desired, leases, node))
    if not ends:
        raise UsageError(f"{node} has no NIC")
    return sorted(ends, key=lambda end: not _has_way_out(end))


def _has_way_out(end: End) -> bool:
    return end.dhcp or (isinstance(end.port, Veth) and bool(end.port.gateway))


def _all_ends(desired: State, leases: Sequence[Lease], node: str) -> Iterator[End]:
    guest = desired.get(f"guest:{node}")
    if isinstance(guest, Guest):
        for nic in guest.nics:
            if nic.backend != "tap":
                continue  # leads out of what the lab's rules and bridges have a say in
            tap = desired.get(guest.tap_key(nic))
            assert isinstance(tap, Tap)
            dhcp = tap.network in guest.networks
            address = _leased(desired, leases, tap.network, nic.mac) if dhcp else ""
            yield End(node=node, mac=nic.mac, port=tap, dhcp=dhcp, address=address)
    clients = {client.needs[0] for client in desired.of(DhcpClient)}
    for veth in desired.of(Veth):
        if veth.host == node:
            dhcp = veth.key in clients
            static = veth.addresses[0].partition("/")[0] if veth.addresses else ""
            address = _leased(desired, leases, veth.network, veth.mac) if dhcp else static
            yield End(node=node, mac=veth.mac, port=veth, dhcp=dhcp, address=address)


def _leased(desired: State, leases: Sequence[Lease], network: str, mac: str) -> str:
    """The address that DHCP gave to a NIC, or has reserved for it."""
    for lease in leases:
        if (lease.network, lease.mac) == (network, mac):
            return lease.address
    dnsmasq = desired.get(f"dnsmasq:{network}")
    for line in dnsmasq.hosts.splitlines() if isinstance(dnsmasq, Dnsmasq) else ():
        if line.startswith(f"{mac},"):
            return line.split(",")[1]
    return ""


def _nearest(starts: Sequence[End], ends: Sequence[End]) -> tuple[End, End]:
    """A pair of ends on one bridge, or else the first of each."""
    pairs = [(start, end) for start in starts for end in ends if start.bridge == end.bridge]
    return (*pairs, (starts[0], ends[0]))[0]


def _gateway(desired: State, start: End) -> str:
    if isinstance(start.port, Veth) and start.port.gateway:
        return start.port.gateway
    bridge = network_of(desired, start.network)
    if bridge is None or not bridge.addresses:
        raise UsageError(f"network {start.network} has no gateway")
    return bridge.addresses[0].partition("/")[0]


def _is_within(desired: State, end: End, address: str) -> bool:
    """Is the address in the network that the end is in?"""
    bridge = network_of(desired, end.network)
    static = end.port.addresses if isinstance(end.port, Veth) else ()
    known = (*(bridge.addresses if bridge else ()), *static)
    return any(IPv4Address(address) in IPv4Interface(text).network for text in known)


def _is_hidden(desired: State, end: End) -> bool:
    """Do packets from this end leave with this machine's address?"""
    record = desired.get("record")
    if not isinstance(record, Record):
        return False
    network = msgspec.json.decode(record.text, type=Topology).networks.get(end.network)
    return network is not None and network.mode == "nat"
