"""The hops within this machine: its route, IPv4 forwarding, and nftables. Pure."""

from collections.abc import Iterator

from netorch.resources import Ruleset
from netorch.state import State
from netorch.system.hops import Hop, way_hop
from netorch.system.journeys import Journey
from netorch.system.sights import Sights

_AGAIN = "`netorch apply` its file again"


def through(desired: State, seen: Sights, journey: Journey, table: str) -> Iterator[Hop]:
    """The hops of a routed journey within this machine, but for what dropped the probe.

    `table` is the name of the lab's own nft table.
    """
    way = seen.ground.way
    if way is None:
        return
    hop = way_hop("route in this machine", way, journey.address, "it needs one, or an uplink")
    out = journey.target.bridge if journey.target else way.device
    if hop.ok and way.device != out:
        detail = f"packets to {journey.address} leave by {way.device}, not by {out}"
        hop = Hop(hop.name, False, f"{detail}: another route or address is in the way")
    yield hop
    for name in (journey.source.bridge, *([out] if out else [])):
        yield _forwarding(seen, name)
    if not journey.target and out:
        yield _uplink(seen, out)
    if desired.of(Ruleset):
        yield _table(seen, table)


def filters(seen: Sights, journey: Journey, table: str) -> Iterator[Hop]:
    """What dropped the probe or its answer; without a trace, which foreign chains may have."""
    drop, blame = seen.drop, not seen.echo.answered
    if drop is None or not blame:  # what was dropped was a copy, flooded to other ports
        for where, why in seen.refusals:
            detail = f"it {why}, and the probe could not be traced: the lab needs a rule there"
            yield Hop(f"nft {where}", not blame, detail)
        if not seen.refusals:
            yield Hop("nft rules", True, "none dropped the probe")
        return
    what = "the answer" if drop.answer else "the packet"
    how = f"by its rule `{drop.rule}`" if drop.rule else "by its policy"
    if drop.table == table:
        why = "that is the lab's own rule: a nat network is entered by answers only, an isolated "
        why += "one not at all"
    elif journey.routed or journey.here:
        why = "the lab's traffic needs a rule before it that accepts"
    else:
        why = "a bridged frame gets there where br_netfilter is on "
        why += "(sysctl net.bridge.bridge-nf-call-iptables), or in family bridge"
    yield Hop(f"nft {drop.where}", False, f"drops {what} {how}: {why}")


def _forwarding(seen: Sights, name: str) -> Hop:
    link = seen.ground.links.get(name)
    hop = f"forwarding on {name}"
    if link is None:
        return Hop(hop, False, "there is no such interface")
    if not link.forwarding:
        return Hop(hop, False, f"IPv4 forwarding is off: {_AGAIN}")
    return Hop(hop, True, "on")


def _uplink(seen: Sights, name: str) -> Hop:
    link = seen.ground.links.get(name)
    up = link is not None and link.up
    return Hop(f"uplink {name}", up, "up" if up else f"it is down: `ip link set {name} up`")


def _table(seen: Sights, table: str) -> Hop:
    name = f"nft table {table}"
    rules = seen.state.get("ruleset")
    if not isinstance(rules, Ruleset):
        return Hop(name, False, f"it is gone: {_AGAIN}")
    if not rules.digest:
        return Hop(name, False, f"someone else changed it: {_AGAIN}")
    return Hop(name, True, "as netorch made it")
