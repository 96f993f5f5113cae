"""What types can't say about `[[expect]]`: who is meant, and what can be proved at all.

An expectation that could never be decided (a source address that nobody is there to report, a
lease that nobody asks for) is a mistake of the file, not a failure of the lab.
"""

import re
from collections.abc import Iterable, Iterator

from netorch.errors import Key, quoted
from netorch.model import Expect, HostNic, Network, Nic, Topology
from netorch.topology_values import Wrong, address, domain, nearest

NETWORK = "network:"
GATEWAY = "gateway"

Doubt = tuple[Key, str, str, tuple[Key, ...]]
"""A finding, and what it rests on: it is an echo if one of these is reported already."""

_NODES: tuple[Key, ...] = (("guests",), ("hosts",))


def nics_of(topology: Topology, node: str) -> tuple[Nic, ...] | tuple[HostNic, ...]:
    """The NICs of a guest or host; none for any other name."""
    if node in topology.guests:
        return topology.guests[node].nics
    return topology.hosts[node].nics if node in topology.hosts else ()


def nodes(topology: Topology) -> list[str]:
    return [*topology.guests, *topology.hosts]


def sources(topology: Topology, expect: Expect) -> list[str]:
    """The nodes that try, each once; a network's without the one that they try to reach."""
    written = (expect.from_,) if isinstance(expect.from_, str) else expect.from_
    found: dict[str, None] = {}
    for word in written:
        if word.startswith(NETWORK):
            there = on_network(topology, word.removeprefix(NETWORK))
            found.update(dict.fromkeys(node for node in there if node != expect.to))
        else:
            found[word] = None
    return list(found)


def on_network(topology: Topology, network: str) -> list[str]:
    return [n for n in nodes(topology) if any(x.network == network for x in nics_of(topology, n))]


def expectations(topology: Topology) -> Iterator[Doubt]:
    """Everything that is wrong with the topology's expectations."""
    known = dict.fromkeys(nodes(topology))
    here = {*known, GATEWAY, *_addresses(topology)} if topology.expect else set()
    for index, expect in enumerate(topology.expect):
        yield from _Check(topology, known, here, ("expect", index), expect).run()


def _addresses(topology: Topology) -> Iterator[str]:
    """The addresses that the file gives to this machine, and to guests and hosts."""
    written = [network.address for network in topology.networks.values()]
    written += [nic.address for node in nodes(topology) for nic in nics_of(topology, node)]
    return ((text or "").partition("/")[0] for text in written)


