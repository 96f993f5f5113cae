"""Changing the disks of a guest that runs: the part of netorch.system.guest_changes for disks.

Plugging: the spec, the files' descriptors (add-fd), the controller if there is none yet, the nodes
from the deepest layer up, the device. For taking away see netorch.system.disk_removal. A disk that
differs in anything is unplugged and plugged; a SCSI controller goes with the last disk on it.
"""

import contextlib
import itertools

import msgspec

from netorch.disk_devices import (
    CONTROLLERS,
    IMAGE,
    PluggedDisk,
    blockdevs,
    controllers,
    device,
    device_id,
    spec,
)
from netorch.nic_devices import SPEC
from netorch.resources import Guest, GuestDisk
from netorch.system.disk_removal import descriptor_sets, finish, leave
from netorch.system.disks import open_disk
from netorch.system.guest_devices import Seen
from netorch.system.hotplug import FreePorts, ask_to_let_go, await_gone, port_of
from netorch.system.qmp import Qmp
from netorch.system.scope import Scope

# Of the controllers. Linux 6.1 did not let go of a qemu-xhci (QEMU 7.2) within 15 s; it stays.
_REMOVABLE = frozenset({"scsi"})


class DiskChanges:
    """What has to be done to the disks of a running guest that is to become `wanted`."""

    def __init__(self, scope: Scope, qmp: Qmp, wanted: Guest, seen: Seen) -> None:
        self._scope = scope
        self._qmp = qmp
        self._guest = wanted.name
        self._devices = seen.devices
        have = {plugged.disk.name: plugged for plugged in seen.disks}
        self._kept: list[tuple[int, PluggedDisk]] = []
        self._fresh: list[tuple[int, GuestDisk]] = []
        for index, disk in enumerate(wanted.disks):
            if disk.name == IMAGE:
                continue
            if disk.name in have and have[disk.name].disk == disk:
                self._kept.append((index, have.pop(disk.name)))
            else:
                self._fresh.append((index, disk))
        self._gone = list(have.values())
        self._leaving: list[str] = []
        present = [bus for bus in CONTROLLERS if bus in seen.devices]
        needed = {disk.bus for disk in wanted.disks}
        self._idle = [bus for bus in present if bus in _REMOVABLE and bus not in needed]
        self._controllers = set(present) - set(self._idle)

    def ask_to_let_go(self) -> None:
        self._leaving = leave(self._qmp, self._gone, self._devices)

    def unplug(self) -> None:
        finish(self._qmp, self._gone, self._leaving, self._guest)
        for bus in ask_to_let_go(self._qmp, self._idle):
            await_gone(self._qmp, bus, f"the {bus} controller", self._guest)

    def ports(self) -> set[str]:
        """Those that what stays is in."""
        of_controllers = {port_of(self._qmp, bus) for bus in self._controllers}
        return of_controllers | {plugged.port for _, plugged in self._kept}

    def plug(self, free: FreePorts) -> None:
        for index, disk in self._fresh:
            self._add_controller(disk, free)
            port = free.take(disk.describe()) if disk.bus in ("virtio", "nvme") else ""
            self._plug(disk, index, port)

    def settle(self) -> None:
        """Say of the disks that stay where they stand now."""
        for index, old in self._kept:
            if index != old.index:
                text = spec(msgspec.structs.replace(old, index=index))["identity"]
                path = f"/objects/{device_id(old.disk.name)}{SPEC}"
                self._qmp.ask("qom-set", {"path": path, "property": "identity", "value": text})

    def _add_controller(self, disk: GuestDisk, free: FreePorts) -> None:
        if disk.bus in self._controllers or disk.bus not in CONTROLLERS:
            return
        port = free.take(f"a {disk.bus} controller")
        for controller in controllers([disk], {disk.bus: port}):
            self._qmp.ask("device_add", controller)
        self._controllers.add(disk.bus)

    def _plug(self, disk: GuestDisk, index: int, port: str) -> None:
        used = descriptor_sets(self._qmp)
        numbers = itertools.filterfalse(used.__contains__, itertools.count(1))
        with contextlib.ExitStack() as opened:
            sources = open_disk(self._scope, self._guest, disk, numbers, opened)
            sets = tuple(source.set for source in sources)
            plugged = PluggedDisk(disk=disk, index=index, port=port, sets=sets)
            self._qmp.ask("object-add", spec(plugged))
            for source in sources:
                self._qmp.ask("add-fd", {"fdset-id": source.set}, [source.fd])
            for node in blockdevs(disk, sources):
                self._qmp.ask("blockdev-add", node)
        self._qmp.ask("device_add", device(disk, port))
