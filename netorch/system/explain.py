"""Why a packet does not arrive: every hop of its journey, observed and judged.

1. Plan the journey from what the lab should be (`journeys`).
2. Send one ping from the source, while nftables traces it (`echo`, `tracing`).
3. Look at everything after that, so that the bridges and ARP tables have seen the ping (`sights`).
4. Judge each hop (`hops`, `routing`): pure.

Nothing is changed, and nothing is left behind. It takes some 0.1 s where all is well; without an
answer, the 2 s that it is waited for.
"""

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from netorch.errors import KernelError, MissingError
from netorch.resources import Bridge, Guest, Namespace
from netorch.state import State
from netorch.system import hops, journeys, leases, routing, sights
from netorch.system.echo import Echo, from_guest, from_host
from netorch.system.firewall import refusals
from netorch.system.hops import Hop, first_broken
from netorch.system.journeys import End, Journey
from netorch.system.scope import Scope
from netorch.system.sights import Sights
from netorch.system.tracing import PINGS, Drop, Packets, Trace

__all__ = ["Echo", "Hop", "Packets", "Probe", "explain", "first_broken"]


class Probe(NamedTuple):
    """What is sent in place of a ping: its packets as nft knows them ("tcp dport 80"), and how."""

    packets: Packets
    send: Callable[[], Echo]


def explain(
    scope: Scope, desired: State, source: str, target: str, probe: Probe | None = None
) -> list[Hop]:
    """The hops between the guest or host `source` and a node, "gateway" or IPv4 address.

    In the order in which a packet meets them; the first that is not ok is the broken one. What
    was to be proved with something else than a ping is explained with that: see Probe. To be called
    in the lab's place. Raises UsageError for what the lab doesn't have.
    """
    held = tuple(leases.read(scope))
    own = [a.partition("/")[0] for bridge in desired.of(Bridge) for a in bridge.addresses]
    own += sights.ground("").addresses
    journey = _addressed(scope, journeys.plan(desired, held, own, source, target))
    return judge(desired, journey, _look(scope, journey, held, probe), scope.table)


def judge(desired: State, journey: Journey, seen: Sights, table: str) -> list[Hop]:
    """Pure. `table` is the name of the lab's own nft table."""
    found = hops.out_of(desired, seen, journey.source, journey.address)
    if journey.routed:
        found += routing.through(desired, seen, journey, table)
    found += routing.filters(seen, journey, table)
    if journey.target is not None:
        bridged = journey.target.bridge == journey.source.bridge
        found += hops.into(desired, seen, journey.target, journey.seen_as, bridged=bridged)
    found += hops.neighbours(seen, journey)
    return [*found, hops.answer(seen, journey, found)]


def _addressed(scope: Scope, journey: Journey) -> Journey:
    """The journey with the addresses that only the nodes themselves know: those of guests in a
    network without DHCP.
    """
    source, target = journey.source, journey.target
    if source.address and (journey.address or target is None):
        return journey
    state = sights.state(scope)

    def ask(end: End) -> str:
        return (*sights.inside(scope, state, end, "").addresses, "")[0]

    if not source.address:
        address = ask(source)
        seen_as = journey.seen_as or address
        source = msgspec.structs.replace(source, address=address)
        journey = msgspec.structs.replace(journey, source=source, seen_as=seen_as)
    if target is not None and not target.address:
        address = ask(target)
        target = msgspec.structs.replace(target, address=address)
        journey = msgspec.structs.replace(journey, target=target, address=address)
    return journey


def _look(
    scope: Scope, journey: Journey, held: tuple[leases.Lease, ...], probe: Probe | None
) -> Sights:
    state = sights.state(scope)
    probe = probe or Probe(PINGS, lambda: _ping(scope, state, journey))
    echo, drop, refused = _traced(scope, journey, probe)
    source, target = journey.source, journey.target
    inside = {source.node: sights.inside(scope, state, source, journey.address)}
    if target is not None and target.node != source.node:
        inside[target.node] = sights.inside(scope, state, target, journey.seen_as)
    return Sights(
        state=state,
        ground=sights.ground(journey.address),
        leases=held,
        inside=inside,
        echo=echo,
        drop=drop,
        refusals=refused,
    )


def _traced(
    scope: Scope, journey: Journey, probe: Probe
) -> tuple[Echo, Drop | None, tuple[tuple[str, str], ...]]:
    """What came of the probe, what dropped it, and without a trace who else drops packets."""
    if not (journey.source.address and journey.address):
        return probe.send(), None, ()
    try:
        trace = Trace(scope.lab, journey.source.address, journey.address, probe.packets)
    except (KernelError, MissingError):
        found = refusals() if journey.routed else []
        return probe.send(), None, tuple((where, why) for where, why, _ in found)
    with trace:
        return probe.send(), trace.drop(), ()


def _ping(scope: Scope, state: State, journey: Journey) -> Echo:
    source = journey.source
    if not journey.address:
        return Echo(False, False, "the target's address is not known")
    if source.is_guest:
        guest = state.get(f"guest:{source.node}")
        if not isinstance(guest, Guest) or guest.state != "running":
            return Echo(False, False, f"{source.node} does not run")
        return from_guest(scope, source.node, journey.address)
    there = state.get(f"namespace:{source.node}")
    if not isinstance(there, Namespace) or not there.up:
        return Echo(False, False, f"{source.node} is not there")
    return from_host(scope.namespace(source.node), source.node, journey.address)
