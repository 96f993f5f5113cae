"""What is in the way of a lab's links: names, address ranges and ports of somebody else's."""

import errno
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Network

import msgspec

from netorch.addresses import Ranges
from netorch.resources import Bridge, Rate, Resource, Tap, Veth
from netorch.system import rates, taps
from netorch.system.bridges import MAX_PORTS
from netorch.system.changes import bridge_index
from netorch.system.netlink import Netlink
from netorch.system.scope import Scope
from netorch.system.snapshot import Link, Route, Snapshot, routes, uplink_mark

# Prefixes that some VPNs cut the default route into; a network of a lab always lies within one of
# them.
HALVES = ("0.0.0.0/1", "128.0.0.0/1")


class Use(msgspec.Struct, frozen=True):
    """An address range that something which is not the lab's own already uses."""

    network: IPv4Network
    text: str  # the address or route as the machine has it
    owner: str  # the interface, or the kind of route


def find(wanted: Sequence[Resource], scope: Scope) -> list[str]:
    """Why these bridges, taps and veths can't be created, a sentence each."""
    if not wanted:
        return []
    with Netlink() as netlink:
        snapshot = Snapshot(netlink)
        uses = list(foreign_uses(snapshot, list(routes(netlink)), scope))
    reasons = []
    for resource in wanted:
        assert isinstance(resource, Bridge | Tap | Veth | Rate)
        link = snapshot.by_name.get(resource.name)
        if link is not None and not is_own(link, scope):
            reasons.append(f"the name {link.name} is taken by {_whose(link)}")
    reasons += _overlaps(wanted, uses)
    reasons += _no_bridge(wanted, snapshot, scope)
    reasons += _too_many_ports(wanted, snapshot, scope)
    if any(isinstance(resource, Tap) for resource in wanted):
        reasons += _no_tun()
    if any(isinstance(resource, Rate) for resource in wanted):
        reasons += rates.missing(snapshot)
    return reasons


def is_own(link: Link, scope: Scope) -> bool:
    return link.alias.startswith(scope.alias(""))


def foreign_uses(snapshot: Snapshot, known: Sequence[Route], scope: Scope) -> Iterator[Use]:
    """Every IPv4 range in use by addresses and non-default routes of links not the lab's own."""
    own = {link.index: link for link in snapshot.links.values() if is_own(link, scope)}
    yield from _of_uplinks(snapshot, own.values())
    for index, addresses in snapshot.addresses.items():
        if index in own or index not in snapshot.links:
            continue
        for address in addresses:
            local = (
                address.text.partition("/")[0] + "/32"
            )  # apart from the network on a point-to-point link
            for prefix in {address.network: None, local: None}:
                yield Use(IPv4Network(prefix), address.text, snapshot.links[index].name)
    for route in known:
        if is_default(route) or not own.keys().isdisjoint(route.links):
            continue
        names = [snapshot.links[i].name for i in route.links if i in snapshot.links]
        owner = " and ".join(names) or "a route without an interface"
        yield Use(IPv4Network(route.prefix), f"route {route.prefix}", owner)


def _of_uplinks(snapshot: Snapshot, own: Iterable[Link]) -> Iterator[Use]:
    """The addresses that bridges of the lab have of their uplinks."""
    for link in own:
        if uplink_mark(link):
            for address in snapshot.addresses.get(link.index, ()):
                if address.label != link.name:
                    yield Use(IPv4Network(address.network), address.text, link.name)


def is_default(route: Route) -> bool:
    return route.prefix == "0.0.0.0/0" or route.prefix in HALVES


def _overlaps(wanted: Sequence[Resource], uses: Sequence[Use]) -> Iterator[str]:
    taken = Ranges(use.network for use in uses)
    for bridge in wanted:
        if not isinstance(bridge, Bridge):
            continue
        for text in bridge.addresses:
            network = IPv4Network(text, strict=False)
            if network not in taken:
                continue
            for use in uses:
                if use.owner == bridge.uplink and use.text.partition("/")[0] != _ip(text):
                    continue  # they are going to be on one LAN
                if network.overlaps(use.network):
                    yield (
                        f"network {bridge.network}: {network} overlaps with {use.text} "
                        f"of {use.owner}"
                    )
                    break


def _ip(text: str) -> str:
    return text.partition("/")[0]


def _no_bridge(wanted: Sequence[Resource], snapshot: Snapshot, scope: Scope) -> Iterator[str]:
    """Bridges of others (`external = true`) that ports are to join, and that are not there."""
    ports = [r for r in wanted if isinstance(r, Tap | Veth) and not r.network and r.bridge]
    for bridge in dict.fromkeys(port.bridge for port in ports):
        index = bridge_index(snapshot, bridge, scope, external=True)
        if not isinstance(index, int):
            private = "; a private namespace has none of the machine's" if scope.private else ""
            yield f"{index} that is not netorch's to make (external = true){private}"


def _too_many_ports(wanted: Sequence[Resource], snapshot: Snapshot, scope: Scope) -> Iterator[str]:
    ports = Counter(r.bridge for r in wanted if isinstance(r, Tap | Veth) and r.bridge)
    for link in snapshot.links.values():
        if link.master in snapshot.links and not is_own(link, scope):
            ports[snapshot.links[link.master].name] += 1
    for bridge in {r.bridge for r in wanted if isinstance(r, Tap | Veth)} - {""}:
        if ports[bridge] > MAX_PORTS:
            count = f"{ports[bridge]:,} ports; the kernel allows {MAX_PORTS:,}"
            yield f"bridge {bridge} would have {count}"


def _no_tun() -> Iterator[str]:
    try:
        os.close(os.open(taps.DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            remedy = "`chmod 666 /dev/net/tun`, or add yourself to the group that owns it"
        else:
            remedy = "on a host, `modprobe tun`"
        yield (
            f"{taps.DEVICE} can't be opened: {error.strerror} "
            f"({remedy}; in a container, start it with `--device {taps.DEVICE}`)"
        )


def _whose(link: Link) -> str:
    """What a foreign link is, as far as its mark, kind and name tell."""
    if link.alias.startswith("netorch:"):
        return f"a {_kind(link)} of the netorch lab {link.alias.split(':')[1]}"
    for prefix, words in _FAMILIAR.items():
        if link.kind == "bridge" and link.name.startswith(prefix):
            return f"a bridge that looks like {words}"
    return f"a {_kind(link)} that is not netorch's"


def _kind(link: Link) -> str:
    kinds = {"tun": "tap", "": "network card" if link.mac else "link"}
    return kinds.get(link.kind, link.kind)


_FAMILIAR = {
    "virbr": "libvirt's (`virsh net-list` shows its network)",
    "docker": "Docker's",
    "br-": "a Docker network's",
    "podman": "Podman's",
    "cni": "Podman's or Kubernetes'",
    "lxcbr": "LXC's",
    "lxdbr": "LXD's",
    "incusbr": "Incus'",
}
