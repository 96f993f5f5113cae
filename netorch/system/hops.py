"""Hops: what a packet meets on its journey, each judged from what was seen. Pure.

The order is that of the packet: out of the source, through this machine, into the target, and back.
A hop is blamed only for what it does itself, not for what another one causes: a tap without a
carrier is the guest's fault where QEMU is gone, a port that doesn't forward that of the link which
is down, and an address that a bridge has not learned is nobody's as long as the node can't send.
"""

from collections.abc import Iterator, Sequence

import msgspec

from netorch.resources import Guest, Namespace, Veth
from netorch.state import State
from netorch.system.journeys import End, Journey, network_of
from netorch.system.neighbours import Way
from netorch.system.sights import Inside, Sights

_FORWARDING = 3  # BR_STATE_
_PORT_STATES = ("disabled", "listening", "learning", "forwarding", "blocking")
_LOST = ("failed", "incomplete")
_AGAIN = "`netorch apply` its file again"


class Hop(msgspec.Struct, frozen=True):
    """`detail` is what was seen and, where the hop is broken, what to do."""

    name: str
    ok: bool
    detail: str


def first_broken(hops: Sequence[Hop]) -> str:
    """One sentence for a report: the first broken hop, or that none is."""
    for hop in hops:
        if not hop.ok:
            return f"{hop.name} is broken: {hop.detail}"
    return "every hop is as it should be"


def out_of(desired: State, seen: Sights, end: End, address: str) -> list[Hop]:
    """The hops of the source, from the inside to its bridge, and how it came to send."""
    first = [_process(seen, end), *_nic(seen, end), _port(seen, end), _bridge_port(seen, end)]
    first.append(_bridge(desired, seen, end))
    last = [*_given(seen, end), *_route(seen, end, address)]
    blameless = all(hop.ok for hop in (*first, *last))
    return [*first, *_learned(seen, end, blameless), *last]


def into(desired: State, seen: Sights, end: End, address: str, *, bridged: bool) -> list[Hop]:
    """The hops of the target, from its bridge to the inside, and how it answers."""
    bridge = [] if bridged else [_bridge(desired, seen, end)]
    way_in = [_bridge_port(seen, end), _port(seen, end), _process(seen, end), *_nic(seen, end)]
    last = [*_given(seen, end), *_route(seen, end, address)]
    blameless = all(hop.ok for hop in (*bridge, *way_in, *last))
    return [*bridge, *_learned(seen, end, blameless), *way_in, *last]


def neighbours(seen: Sights, journey: Journey) -> Iterator[Hop]:
    """Whether those who send found the MAC of whom they send to."""
    source, target = journey.source, journey.target
    yield from _neighbour(seen.inside.get(source.node), source.node, journey.address)
    if journey.routed and seen.ground.way is not None:
        ground = Inside(way=seen.ground.way, arp=seen.ground.arp)
        yield from _neighbour(ground, "this machine", journey.address)
    if target is not None and journey.seen_as:
        yield from _neighbour(seen.inside.get(target.node), target.node, journey.seen_as)


def answer(seen: Sights, journey: Journey, so_far: Sequence[Hop]) -> Hop:
    """The end of the journey: is there an answer to a ping?"""
    whom = journey.target.node if journey.target else journey.address
    name, echo = f"answer of {whom}", seen.echo
    if echo.answered:
        return Hop(name, True, echo.said)
    if not echo.tried:
        return Hop(name, True, f"not tried: {echo.said}")
    if not all(hop.ok for hop in so_far):
        return Hop(name, False, echo.said)
    if journey.target is None and journey.routed:
        beyond = "this machine sent it on, and can't see further (a private place's uplink, pasta "
        return Hop(name, False, f"{echo.said}; {beyond}or slirp4netns, may pass no pings)")
    return Hop(name, False, f"{echo.said}; a firewall on either of them may drop it")


