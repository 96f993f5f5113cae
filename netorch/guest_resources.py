"""The resources of guests: a QEMU, its NICs and its disks. See `netorch.resources`."""

from typing import ClassVar, Self

import msgspec

from netorch.boot_resources import GuestBoot
from netorch.resource import Resource


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


class GuestDisk(msgspec.Struct, frozen=True, kw_only=True):
    """A guest's disk: the device that it sees, and the data behind it.

    `use` says who takes the writes: an `overlay` or a `volume` (the lab's own file, a resource), or
    with `write` the first of `layers`; with `read` nobody. Each of `layers` lies over the next.
    `unit` is the place on a bus where places count (ide, sata); `bootindex` 0 is none.
    """

    name: str
    bus: str
    serial: str
    use: str
    layers: tuple[DiskLayer, ...] = ()
    cdrom: bool = False
    unit: int = 0
    bootindex: int = 0


class GuestNic(msgspec.Struct, frozen=True, kw_only=True):
    """A guest's NIC: the device that it sees (`model`, `mac`) and the tap behind it.

    `tap` is "" where qemu-bridge-helper gives it one, on the bridge of somebody else's `bridge`.
    """

    mac: str
    model: str
    tap: str
    queues: int = 1
    bridge: str = ""


class Guest(Resource, frozen=True):
    """A running QEMU. `image` is `tiny`, `none`, or an absolute path, then also that of the first
    disk; `memory` is in MiB.

    `vnc` is `socket`, for one in the run directory, or a display number on loopback, "" for none;
    `video` is the display adapter, "" for none. `networks` are those whose services it waits for.
    `state` is QEMU's run state (its QMP command query-status); a lab wants "running".
    """

    live: ClassVar[frozenset[str]] = frozenset({"state"})
    name: str
    image: str
    machine: str
    accel: str
    memory: int
    cpus: int
    nics: tuple[GuestNic, ...] = ()
    disks: tuple[GuestDisk, ...] = ()
    networks: tuple[str, ...] = ()
    vnc: str = ""
    video: str = ""
    boot: GuestBoot = GuestBoot()
    state: str = "running"

    @property
    def key(self) -> str:
        return f"guest:{self.name}"

    @property
    def needs(self) -> tuple[str, ...]:
        taps = (f"tap:{self.name}:{i}" for i, nic in enumerate(self.nics) if nic.tap)
        own = (disk for disk in self.disks if disk.use in ("overlay", "volume"))
        disks = [f"{disk.use}:{self.name}:{disk.name}" for disk in own]
        disks += [f"seed:{self.name}"] if self.boot.seed else []
        disks += [f"variables:{self.name}"] if self.boot.uefi else []
        services = (f"dnsmasq:{network}" for network in self.networks)
        return ("record", "ruleset", *disks, *taps, *services)

    def after_replace(self, needed: str) -> Self | None:
        lost = needed.startswith(("tap:", "overlay:", "volume:", "seed:", "variables:"))
        return None if lost else self

    def describe(self) -> str:
        return f"guest {self.name} ({self.image}, {self.memory} MiB, {_count(self.cpus, 'cpu')})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def spoken(size: int) -> str:
    """Bytes as the file has them: `10G`."""
    for unit, letter in ((1 << 40, "T"), (1 << 30, "G"), (1 << 20, "M")):
        if size >= unit and size % unit == 0:
            return f"{size // unit}{letter}"
    return f"{size} bytes"
