"""Veth pairs between a bridge and a host's namespace, put together from both ends.

One message makes both ends, the far one in the host's namespace under its name there; its index is
chosen as the near end's is. The near end carries the mark that counts: deleting it takes the far
end along.
"""

import errno
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from netorch.errors import KernelError
from netorch.resources import Veth
from netorch.system import changes, messages, removal
from netorch.system.changes import Wanted
from netorch.system.netlink import Group, Netlink, Outcomes
from netorch.system.scope import Scope
from netorch.system.snapshot import Link, Route, Snapshot, routes

_BY_DHCP = 16  # RTPROT_DHCP: the route is the DHCP client's
_ANYWHERE = "0.0.0.0/0"
_GONE = (
    errno.ENOENT,
    errno.EINVAL,
)  # no such file; a file that no namespace is mounted on any more


class Far:
    """A host's namespace as it was seen at one moment."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with Netlink(path) as netlink:
            self.snapshot = Snapshot(netlink)
            self.routes = tuple(routes(netlink))

    def end(self, near: Link) -> Link | None:
        """The other end of the veth `near`, if it is here."""
        link = self.snapshot.links.get(near.peer)
        return link if link is not None and link.peer == near.index else None

    def gateways(self, index: int) -> tuple[str, ...]:
        """Of the static default routes by one interface."""
        return tuple(r.gateway for r in self.routes if _is_static_default(r, index))


def look(scope: Scope, hosts: Iterable[str]) -> dict[str, Far]:
    """The hosts' namespaces; one that is gone, and its veths with it, is left out."""
    seen = {}
    for host in sorted(set(hosts)):
        try:
            seen[host] = Far(scope.namespace(host))
        except OSError as error:
            if error.errno not in _GONE:
                code = error.errno or 0
                text = f"failed to enter the namespace of host {host}: {os.strerror(code)}"
                raise KernelError(text, code) from error
    return seen


def host_of(id: str) -> str:
    """The host that a veth's id (`server:0`) begins with."""
    return id.rpartition(":")[0]


def observe(link: Link, id: str, network: str, bridge: str, far: Far | None) -> Veth:
    end = (far.end(link) if far else None) or Link(index=0)
    addresses = far.snapshot.permanent(end.index) if far else ()
    gateways = far.gateways(end.index) if far else ()
    return Veth(
        id=id,
        name=link.name,
        network=network,
        bridge=bridge,
        host=host_of(id),
        device=end.name,
        mac=end.mac,
        mtu=min(link.mtu, end.mtu),
        addresses=addresses,
        gateway=gateways[0] if gateways else "",
        up=link.up and end.up,
    )


def create(
    netlink: Netlink, snapshot: Snapshot, wanted: Sequence[tuple[Veth, int]], scope: Scope
) -> Outcomes:
    """Make pairs, each with the index of its bridge (0 for none). What fails leaves nothing."""
    if not wanted:
        return []
    ipv6 = 0 if snapshot.has_ipv6 else None
    near = [Link(index=changes.new_index(snapshot), ipv6=ipv6) for _ in wanted]
    outcomes: Outcomes = [None] * len(wanted)
    groups: list[Group] = []
    with ExitStack() as stack:
        namespaces = _Descriptors(scope, stack)
        for place, ((veth, master), link) in enumerate(zip(wanted, near, strict=True)):
            try:
                namespace = namespaces.of(veth.host)
            except OSError as error:
                outcomes[place] = KernelError(
                    f"host {veth.host}: {error.strerror}", error.errno or 0
                )
                groups.append([])
                continue
            first = _pair(veth, link.index, changes.new_index(snapshot), namespace, scope)
            link.mtu, link.group = veth.mtu, scope.group
            groups.append([first, *_update_near(link, veth, master, scope)])
        _merge(outcomes, range(len(wanted)), netlink.send(groups))
    made = Snapshot(netlink).links  # again, to learn which end is whose
    places = [place for place, error in enumerate(outcomes) if error is None]
    pairs = [(wanted[p][0], made.get(near[p].index, near[p])) for p in places]
    _merge(outcomes, places, _update_far(pairs, scope))
    removal.take_back(netlink, [link.index for link in near], outcomes)
    return outcomes


