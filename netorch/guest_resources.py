"""The resources of guests: a QEMU, its NICs and its disks. See `netorch.resources`."""

from typing import ClassVar, Self

import msgspec

from netorch.boot_resources import GuestBoot
from netorch.model import DISKLESS
from netorch.resource import Resource


class Overlay(Resource, frozen=True):
    """The disk of a guest with an image: a qcow2 file over it. `format` is the image's."""

    guest: str
    image: str
    format: str

    @property
    def key(self) -> str:
        return f"overlay:{self.guest}"

    def describe(self) -> str:
        return f"disk of {self.guest} over {self.image}"


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
    """A running QEMU. `image` is `tiny`, `none`, or an absolute path; `memory` is in MiB.

    `vnc` is a display number on loopback, -1 for none. `networks` are those whose services it waits
    for. `state` is QEMU's run state (its QMP command query-status); a lab wants "running".
    """

    live: ClassVar[frozenset[str]] = frozenset({"state"})
    name: str
    image: str
    format: str
    machine: str
    accel: str
    memory: int
    cpus: int
    nics: tuple[GuestNic, ...] = ()
    networks: tuple[str, ...] = ()
    vnc: int = -1
    boot: GuestBoot = GuestBoot()
    state: str = "running"

    @property
    def key(self) -> str:
        return f"guest:{self.name}"

    @property
    def needs(self) -> tuple[str, ...]:
        taps = (f"tap:{self.name}:{i}" for i, nic in enumerate(self.nics) if nic.tap)
        disk = [] if self.image in DISKLESS else [f"overlay:{self.name}"]
        disk += [f"seed:{self.name}"] if self.boot.seed else []
        disk += [f"variables:{self.name}"] if self.boot.uefi else []
        services = (f"dnsmasq:{network}" for network in self.networks)
        return ("record", "ruleset", *disk, *taps, *services)

    def after_replace(self, needed: str) -> Self | None:
        lost = needed.startswith(("tap:", "overlay:", "seed:", "variables:"))
        return None if lost else self

    def describe(self) -> str:
        return f"guest {self.name} ({self.image}, {self.memory} MiB, {_count(self.cpus, 'cpu')})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
