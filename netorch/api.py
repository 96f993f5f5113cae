"""netorch in Python: labs as context managers.

    with netorch.Lab("topology.toml") as lab:
        lab.host("client").run(["ping", "-c", "1", lab.ip("server")])

The calling process stays where it is: an agent (netorch.agents) is in the lab on its behalf, and
takes the lab down when the block is left, or the process dies. Labs are private, so any number of
them can be up at once with the same addresses. They have no way out unless `uplink` is given.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import msgspec

from netorch import starter, wire
from netorch.api_nodes import Guest as Guest
from netorch.api_nodes import Host as Host
from netorch.api_nodes import Link as Link
from netorch.capture import Capture
from netorch.errors import ApplyError, ConflictError, NetorchError, UsageError
from netorch.model import Topology
from netorch.names import bridge_name, tap_name
from netorch.system.scope import Scope, disks_base
from netorch.topology import checked as checked_topology
from netorch.topology import load, parse

# msgspec (0.22) looks a class over when it is first used, and crashes if two threads do that at
# once: so it is done here, under the import lock.
msgspec.convert({}, Topology)

Text = str | os.PathLike[str] | Topology


class Row(NamedTuple):
    """A resource of the lab. `state` is ok, missing, changed or stray."""

    state: str
    key: str
    description: str


class Lab:
    """A lab: `topology` is a path (or a string that ends in .toml), TOML text, or a Topology."""

    def __init__(
        self,
        topology: Text,
        *,
        name: str | None = None,
        private: bool = True,
        keep: bool = False,
        uplink: wire.Uplink | None = None,
        base: str | os.PathLike[str] = ".",
    ) -> None:
        """Raises TopologyError; the machine is not touched before `start`, or the block.

        `name` is by default the topology's and six random digits. `private`: in namespaces of its
        own, else in this network namespace, which takes CAP_NET_ADMIN. `keep`: the lab stays, and
        `netorch teardown` ends it. `uplink` is as in the file. `base` is where paths begin.
        """
        self._base = Path(base)
        self.topology, self.source = _read(topology, self._base)
        self.name = name or f"{self.topology.name[:56]}-{os.urandom(3).hex()}"
        self._options = {"named": name is not None, "private": private, "keep": keep}
        written = self.topology.lab.uplink
        self._uplink: wire.Uplink = uplink or ("none" if written == "auto" else written)
        self._connection: starter.Connection | None = None
        self._scope: Scope | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        """Bring the lab up; returns when its guests and hosts have their addresses."""
        if self._connection is not None:
            raise UsageError(f"lab {self.name} is up already")
        request = wire.Start(
            lab=self.name,
            topology=self.topology,
            source=self.source,
            uplink=self._uplink,
            environ=dict(os.environ),
            cwd=os.getcwd(),
            **self._options,
        )
        self._connection, made = starter.start(request)
        self._scope = Scope(
            lab=self.name,
            place=made["place"]["inode"],
            private=made["place"]["private"],
            run=Path(made["run"]),
            disks=disks_base() / self.name,
        )

    def close(self) -> None:
        """Take the lab down, unless it is to be kept. Does nothing where it is not up."""
        connection, self._connection = self._connection, None
        if connection is not None and connection.is_here:
            connection.end()

    @property
    def is_up(self) -> bool:
        return self._connection is not None

    @property
    def scope(self) -> Scope:
        """Where the lab's files are, and what its objects are marked with."""
        if self._scope is None or self._connection is None:
            raise UsageError(f"lab {self.name} is not up")
        return self._scope

    @property
    def connection(self) -> starter.Connection:
        if self._connection is None:
            raise UsageError(f"lab {self.name} is not up")
        return self._connection

    def host(self, name: str) -> "Host":
        """Raises UsageError if the topology has no such host."""
        _known(self, "host", name, self.topology.hosts)
        return Host(self, name)

    def guest(self, name: str) -> "Guest":
        """Raises UsageError if the topology has no such guest."""
        _known(self, "guest", name, self.topology.guests)
        return Guest(self, name)

    def node(self, name: str) -> "Host | Guest":
        """The host or the guest."""
        both = [*self.topology.hosts, *self.topology.guests]
        _known(self, "host or guest", name, both)
        return self.host(name) if name in self.topology.hosts else self.guest(name)

    def ip(self, node: str, network: str | None = None) -> str:
        """The address of a node, as `Host.address`."""
        return self.node(node).address(network)

    def link(self, node: str, nic: int = 0, *, network: str | None = None) -> "Link":
        """The cable of a node's NIC, by its number or the network that it leads to."""
        return Link(self.node(node), self.node(node).index(nic, network))

    def capture(
        self, where: str, nic: int = 0, *, path: str | os.PathLike[str] | None = None
    ) -> Capture:
        """Capture on a network's bridge, or on a NIC of a host or guest: `with` begins it."""
        return Capture(self.connection, *self._interface(where, nic), path)

    def apply(self, topology: Text, *, restart: bool = False) -> list[str]:
        """Change the running lab to match; what was done, a line each.

        Raises ConflictError before the first change if a guest has to restart and may not.
        """
        wanted, source = _read(topology, self._base)
        request = wire.Apply(topology=wanted, source=source, restart=restart)
        previous = self.topology, self.source
        self.topology, self.source = wanted, source
        try:
            done, _ = self.connection.ask(request)
        except (ApplyError, ConflictError):
            self.topology, self.source = previous
            raise
        return list(done)

    def status(self) -> list[Row]:
        """The lab's resources, compared with the topology."""
        rows, _ = self.connection.ask(wire.Status())
        return [Row(*row) for row in rows]

    def leases(self) -> list[Any]:
        """The leases (network, name, address, mac, expires) that its DHCP servers have given."""
        from netorch.system import leases

        return list(leases.read(self.scope))

    def sections(self) -> list[tuple[str, str]]:
        """The lab as it is now, for people: (title, text) for nodes, leases, rules."""
        return [(title, text) for title, text in self.connection.ask(wire.Picture())[0]]

    def recorder(self, network: str) -> Capture:
        """As capture, for the first 512 frames on a network, which nobody reads until asked to."""
        return Capture(self.connection, *self._interface(network, 0), watched=False)

    def _interface(self, where: str, nic: int) -> tuple[str, str]:
        """The host ("" for the lab's place) and the name of an interface."""
        topology = self.topology
        if where in topology.networks:
            if where in topology.hosts or where in topology.guests:
                raise UsageError(f"{where} is both a network and a node", "rename one of them")
            return "", bridge_name(where, topology.networks[where])
        node = self.node(where)
        index = node.index(nic, None)
        if isinstance(node, Host):
            return where, f"eth{index}"
        end = topology.guests[where].nics[index]
        if end.network is None:
            raise UsageError(f"NIC {index} of {where} has no tap: it is on no network")
        return "", tap_name(where, index, end)


def _read(topology: Text, base: Path) -> tuple[Topology, str]:
    """The topology, checked, and what it is called."""
    if isinstance(topology, Topology):
        if topology.lab.name is None:
            lab = msgspec.structs.replace(topology.lab, name="lab")
            topology = msgspec.structs.replace(topology, lab=lab)
        return checked_topology(topology, "the topology", base), "Python"
    if isinstance(topology, os.PathLike) or topology.endswith(".toml"):
        path = base / topology
        return load(path), str(path.absolute())
    if not isinstance(topology, str):
        raise NetorchError(f"a topology can't be a {type(topology).__name__}")
    return parse(topology, "lab", base), "TOML text"


def _known(lab: Lab, kind: str, name: str, names: Sequence[str] | Mapping[str, Any]) -> None:
    if name not in names:
        raise UsageError(
            f"lab {lab.name} has no {kind} {name!r}", f"it has: {', '.join(names) or 'none'}"
        )
