"""Addresses that nobody wrote: subnets, leases and MACs, so chosen that they never wander.

They are derived from names, by hash; where two names hash to the same value, the one that stands
first in the file keeps it. So adding something to a file does not move what was there before.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

from netorch.digests import blake2s
from netorch.errors import ConflictError
from netorch.facts import Facts
from netorch.model import Dhcp, HostNic, Network, Nic, Topology

# Where `address = "auto"` looks for a free /24: from libvirt's own subnet upwards, then on.
AUTO = (IPv4Network("192.168.122.0/24"), IPv4Network("192.168.0.0/16"), IPv4Network("10.0.0.0/8"))


def gateways(topology: Topology, facts: Facts) -> dict[str, IPv4Interface | None]:
    """Each network's address on this machine. "auto" keeps what the running lab has, if it is still
    free.
    """
    taken = Ranges(IPv4Network(prefix) for prefix in facts.taken)
    found: dict[str, IPv4Interface | None] = {}
    for name, network in topology.networks.items():
        if network.address not in (None, "auto"):
            found[name] = gateway = IPv4Interface(network.address)
            taken.add(gateway.network)
    free = (subnet for subnet in _candidates() if subnet not in taken)
    for name, network in topology.networks.items():
        if name in found:
            continue
        if network.address is None and network.mode == "bridge":
            found[name] = None
            continue
        current = facts.addresses.get(name)
        if current and IPv4Interface(current).network not in taken:
            gateway = IPv4Interface(current)
        elif (subnet := next(free, None)) is not None:
            gateway = IPv4Interface(f"{subnet.network_address + 1}/24")
        else:
            raise ConflictError(f"network {name}: no free /24 is left for an automatic address")
        found[name] = gateway
        taken.add(gateway.network)
    return found


def _candidates() -> Iterator[IPv4Network]:
    """Every /24 that an automatic address may be in, in the order of preference."""
    for pool in AUTO:
        for subnet in pool.subnets(new_prefix=24) if pool.prefixlen < 24 else (pool,):
            if pool.prefixlen == 16 and subnet.network_address.packed[2] <= 122:
                continue  # 192.168.0.0/24 to .122: where home routers live
            yield subnet


class Ranges:
    """Address ranges, to be asked whether another one meets any of them."""

    def __init__(self, networks: Iterable[IPv4Network] = ()) -> None:
        self._first: list[int] = []  # of disjoint ranges, sorted
        self._last: list[int] = []
        for network in networks:
            self.add(network)

    def __contains__(self, network: IPv4Network) -> bool:
        """Does any part of it lie in one of the ranges?"""
        at = bisect_right(self._first, int(network.broadcast_address)) - 1
        return at >= 0 and self._last[at] >= int(network.network_address)

    def add(self, network: IPv4Network) -> None:
        first, last = int(network.network_address), int(network.broadcast_address)
        start, end = bisect_left(self._last, first), bisect_right(self._first, last)
        if start < end:  # those that it meets become one with it
            first, last = min(first, self._first[start]), max(last, self._last[end - 1])
        self._first[start:end], self._last[start:end] = [first], [last]


def dhcp_range(
    network: Network, gateway: IPv4Interface | None
) -> tuple[IPv4Address, IPv4Address] | tuple[None, None]:
    """The first and last address that DHCP serves; by default all but the gateway's, as libvirt's
    .2-.254.
    """
    wanted = network.dhcp if network.dhcp is not None else network.mode != "bridge"
    if gateway is None or wanted is False:
        return None, None
    if isinstance(wanted, Dhcp) and wanted.range:
        return IPv4Address(wanted.range[0]), IPv4Address(wanted.range[1])
    first, last = gateway.network[1], gateway.network[-2]
    if gateway.ip == first:
        first += 1
    elif gateway.ip == last:
        last -= 1
    return first, last


def nics_of(topology: Topology) -> Iterator[tuple[str, int, Nic | HostNic]]:
    for name, guest in topology.guests.items():
        for index, nic in enumerate(guest.nics):
            yield name, index, nic
    for name, host in topology.hosts.items():
        for index, host_nic in enumerate(host.nics):
            yield name, index, host_nic


class Pool:
    """Addresses from `first` to `last` without `taken`, handed out by the hash of a name."""

    def __init__(self, first: IPv4Address, last: IPv4Address, taken: set[IPv4Address]) -> None:
        self._first = first
        self._size = int(last) - int(first) + 1
        self._taken = set(taken)

    def take(self, name: str) -> IPv4Address | None:
        start = int.from_bytes(_digest(name)[:8]) % self._size
        for step in range(self._size):
            address = self._first + (start + step) % self._size
            if address not in self._taken:
                self._taken.add(address)
                return address
        return None


class Macs:
    """MACs with QEMU's prefix 52:54:00, by the hash of the lab's and the NIC's name, unique in the
    lab.
    """

    def __init__(self, topology: Topology) -> None:
        self._lab = topology.name
        written = [nic.mac for _, _, nic in nics_of(topology)]
        written += [network.mac for network in topology.networks.values()]
        self._taken = {mac.lower() for mac in written if mac}
        self._chosen: dict[str, str] = {}

    def of_nic(self, node: str, index: int, mac: str | None) -> str:
        return mac.lower() if mac else self.of(f"{node}:{index}")

    def of(self, name: str) -> str:
        attempt = 0
        while name not in self._chosen:
            tail = _digest(f"{self._lab} {name} {attempt or ''}")[:3]
            mac = f"52:54:00:{tail.hex(':')}"
            if mac not in self._taken:
                self._taken.add(mac)
                self._chosen[name] = mac
            attempt += 1
        return self._chosen[name]


def _digest(text: str) -> bytes:
    return blake2s(text)


def uplink_subnet(topology: Topology) -> str:
    """The subnet of a private place's uplink: QEMU's and slirp4netns's 10.0.2.0/24, unless the file
    has it.
    """
    written = [
        IPv4Interface(network.address).network
        for network in topology.networks.values()
        if network.address not in (None, "auto")
    ]
    taken = Ranges(written)
    candidates = IPv4Network("10.0.0.0/8").subnets(new_prefix=24)
    return next(
        str(subnet)
        for subnet in candidates
        if subnet >= IPv4Network("10.0.2.0/24") and subnet not in taken
    )
