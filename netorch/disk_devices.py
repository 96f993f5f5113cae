"""QEMU's two halves of a guest's disk, as the objects that QEMU takes: pure rendering.

`blockdevs` are the back-end's nodes, each before what names it, `controllers` what disks hang on,
and `device` is the front-end. The command line (-blockdev, -device) and QMP (blockdev-add,
device_add) take the same objects, so a disk that is added to a running guest is the one that a
start would have made. Node and device have the id `disk-<name>`. All disks but the image also have
a `spec`, an object without any effect that carries the GuestDisk as JSON, so that QEMU itself can
be asked what its disks were made from.

QEMU opens no file by its path, only descriptors that netorch has opened: sets of one descriptor
each (-add-fd, add-fd), which the nodes name. Formats are always given and never probed, and a node
has the backing file that netorch says and not the one in the image's header: a guest may write any
header into raw data, and with it the name of any file.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

import msgspec

from netorch.nic_devices import SPEC, carrier
from netorch.resources import GuestDisk

IMAGE = "image"  # the disk that a guest boots from; it can't come and go

_NO_PORTS: Mapping[str, str] = MappingProxyType({})

# The front-ends by bus, those of hard disks and of CD-ROM drives.
FRONT_ENDS: dict[str, dict[str, object]] = {
    "virtio": {"driver": "virtio-blk-pci"},
    "scsi": {"driver": "scsi-hd", "bus": "scsi.0"},
    "sata": {"driver": "ide-hd"},
    "ide": {"driver": "ide-hd"},
    "nvme": {"driver": "nvme"},
    "usb": {"driver": "usb-storage", "bus": "usb.0"},
}
CDROMS: dict[str, dict[str, object]] = {
    "scsi": {"driver": "scsi-cd", "bus": "scsi.0"},
    "sata": {"driver": "ide-cd"},
    "ide": {"driver": "ide-cd"},
}
CONTROLLERS: dict[str, dict[str, object]] = {
    "scsi": {"driver": "virtio-scsi-pci", "id": "scsi"},
    "sata": {"driver": "ahci", "id": "sata"},
    "usb": {"driver": "qemu-xhci", "id": "usb", "p2": 15, "p3": 15},
}


class Source(msgspec.Struct, frozen=True):
    """An opened file or block device: the descriptor `fd`, which QEMU gets as the set `set`."""

    fd: int
    set: int
    block_device: bool = False


class PluggedDisk(msgspec.Struct, frozen=True, kw_only=True):
    """What a spec carries: a disk, its place among the guest's disks, its port ("": none), and the
    sets of its descriptors.
    """

    disk: GuestDisk
    index: int
    port: str = ""
    sets: tuple[int, ...] = ()


def device_id(name: str) -> str:
    return f"disk-{name}"


def spec(plugged: PluggedDisk) -> dict[str, object]:
    """The object that says what the disk was made from; see `said`."""
    return carrier(device_id(plugged.disk.name), plugged)


def said(name: str, identity: str) -> PluggedDisk:
    """What the spec of this name carries; a disk that nobody asked for if that can't be read, since
    another version of netorch wrote it.
    """
    try:
        return msgspec.json.decode(identity, type=PluggedDisk)
    except msgspec.DecodeError:
        named = name.removesuffix(SPEC).removeprefix(device_id(""))
        disk = GuestDisk(name=named, bus="", serial="", use="", hot=True, attached=False)
        return PluggedDisk(disk=disk, index=0)


def nodes(disk: GuestDisk) -> list[str]:
    """The names of its nodes, the top one first."""
    count = len(disk.layers) + (disk.use in ("overlay", "volume"))
    return [device_id(disk.name) + (f"-{index}" if index else "") for index in range(count)]


def writes(disk: GuestDisk, layer: int) -> bool:
    """Is this one of the disk's files (counted from the lab's own, if it has one) written to?"""
    return layer == 0 and disk.use != "read"


def blockdevs(disk: GuestDisk, sources: Sequence[Source]) -> list[dict[str, object]]:
    """The nodes of the disk, the deepest layer first. `sources` are its files, the top one first:
    the lab's own, if there is one, then its `layers`.
    """
    formats = [layer.format for layer in disk.layers]
    if disk.use in ("overlay", "volume"):
        formats.insert(0, "qcow2")
    made: list[dict[str, object]] = []
    below: str | None = None
    for index, name in reversed(list(enumerate(nodes(disk)))):
        made.append(_node(name, formats[index], sources[index], writes(disk, index), below))
        below = name
    return made


def _node(
    name: str, format: str, source: Source, written: bool, below: str | None
) -> dict[str, object]:
    file: dict[str, object] = {
        "driver": "host_device" if source.block_device else "file",
        "filename": f"/dev/fdset/{source.set}",
        "locking": "on",
    }
    node: dict[str, object] = {"driver": format, "node-name": name}
    if written:
        file["discard"] = node["discard"] = "unmap"
    else:
        file["read-only"] = node["read-only"] = True
    if format == "qcow2":
        node["backing"] = below
    return {**node, "file": file}


def controllers(
    disks: Iterable[GuestDisk], ports: Mapping[str, str] = _NO_PORTS
) -> list[dict[str, object]]:
    """What these disks hang on, each once, in the port that `ports` has for its id."""
    buses = dict.fromkeys(disk.bus for disk in disks if disk.bus in CONTROLLERS)
    return [_in_port(CONTROLLERS[bus], ports.get(bus, "")) for bus in buses]


def _in_port(front_end: dict[str, object], port: str) -> dict[str, object]:
    return {**front_end, "bus": port} if port else front_end


def device(disk: GuestDisk, port: str = "") -> dict[str, object]:
    """The front-end."""
    name = device_id(disk.name)
    front_end = {**(CDROMS if disk.cdrom else FRONT_ENDS)[disk.bus], "id": name, "drive": name}
    if disk.bus == "sata":
        front_end["bus"] = f"sata.{disk.unit}"
    if disk.bus == "ide":
        front_end |= {"bus": f"ide.{disk.unit // 2}", "unit": disk.unit % 2}
    front_end["serial"] = disk.serial
    if disk.bootindex:
        front_end["bootindex"] = disk.bootindex
    return _in_port(front_end, port)


def options(
    disks: Sequence[GuestDisk],
    sources: Sequence[Sequence[Source]],
    ports: Mapping[str, str] = _NO_PORTS,
) -> Iterator[tuple[str, str | dict[str, object]]]:
    """The words of the command line; a word that is an object is JSON there."""
    for controller in controllers(disks, ports):
        yield "-device", controller
    for index, (disk, files) in enumerate(zip(disks, sources, strict=True)):
        port = ports.get(device_id(disk.name), "")
        if disk.name != IMAGE:
            sets = tuple(source.set for source in files)
            yield "-object", spec(PluggedDisk(disk=disk, index=index, port=port, sets=sets))
        for source in files:
            yield "-add-fd", f"fd={source.fd},set={source.set}"
        for node in blockdevs(disk, files):
            yield "-blockdev", node
        yield "-device", device(disk, port)
