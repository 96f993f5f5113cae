"""compile(Topology, Facts) -> State: every derived value is chosen here, and nothing else is.

A pure function: the same file on the same machine gives the same State (see also
`netorch.addresses`).
"""

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path

import msgspec

from netorch.addresses import Macs, Pool, dhcp_range, gateways, nics_of
from netorch.facts import Facts, Interface
from netorch.guest_disks import disks_of, hot_disks, storage_of
from netorch.guest_nics import guest_nics, user_subnets
from netorch.model import Dhcp, Guest, Host, HostNic, Network, Nic, Taps, Topology
from netorch.names import bridge_name, rate_name, tap_id, tap_name, tap_names, veth_name
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
    BridgeUplink,
    DhcpClient,
    Dnsmasq,
    Forwarding,
    GuestBoot,
    Namespace,
    Rate,
    Record,
    Resource,
    Seed,
    Tap,
    Variables,
    Veth,
)
from netorch.resources import Guest as RunningGuest
from netorch.state import State
from netorch.topology import memory_mib
from netorch.topology_rates import limits


def compile(topology: Topology, facts: Facts, run: Path, table: str, source: str = "") -> State:
    """The State that `topology` asks for on a machine with these `facts`.

    `run` is the lab's run directory (dnsmasq's files are named in its configuration), `table` the
    name of its nft table, `source` the file. Raises ConflictError if no subnet is left for an
    "auto" address.
    """
    order = {
        f"guest:{name}": tuple(f"guest:{other}" for other in guest.after)
        for name, guest in topology.guests.items()
        if guest.after
    }
    return State(_Compiler(topology, facts, run, table, source).resources(), order)


