"""What a file says of a guest's disks -> the disks of the guest, and the lab's own files of them.

Pure, and a part of the compiler. The image is a disk like any other, the first one, called `image`;
the others are called as they stand in the file, `disk0`, `disk1`, ..., unless they have a name.
"""

from collections.abc import Iterator, Mapping

import msgspec

from netorch.disk_devices import IMAGE
from netorch.model import DISKLESS, Disk, Guest
from netorch.resources import DiskLayer, GuestDisk, Overlay, Resource, Volume, behind_ports
from netorch.topology_values import disk_bytes

# Disks on other buses can't come and go: QEMU plugs nothing into AHCI and IDE controllers.
_HOT_BUSES = frozenset({"virtio", "nvme", "scsi", "usb"})


def disk_name(index: int, disk: Disk) -> str:
    """What a disk is called within its guest."""
    return disk.name or f"disk{index}"


def files_of(guest: Guest) -> Iterator[str]:
    """The files at the top of the guest's disks, whose formats are read from their headers."""
    if guest.image not in DISKLESS:
        yield guest.image
    yield from (disk.file for disk in guest.disks if disk.file)


def disks_of(guest: Guest, formats: Mapping[str, str], before: int = 0) -> tuple[GuestDisk, ...]:
    """The guest's disks in its order; `formats` are those of files, by their headers, `before` the
    number of NICs that it boots from first.
    """
    made: list[GuestDisk] = []
    for name, disk in _all(guest):
        bus = _bus(guest, disk)
        unit = sum(other.bus == bus for other in made)
        made.append(
            GuestDisk(
                name=name,
                bus=bus,
                serial=disk.serial or name,
                use=_use(disk),
                layers=tuple(_layers(disk, formats)),
                cdrom=disk.cdrom,
                unit=unit if bus in ("ide", "sata") else 0,
                bootindex=1 + before if name == IMAGE else 0,
            )
        )
    return tuple(made)


def hot_disks(
    disks: tuple[GuestDisk, ...], guest: Guest, ports: int | None
) -> tuple[GuestDisk, ...]:
    """The disks, with those marked `hot` that can come and go: if there are `ports` for all of them
    and for the NICs; None: they need none.
    """
    marked = tuple(
        msgspec.structs.replace(disk, hot=disk.bus in _HOT_BUSES and disk.name != IMAGE)
        for disk in disks
    )
    if ports is not None and len(guest.nics) + len(behind_ports(marked)) > ports:
        return disks
    return marked


def storage_of(name: str, guest: Guest, disks: tuple[GuestDisk, ...]) -> Iterator[Resource]:
    """The lab's own files behind the disks of the guest `name`."""
    sizes = {disk_name(index, disk): disk.size for index, disk in enumerate(guest.disks)}
    for disk in disks:
        if disk.use == "volume":
            size = sizes[disk.name]
            assert size is not None, "netorch.topology_disks asks for a file or a size"
            yield Volume(guest=name, disk=disk.name, size=disk_bytes(size))
        elif disk.use == "overlay":
            base = disk.layers[0]
            yield Overlay(guest=name, disk=disk.name, image=base.file, format=base.format)


def _all(guest: Guest) -> Iterator[tuple[str, Disk]]:
    if guest.image not in DISKLESS:
        yield (
            IMAGE,
            Disk(
                file=guest.image,
                format=guest.format,
                backing=guest.backing,
                bus=guest.bus,
                persistent=guest.persistent,
            ),
        )
    for index, disk in enumerate(guest.disks):
        yield disk_name(index, disk), disk


def _bus(guest: Guest, disk: Disk) -> str:
    # What q35 calls IDE is a SATA controller.
    return "sata" if disk.bus == "ide" and guest.machine == "q35" else disk.bus


def _use(disk: Disk) -> str:
    if disk.file is None:
        return "volume"
    if disk.readonly or disk.cdrom:
        return "read"
    return "write" if disk.persistent else "overlay"


def _layers(disk: Disk, formats: Mapping[str, str]) -> Iterator[DiskLayer]:
    if disk.file is not None:
        chosen = formats.get(disk.file, disk.format) if disk.format == "auto" else disk.format
        yield DiskLayer(disk.file, chosen)
    yield from (DiskLayer(layer.file, layer.format) for layer in disk.backing)
