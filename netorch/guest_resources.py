"""The resources of guests: a QEMU, its NICs and its disks. See `netorch.resources`."""

from collections.abc import Iterable
from typing import ClassVar, Literal, Self

import msgspec

from netorch.boot_resources import GuestBoot
from netorch.model import Forward
from netorch.resource import Resource, short

# The states of a QEMU that somebody may be at work in (qapi/run-state.json). In any other one the
# guest has ended or crashed, was never let run, or can't be asked.
_IN_USE = frozenset({"running", "paused", "suspended", "io-error", "debug", "postmigrate"})


class Overlay(Resource, frozen=True):
    """A qcow2 file that takes what a guest writes to one of its disks. All else is read from
    `image`, whose format is `format`.
    """

    guest: str
    disk: str
    image: str
    format: str

    @property
    def key(self) -> str:
        return f"overlay:{self.guest}:{self.disk}"

    def describe(self) -> str:
        return f"disk {self.disk} of {self.guest} over {self.image}"


class Volume(Resource, frozen=True):
    """A disk of a guest that was empty when it was made: a sparse qcow2 file. `size` is in bytes.

    It grows, also under a running guest; it never shrinks.
    """

    live: ClassVar[frozenset[str]] = frozenset({"size"})
    guest: str
    disk: str
    size: int

    @property
    def key(self) -> str:
        return f"volume:{self.guest}:{self.disk}"

    def refuses(self, new: Resource) -> str:
        if isinstance(new, Volume) and new.size < self.size:
            return (
                f"disk {self.disk} of guest {self.guest} has {spoken(self.size)} and can't shrink "
                f"to {spoken(new.size)}: leave its size, or give the smaller one another name"
            )
        return ""

    def describe(self) -> str:
        return f"disk {self.disk} of {self.guest}, {spoken(self.size)}"


class DiskLayer(msgspec.Struct, frozen=True):
    """A file or block device of the person's, and the format of what is in it."""

    file: str
    format: str

    def __str__(self) -> str:
        return f"{self.file} as {self.format}"


class GuestDisk(msgspec.Struct, frozen=True, kw_only=True):
    """A guest's disk: the device that it sees, and the data behind it.

    `use` says who takes the writes: an `overlay` or a `volume` (the lab's own file, a resource), or
    with `write` the first of `layers`; with `read` nobody. Each of `layers` lies over the next.
    `unit` is the place on a bus where places count (ide, sata); `bootindex` 0 is none. One that is
    `hot` can come and go while the guest runs; one that is not `attached` is half made.
    """

    name: str
    bus: str
    serial: str
    use: str
    layers: tuple[DiskLayer, ...] = ()
    cdrom: bool = False
    unit: int = 0
    bootindex: int = 0
    hot: bool = False
    attached: bool = True

    def describe(self) -> str:
        return f"disk {self.name} ({self.bus})"

    def changes(self, new: "GuestDisk") -> str:
        if not self.attached:
            return f"plug {new.describe()} again"
        if not new.attached:
            return f"disk {self.name} is half made"
        what = [
            f"{name} {short(getattr(self, name))} -> {short(getattr(new, name))}"
            for name in self.__struct_fields__
            if getattr(self, name) != getattr(new, name) and name != "hot"
        ]
        return f"disk {self.name} {', '.join(what)}" if what else ""