def update(netlink: Netlink, wanted: Sequence[tuple[Veth, Link, int]], scope: Scope) -> Outcomes:
    """Bring pairs, each given with its near end and its bridge's index, to what they should be."""
    outcomes = netlink.send(
        [_update_near(link, veth, master, scope) for veth, link, master in wanted]
    )
    pairs = [(veth, link) for veth, link, _ in wanted]
    _merge(outcomes, range(len(wanted)), _update_far(pairs, scope))
    return outcomes


class _Descriptors:
    """The namespaces of hosts, each opened once."""

    def __init__(self, scope: Scope, stack: ExitStack) -> None:
        self._scope = scope
        self._stack = stack
        self._opened: dict[str, int] = {}

    def of(self, host: str) -> int:
        if host not in self._opened:
            fd = os.open(self._scope.namespace(host), os.O_RDONLY | os.O_CLOEXEC)
            self._stack.callback(os.close, fd)
            self._opened[host] = fd
        return self._opened[host]


def _pair(veth: Veth, near: int, far: int, namespace: int, scope: Scope) -> bytearray:
    # A bridge without a MAC of its own takes the lowest of its ports': not one that begins with fe.
    near_mac = "fe" + veth.mac[2:]
    return messages.veth(
        index=near,
        name=veth.name,
        peer=far,
        device=veth.device,
        mac=veth.mac,
        namespace=namespace,
        attributes=(
            ("IFLA_MTU", veth.mtu),
            ("IFLA_GROUP", scope.group),
            ("IFLA_ADDRESS", near_mac),
        ),
    )


def _update_near(link: Link, veth: Veth, master: int, scope: Scope) -> list[bytearray]:
    wanted = Wanted(
        alias=scope.alias(veth.key),
        mac=link.mac,
        mtu=veth.mtu,
        up=veth.up,
        group=scope.group,
        master=master,
        no_ipv6=True,
    )
    return changes.at_once(link, wanted)


def _update_far(pairs: Sequence[tuple[Veth, Link]], scope: Scope) -> Outcomes:
    """Bring the hosts' ends of pairs, given with their near ends, to what they should be."""
    outcomes: Outcomes = [None] * len(pairs)
    seen = look(scope, [veth.host for veth, _ in pairs])
    places: dict[str, list[int]] = {}
    for place, (veth, near) in enumerate(pairs):
        if veth.host in seen and seen[veth.host].end(near) is not None:
            places.setdefault(veth.host, []).append(place)
        else:
            outcomes[place] = KernelError(f"its end in host {veth.host} is gone", errno.ENODEV)
    for host, of_host in places.items():
        groups = [_far_changes(*pairs[place], seen[host], scope) for place in of_host]
        with Netlink(seen[host].path) as netlink:
            _merge(outcomes, of_host, netlink.send(groups))
    return outcomes


def _far_changes(veth: Veth, near: Link, far: Far, scope: Scope) -> list[bytearray]:
    link = far.end(near)
    assert link is not None
    wanted = Wanted(
        alias=scope.alias(veth.key), mac=veth.mac, mtu=veth.mtu, up=veth.up, group=link.group
    )
    current = far.snapshot.permanent(link.index)
    gateways = far.gateways(link.index)
    readdressed = changes.readdress(link.index, current, veth.addresses)
    static = (veth.gateway,) if veth.gateway and veth.up else ()
    # Without the address or the carrier that it goes by, the kernel drops a route: so off first,
    # on last.
    rerouted = bool(readdressed) or gateways != static
    stale, missing = (gateways, static) if rerouted else ((), ())
    return [
        *changes.configure(link, wanted),
        *(messages.default_route(messages.DELROUTE, link.index, g) for g in stale),
        *readdressed,
        *changes.activate(link, wanted),
        *(messages.default_route(messages.NEWROUTE, link.index, g) for g in missing),
    ]


def _merge(outcomes: Outcomes, places: Iterable[int], later: Outcomes) -> None:
    for place, error in zip(places, later, strict=True):
        outcomes[place] = outcomes[place] or error


def _is_static_default(route: Route, index: int) -> bool:
    return (
        route.prefix == _ANYWHERE
        and index in route.links
        and route.protocol != _BY_DHCP
        and bool(route.gateway)
    )
