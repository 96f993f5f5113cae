"""What types can't say about a topology: references, addresses, and names that must not meet.

`check` returns everything that is wrong. It never looks at the machine, so a file that it accepts
can still name an image, a user or an uplink that isn't there.

A mistake is reported once: what follows from a value that is reported already (`broken`, or an
address that can't be read) is left out.
"""

from collections.abc import Callable, Collection
from ipaddress import IPv4Address, IPv4Interface
from typing import TypeVar

from netorch.errors import Finding, Key, dotted, quoted
from netorch.model import Dhcp, Guest, HostNic, Network, Nic, Topology
from netorch.names import bridge_name
from netorch.topology_boot import boots
from netorch.topology_clashes import clashes, overlaps
from netorch.topology_disks import storage
from netorch.topology_expect import expectations
from netorch.topology_nics import nics
from netorch.topology_order import order
from netorch.topology_rates import rates
from netorch.topology_values import (
    Wrong,
    address,
    domain,
    interface,
    lease_seconds,
    machine,
    memory_mib,
    nearest,
)

T = TypeVar("T")

MIN_MEMORY = 64  # MiB: a Linux kernel and an initramfs
MAX_MEMORY = 16 << 20  # MiB
MIN_LEASE = 120  # seconds: dnsmasq makes a shorter one that long


def check(topology: Topology, broken: Collection[Key] = ()) -> list[Finding]:
    """All mistakes in `topology` but those that rest on the values at `broken`."""
    return _Checks(topology, broken).run()


def _takes_in(network: Network) -> bool:
    return network.mode == "bridge" and network.uplink is not None