class GuestNic(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A guest's NIC: the device that it sees (`model`, `mac`), and what is behind it.

    `id` is what the tap's key is made of: the NIC's number, or the tap's name where the file gives
    one. `network` is the one that it was told it is on, and `served` whether that has DHCP; `link`
    is its cable. One that is not `attached` is half made, or has lost what was behind it.

    `backend` is
    - "tap": the tap `tap` with so many `queues`, or one that qemu-bridge-helper gives it on the
      bridge of somebody else's `bridge`
    - "user" or "passt": QEMU's own network stack, or a passt of its own, which plays the `subnet`
      and has the `forward`ed ports
    - "wire": end 0 or 1 of a `wire` to another guest's NIC
    """

    id: str
    mac: str
    model: str
    backend: str = "tap"
    tap: str = ""
    queues: int = 1
    bridge: str = ""
    network: str = ""
    served: bool = False
    link: Literal["up", "down"] = "up"
    subnet: str = ""
    forward: tuple[Forward, ...] = ()
    wire: str = ""
    end: int = 0
    attached: bool = True

    @property
    def hardware(self) -> tuple[object, ...]:
        """What makes it another device: to change that, it is unplugged and plugged."""
        behind = self.tap, self.queues, self.bridge, self.subnet, self.forward, self.wire, self.end
        return self.mac, self.model, self.backend, *behind, self.attached

    def describe(self) -> str:
        behind = self.network or self.bridge
        where = f"on {behind}" if behind else f"on wire {self.wire}" if self.wire else self.backend
        return f"NIC {self.tap or self.mac} {where}"

    def changes(self, new: "GuestNic") -> str:
        if not self.attached:
            return f"plug {new.describe()} again"
        if not new.attached:
            return f"NIC {self.tap or self.mac} has lost its {self.backend}"
        fields = [
            f"{name} {getattr(self, name)} -> {getattr(new, name)}"
            for name in self.__struct_fields__
            if getattr(self, name) != getattr(new, name)
        ]
        return f"NIC {self.tap or self.mac} {', '.join(fields)}"


class Passt(Resource, frozen=True):
    """The passt behind one NIC of a guest. It is a part of the guest, and no State has it; its
    process is marked with it.
    """

    guest: str
    mac: str

    @property
    def key(self) -> str:
        return f"passt:{self.guest}:{self.mac}"

    def describe(self) -> str:
        return f"passt of guest {self.guest}, NIC {self.mac}"


class Guest(Resource, frozen=True):
    """A running QEMU. `image` is `tiny`, `none`, or an absolute path, then also that of the first
    disk; `memory` is in MiB.

    `ports` is how many PCIe ports it has for NICs and disks that come and go; a machine `pc` needs
    none.
    `vnc` is `socket`, for one in the run directory, or a display number on loopback, "" for none;
    `video` is the display adapter, "" for none. `state` is QEMU's run state (its QMP command
    query-status); a lab wants "running".
    """

    live: ClassVar[frozenset[str]] = frozenset({"nics", "disks", "vnc", "state"})
    name: str
    image: str
    machine: str
    accel: str
    memory: int
    cpus: int
    nics: tuple[GuestNic, ...] = ()
    disks: tuple[GuestDisk, ...] = ()
    ports: int = 0
    vnc: str = ""
    video: str = ""
    boot: GuestBoot = GuestBoot()
    state: str = "running"

    @property
    def key(self) -> str:
        return f"guest:{self.name}"

    @property
    def needs(self) -> tuple[str, ...]:
        taps = (self.tap_key(nic) for nic in self.nics if nic.tap)
        disks = [key for key in map(self.file_key, self.disks) if key]
        disks += [f"seed:{self.name}"] if self.boot.seed else []
        disks += [f"variables:{self.name}"] if self.boot.uefi else []
        services = (f"dnsmasq:{network}" for network in self.networks)
        return ("record", "ruleset", *disks, *taps, *services)

    @property
    def networks(self) -> tuple[str, ...]:
        """Those whose services it waits for."""
        return tuple(dict.fromkeys(nic.network for nic in self.nics if nic.served))

    @property
    def is_in_use(self) -> bool:
        return self.state in _IN_USE

    def tap_key(self, nic: GuestNic) -> str:
        return f"tap:{self.name}:{nic.id}"

    def file_key(self, disk: GuestDisk) -> str:
        """The resource that takes a disk's writes; "": none does."""
        own = disk.use in ("overlay", "volume")
        return f"{disk.use}:{self.name}:{disk.name}" if own else ""

    def port_of(self, index: int) -> str:
        """The port of its NIC `index` at a start; "": it is on the root bus."""
        return f"port{index}" if index < self.ports else ""

    def disk_ports(self) -> dict[str, str]:
        """The ports at a start of what its disks have behind ports; see `behind_ports`."""
        if self.machine != "q35":
            return {}
        names = enumerate(behind_ports(self.disks), len(self.nics))
        return {name: f"port{number}" for number, name in names}

    def can_become(self, new: Resource) -> bool:
        if not super().can_become(new) or not isinstance(new, Guest):
            return False
        if self.state not in _IN_USE:
            return True  # it is started again, as new
        return self._can_plug(new) and self._can_plug_disks(new) and self._can_move_screen(new)

    def after_replace(self, needed: str) -> Self | None:
        if needed.startswith(("seed:", "variables:")):
            return None
        if needed.startswith(("overlay:", "volume:")):
            return self._without_file(needed)
        nics = tuple(
            msgspec.structs.replace(nic, attached=False) if self.tap_key(nic) == needed else nic
            for nic in self.nics
        )
        return msgspec.structs.replace(self, nics=nics)

    def describe(self) -> str:
        return f"guest {self.name} ({self.image}, {self.memory} MiB, {_count(self.cpus, 'cpu')})"

    def changes(self, new: Resource) -> list[str]:
        changes = super().changes(new)
        if not isinstance(new, Guest):
            return changes
        rest = [change for change in changes if not change.startswith(("nics ", "disks "))]
        return [*rest, *self._changes_of_nics(new), *self._changes_of_disks(new)]

    def _changes_of_nics(self, new: "Guest") -> list[str]:
        if self.nics == new.nics:
            return []
        old_nics, new_nics = ({nic.mac: nic for nic in guest.nics} for guest in (self, new))
        of_nics = [f"remove {nic.describe()}" for m, nic in old_nics.items() if m not in new_nics]
        for mac, nic in new_nics.items():
            if mac not in old_nics:
                of_nics.append(f"add {nic.describe()}")
            elif nic != old_nics[mac]:
                of_nics.append(old_nics[mac].changes(nic))
        return of_nics or ["the order of its NICs"]

    def _changes_of_disks(self, new: "Guest") -> list[str]:
        old_disks, new_disks = ({d.name: d for d in guest.disks} for guest in (self, new))
        gone = [d for name, d in old_disks.items() if name not in new_disks]
        lines = [f"remove {disk.describe()}" for disk in gone]
        for name, disk in new_disks.items():
            if name not in old_disks:
                lines.append(f"add {disk.describe()}")
            elif disk != old_disks[name] and (change := old_disks[name].changes(disk)):
                lines.append(change)
        same = old_disks == new_disks and self.disks != new.disks
        return ["the order of its disks"] if same else lines

    def _without_file(self, needed: str) -> Self | None:
        """What is left of it once a file behind one of its disks has gone: the disk, half made, if
        it could be unplugged.
        """
        disks = list(self.disks)
        for index, disk in enumerate(disks):
            if self.file_key(disk) == needed:
                if not disk.hot or not self.is_in_use:
                    return None
                disks[index] = msgspec.structs.replace(disk, attached=False)
        return msgspec.structs.replace(self, disks=tuple(disks))

    def _can_move_screen(self, new: "Guest") -> bool:
        """A display on a TCP port can get another port, or none; it is in the lab's network
        namespace, where a QEMU without one is not.
        """
        return self.vnc == new.vnc or (self.vnc.isdigit() and (new.vnc.isdigit() or not new.vnc))

    def _can_plug(self, new: "Guest") -> bool:
        """Whether its NICs can change while it runs.

        A q35 has no hot-plug on its root bus (QEMU, docs/pcie.txt), where NICs are that were too
        many for its ports at the start.
        """
        if {nic.hardware for nic in self.nics} == {nic.hardware for nic in new.nics}:
            return True
        if any(nic.backend == "user" and nic not in self.nics for nic in new.nics):
            return False  # QEMU may be in a network namespace that leads nowhere
        return self._has_ports_for(new)

    def _can_plug_disks(self, new: "Guest") -> bool:
        """Whether its disks can change while it runs: those that do are all hot."""
        both = set(self.disks) & set(new.disks)
        changed = (set(self.disks) | set(new.disks)) - both
        return not changed or (all(disk.hot for disk in changed) and self._has_ports_for(new))

    def _has_ports_for(self, new: "Guest") -> bool:
        if self.machine == "q35":
            return max(self._ports_taken(), new._ports_taken()) <= self.ports
        return self.machine == "pc"

    def _ports_taken(self) -> int:
        return len(self.nics) + len(behind_ports(self.disks))


def behind_ports(disks: Iterable[GuestDisk]) -> list[str]:
    """What has a PCIe port each, in a q35: disks that are hot and PCI devices, by their names'
    devices, and the controllers (`scsi`, `usb`) of hot disks. One that the image hangs on has none,
    since it never goes.
    """
    disks = list(disks)
    fixed = {disk.bus for disk in disks if not disk.hot}
    names = (
        f"disk-{disk.name}" if disk.bus in ("virtio", "nvme") else disk.bus
        for disk in disks
        if disk.hot and (disk.bus in ("virtio", "nvme") or disk.bus not in fixed)
    )
    return list(dict.fromkeys(names))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def spoken(size: int) -> str:
    """Bytes as the file has them: `10G`."""
    for unit, letter in ((1 << 40, "T"), (1 << 30, "G"), (1 << 20, "M")):
        if size >= unit and size % unit == 0:
            return f"{size // unit}{letter}"
    return f"{size} bytes"
