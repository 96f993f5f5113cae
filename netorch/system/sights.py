"""What there is to see along a journey, before it is judged.

Inside a guest, its agent runs `ip`, which busybox and iproute2 both have; where it may not run
commands, it still lists the interfaces. An image without an agent can't be looked into.
"""

import re
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from netorch.errors import NetorchError
from netorch.resources import Guest, Namespace, Veth
from netorch.state import State
from netorch.system.echo import Echo
from netorch.system.journeys import End
from netorch.system.leases import Lease
from netorch.system.neighbours import Learned, Way, arp, learned, way
from netorch.system.netlink import Netlink
from netorch.system.qmp import Agent, QmpError, agent_exec, agent_path
from netorch.system.scope import Scope
from netorch.system.snapshot import Link, Snapshot
from netorch.system.tracing import Drop

_LOOK = """
ip -o link; echo
ip -o -4 addr; echo
[ -z "$0" ] || ip -4 route get "$0" 2>&1; echo
ip -4 neigh
"""
_LINK = re.compile(r"^\d+: ([^:@]+)\S* <([^>]*)>.* link/ether ([0-9a-f:]{17})", re.MULTILINE)
_ADDRESS = re.compile(r"^\d+: (\S+) +inet ([\d.]+)", re.MULTILINE)
_WAY = re.compile(r"^[\d.]+ (?:via ([\d.]+) )?dev (\S+)")
_NEIGHBOUR = re.compile(r"^([\d.]+) dev .*?([A-Z]+) *$", re.MULTILINE)


class Inside(msgspec.Struct, frozen=True, kw_only=True):
    """A node's own view of its NIC. `unseen` is the reason why nobody could look, "" if seen.

    `device` is "" where no NIC has the MAC; `way` leads to the other end, None if nobody asked.
    """

    device: str = ""
    up: bool = False
    carrier: bool = False
    addresses: tuple[str, ...] = ()
    way: Way | None = None
    arp: dict[str, str] = {}
    unseen: str = ""


class Ground(msgspec.Struct, frozen=True, kw_only=True):
    """This machine's view: its links by name, what its bridges learned, its way to the target."""

    links: dict[str, Link]
    addresses: tuple[str, ...] = ()
    learned: tuple[Learned, ...] = ()
    arp: dict[str, str] = {}
    way: Way | None = None


class Sights(msgspec.Struct, frozen=True, kw_only=True):
    """All that was seen. `drop` and `refusals` (chain, reason) are nftables'; with a trace there
    are no refusals.
    """

    state: State
    ground: Ground
    leases: tuple[Lease, ...] = ()
    inside: dict[str, Inside] = {}
    echo: Echo
    drop: Drop | None = None
    refusals: tuple[tuple[str, str], ...] = ()


def state(scope: Scope) -> State:
    """The lab's resources that a packet meets, as they are."""
    from netorch.system.firewall import Firewall
    from netorch.system.guests import Guests
    from netorch.system.hosts import Hosts
    from netorch.system.links import Links
    from netorch.system.services import DhcpClients, Dnsmasqs

    adapters = (
        Hosts(scope),
        Links(scope),
        Firewall(scope),
        Dnsmasqs(scope),
        DhcpClients(scope),
        Guests(scope, lambda line: None),
    )
    return State(resource for adapter in adapters for resource in adapter.observe())


def ground(address: str) -> Ground:
    """This machine, and its way to `address` ("": to nowhere)."""
    with Netlink() as netlink:
        snapshot = Snapshot(netlink)
        return Ground(
            links=snapshot.by_name,
            addresses=tuple(
                a.text.partition("/")[0] for of in snapshot.addresses.values() for a in of
            ),
            learned=tuple(learned(netlink)),
            arp=arp(netlink),
            way=way(netlink, address, _names(snapshot)) if address else None,
        )


def inside(scope: Scope, seen: State, end: End, address: str) -> Inside:
    """The node of `end`, and its way to `address` ("": to nowhere)."""
    if end.is_guest:
        return _inside_guest(scope, seen, end, address)
    return _inside_host(scope, seen, end, address)


def _inside_host(scope: Scope, seen: State, end: End, address: str) -> Inside:
    there = seen.get(f"namespace:{end.node}")
    assert isinstance(end.port, Veth)
    if not isinstance(there, Namespace) or not there.up:
        return Inside(unseen="it is not there")
    with Netlink(scope.namespace(end.node)) as netlink:
        snapshot = Snapshot(netlink)
        link = snapshot.by_name.get(end.port.device)
        if link is None:
            return Inside()
        return Inside(
            device=link.name,
            up=link.up,
            carrier=link.running,
            addresses=tuple(
                a.text.partition("/")[0] for a in snapshot.addresses.get(link.index, ())
            ),
            way=way(netlink, address, _names(snapshot)) if address else None,
            arp=arp(netlink),
        )


def _inside_guest(scope: Scope, seen: State, end: End, address: str) -> Inside:
    guest = seen.get(f"guest:{end.node}")
    if not isinstance(guest, Guest) or guest.state != "running":
        return Inside(unseen="it does not run")
    try:
        with suppress(QmpError):
            done = agent_exec(scope, end.node, ["/bin/sh", "-c", _LOOK, address])
            parts = done.out.decode(errors="replace").split("\n\n")
            if len(parts) == 4:
                return parse(parts, end.mac, asked=bool(address))
        with Agent(agent_path(scope, end.node), end.node) as agent:
            return _listed(agent.ask("guest-network-get-interfaces"), end.mac)
    except NetorchError as error:
        return Inside(unseen=error.message)


def parse(parts: Sequence[str], mac: str, *, asked: bool) -> Inside:
    """What `ip` says of links, addresses, the way to an address (if asked), and neighbours."""
    links, addresses, route, neighbours = parts
    known = {found[2]: (found[0], found[1].split(",")) for found in _LINK.findall(links)}
    device, flags = known.get(mac, ("", []))
    found = _WAY.match(route.strip())
    error = "" if found else route.strip().partition("\n")[0].removeprefix("ip: ")
    return Inside(
        device=device,
        up="UP" in flags,
        carrier="LOWER_UP" in flags,
        addresses=tuple(text for name, text in _ADDRESS.findall(addresses) if name == device),
        way=Way(found[2] if found else "", found[1] or "" if found else "", error)
        if asked
        else None,
        arp={text: state.lower() for text, state in _NEIGHBOUR.findall(neighbours)},
    )


def _listed(interfaces: list[dict[str, object]], mac: str) -> Inside:
    """What the agent itself tells (qga/qapi-schema.json): no flags, no routes."""
    for interface in msgspec.convert(interfaces, list[_Interface]):
        if interface.mac == mac:
            addresses = (a.address for a in interface.addresses if a.kind == "ipv4")
            return Inside(device=interface.name, up=True, carrier=True, addresses=tuple(addresses))
    return Inside()


class _IpAddress(msgspec.Struct, rename={"address": "ip-address", "kind": "ip-address-type"}):
    address: str
    kind: str


class _Interface(msgspec.Struct, rename={"mac": "hardware-address", "addresses": "ip-addresses"}):
    name: str
    mac: str = ""
    addresses: list[_IpAddress] = []


def _names(snapshot: Snapshot) -> dict[int, str]:
    return {index: link.name for index, link in snapshot.links.items()}