class _Checks:
    def __init__(self, topology: Topology, broken: Collection[Key]) -> None:
        self.topology = topology
        self.broken = broken
        self.findings: list[Finding] = []
        # Subnets as written; None where it is reported or chosen later ("auto"), or there is none.
        self.subnets: dict[str, IPv4Interface | None] = {}
        self.ranges: dict[str, tuple[IPv4Address, IPv4Address]] = {}  # of DHCP, where right
        # What NICs want of a network: addresses that they name, and any address.
        self.fixed: dict[str, set[IPv4Address]] = {name: set() for name in topology.networks}
        self.asking = dict.fromkeys(topology.networks, 0)
        self.bridged = {n.uplink: name for name, n in topology.networks.items() if _takes_in(n)}

    def run(self) -> list[Finding]:
        for name, network in self.topology.networks.items():
            self._network(name, network)
        for name, guest in self.topology.guests.items():
            self._guest(name, guest)
        for name, host in self.topology.hosts.items():
            for index, nic in enumerate(host.nics):
                self._host_nic(("hosts", name, "nics", index), nic)
        for name, taps in self.topology.taps.items():
            self._known_network(("taps", name, "network"), taps.network)
        for name, network in self.topology.networks.items():
            self._room(name, network)
        others = (clashes, order, rates)
        for finding in (*overlaps(self.subnets), *(f for c in others for f in c(self.topology))):
            self.say(*finding)
        for path, message, hint, because in (
            *nics(self.topology),
            *storage(self.topology),
            *boots(self.topology),
            *expectations(self.topology),
        ):
            self.say(path, message, hint, *because)
        return self.findings

    def say(self, path: Key, message: str, hint: str = "", *because: Key) -> None:
        """Note a mistake, unless it or what it rests on is reported already."""
        if not any(self._is_broken(place) for place in (path, *because)):
            self.findings.append((path, message, hint))

    def _is_broken(self, path: Key) -> bool:
        return any(path[:length] in self.broken for length in range(1, len(path) + 1))

    # Networks

    def _network(self, name: str, network: Network) -> None:
        path: Key = ("networks", name)
        self.subnets[name] = self._network_address(path, network)
        self._mode_and_uplink(path, network)
        self._external(path, network)
        self._dhcp(path, network)
        if network.domain is not None:
            self.read((*path, "domain"), network.domain, domain)

    def _network_address(self, path: Key, network: Network) -> IPv4Interface | None:
        where, text = (*path, "address"), network.address
        if text is None or self._is_broken(where):
            return None
        if text != "auto":
            return self.read(where, text, interface)
        if network.mode == "bridge":
            hint = "write one of the LAN's, or leave it out: netorch then has no address there"
            self.say(where, 'mode "bridge" has no automatic address', hint, (*path, "mode"))
        return None

    def _mode_and_uplink(self, path: Key, network: Network) -> None:
        if network.uplink is None:
            return
        where, mode = (*path, "uplink"), (*path, "mode")
        if network.mode in ("isolated", "open"):
            self.say(
                where, f'mode "{network.mode}" has no uplink', 'for mode "nat" or "route"', mode
            )
        if network.uplink in self.bridged and not _takes_in(network):
            other = self.bridged[network.uplink]
            bridge = bridge_name(other, self.topology.networks[other])
            message = f"{network.uplink} becomes a port of {bridge}, which has its routes then"
            self.say(where, message, quoted(bridge), mode, ("networks", other))

    def _external(self, path: Key, network: Network) -> None:
        """Of a bridge of somebody else's, everything but its name is somebody else's too."""
        if not network.external:
            return
        where: Key = (*path, "external")
        if network.mode != "bridge":
            hint = 'mode = "bridge"'
            self.say(where, "netorch gives no services on a bridge of somebody else's", hint)
        if network.bridge is None:
            self.say(where, "needs the name of the bridge", 'bridge = "br0"')
        for key in ("address", "dhcp", "tftp", "domain", "uplink", "mac", "mtu", "stp"):
            if getattr(network, key) not in (None, False):
                message = "can't be set: the bridge is somebody else's (external = true)"
                self.say((*path, key), message, "leave it out", where)

    def _dhcp(self, path: Key, network: Network) -> None:
        where, dhcp = (*path, "dhcp"), network.dhcp
        if dhcp and network.address is None and network.mode == "bridge":
            hint = 'write address = "..." (this machine\'s own on that LAN)'
            because = ((*path, "address"), (*path, "mode"))
            self.say(where, "DHCP needs an address to serve from", hint, *because)
        subnet = self.subnets[str(path[1])]
        if subnet is not None and not self._is_broken(where):
            self.ranges[str(path[1])] = (subnet.network[1], subnet.network[-2])
        if not isinstance(dhcp, Dhcp):
            return
        if not self._is_broken((*where, "lease")) and lease_seconds(dhcp.lease) < MIN_LEASE:
            hint = '"2m" or more; dnsmasq has no shorter ones'
            self.say((*where, "lease"), f"{quoted(dhcp.lease)} is too short", hint)
        if dhcp.range is not None:
            self._range(path, network, dhcp.range)

    def _range(self, path: Key, network: Network, written: tuple[str, str]) -> None:
        where, name = (*path, "dhcp", "range"), str(path[1])
        self.ranges.pop(name, None)
        ends = []
        for index, text in enumerate(written):
            ip = self.read((*where, index), text, address)
            if ip and self._inside((*where, index), ip, self.subnets[name]):
                ends.append(ip)
        if len(ends) == 2 and ends[0] <= ends[1]:
            self.ranges[name] = (ends[0], ends[1])
        elif len(ends) == 2:
            self.say(where, f"{ends[0]} to {ends[1]} runs backwards", f'["{ends[1]}", "{ends[0]}"]')
        if network.address in (None, "auto") and network.mode != "bridge":
            message = "a range needs a subnet, and this network picks its own"
            hint = 'write address = "...", or leave the range out'
            self.say(where, message, hint, (*path, "address"), (*path, "mode"))

    def _room(self, name: str, network: Network) -> None:
        """Every NIC that asks for an address gets one of its own, so that many must be free."""
        subnet, ends = self.subnets[name], self.ranges.get(name)
        if subnet is None or ends is None or self._is_off(network):
            return
        taken = sum(ends[0] <= ip <= ends[1] for ip in {subnet.ip, *self.fixed[name]})
        room = int(ends[1]) - int(ends[0]) + 1 - taken
        if self.asking[name] > room:
            message = f"{self.asking[name]} NICs ask for an address, and there are {room} to give"
            where: Key = ("networks", name, "dhcp")
            hint = "make the range or the subnet larger"
            self.say(where, message, hint, (*where[:2], "address"), (*where[:2], "mode"))

    # Guests, hosts, taps

    def _guest(self, name: str, guest: Guest) -> None:
        path: Key = ("guests", name)
        self._memory((*path, "memory"), guest.memory)
        if guest.ports is not None and guest.machine != "q35":
            message = f'machine "{guest.machine}" has no ports: its NICs come and go without'
            self.say((*path, "ports"), message, "leave it out", (*path, "machine"))
        for index, nic in enumerate(guest.nics):
            self._nic((*path, "nics", index), nic)

    def _memory(self, path: Key, memory: int | str) -> None:
        said = quoted(memory) if isinstance(memory, str) else f"{memory} MiB"
        try:
            mib = memory_mib(memory)
        except Wrong as wrong:
            self.say(path, f"{said} {wrong.message}", wrong.hint)
            return
        if not MIN_MEMORY <= mib <= MAX_MEMORY:
            amount = "little" if mib < MIN_MEMORY else "much"
            self.say(path, f"{said} is too {amount} memory", f"{MIN_MEMORY} MiB to 16 TiB")

    def _nic(self, path: Key, nic: Nic) -> None:
        if nic.network is None:
            return
        network = self._known_network((*path, "network"), nic.network)
        where = (*path, "address")
        if self._is_broken(where):
            return
        if nic.address is None:
            if network is not None:
                self.asking[nic.network] += 1
            return
        if self._is_off(network):
            message = f"a reservation needs DHCP, which is off on {quoted(nic.network)}"
            hint = f"set it inside the guest, or {dotted(('networks', nic.network, 'dhcp'))} = true"
            self.say(where, message, hint, *self._dhcp_rests_on(nic.network))
        if nic.address == "dhcp":
            self.say(where, "a guest asks by DHCP by itself", "leave the address out")
            return
        if "/" in nic.address and ":" not in nic.address:
            message = f"a reservation has no prefix length, got {quoted(nic.address)}"
            self.say(where, message, quoted(nic.address.partition("/")[0]))
            return
        self._on_network(where, self.read(where, nic.address, address), nic.network)

    def _host_nic(self, path: Key, nic: HostNic) -> None:
        network = self._known_network((*path, "network"), nic.network)
        where = (*path, "address")
        static = None
        if self._is_broken(where):
            return
        if nic.address is None or nic.address == "dhcp":
            if network is not None:
                self.asking[nic.network] += 1
            elsewhere = nic.address == "dhcp" and network is not None and network.mode == "bridge"
            if self._is_off(network) and not elsewhere:
                message = f"needs an address: there is no DHCP on {quoted(nic.network)}"
                hint = 'write address = "a.b.c.d/24"'
                if network is not None and network.mode == "bridge":
                    hint += ', or "dhcp" if something else on that LAN serves it'
                self.say(where, message, hint, *self._dhcp_rests_on(nic.network))
        else:
            static = self.read(where, nic.address, interface)
            self._on_network(where, static.ip if static else None, nic.network)
        if isinstance(nic.gateway, str):
            self._gateway((*path, "gateway"), nic.gateway, static)

    def _gateway(self, where: Key, text: str, static: IPv4Interface | None) -> None:
        gateway = self.read(where, text, address)
        if gateway is None or static is None:
            return
        if gateway == static.ip:
            self.say(where, f"{gateway} is the host's own address", "false for no default route")
        elif gateway not in static.network:
            self.say(where, f"{gateway} is outside of {static.network}", "the host can't reach it")

    def _known_network(self, where: Key, name: str) -> Network | None:
        network = self.topology.networks.get(name)
        if network is None:
            meant = nearest(name, self.topology.networks) if name else ""
            known = ", ".join(list(self.topology.networks)[:8])
            hint = (
                f"did you mean {quoted(meant)}?" if meant else f"networks here: {known or 'none'}"
            )
            self.say(where, f"there is no network {quoted(name)}", hint, ("networks",))
        return network

    def _is_off(self, network: Network | None) -> bool:
        """Is DHCP surely off there?"""
        if network is None:
            return False
        return network.dhcp is False or (network.dhcp is None and network.mode == "bridge")

    def _dhcp_rests_on(self, network: str) -> tuple[Key, Key]:
        return ("networks", network, "dhcp"), ("networks", network, "mode")

    def read(self, path: Key, text: str, reader: Callable[[str], T]) -> T | None:
        """What the string means; None if it is reported, now or before."""
        if self._is_broken(path):
            return None
        try:
            return reader(text)
        except Wrong as wrong:
            self.say(path, f"{quoted(text)} {wrong.message}", wrong.hint)
            return None

    def _inside(self, path: Key, ip: IPv4Address | None, subnet: IPv4Interface | None) -> bool:
        """Is it a machine's address of the subnet, as far as that is known?"""
        if ip is None:
            return False
        try:
            if subnet is not None:
                machine(ip, subnet)
        except Wrong as wrong:
            self.say(path, f"{ip} {wrong.message}", wrong.hint)
            return False
        return True

    def _on_network(self, path: Key, ip: IPv4Address | None, name: str) -> None:
        """A NIC's address: in the network's subnet, and not the network's own."""
        network, subnet = self.topology.networks.get(name), self.subnets.get(name)
        if ip is None or network is None or not self._inside(path, ip, subnet):
            return
        self.fixed[name].add(ip)
        where: Key = ("networks", name)
        if subnet is not None and ip == subnet.ip:
            message = f"{ip} is the address of {dotted(where)} itself"
            self.say(path, message, f"another one of {subnet.network}")
        if network.address in (None, "auto") and network.mode != "bridge":
            message = f"{quoted(name)} picks its own subnet, so {ip} may not be in it"
            hint = f'write {dotted((*where, "address"))} = "..."'
            self.say(path, message, hint, (*where, "address"), (*where, "mode"))
