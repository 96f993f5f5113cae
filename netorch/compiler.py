"""compile(Topology, Facts) -> State: every derived value is chosen here, and nothing else is.

A pure function: the same file on the same machine gives the same State, and adding something to a file does
not move what was there before. So addresses and MACs are derived from names, by hash; where two names hash
to the same value, the one that stands first in the file keeps it.
"""

import hashlib
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path

import msgspec

from netorch.errors import ConflictError
from netorch.facts import Facts
from netorch.model import Dhcp, Guest, Host, HostNic, Network, Nic, Taps, Topology
from netorch.names import bridge_name, tap_name, tap_names, veth_name
from netorch.networks import (
    Reservation,
    Segment,
    dhcp_hosts,
    dnsmasq_config,
    ruleset,
    static_names,
)
from netorch.resources import (
    Bridge,
    DhcpClient,
    Dnsmasq,
    Forwarding,
    GuestNic,
    Namespace,
    Record,
    Resource,
    State,
    Tap,
    Veth,
)
from netorch.resources import Guest as RunningGuest
from netorch.topology import memory_mib

# Where `address = "auto"` looks for a free /24: from libvirt's own subnet upwards, then on.
AUTO = (IPv4Network("192.168.122.0/24"), IPv4Network("192.168.0.0/16"), IPv4Network("10.0.0.0/8"))


def compile(topology: Topology, facts: Facts, run: Path, table: str, source: str = "") -> State:
    """The State that `topology` asks for on a machine with these `facts`.

    `run` is the lab's run directory (dnsmasq's files are named in its configuration), `table` the name of
    its nft table, `source` the file. Raises ConflictError if no subnet is left for an "auto" address.
    """
    return State(_Compiler(topology, facts, run, table, source).resources())


