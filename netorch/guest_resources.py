"""The resources of guests: a QEMU, its NICs and its disks. See `netorch.resources`."""

from typing import ClassVar, Self

import msgspec

from netorch.model import Forward
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


class GuestNic(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A guest's NIC: the device that it sees (`model`, `mac`), and what is behind it.

    `backend` is
    - "tap": the tap `tap` with so many `queues`, or one that qemu-bridge-helper gives it on the
      bridge of somebody else's `bridge`
    - "user" or "passt": QEMU's own network stack, or a passt of its own, which plays the `subnet`
      and has the `forward`ed ports
    - "wire": end 0 or 1 of a `wire` to another guest's NIC
    - "none": what was behind it has ended; only ever observed
    """

    mac: str
    model: str
    backend: str = "tap"
    tap: str = ""
    queues: int = 1
    bridge: str = ""
    subnet: str = ""
    forward: tuple[Forward, ...] = ()
    wire: str = ""
    end: int = 0

    def __str__(self) -> str:
        behind = self.tap or self.bridge or self.wire or self.subnet
        return f"{self.model} {self.mac} {self.backend} {behind}".strip()


class Passt(Resource, frozen=True):
    """The passt behind one NIC of a guest. It is a part of the guest, and no State has it; its
    process is marked with it.
    """

    guest: str
    index: int

    @property
    def key(self) -> str:
        return f"passt:{self.guest}:{self.index}"

    def describe(self) -> str:
        return f"passt of guest {self.guest}, NIC {self.index}"


class Guest(Resource, frozen=True):
    """A running QEMU. `image` is `tiny` or an absolute path; `memory` is in MiB.

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
    state: str = "running"

    @property
    def key(self) -> str:
        return f"guest:{self.name}"

    @property
    def needs(self) -> tuple[str, ...]:
        taps = (f"tap:{self.name}:{i}" for i, nic in enumerate(self.nics) if nic.tap)
        disk = () if self.image == "tiny" else (f"overlay:{self.name}",)
        services = (f"dnsmasq:{network}" for network in self.networks)
        return ("record", "ruleset", *disk, *taps, *services)

    def after_replace(self, needed: str) -> Self | None:
        return None if needed.startswith(("tap:", "overlay:")) else self

    def describe(self) -> str:
        return f"guest {self.name} ({self.image}, {self.memory} MiB, {_count(self.cpus, 'cpu')})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
