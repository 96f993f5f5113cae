"""Values of a topology that must not meet: names, MACs, addresses, displays, subnets, ports."""

from collections.abc import Iterable, Iterator, Mapping
from ipaddress import IPv4Interface

from netorch import names
from netorch.errors import Finding, Key, dotted, quoted
from netorch.model import HostNic, Nic, Topology

MAX_PORTS = 1023  # of a Linux bridge: BR_MAX_PORTS is 1 << 10, and port 0 is not used
RESERVED_NAMES = ("all", "default", "lo")  # the first two are directories of net.ipv4.conf


def clashes(topology: Topology) -> Iterator[Finding]:
    """Everything in the topology that meets something else of it."""
    yield from _node_names(topology)
    yield from _interface_names(topology)
    yield from _macs(topology)
    yield from _addresses(topology)
    yield from _displays(topology)
    yield from _ports(topology)


def overlaps(subnets: Mapping[str, IPv4Interface | None]) -> Iterator[Finding]:
    """Networks that share addresses; each is held against those that begin before it.

    Sorted by their beginning, one that meets any earlier one meets the one that ends last.
    """
    order = {name: index for index, name in enumerate(subnets)}
    known = [(subnet.network, name) for name, subnet in subnets.items() if subnet]
    widest = None
    for current in sorted(known):
        if widest and current[0].overlaps(widest[0]):
            (other, earlier), (own, later) = sorted(
                (current, widest), key=lambda item: order[item[1]]
            )
            message = f"{own} overlaps {other} of {dotted(('networks', earlier))}"
            yield ("networks", later, "address"), message, 'give it another, or "auto"'
        if widest is None or current[0].broadcast_address > widest[0].broadcast_address:
            widest = current


def _nics(topology: Topology) -> Iterator[tuple[Key, Nic | HostNic]]:
    for name, guest in topology.guests.items():
        for index, nic in enumerate(guest.nics):
            yield ("guests", name, "nics", index), nic
    for name, host in topology.hosts.items():
        for index, host_nic in enumerate(host.nics):
            yield ("hosts", name, "nics", index), host_nic


def _once(what: str, uses: Iterable[tuple[Key, object, str]], hint: str) -> Iterator[Finding]:
    """Each value (the second of `uses`; the third is how to say it) may stand in one place."""
    seen: dict[object, Key] = {}
    for path, value, said in uses:
        if value in seen:
            yield path, f"{what} {said} is taken by {dotted(seen[value])}", hint
        else:
            seen[value] = path


def _node_names(topology: Topology) -> Iterator[Finding]:
    """Guests and hosts share DNS, which has no case; guests and taps share the keys of taps."""
    nodes = [("guests", name) for name in topology.guests]
    nodes += [("hosts", name) for name in topology.hosts]
    nodes += [("taps", name) for name in topology.taps]
    uses = ((path, path[1].lower(), quoted(path[1])) for path in nodes)
    return _once("the name", uses, "guests, hosts and taps share one name space")


def _interface_names(topology: Topology) -> Iterator[Finding]:
    uses = list(_interfaces(topology))
    for path, name in uses:
        if name in RESERVED_NAMES:
            yield path, f'"{name}" means something else to the kernel', "choose another name"
    said = ((path, name, quoted(name)) for path, name in uses)
    yield from _once("the interface name", said, "choose another name")


def _interfaces(topology: Topology) -> Iterator[tuple[Key, str]]:
    """Every interface that the lab makes or takes, with the key that its name comes from."""
    for name, network in topology.networks.items():
        path: Key = ("networks", name)
        if network.external:
            continue  # which several networks may name
        if network.mode == "bridge" and network.uplink:
            yield (*path, "uplink"), network.uplink
        yield (*path, "bridge") if network.bridge else path, names.bridge_name(name, network)
    for name, guest in topology.guests.items():
        for index, nic in enumerate(guest.nics):
            path = ("guests", name, "nics", index)
            if nic.network is None:
                continue
            tap = names.tap_name(name, index, nic)
            yield (*path, "tap") if nic.tap else path, tap
            if nic.rate is not None:
                yield (*path, "rate"), names.rate_name(tap)
    for name, host in topology.hosts.items():
        for index, host_nic in enumerate(host.nics):
            veth = names.veth_name(name, index)
            yield ("hosts", name, "nics", index), veth
            if host_nic.rate is not None:
                yield ("hosts", name, "nics", index, "rate"), names.rate_name(veth)
    for name, taps in topology.taps.items():
        for tap in names.tap_names(name, taps):
            yield ("taps", name), tap


def _macs(topology: Topology) -> Iterator[Finding]:
    written = [(("networks", name), network.mac) for name, network in topology.networks.items()]
    owners: list[tuple[Key, str | None]] = [*written]
    owners += [(path, nic.mac) for path, nic in _nics(topology)]
    macs = [((*path, "mac"), mac) for path, mac in owners if mac]
    for path, mac in macs:
        if int(mac[:2], 16) & 1:
            yield path, f"{mac} is a multicast address", "an even first byte, such as 52:"
        elif mac == "00:00:00:00:00:00":
            yield path, f"{mac} is not a machine's address", "such as 52:54:00:12:34:56"
    uses = ((path, mac.lower(), mac) for path, mac in macs)
    yield from _once("the MAC address", uses, "every NIC needs its own")


def _addresses(topology: Topology) -> Iterator[Finding]:
    uses = []
    for path, nic in _nics(topology):
        address = (nic.address or "dhcp").partition("/")[0]
        if address != "dhcp" and nic.network:
            uses.append(((*path, "address"), (nic.network, address), address))
    return _once("the address", uses, "every NIC of a network needs its own")


def _displays(topology: Topology) -> Iterator[Finding]:
    guests = topology.guests.items()
    written = ((n, g.vnc) for n, g in guests if not isinstance(g.vnc, bool))
    uses = ((("guests", n, "vnc"), display, str(display)) for n, display in written)
    return _once("the VNC display", uses, "every guest needs its own")


def _ports(topology: Topology) -> Iterator[Finding]:
    ports = dict.fromkeys(topology.networks, 0)
    for _path, nic in _nics(topology):
        if nic.network in ports:
            ports[nic.network] += 1
    for taps in topology.taps.values():
        if taps.network in ports:
            ports[taps.network] += taps.count
    for name, count in ports.items():
        if count > MAX_PORTS:
            message = f"has {count} ports; a Linux bridge takes at most {MAX_PORTS}"
            yield ("networks", name), message, "spread them over several networks"
