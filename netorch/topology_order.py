"""What types can't say about the order of guests: `after`, and what `ready` can be seen by."""

import re
from collections.abc import Iterator

from netorch.errors import Finding, Key, quoted
from netorch.model import Guest, Topology
from netorch.topology_values import nearest


def order(topology: Topology) -> Iterator[Finding]:
    """Mistakes in `after` and `ready` of guests."""
    for name, guest in topology.guests.items():
        path: Key = ("guests", name)
        for index, other in enumerate(guest.after):
            where = (*path, "after", index)
            if other not in topology.guests:
                hint = nearest(other, topology.guests) or "it names guests of this file"
                yield where, f"there is no guest {quoted(other)}", hint
            elif other == name:
                yield where, f"{quoted(name)} can't come after itself", "take it out"
        yield from _ready(topology, (*path, "ready"), guest)
    for cycle in _cycles(topology):
        where = ("guests", cycle[0], "after")
        said = " after ".join([*cycle, cycle[0]])
        yield where, f"these guests wait for each other: {said}", "one of them has to be the first"


def _ready(topology: Topology, path: Key, guest: Guest) -> Iterator[Finding]:
    kind, _, argument = guest.ready.partition(":")
    if kind == "console":
        try:
            re.compile(argument)
        except re.error as error:
            yield path, f"{quoted(argument)} is not a regular expression: {error}", "Python's re"
    if kind == "tcp":
        if not 1 <= int(argument) <= 65535:
            yield path, f"{argument} is not a port", "1 to 65535"
        known = topology.networks
        networks = [known[nic.network] for nic in guest.nics if nic.network in known]
        if not any(network.mode != "bridge" or network.address for network in networks):
            hint = "a NIC on a network that has an address"
            yield path, "this machine can't reach a port of the guest", hint


def _cycles(topology: Topology) -> Iterator[tuple[str, ...]]:
    """Rings of guests that come after each other; each once."""
    done: set[str] = set()
    for start in topology.guests:
        trail: list[str] = []
        stack = [iter([start])]
        while stack:
            name = next(stack[-1], None)
            if name is None:
                stack.pop()
                if trail:
                    done.add(trail.pop())
            elif name in trail:
                if len(ring := trail[trail.index(name) :]) > 1:
                    yield tuple(ring)
            elif name in topology.guests and name not in done:
                trail.append(name)
                stack.append(iter(topology.guests[name].after))