def _process(seen: Sights, end: End) -> Hop:
    if not end.is_guest:
        there = seen.state.get(f"namespace:{end.node}")
        name = f"host {end.node}"
        if not isinstance(there, Namespace) or not there.up:
            return Hop(name, False, f"its network namespace is gone: {_AGAIN}")
        return Hop(name, True, "its network namespace is there")
    name, guest = f"guest {end.node}", seen.state.get(f"guest:{end.node}")
    if not isinstance(guest, Guest):
        return Hop(name, False, f"no QEMU runs it: {_AGAIN}")
    if guest.state != "running":
        return Hop(name, False, f"QEMU does not run it, its state is {guest.state}: {_AGAIN}")
    return Hop(name, True, "QEMU runs it")


def _nic(seen: Sights, end: End) -> Iterator[Hop]:
    if not _process(seen, end).ok:
        return
    inside = seen.inside[end.node]
    name = f"NIC {inside.device or end.mac} of {end.node}"
    if inside.unseen:
        guest = seen.state.get(f"guest:{end.node}")
        tiny = isinstance(guest, Guest) and guest.image == "tiny"  # which always has an agent
        yield Hop(name, not tiny, f"can't be looked at: {inside.unseen}")
    elif not inside.device:
        yield Hop(name, False, f"{end.node} has no such NIC: {_AGAIN}")
    elif not inside.up:
        yield Hop(name, False, f"it is down: `ip link set {inside.device} up` in {end.node}")
    elif end.is_guest and not inside.carrier:
        yield Hop(name, False, "it has no carrier: QEMU has its link off (QMP: set_link, up=true)")
    else:
        yield Hop(name, True, "up")


def _port(seen: Sights, end: End) -> Hop:
    name = f"{'tap' if end.is_guest else 'veth'} {end.port.name}"
    link = seen.ground.links.get(end.port.name)
    blame = _process(seen, end).ok
    if link is None or seen.state.get(end.port.key) is None:
        return Hop(name, not (end.is_guest or blame), f"it is gone: {_AGAIN}")
    if not link.up:
        return Hop(name, False, f"it is down: `ip link set {link.name} up`, or {_AGAIN}")
    if link.running:
        return Hop(name, True, "up, with a carrier")
    if end.is_guest:
        return Hop(name, not blame, "no carrier: no QEMU has it open")
    blame = blame and seen.inside[end.node].up
    return Hop(name, not blame, f"no carrier: its other end in {end.node} is down")


def _bridge_port(seen: Sights, end: End) -> Hop:
    name, there = f"bridge port {end.port.name}", seen.state.get(end.port.key)
    link = seen.ground.links.get(end.port.name)
    if link is None or there is None:
        return Hop(name, True, f"not there: see {end.port.name}")
    bridge = getattr(there, "bridge", "")
    if bridge != end.bridge:
        return Hop(
            name,
            False,
            f"it is a port of {bridge or 'no bridge'}, not of {end.bridge}: "
            f"`ip link set {link.name} master {end.bridge}`, or {_AGAIN}",
        )
    state, master = link.port_state, seen.ground.links.get(bridge)
    works = link.running and master is not None and master.up
    if works and state is not None and state != _FORWARDING:
        words = _PORT_STATES[state] if state < len(_PORT_STATES) else str(state)
        return Hop(name, False, f"it is {words}: spanning tree lets nothing pass (yet)")
    return Hop(name, True, f"a port of {bridge}")


def _bridge(desired: State, seen: Sights, end: End) -> Hop:
    name, link = f"bridge {end.bridge}", seen.ground.links.get(end.bridge)
    wanted, there = (network_of(state, end.network) for state in (desired, seen.state))
    if link is None or (wanted is not None and there is None):
        return Hop(name, False, f"it is gone: {_AGAIN}")
    if not link.up:
        return Hop(name, False, f"it is down: `ip link set {link.name} up`, or {_AGAIN}")
    if wanted is not None and there is not None:
        for address in wanted.addresses:
            if address not in there.addresses:
                return Hop(name, False, f"it lacks its address {address}: {_AGAIN}")
    return Hop(name, True, " ".join(("up", *(there.addresses if there else ()))))


