"""From `[[expect]]` to questions: who tries what against which address, and how a "no" is proved.

A question is one source and one far end, with every derived value chosen: an expectation of three
sources is three questions. Where they come from is the State that the lab should be in, so that a
question does not change its meaning because the lab is broken.
"""

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Interface
from typing import Literal

import msgspec

from netorch.model import Expect, Topology
from netorch.resources import Bridge, Dnsmasq, Guest, Tap, Veth
from netorch.state import State
from netorch.topology_expect import GATEWAY, nodes, sources

PLACE = ""
"""The place itself, where a node's name could stand: the machine that has the gateways."""

SECONDS = 10  # until it must have worked
SILENCE = 2  # seconds without an answer that are taken for a no


class Port(msgspec.Struct, frozen=True, kw_only=True):
    """A NIC of a node as the lab should have it.

    `given` says where its address comes from; `address` is "" where that is elsewhere. `link` is
    the lab's end of its cable, `device` the host's own name for it.
    """

    node: str
    network: str
    mac: str
    address: str
    given: Literal["static", "lab", "elsewhere"]
    link: str
    device: str = ""


class Far(msgspec.Struct, frozen=True, kw_only=True):
    """The far end. `node` is PLACE for this machine, None for a stranger.

    `address` is "" if it is to be found: that of the MAC `mac`, or of the DNS name `name`.
    """

    node: str | None = None
    network: str = ""
    address: str = ""
    mac: str = ""
    name: str = ""


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """One thing to try. `servers` are the name servers of the source; `answers` are the addresses
    that a DNS name of the lab must have. `vantages` are where a "no" is held against, in order.
    """

    expect: Expect
    source: str
    kind: str
    detail: str  # the port, or the DNS name
    far: Far
    vantages: tuple[str, ...] = ()
    servers: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    seconds: float = SECONDS

    @property
    def port(self) -> int:
        return int(self.detail)

    @property
    def title(self) -> str:
        """`vm1 -> server tcp:22`, as the file has it."""
        to = f" -> {self.expect.to}" if self.expect.to else ""
        return f"{self.source}{to} {self.expect.by}"


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """How one question went. `observed` is what was seen; `because` why it failed, if known."""

    question: Question
    ok: bool
    observed: str
    seconds: float
    because: str = ""


def questions(topology: Topology, state: State) -> list[Question]:
    """All questions of the topology, in the order of the file."""
    reader = _Reader(topology, state)
    return [
        reader.question(expect, source)
        for expect in topology.expect
        for source in sources(topology, expect)
    ]


def ports(state: State) -> Iterator[Port]:
    """The NICs of all nodes, in each node's order."""
    reserved = dict(_reservations(state))
    for veth in state.of(Veth):
        static = [str(IPv4Interface(address).ip) for address in veth.addresses]
        leased = reserved.get(veth.mac, "")
        yield Port(
            node=veth.host,
            network=veth.network,
            mac=veth.mac,
            address=static[0] if static else leased,
            given="static" if static else "lab" if leased else "elsewhere",
            link=veth.name,
            device=veth.device,
        )
    for guest in state.of(Guest):
        for nic in guest.nics:
            if nic.backend != "tap":
                continue  # nobody of the lab knows what address it has
            tap = state.get(guest.tap_key(nic))
            assert isinstance(tap, Tap), "the compiler makes one for every NIC on a network"
            leased = reserved.get(nic.mac, "")
            yield Port(
                node=guest.name,
                network=tap.network,
                mac=nic.mac,
                address=leased,
                given="lab" if leased else "elsewhere",
                link=tap.name,
            )


def _reservations(state: State) -> Iterator[tuple[str, str]]:
    for dnsmasq in state.of(Dnsmasq):
        for line in dnsmasq.hosts.splitlines():
            mac, address = line.split(",")[:2]
            yield mac, address


class _Reader:
    def __init__(self, topology: Topology, state: State) -> None:
        self.topology = topology
        self.state = state
        self.ports: dict[str, list[Port]] = {node: [] for node in nodes(topology)}
        for port in ports(state):
            self.ports[port.node].append(port)
        self.bridges = {
            bridge.network: str(IPv4Interface(bridge.addresses[0]).ip)
            for bridge in state.of(Bridge)
            if bridge.addresses
        }

    def question(self, expect: Expect, source: str) -> Question:
        kind, _, detail = expect.by.partition(":")
        far = self._far(expect, source, kind)
        return Question(
            expect=expect,
            source=source,
            kind=kind,
            detail=detail,
            far=far,
            vantages=() if expect.reach else tuple(self._vantages(source, far)),
            servers=self._servers(source),
            answers=self._answers(detail) if kind == "dns" else (),
            seconds=expect.within or (SECONDS if expect.reach else SILENCE),
        )

    def _far(self, expect: Expect, source: str, kind: str) -> Far:
        to = expect.to
        if to is None:
            return Far(node=PLACE) if kind == "dns" else Far(node=source)
        if to in self.ports:
            return self._node(to, {port.network for port in self.ports[source]})
        if to == GATEWAY:
            return self._at(self._gateway(source))
        try:
            return self._at(str(IPv4Address(to)))
        except ValueError:
            return Far(name=to)

    def _node(self, node: str, near: set[str]) -> Far:
        """The NIC that the source shares a network with, else the first one."""
        port = next((p for p in self.ports[node] if p.network in near), self.ports[node][0])
        return Far(node=node, network=port.network, address=port.address, mac=port.mac)

    def _at(self, address: str) -> Far:
        """Whoever has the address."""
        for network, own in self.bridges.items():
            if own == address:
                return Far(node=PLACE, network=network, address=address)
        for node, there in self.ports.items():
            for port in there:
                if port.address == address:
                    return Far(node=node, network=port.network, address=address, mac=port.mac)
        return Far(address=address)

    def _gateway(self, source: str) -> str:
        for port in self.ports[source]:
            veth = self.state.get(f"veth:{source}:{port.device.removeprefix('eth')}")
            if isinstance(veth, Veth) and veth.gateway:
                return veth.gateway
            if port.network in self.bridges:
                return self.bridges[port.network]
        raise AssertionError("netorch.topology_expect refuses a source without a gateway")

    def _vantages(self, source: str, far: Far) -> Iterator[str]:
        """Who should reach the far end: this machine where it is on that network, then the other
        hosts and guests there.
        """
        if far.node in (None, PLACE) or far.network in self.bridges:
            yield PLACE
        for node in [*self.topology.hosts, *self.topology.guests]:
            there = any(port.network == far.network for port in self.ports[node])
            if there and node not in (source, far.node):
                yield node

    def _servers(self, source: str) -> tuple[str, ...]:
        serving = (n for n, network in self.topology.networks.items() if network.dns)
        asked = {port.network for port in self.ports[source]}
        return tuple(self.bridges[n] for n in serving if n in asked and n in self.bridges)

    def _answers(self, name: str) -> tuple[str, ...]:
        domains = {network.domain for network in self.topology.networks.values()}
        short = next((name.removesuffix(f".{d}") for d in domains if d and name.endswith(d)), name)
        by_lower = {node.lower(): there for node, there in self.ports.items()}
        return tuple(port.address for port in by_lower.get(short.lower(), ()) if port.address)
