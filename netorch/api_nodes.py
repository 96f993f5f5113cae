"""The nodes of a lab in Python: hosts, guests, and the cables of their NICs. See netorch.api."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netorch import wire
from netorch.addresses import Macs
from netorch.commands import Completed, Process, Stream, checked, run
from netorch.errors import CommandError, NetorchError, UsageError

if TYPE_CHECKING:
    from netorch.api import Lab


class _Node:
    def __init__(self, lab: "Lab", name: str) -> None:
        self.lab = lab
        self.name = name

    @property
    def _nics(self) -> Sequence[Any]:
        raise NotImplementedError

    def index(self, nic: int, network: str | None) -> int:
        """The number of a NIC. Raises UsageError if there is none."""
        networks = [one.network or "no network" for one in self._nics]
        if network is not None and network in networks:
            return networks.index(network)
        if network is not None or not 0 <= nic < len(networks):
            raise UsageError(
                f"{self.name} has no NIC {nic if network is None else f'on {network}'}",
                f"it has: {', '.join(networks) or 'none'}",
            )
        return nic

    def address(self, network: str | None = None) -> str:
        """Its address on a network, by default on the first where it has one.

        Raises UsageError if it has none: no static address, and no lease.
        """
        if network is not None:
            self.index(0, network)
        macs = Macs(self.lab.topology)
        leased = {lease.mac: lease.address for lease in self.lab.leases()}
        for index, nic in enumerate(self._nics):
            if network in (None, nic.network):
                address = nic.address or ""
                if "/" in address:
                    return str(address.partition("/")[0])
                mac = macs.of_nic(self.name, index, nic.mac)
                if mac in leased:
                    return str(leased[mac])
        where = f" on {network}" if network else ""
        raise UsageError(f"{self.name} has no address{where}")


class Host(_Node):
    """A host of a running lab."""

    @property
    def _nics(self) -> Sequence[Any]:
        return self.lab.topology.hosts[self.name].nics

    def run(
        self,
        argv: Sequence[str],
        *,
        check: bool = True,
        input: str | bytes | None = None,
        timeout: float | None = None,
        text: bool = True,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Completed:
        """Run a command to its end; its exit status and what it wrote.

        Raises CommandError if it fails and `check` is set, or still runs after `timeout` seconds
        (then it is killed), and MissingError if there is no such program.
        """
        from subprocess import DEVNULL, PIPE

        stdin = DEVNULL if input is None else PIPE
        process = self.popen(
            argv, stdin=stdin, stdout=PIPE, stderr=PIPE, text=text, cwd=cwd, env=env
        )
        return run(process, self.name, check=check, input=input, timeout=timeout)

    def popen(
        self,
        argv: Sequence[str],
        *,
        stdin: Stream = None,
        stdout: Stream = None,
        stderr: Stream = None,
        text: bool = True,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Process:
        """Start a command; the streams are as subprocess.Popen's. It ends with the lab."""
        return Process(
            self.lab.connection,
            self.name,
            argv,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            text=text,
            cwd=cwd,
            env=env,
        )


class Guest(_Node):
    """A guest of a running lab."""

    @property
    def _nics(self) -> Sequence[Any]:
        return self.lab.topology.guests[self.name].nics

    def exec(
        self,
        argv: Sequence[str],
        *,
        check: bool = True,
        input: str | bytes | None = None,
        timeout: float | None = None,
        text: bool = True,
    ) -> Completed:
        """Run a command by the guest's agent; as Host.run."""
        from netorch.system.qmp import CUT, CUT_HINT, agent_exec

        data = input.encode() if isinstance(input, str) else input or b""
        done = agent_exec(self.lab.scope, self.name, argv, data, timeout)
        out, err = (t.decode(errors="replace") if text else t for t in (done.out, done.err))
        if done.code is None:
            raise CommandError(f"`{argv[0]}` was ended after {timeout} s", None, out, err)
        if done.cut:
            raise NetorchError(CUT, CUT_HINT)
        return checked(Completed(list(argv), done.code, out, err), self.name, check)

    def console_log(self) -> str:
        """What it has written to its serial console."""
        try:
            return (self._directory / "serial.log").read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def set_carrier(self, index: int, up: bool) -> None:
        """Have QEMU show a NIC with or without a cable."""
        from netorch.nic_devices import netdev_id
        from netorch.system.qmp import Qmp

        mac = Macs(self.lab.topology).of_nic(self.name, index, self._nics[index].mac)
        with Qmp(self._directory / "qmp.sock", self.name) as qmp:
            qmp.ready()
            qmp.ask("set_link", {"name": netdev_id(mac), "up": up})

    @property
    def _directory(self) -> Path:
        return self.lab.scope.run / "guests" / self.name


class Link:
    """The cable between a node's NIC and its network. Without it, the NIC has no carrier."""

    def __init__(self, node: Host | Guest, index: int) -> None:
        self._node = node
        self._index = index

    def down(self) -> None:
        """Pull the cable."""
        self._set(False)

    def up(self) -> None:
        """Put it back."""
        self._set(True)

    def _set(self, up: bool) -> None:
        node = self._node
        if isinstance(node, Guest):
            node.set_carrier(self._index, up)
        else:
            node.lab.connection.ask(wire.Wire(id=f"{node.name}:{self._index}", up=up))