def _learned(seen: Sights, end: End, blameless: bool) -> Iterator[Hop]:
    """`blameless`: nothing else at this end is known to be broken."""
    name, links = f"forwarding table of {end.bridge}", seen.ground.links
    bridge, port = links.get(end.bridge), links.get(end.port.name)
    if bridge is None or port is None:
        return
    entries = [e for e in seen.ground.learned if (e.bridge, e.mac) == (bridge.index, end.mac)]
    names = {link.index: link.name for link in links.values()}
    elsewhere = [names.get(e.port, "another port") for e in entries if e.port != port.index]
    what = f"{end.mac} ({end.node})"
    if elsewhere and blameless:
        detail = f"it has {what} on {elsewhere[0]}, not on {port.name}: two have that MAC, or "
        yield Hop(name, False, f"{detail}`bridge fdb del {end.mac} dev {elsewhere[0]} master`")
    elif entries:
        yield Hop(name, True, f"it has {what} on {names.get(entries[0].port, 'a port')}")
    else:
        blame = blameless and seen.echo.tried and not seen.echo.answered
        yield Hop(name, not blame, f"it has not learned {what}: nothing came from there")


def _given(seen: Sights, end: End) -> Iterator[Hop]:
    """How the node came to its address, and whether it has it."""
    if end.dhcp:
        running = f"dnsmasq:{end.network}" in seen.state
        detail = "it runs" if running else f"it does not run: {_AGAIN}"
        yield Hop(f"dnsmasq for {end.network}", running, detail)
        if isinstance(end.port, Veth):
            running = f"dhcp:{end.node}:{end.port.device}" in seen.state
            detail = "it runs" if running else f"it does not run: {_AGAIN}"
            yield Hop(f"DHCP client of {end.node}", running, detail)
        yield _lease(seen, end)
    else:
        yield _address(seen, end)


def _lease(seen: Sights, end: End) -> Hop:
    name, inside = f"lease of {end.node}", seen.inside.get(end.node, Inside(unseen="it is gone"))
    held = [e for e in seen.leases if (e.network, e.mac) == (end.network, end.mac)]
    has = f"{end.node} has {' '.join(inside.addresses) or 'no address'}"
    if inside.unseen:
        has = f"{end.node} can't be looked into"
    if not held:
        detail = f"dnsmasq has given {end.mac} no lease; {has}: let it ask again"
        return Hop(name, False, detail)
    address = held[0].address
    if not inside.unseen and address not in inside.addresses:
        detail = f"dnsmasq has {address} for it, but {has}: let its DHCP client ask again"
        return Hop(name, False, detail)
    return Hop(name, True, f"{address}, and {has}")


def _address(seen: Sights, end: End) -> Hop:
    name, inside = f"address of {end.node}", seen.inside.get(end.node, Inside(unseen="it is gone"))
    if inside.unseen:
        return Hop(name, True, f"{end.address or 'not known'}: {end.node} can't be looked into")
    if end.address and end.address not in inside.addresses:
        has = " ".join(inside.addresses) or "none"
        return Hop(name, False, f"it should have {end.address}, and has {has}: {_AGAIN}")
    if not inside.addresses:
        return Hop(name, False, f"it has none, and network {end.network} has no DHCP: give it one")
    return Hop(name, True, " ".join(inside.addresses))


def _route(seen: Sights, end: End, address: str) -> Iterator[Hop]:
    inside = seen.inside.get(end.node)
    if inside is not None and inside.way is not None and address:
        yield way_hop(f"route in {end.node}", inside.way, address, "give it a default route")


def way_hop(name: str, way: Way, address: str, remedy: str) -> Hop:
    if way.error:
        return Hop(name, False, f"no way to {address} ({way.error}): {remedy}")
    via = f"via {way.gateway} " if way.gateway else ""
    return Hop(name, True, f"to {address} {via}by {way.device or 'itself'}")


def _neighbour(inside: Inside | None, who: str, address: str) -> Iterator[Hop]:
    if inside is None or inside.way is None or inside.way.error:
        return
    next_hop = inside.way.gateway or address
    state = inside.arp.get(next_hop)
    if state is not None:
        detail = "nobody answers to ARP for it" if state in _LOST else state
        yield Hop(f"neighbour {next_hop} of {who}", state not in _LOST, detail)
