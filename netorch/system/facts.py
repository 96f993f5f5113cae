"""Observes the Facts that the compiler needs of this network namespace."""

from collections.abc import Collection

from netorch.facts import Facts, Interface, Uplink
from netorch.system.conflicts import foreign_uses, is_default, is_own
from netorch.system.look import Look
from netorch.system.scope import Scope
from netorch.system.snapshot import Link, Route, Snapshot, uplink_mark

_MAIN_TABLE = 254


def observe_facts(scope: Scope, named: Collection[str] = (), look: Look | None = None) -> Facts:
    """The address ranges in use, the uplinks, the addresses of the lab's own networks, and the
    interfaces that are `named` by the file.
    """
    look = look or Look(scope)
    snapshot, known = look.snapshot, look.routes
    taken = {use.network for use in foreign_uses(snapshot, known, scope)}
    return Facts(
        taken=tuple(str(network) for network in sorted(taken)),
        uplinks=_uplinks(snapshot, known, scope),
        addresses=_addresses(snapshot, scope),
        interfaces={
            name: Interface(link.mac, link.mtu, bool(link.forwarding))
            for name in named
            if (link := snapshot.by_name.get(name)) is not None
        },
    )


def _uplinks(snapshot: Snapshot, known: list[Route], scope: Scope) -> tuple[Uplink, ...]:
    """Every interface once, that of the lowest metric first."""
    defaults = [route for route in known if is_default(route) and route.table == _MAIN_TABLE]
    indexes = {i: None for route in sorted(defaults, key=lambda r: r.metric) for i in route.links}
    found = [
        link for i in indexes if (link := _behind(i, snapshot, scope)) and not is_own(link, scope)
    ]
    return tuple(Uplink(link.name, link.mtu) for link in found)


def _behind(index: int, snapshot: Snapshot, scope: Scope) -> Link | None:
    """The interface, or, of a bridge of the lab, its uplink: so what is compiled before the uplink
    moves and after it is the same.
    """
    link = snapshot.links.get(index)
    mark = uplink_mark(link) if link and is_own(link, scope) else None
    return snapshot.links.get(mark.index) if mark else link


def _addresses(snapshot: Snapshot, scope: Scope) -> dict[str, str]:
    prefix = scope.alias("bridge:")
    return {
        link.alias.removeprefix(prefix): snapshot.own(link)[0]
        for link in snapshot.links.values()
        if link.alias.startswith(prefix) and snapshot.own(link)
    }
