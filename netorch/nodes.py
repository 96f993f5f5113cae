"""Nodes: running a command in a host or a guest, and a guest's console."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from netorch.errors import MissingError, NetorchError, UsageError
from netorch.labs import Lab, find_all, status
from netorch.resources import Bridge, Veth
from netorch.state import State
from netorch.system import rundir
from netorch.system.places import enter

if TYPE_CHECKING:
    from netorch.system.explain import Hop

# The agent's parser takes 64 MiB of JSON (QEMU, qobject/json-streamer.c), but the message waits in
# memory on both sides, and a guest under TCG takes 3 MB a second.
_MAX_INPUT = 16 << 20


class TimedOut(NetorchError):
    """A command took longer than it was given."""


class Node(msgspec.Struct, frozen=True):
    """A guest or a host of a running lab."""

    lab: Lab
    name: str
    is_guest: bool


def find(lab: str | None, name: str) -> Node:
    """The node called `name`, in `lab` or in the only lab that has one. Raises UsageError."""
    found: list[Node] = []
    known: list[str] = []
    for there in find_all(lab):
        record = rundir.recorded(there.run)
        if record is None:
            continue
        topology = rundir.topology_of(record)
        known += [*topology.guests, *topology.hosts]
        if name in topology.guests or name in topology.hosts:
            found.append(Node(there, name, name in topology.guests))
    if not found:
        raise UsageError(
            f"no guest or host {name!r} is running here", f"running: {', '.join(known) or 'none'}"
        )
    if len(found) > 1:
        labs = ", ".join(node.lab.name for node in found)
        raise UsageError(f"more than one lab has {name!r}", f"say which with --lab: {labs}")
    return found[0]


def run(node: Node, command: Sequence[str], seconds: float | None = None) -> int:
    """Run a command in the node with this process's input and output; returns its exit status, 124
    if it was ended after so many seconds.

    In a host the command takes the place of this process. In a guest it runs through the guest
    agent, which hands over all output at the end.
    """
    if node.lab.place.private:
        enter(node.lab.place)
    if node.is_guest:
        return _in_guest(node, command, seconds)
    return _in_host(node, command if seconds is None else ("timeout", str(seconds), *command))


def console(node: Node) -> int:
    """Connect the terminal with the guest's serial port; returns 0 once the person leaves."""
    from netorch.system.console import console as open_console

    if not node.is_guest:
        raise UsageError(
            f"{node.name} is a host and has no console", f"netorch exec {node.name} -- sh"
        )
    if node.lab.place.private:
        enter(node.lab.place)
    directory = node.lab.run / "guests" / node.name
    return open_console(directory / "serial.sock", log=directory / "serial.log")


def why(node: Node, target: str) -> "list[Hop]":
    """The hops from a node to another one, "gateway" or an IPv4 address; see
    `netorch.system.explain`.
    """
    from netorch.system.explain import explain

    standing = status(node.lab)  # moves into the lab's place
    assert standing.desired is not None, "find() read the record"
    return explain(node.lab.scope, standing.desired, node.name, target)


def _in_guest(node: Node, command: Sequence[str], seconds: float | None) -> int:
    from netorch.system.qmp import CUT, CUT_HINT, QmpError, agent_exec

    data = b"" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer.read(_MAX_INPUT + 1)
    if len(data) > _MAX_INPUT:
        raise UsageError(
            f"the guest agent takes {_MAX_INPUT >> 20} MiB of input for a command at most",
            f"netorch copy FILE {node.name}:/path, and let the command read that",
        )
    try:
        done = agent_exec(node.lab.scope, node.name, command, data, seconds)
    except QmpError as error:
        if "No such file or directory" in error.message:
            raise MissingError(f"{command[0]}: not found in guest {node.name}") from error
        raise
    sys.stdout.buffer.write(done.out)
    sys.stdout.flush()
    sys.stderr.buffer.write(done.err)
    if done.cut:
        raise NetorchError(CUT, CUT_HINT)
    if done.code is None:
        raise TimedOut(f"{command[0]} in guest {node.name} was ended after {seconds:g} s")
    return done.code


def _in_host(node: Node, command: Sequence[str]) -> int:
    from netorch.system.hosts import exec_in_host

    servers, domain = name_service(node.lab, node.name)
    exec_in_host(node.lab.scope, node.name, command, servers, domain)


def name_service(lab: Lab, host: str) -> tuple[list[str], str]:
    """The name servers that a host should ask, those of its networks, and the first domain of
    these.
    """
    from netorch.system.links import Links

    state = State(Links(lab.scope).observe())
    record = rundir.recorded(lab.run)
    networks = rundir.topology_of(record).networks if record else {}
    servers: list[str] = []
    domain = ""
    for veth in state.of(Veth):
        network = networks.get(veth.network)
        bridge = state.get(f"bridge:{veth.network}")
        if (
            veth.host != host
            or network is None
            or not network.dns
            or not isinstance(bridge, Bridge)
        ):
            continue
        servers += [address.partition("/")[0] for address in bridge.addresses]
        domain = domain or network.domain or ""
    return servers, domain