class _Check:
    def __init__(
        self,
        topology: Topology,
        known: dict[str, None],
        here: set[str],
        path: Key,
        expect: Expect,
    ) -> None:
        self.topology = topology
        self.known = known
        self.here = here
        self.path = path
        self.expect = expect
        self.kind, _, self.detail = expect.by.partition(":")

    def run(self) -> Iterator[Doubt]:
        yield from self._from()
        yield from self._by()
        yield from self._to()
        yield from self._seen_as()

    def _doubt(self, key: str, message: str, hint: str, *because: Key) -> Doubt:
        return (*self.path, key), message, hint, because

    def _from(self) -> Iterator[Doubt]:
        written, where = self.expect.from_, (*self.path, "from")
        if not written and not isinstance(written, str):
            yield where, "names nobody", 'a guest or host, several, or "network:NAME"', ()
        for index, word in enumerate([written] if isinstance(written, str) else written):
            path = where if isinstance(written, str) else (*where, index)
            if word.startswith(NETWORK):
                yield from self._from_network(path, word.removeprefix(NETWORK))
            elif word not in self.known:
                yield path, *self._unknown(word, [NETWORK + n for n in self.topology.networks])
            elif word == self.expect.to:
                yield path, f"{quoted(word)} always reaches itself", "name another", ()
            elif not nics_of(self.topology, word):
                yield path, f"{quoted(word)} has no NIC", "give it one, or leave it out", ()

    def _from_network(self, path: Key, network: str) -> Iterator[Doubt]:
        if network not in self.topology.networks:
            meant = nearest(network, self.topology.networks)
            there = ", ".join(list(self.topology.networks)[:8]) or "none"
            hint = f"did you mean {quoted(NETWORK + meant)}?" if meant else f"networks: {there}"
            yield path, f"there is no network {quoted(network)}", hint, (("networks",),)
        elif not [n for n in on_network(self.topology, network) if n != self.expect.to]:
            message = f"no other guest or host is on {quoted(network)}"
            yield path, message, "name one that is there", _NODES

    def _unknown(self, word: str, more: Iterable[str]) -> tuple[str, str, tuple[Key, ...]]:
        message, known = f"there is no guest or host {quoted(word)}", [*self.known, *more]
        meant = nearest(word, known) if word else ""
        if word in self.topology.taps:
            return message, "what is behind a tap of [taps] is not known to netorch", ()
        names = ", ".join(list(self.known)[:8]) or "none"
        hint = f"did you mean {quoted(meant)}?" if meant else f"guests and hosts here: {names}"
        return message, hint, _NODES

    def _by(self) -> Iterator[Doubt]:
        if self.kind in ("tcp", "udp") and not 1 <= int(self.detail) <= 65535:
            hint = f'"{self.kind}:1" to "{self.kind}:65535"'
            yield self._doubt("by", f"{self.detail} is not a port", hint)
        if self.kind == "dns":
            yield from self._read("by", self.detail, self.detail)
        if self.kind == "dhcp":
            yield from self._dhcp()

    def _dhcp(self) -> Iterator[Doubt]:
        by: Key = (*self.path, "by")
        if not self.expect.reach:
            message = "that a node gets no lease can't be proved"
            yield self._doubt("reach", message, "leave it out", by)
        for node in sources(self.topology, self.expect):
            nics = nics_of(self.topology, node)
            if nics and not any(self._asks(nic) for nic in nics):
                message = f"{node} asks for no lease: its addresses are static"
                yield self._doubt("from", message, "name others", by, *_NODES, ("networks",))

    def _asks(self, nic: Nic | HostNic) -> bool:
        """May the NIC have a lease? A guest on a LAN of somebody else's may."""
        if isinstance(nic, HostNic):
            return nic.address in (None, "dhcp")
        if nic.network is None:
            return False
        network = self.topology.networks.get(nic.network, Network())
        return network.dhcp is not False or network.mode == "bridge"

    def _to(self) -> Iterator[Doubt]:
        to, by = self.expect.to, (*self.path, "by")
        if to is None:
            if self.kind in ("ping", "tcp", "udp"):
                hint = 'a guest or host, "gateway", an address or a DNS name'
                yield self._doubt("to", "is missing", hint, by)
        elif self.kind == "dhcp":
            hint = "leave it out; the lease and the address are looked at"
            yield self._doubt("to", 'by = "dhcp" has no far end', hint, by)
        elif to in self.known:
            if not nics_of(self.topology, to):
                yield self._doubt("to", f"{quoted(to)} has no NIC", "nobody can reach it")
            elif not any(nic.network for nic in nics_of(self.topology, to)):
                message = f"{quoted(to)} is on no network"
                hint = "what an address of its wires or back-ends is, only the guest knows"
                yield self._doubt("to", message, hint, *_NODES)
        elif to == GATEWAY:
            yield from self._gateway()
        elif re.fullmatch(r"[0-9./:]+", to):
            try:
                address(to)
            except Wrong as wrong:
                yield self._doubt("to", f"{quoted(to)} {wrong.message}", wrong.hint)
        elif "." not in to:
            yield (*self.path, "to"), *self._unknown(to, [GATEWAY])
        elif self.kind == "dns":
            hint = "the server to ask: a guest or host, gateway, or an address"
            yield self._doubt("to", f"{quoted(to)} is a DNS name", hint, by)
        else:
            yield from self._read("to", to, to)

    def _gateway(self) -> Iterator[Doubt]:
        for node in sources(self.topology, self.expect):
            nics = nics_of(self.topology, node)
            if nics and not any(self._has_gateway(nic) for nic in nics):
                yield self._doubt(
                    "to",
                    f"{node} has no gateway",
                    "its networks have no address of this machine's",
                    *_NODES,
                    ("networks",),
                )

    def _has_gateway(self, nic: Nic | HostNic) -> bool:
        if nic.network is None:
            return False
        network = self.topology.networks.get(nic.network, Network())
        own = isinstance(nic, HostNic) and isinstance(nic.gateway, str)
        return own or network.address is not None or network.mode != "bridge"

    def _seen_as(self) -> Iterator[Doubt]:
        expect, by = self.expect, (*self.path, "by")
        if expect.seen_as is None:
            return
        try:
            address(expect.seen_as)
        except Wrong as wrong:
            yield self._doubt("seen_as", f"{quoted(expect.seen_as)} {wrong.message}", wrong.hint)
        if not expect.reach:
            message = "nothing is seen of what does not arrive"
            hint = "leave it out where reach = false"
            yield self._doubt("seen_as", message, hint, (*self.path, "reach"))
        if self.kind in ("dns", "dhcp"):
            message = f'by = "{self.kind}" does not look at the source address'
            yield self._doubt("seen_as", message, "ping, tcp:PORT or udp:PORT do", by)
        elif expect.to is not None and expect.to not in self.here:
            message = f"nobody at {quoted(expect.to)} can say what is seen there"
            hint = "it must be a guest, a host, or this machine (gateway) to be asked"
            yield self._doubt("seen_as", message, hint, (*self.path, "to"), *_NODES)

    def _read(self, key: str, text: str, name: str) -> Iterator[Doubt]:
        try:
            domain(name)
        except Wrong as wrong:
            yield self._doubt(key, f"{quoted(text)} {wrong.message}", wrong.hint)