class _Compiler:
    def __init__(
        self, topology: Topology, facts: Facts, run: Path, table: str, source: str
    ) -> None:
        self.topology = topology
        self.facts = facts
        self.run = run
        self.table = table
        self.source = source
        self.macs = Macs(topology)
        self.gateways = gateways(topology, facts)
        self.nics: dict[str, list[tuple[str, int, Nic | HostNic]]] = {}
        for node, index, nic in nics_of(topology):
            if nic.network is not None:
                self.nics.setdefault(nic.network, []).append((node, index, nic))
        modes = {network.mode for network in topology.networks.values()}
        self.routed = not modes.isdisjoint(("nat", "route", "open"))
        self.bridges = {name: bridge_name(name, net) for name, net in topology.networks.items()}
        self.segments = {name: self._segment(name) for name in topology.networks}

    def resources(self) -> Iterator[Resource]:
        yield Record(text=msgspec.json.encode(self.topology).decode(), source=self.source)
        for host in self.topology.hosts:
            yield Namespace(host=host)
        for name, segment in self.segments.items():
            network = self.topology.networks[name]
            if network.external:
                continue
            yield self._bridge(name, segment)
            if network.mode == "bridge" and network.uplink:
                yield BridgeUplink(network=name, name=network.uplink, bridge=segment.bridge)
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
            tftp = self.topology.networks[segment.network].tftp or ""
            if segment.gateway and (segment.dhcp_first or segment.dns or tftp):
                yield self._dnsmasq(segment, tftp)
        for name, guest in self.topology.guests.items():
            yield from storage_of(name, guest, disks_of(guest, self.facts.formats))
            if guest.firmware == "uefi":
                yield Variables(guest=name, machine=guest.machine)
            if guest.user_data or guest.ssh_keys:
                yield self._seed(name, guest)
            yield self._guest(name, guest)

    def _bridge(self, name: str, segment: Segment) -> Bridge:
        network = self.topology.networks[name]
        gateway = self.gateways[name]
        uplink = self._taken_in(network)
        derived = uplink.mac if uplink else self.macs.of(f"network {name}")
        return Bridge(
            network=name,
            name=segment.bridge,
            mac=network.mac.lower() if network.mac else derived,
            mtu=segment.mtu,
            addresses=(str(gateway),) if gateway else (),
            # A bridge with an address of the lab's own LAN is a way out for its other networks.
            forwarding=network.mode in ("nat", "route", "open")
            or self._is_lan(name)
            or (uplink is not None and uplink.forwarding),
            stp=network.stp,
            uplink=(network.uplink or "") if network.mode == "bridge" else "",
        )

    def _taken_in(self, network: Network) -> Interface | None:
        """The interface of which a bridged network takes the MAC, the MTU, and its place."""
        if network.mode != "bridge" or network.uplink is None:
            return None
        return self.facts.interfaces.get(network.uplink)

    def _is_lan(self, name: str) -> bool:
        """Is this a bridged network that the lab's routed ones may leave by?"""
        network = self.topology.networks[name]
        member = bool(self.gateways[name] or network.uplink)
        return network.mode == "bridge" and member and self.routed

    def _uplinks(self) -> list[str]:
        """Foreign interfaces that traffic of the lab leaves by; forwarding has to be on for the
        replies.
        """
        found: dict[str, None] = {}
        networks = self.topology.networks.values()
        taken_in = {n.uplink for n in networks if n.mode == "bridge"}
        ours = {bridge for name, bridge in self.bridges.items() if not self._is_external(name)}
        for network in networks:
            if network.mode not in ("nat", "route", "open"):
                continue
            names = [network.uplink] if network.uplink else [u.name for u in self.facts.uplinks]
            found.update(dict.fromkeys(n for n in names if n not in ours and n not in taken_in))
        return list(found)

    def _is_external(self, network: str) -> bool:
        return self.topology.networks[network].external

    def _segment(self, name: str) -> Segment:
        network = self.topology.networks[name]
        gateway = self.gateways[name]
        first, last = dhcp_range(network, gateway)
        return Segment(
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
            boot=(network.dhcp.boot or "") if isinstance(network.dhcp, Dhcp) else "",
            dns=network.dns,
            domain=network.domain or "",
            reservations=tuple(self._reservations(name, first, last)),
            names=tuple(self._static_names(name)),
        )

    def _mtu(self, network: Network) -> int:
        if network.mtu:
            return network.mtu
        if network.external and network.bridge in self.facts.interfaces:
            return self.facts.interfaces[network.bridge].mtu
        if uplink := self._taken_in(network):
            return uplink.mtu
        if network.mode in ("isolated", "bridge"):
            return 1500
        ways_out = [u.mtu for u in self.facts.uplinks if network.uplink in (None, u.name)]
        return min([1500, *ways_out])

    def _reservations(
        self, name: str, first: IPv4Address | None, last: IPv4Address | None
    ) -> Iterator[Reservation]:
        """One for every NIC that asks this network for an address: so addresses never wander."""
        if first is None or last is None:
            return
        nics = self.nics.get(name, ())
        fixed = {
            nic.address.partition("/")[0] for _, _, nic in nics if nic.address not in (None, "dhcp")
        }
        gateway = self.gateways[name]
        assert gateway is not None, "a DHCP range without an address is refused by netorch.topology"
        pool = Pool(first, last, {*map(IPv4Address, fixed), gateway.ip})
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
        for host, _, nic in self.nics.get(name, ()):
            if isinstance(nic, HostNic) and nic.address not in (None, "dhcp"):
                yield (str(IPv4Interface(nic.address).ip), host)

    def _dnsmasq(self, segment: Segment, tftp: str) -> Dnsmasq:
        stem = f"{self.run}/dnsmasq-{segment.network}"
        return Dnsmasq(
            network=segment.network,
            config=dnsmasq_config(
                segment,
                leases=f"{stem}.leases",
                hosts=f"{stem}.hosts",
                names=f"{stem}.names",
                log=f"{stem}.log",
                tftp=tftp,
            ),
            hosts=dhcp_hosts(segment),
            names=static_names(segment),
            tftp=tftp,
        )

    def _taps(self, name: str, taps: Taps) -> Iterator[Tap]:
        for index, device in enumerate(tap_names(name, taps)):
            yield self._tap(f"{name}:{index}", device, taps.network, taps.queues, taps.owner)

    def _guest_taps(self, name: str, guest: Guest) -> Iterator[Resource]:
        for index, nic in enumerate(guest.nics):
            if self.facts.helper or nic.network is None:
                continue
            mac = self.macs.of_nic(name, index, nic.mac)
            tap = self._tap(
                f"{name}:{tap_id(index, nic)}",
                tap_name(name, index, nic),
                nic.network,
                nic.queues,
                0,
                mac,
            )
            yield tap
            yield from _rate(tap, nic)

    def _tap(
        self, id: str, name: str, network: str, queues: int, owner: str | int, mac: str = ""
    ) -> Tap:
        return Tap(
            id=id,
            name=name,
            network="" if self._is_external(network) else network,
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
            gateway = (
                "" if nic.gateway is False or routed or not static else _gateway_of(nic, segment)
            )
            routed = routed or bool(gateway)
            veth = Veth(
                id=f"{name}:{index}",
                name=veth_name(name, index),
                network="" if self._is_external(nic.network) else nic.network,
                bridge=segment.bridge,
                host=name,
                device=f"eth{index}",
                mac=self.macs.of_nic(name, index, nic.mac),
                mtu=segment.mtu,
                addresses=(nic.address,) if static and nic.address else (),
                gateway=gateway,
            )
            yield veth
            yield from _rate(veth, nic)
            if not static:
                yield DhcpClient(host=name, device=f"eth{index}")

    def _guest(self, name: str, guest: Guest) -> RunningGuest:
        boot_nics = tuple(self._boot_nics(guest)) if guest.boot == "network" else ()
        return RunningGuest(
            name=name,
            image=guest.image,
            machine=guest.machine,
            accel=guest.accel,
            memory=memory_mib(guest.memory),
            cpus=guest.cpus,
            nics=guest_nics(
                self.topology,
                name,
                macs=self.macs,
                subnets=user_subnets(self.gateways.values()),
                served={n for n, segment in self.segments.items() if segment.dhcp_first},
                helpers=self.bridges if self.facts.helper else None,
            ),
            disks=hot_disks(
                disks_of(guest, self.facts.formats, len(boot_nics)),
                guest,
                _ports(guest) if guest.machine == "q35" else None,
            ),
            vnc=_display(guest),
            video=guest.video or ("" if guest.vnc is False else "VGA"),
            boot=GuestBoot(
                kernel=guest.kernel or "",
                initrd=guest.initrd or "",
                cmdline=guest.cmdline or "",
                nics=boot_nics,
                uefi=guest.firmware == "uefi",
                seed=bool(guest.user_data or guest.ssh_keys),
            ),
            ports=_ports(guest),
        )

    def _boot_nics(self, guest: Guest) -> Iterator[int]:
        """Those on networks that say what to boot; where none of the lab's does, all of them."""
        said = [
            nic.network is not None and bool(self.segments[nic.network].boot) for nic in guest.nics
        ]
        yield from (index for index, boots in enumerate(said) if boots or not any(said))

    def _seed(self, name: str, guest: Guest) -> Seed:
        from netorch.cloud_init import SeedNic, seed_files

        nics = [
            SeedNic(self.macs.of_nic(name, index, nic.mac), self._has_dhcp(nic))
            for index, nic in enumerate(guest.nics)
        ]
        files = seed_files(name, guest.user_data or "", guest.ssh_keys, nics)
        return Seed(guest=name, files=files)

    def _has_dhcp(self, nic: Nic) -> bool:
        """Whether the lab serves it there, or the LAN that the network is a part of may, or what
        is behind a NIC without a network does.
        """
        if nic.network is None:
            return nic.wire is None
        network = self.topology.networks[nic.network]
        joined = network.external or (network.mode == "bridge" and network.uplink is not None)
        return bool(self.segments[nic.network].dhcp_first) or joined


def _rate(port: Tap | Veth, nic: Nic | HostNic) -> Iterator[Rate]:
    into, out = limits(nic)
    if into or out:
        yield Rate(name=rate_name(port.name), port=port.key, into=into, out=out)


def _display(guest: Guest) -> str:
    if isinstance(guest.vnc, bool):
        return "socket" if guest.vnc else ""
    return str(guest.vnc)


def _ports(guest: Guest) -> int:
    """Each costs a start some hundredths of a second; a `pc` has hot-plug without any."""
    if guest.machine != "q35":
        return 0
    return 4 if guest.ports is None else guest.ports


def _gateway_of(nic: HostNic, segment: Segment) -> str:
    if isinstance(nic.gateway, str):
        return nic.gateway
    return "" if segment.mode == "isolated" else segment.gateway