class _Compiler:
    def __init__(self, topology: Topology, facts: Facts, run: Path, table: str, source: str) -> None:
        self.topology = topology
        self.facts = facts
        self.run = run
        self.table = table
        self.source = source
        self.macs = _Macs(topology)
        self.gateways = _gateways(topology, facts)
        self.bridges = {name: bridge_name(name, net) for name, net in topology.networks.items()}
        self.segments = {name: self._segment(name) for name in topology.networks}

    def resources(self) -> Iterator[Resource]:
        yield Record(text=msgspec.json.encode(self.topology).decode(), source=self.source)
        for host in self.topology.hosts:
            yield Namespace(host=host)
        for name, segment in self.segments.items():
            yield self._bridge(name, segment)
        for name, taps in self.topology.taps.items():
            yield from self._taps(name, taps)
        for name, guest in self.topology.guests.items():
            yield from self._guest_taps(name, guest)
        for name, host_ in self.topology.hosts.items():
            yield from self._host_links(name, host_)
        rules = ruleset(self.table, tuple(self.segments.values()))
        if rules is not None:
            yield rules
        for uplink in self._uplinks():
            yield Forwarding(name=uplink)
        for segment in self.segments.values():
            if segment.gateway and (segment.dhcp_first or segment.dns):
                yield self._dnsmasq(segment)
        for name, guest in self.topology.guests.items():
            yield self._guest(name, guest)

    def _bridge(self, name: str, segment: Segment) -> Bridge:
        network = self.topology.networks[name]
        gateway = self.gateways[name]
        return Bridge(
            network=name,
            name=segment.bridge,
            mac=network.mac.lower() if network.mac else self.macs.of(f"network {name}"),
            mtu=segment.mtu,
            addresses=(str(gateway),) if gateway else (),
            # A bridge with an address of the lab's own LAN is a way out for its other networks.
            forwarding=network.mode in ("nat", "route", "open") or self._is_lan(name),
            stp=network.stp,
        )

    def _is_lan(self, name: str) -> bool:
        """Is this a bridged network that the lab's routed ones may leave by?"""
        routed = any(n.mode in ("nat", "route", "open") for n in self.topology.networks.values())
        return self.topology.networks[name].mode == "bridge" and bool(self.gateways[name]) and routed

    def _uplinks(self) -> list[str]:
        """Foreign interfaces that traffic of the lab leaves by; forwarding has to be on for the replies."""
        found: dict[str, None] = {}
        for network in self.topology.networks.values():
            if network.mode not in ("nat", "route", "open"):
                continue
            names = [network.uplink] if network.uplink else [u.name for u in self.facts.uplinks]
            found.update(dict.fromkeys(name for name in names if name not in self.bridges.values()))
        return list(found)

    def _segment(self, name: str) -> Segment:
        network = self.topology.networks[name]
        gateway = self.gateways[name]
        first, last = _dhcp_range(network, gateway)
        segment = Segment(
            network=name,
            mode=network.mode,
            bridge=self.bridges[name],
            subnet=str(gateway.network) if gateway else "",
            gateway=str(gateway.ip) if gateway else "",
            uplink=network.uplink or "",
            mtu=self._mtu(network),
            dhcp_first=str(first) if first else "",
            dhcp_last=str(last) if last else "",
            lease=network.dhcp.lease if isinstance(network.dhcp, Dhcp) else "1h",
            dns=network.dns,
            domain=network.domain or "",
            reservations=tuple(self._reservations(name, first, last)),
            names=tuple(self._static_names(name)),
        )
        return segment

    def _mtu(self, network: Network) -> int:
        if network.mtu:
            return network.mtu
        if network.mode in ("isolated", "bridge"):
            return 1500
        ways_out = [u.mtu for u in self.facts.uplinks if network.uplink in (None, u.name)]
        return min([1500, *ways_out])

    def _reservations(
        self, name: str, first: IPv4Address | None, last: IPv4Address | None
    ) -> Iterator[Reservation]:
        """One for every NIC that asks this network for an address, so that addresses never wander."""
        if first is None or last is None:
            return
        nics = [(node, i, nic) for node, i, nic in _nics(self.topology) if nic.network == name]
        fixed = {nic.address.partition("/")[0] for _, _, nic in nics if nic.address not in (None, "dhcp")}
        gateway = self.gateways[name]
        assert gateway is not None, "a DHCP range without an address is refused by netorch.topology"
        pool = _Pool(first, last, {*map(IPv4Address, fixed), gateway.ip})
        named: set[str] = set()
        for node, index, nic in nics:
            if isinstance(nic, HostNic) and nic.address not in (None, "dhcp"):
                continue  # static: it never asks
            if nic.address in (None, "dhcp"):
                address = pool.take(f"{node}:{index}")
                assert address is not None, "netorch.topology_checks counts them"
            else:
                address = IPv4Address(nic.address)
            yield Reservation(
                mac=self.macs.of_nic(node, index, nic.mac),
                address=str(address),
                name="" if node in named else node,
            )
            named.add(node)

    def _static_names(self, name: str) -> Iterator[tuple[str, str]]:
        for host, definition in self.topology.hosts.items():
            for nic in definition.nics:
                if nic.network == name and nic.address not in (None, "dhcp"):
                    yield (str(IPv4Interface(nic.address).ip), host)

    def _dnsmasq(self, segment: Segment) -> Dnsmasq:
        stem = f"{self.run}/dnsmasq-{segment.network}"
        return Dnsmasq(
            network=segment.network,
            config=dnsmasq_config(
                segment,
                leases=f"{stem}.leases",
                hosts=f"{stem}.hosts",
                names=f"{stem}.names",
                log=f"{stem}.log",
            ),
            hosts=dhcp_hosts(segment),
            names=static_names(segment),
        )

    def _taps(self, name: str, taps: Taps) -> Iterator[Tap]:
        for index, device in enumerate(tap_names(name, taps)):
            yield self._tap(f"{name}:{index}", device, taps.network, taps.queues, taps.owner)

    def _guest_taps(self, name: str, guest: Guest) -> Iterator[Tap]:
        for index, nic in enumerate(guest.nics):
            mac = self.macs.of_nic(name, index, nic.mac)
            yield self._tap(
                f"{name}:{index}", tap_name(name, index, nic), nic.network, nic.queues, 0, mac
            )

    def _tap(
        self, id: str, name: str, network: str, queues: int, owner: str | int, mac: str = ""
    ) -> Tap:
        return Tap(
            id=id,
            name=name,
            network=network,
            bridge=self.bridges[network],
            mac="fe" + (mac or self.macs.of(f"tap {id}"))[2:],
            mtu=self.segments[network].mtu,
            multi_queue=queues > 1,
            owner=self.facts.users[owner] if isinstance(owner, str) else owner,
        )

    def _host_links(self, name: str, host: Host) -> Iterator[Resource]:
        routed = False
        for index, nic in enumerate(host.nics):
            segment = self.segments[nic.network]
            static = nic.address not in (None, "dhcp")
            gateway = "" if nic.gateway is False or routed or not static else _gateway_of(nic, segment)
            routed = routed or bool(gateway)
            yield Veth(
                id=f"{name}:{index}",
                name=veth_name(name, index),
                network=nic.network,
                bridge=segment.bridge,
                host=name,
                device=f"eth{index}",
                mac=self.macs.of_nic(name, index, nic.mac),
                mtu=segment.mtu,
                addresses=(nic.address,) if static and nic.address else (),
                gateway=gateway,
            )
            if not static:
                yield DhcpClient(host=name, device=f"eth{index}")

    def _guest(self, name: str, guest: Guest) -> RunningGuest:
        served = {n: None for nic in guest.nics if self.segments[n := nic.network].dhcp_first}
        return RunningGuest(
            name=name,
            image=guest.image,
            format=self._format(guest),
            machine=guest.machine,
            accel=guest.accel,
            memory=memory_mib(guest.memory),
            cpus=guest.cpus,
            nics=tuple(
                GuestNic(
                    mac=self.macs.of_nic(name, index, nic.mac),
                    model=nic.model,
                    tap=tap_name(name, index, nic),
                    queues=nic.queues,
                )
                for index, nic in enumerate(guest.nics)
            ),
            networks=tuple(served),
            vnc=-1 if guest.vnc is None else guest.vnc,
        )

    def _format(self, guest: Guest) -> str:
        if guest.image == "tiny":
            return ""
        return self.facts.formats.get(guest.image, guest.format) if guest.format == "auto" else guest.format


