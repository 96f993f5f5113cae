"""Observes the Facts that the compiler needs of this network namespace."""

from netorch.facts import Facts, Uplink
from netorch.system.conflicts import foreign_uses, is_default, is_own
from netorch.system.netlink import Netlink
from netorch.system.scope import Scope
from netorch.system.snapshot import Route, Snapshot, routes

_MAIN_TABLE = 254


def observe_facts(scope: Scope) -> Facts:
    """The address ranges in use, the uplinks, and the addresses of the lab's own networks."""
    with Netlink() as netlink:
        snapshot = Snapshot(netlink)
        known = list(routes(netlink))
    taken = {use.network for use in foreign_uses(snapshot, known, scope)}
    return Facts(
        taken=tuple(str(network) for network in sorted(taken)),
        uplinks=_uplinks(snapshot, known, scope),
        addresses=_addresses(snapshot, scope),
    )


def _uplinks(snapshot: Snapshot, known: list[Route], scope: Scope) -> tuple[Uplink, ...]:
    """Every interface once, that of the lowest metric first."""
    defaults = [route for route in known if is_default(route) and route.table == _MAIN_TABLE]
    indexes = {i: None for route in sorted(defaults, key=lambda r: r.metric) for i in route.links}
    found = [snapshot.links[index] for index in indexes if index in snapshot.links]
    return tuple(Uplink(link.name, link.mtu) for link in found if not is_own(link, scope))


def _addresses(snapshot: Snapshot, scope: Scope) -> dict[str, str]:
    prefix = scope.alias("bridge:")
    return {
        link.alias.removeprefix(prefix): snapshot.permanent(link.index)[0]
        for link in snapshot.links.values()
        if link.alias.startswith(prefix) and snapshot.permanent(link.index)
    }
