"""What the QEMUs of a lab's guests say of themselves: state, NICs, disks, display.

What QEMU's NICs were made from is asked of QEMU itself: each NIC has a spec, a QOM object of the
name `nic-<mac>.spec` that carries it as JSON (`netorch.nic_devices`). A NIC is there if its spec
and its device are, and if QEMU's descriptors are still queues of its tap: one that somebody has
deleted leaves a descriptor behind that leads nowhere, also when a tap of that name has been made
since. That shows in /proc/PID/fdinfo, where the kernel names the interface that a queue belongs to,
or none (drivers/net/tun.c, tun_chr_show_fdinfo). What is not whole is observed as not attached.
Disks have specs as well, and are whole with their device.

All guests are asked before the first answer is awaited, in two rounds.
"""

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from netorch import disk_devices
from netorch.disk_devices import PluggedDisk
from netorch.nic_devices import SPEC, Plugged, device_id, said
from netorch.resources import Guest, GuestNic
from netorch.system.back_ends import severed
from netorch.system.guest_processes import directory_of
from netorch.system.processes import Marked
from netorch.system.qmp import Qmp, QmpError
from netorch.system.scope import Scope

_VNC_PORT = 5900
_TUN = "/dev/net/tun"


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """One QEMU, as it was seen. `devices` are ids, `ports` those of its hot-plug ports."""

    state: str
    nics: tuple[Plugged, ...]
    disks: tuple[PluggedDisk, ...]
    devices: frozenset[str]
    ports: tuple[str, ...]
    vnc: str = ""


def reach(scope: Scope, guest: str) -> Qmp:
    """A QMP session whose negotiation has begun. Raises QmpError or FileNotFoundError."""
    return Qmp(directory_of(scope, guest) / "qmp.sock", guest)


def look_at_all(scope: Scope, processes: Iterable[Marked]) -> dict[str, Seen]:
    """What can be seen of each guest, by name; one that does not answer is not in it."""
    seen: dict[str, Seen] = {}
    with contextlib.ExitStack() as opened:
        sessions: dict[str, tuple[Qmp, Marked]] = {}
        for process in processes:
            assert isinstance(process.resource, Guest)
            name = process.resource.name
            with contextlib.suppress(QmpError, FileNotFoundError):
                sessions[name] = opened.enter_context(reach(scope, name)), process
        looks = {name: Look(*session) for name, session in sessions.items()}
        for step in (Look.ask, Look.ask_specs, Look.finish):
            for name, look in list(looks.items()):
                try:
                    step(look)
                except QmpError:
                    del looks[name]
        for name, look in looks.items():
            seen[name] = look.seen
    return seen


def look(qmp: Qmp, process: Marked) -> Seen:
    """What is seen of one guest in a session whose negotiation is done. Raises QmpError."""
    one = Look(qmp, process, negotiated=True)
    one.ask()
    one.ask_specs()
    one.finish()
    return one.seen


class Look:
    """A look at one guest: two rounds of questions, so that those to many can be in flight at once.
    `ask`, `ask_specs` and `finish` raise QmpError.
    """

    seen: Seen

    def __init__(self, qmp: Qmp, process: Marked, negotiated: bool = False) -> None:
        assert isinstance(process.resource, Guest)
        self._qmp = qmp
        self._pid = process.pid
        self._has_screen = bool(process.resource.vnc)
        self._negotiated = negotiated

    def ask(self) -> None:
        self._qmp.send("query-status")
        self._qmp.send("qom-list", {"path": "/objects"})
        self._qmp.send("qom-list", {"path": "/machine/peripheral"})
        if self._has_screen:
            self._qmp.send("query-vnc")

    def ask_specs(self) -> None:
        if not self._negotiated:
            self._qmp.ready()
        self._state = self._qmp.answer("query-status")["status"]
        objects, devices = (_names(self._qmp.answer("qom-list")) for _ in range(2))
        self._devices = frozenset(devices)
        self._vnc = _display(self._qmp.answer("query-vnc")) if self._has_screen else ""
        self._specs = [name for name in objects if name.endswith(SPEC)]
        for name in self._specs:
            self._qmp.send("qom-get", {"path": f"/objects/{name}", "property": "identity"})

    def finish(self) -> None:
        specs = {name: self._qmp.answer("qom-get") for name in self._specs}
        disk, nic = disk_devices.device_id(""), device_id("")
        plugged = [said(name, text) for name, text in specs.items() if name.startswith(nic)]
        disks = [
            self._whole(disk_devices.said(name, text))
            for name, text in specs.items()
            if name.startswith(disk)
        ]
        made = [p.nic for p in plugged if device_id(p.nic.mac) in self._devices]
        live = attached(made, queues_of(self._pid)) - severed(self._qmp, made)
        nics = [p if p.nic.mac in live else detached(p) for p in plugged]
        self.seen = Seen(
            state=self._state,
            nics=tuple(sorted(nics, key=lambda p: p.index)),
            disks=tuple(sorted(disks, key=lambda p: p.index)),
            devices=self._devices,
            ports=tuple(
                sorted(n for n in self._devices if n.startswith("port") and n[4:].isdigit())
            ),
            vnc=self._vnc,
        )

    def _whole(self, plugged: PluggedDisk) -> PluggedDisk:
        there = disk_devices.device_id(plugged.disk.name) in self._devices
        disk = msgspec.structs.replace(plugged.disk, attached=there)
        return msgspec.structs.replace(plugged, disk=disk)


def detached(plugged: Plugged) -> Plugged:
    nic = msgspec.structs.replace(plugged.nic, attached=False)
    return msgspec.structs.replace(plugged, nic=nic)


def attached(nics: Sequence[GuestNic], queues: Mapping[str, int]) -> set[str]:
    """The MACs of those NICs whose taps have all their queues in `queues`, and of those without.

    The taps of qemu-bridge-helper have names that nobody chose: if one of them is missing, none of
    their NICs is attached for sure.
    """
    named = {nic.tap for nic in nics}
    helped = sum(count for name, count in queues.items() if name not in named)
    wanted = sum(nic.queues for nic in nics if nic.backend == "tap" and not nic.tap)
    return {
        nic.mac
        for nic in nics
        if nic.backend != "tap"
        or (queues.get(nic.tap, 0) >= nic.queues if nic.tap else helped >= wanted)
    }


def queues_of(pid: int) -> Counter[str]:
    """How many open queues a process has, by tap."""
    found: Counter[str] = Counter()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ends meanwhile
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                if os.readlink(f"/proc/{pid}/fd/{fd}").endswith(_TUN):
                    found[_interface(f"/proc/{pid}/fdinfo/{fd}")] += 1
    del found[""]
    return found


def _interface(fdinfo: str) -> str:
    with open(fdinfo, encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("iff:"):
                return line[4:].strip()
    return ""


def _names(properties: Sequence[Mapping[str, Any]]) -> list[str]:
    return [prop["name"] for prop in properties if prop["type"].startswith("child<")]


def _display(info: Mapping[str, Any]) -> str:
    """As a Guest has it."""
    if not info["enabled"]:
        return ""
    return "socket" if info["family"] == "unix" else str(int(info["service"]) - _VNC_PORT)