def _gateways(topology: Topology, facts: Facts) -> dict[str, IPv4Interface | None]:
    """Each network's address on this machine. "auto" keeps what the running lab has, if it is still free."""
    taken = [IPv4Network(prefix) for prefix in facts.taken]
    found: dict[str, IPv4Interface | None] = {}
    for name, network in topology.networks.items():
        if network.address not in (None, "auto"):
            found[name] = IPv4Interface(network.address)
    for name, network in topology.networks.items():
        if name in found:
            continue
        if network.address is None and network.mode == "bridge":
            found[name] = None
            continue
        others = [*taken, *(gateway.network for gateway in found.values() if gateway)]
        current = facts.addresses.get(name)
        if current and not any(IPv4Interface(current).network.overlaps(other) for other in others):
            found[name] = IPv4Interface(current)
        else:
            found[name] = _first_free(others, name)
    return found


def _first_free(taken: list[IPv4Network], network: str) -> IPv4Interface:
    for pool in AUTO:
        for subnet in pool.subnets(new_prefix=24) if pool.prefixlen < 24 else (pool,):
            if pool.prefixlen == 16 and subnet.network_address.packed[2] <= 122:
                continue  # 192.168.0.0/24 to .122: where home routers live
            if not any(subnet.overlaps(other) for other in taken):
                return IPv4Interface(f"{subnet.network_address + 1}/24")
    raise ConflictError(f"network {network}: no free /24 is left for an automatic address")


def _dhcp_range(
    network: Network, gateway: IPv4Interface | None
) -> tuple[IPv4Address, IPv4Address] | tuple[None, None]:
    """The first and last address that DHCP serves; by default all but the gateway's, as libvirt's .2-.254."""
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


def _gateway_of(nic: HostNic, segment: Segment) -> str:
    if isinstance(nic.gateway, str):
        return nic.gateway
    return "" if segment.mode == "isolated" else segment.gateway


def _nics(topology: Topology) -> Iterator[tuple[str, int, Nic | HostNic]]:
    for name, guest in topology.guests.items():
        for index, nic in enumerate(guest.nics):
            yield name, index, nic
    for name, host in topology.hosts.items():
        for index, host_nic in enumerate(host.nics):
            yield name, index, host_nic


class _Pool:
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


class _Macs:
    """MACs with QEMU's prefix 52:54:00, by the hash of the lab's and the NIC's name, unique in the lab."""

    def __init__(self, topology: Topology) -> None:
        self._lab = topology.name
        written = [nic.mac for _, _, nic in _nics(topology)]
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
    return hashlib.blake2s(text.encode()).digest()
