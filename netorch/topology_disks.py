"""Mistakes about disks that types can't express: the image's and the other disks' of each guest."""

import posixpath
from collections import Counter
from collections.abc import Iterator

from netorch.errors import Key, dotted, quoted
from netorch.model import DISKLESS, Disk, Guest, Layer, Topology
from netorch.topology_values import Wrong, disk_bytes

Objection = tuple[Key, str, str, tuple[Key, ...]]
"""Where, what is wrong, what would be right, and what it rests on."""

MIN_SIZE, MAX_SIZE = 1 << 20, 64 << 40  # bytes
ROOM = {"ide": 4, "sata": 6, "usb": 15}  # disks on the one controller; other buses have more
CDROM_BUSES = ("sata", "ide", "scsi")


def storage(topology: Topology) -> Iterator[Objection]:
    """All mistakes about the disks in `topology`."""
    for name, guest in topology.guests.items():
        path: Key = ("guests", name)
        yield from _image(path, guest)
        yield from _names(path, guest)
        yield from _room(path, guest)
        for index, disk in enumerate(guest.disks):
            yield from _disk((*path, "disks", index), disk)
    yield from _shared(topology)


def _image(path: Key, guest: Guest) -> Iterator[Objection]:
    if guest.image not in DISKLESS:
        yield from _path((*path, "image"), guest.image, '"tiny", "none", or a path')
        yield from _backing(path, guest)
        yield from _persistent(path, guest)
        return
    for key, default in (("backing", ()), ("bus", "virtio"), ("persistent", False)):
        if getattr(guest, key) != default:
            message = f"{guest.image} has no disk of its own"
            yield (*path, key), message, "for an image; others stand in disks", ((*path, "image"),)


def _disk(path: Key, disk: Disk) -> Iterator[Objection]:
    file, size = (*path, "file"), (*path, "size")
    if disk.file is not None:
        if disk.size is not None:
            yield size, "a file has its size already", "leave one of them out", (file,)
        yield from _path(file, disk.file, "the path of a qcow2 or raw file, or of a block device")
        yield from _backing(path, disk)
        yield from _persistent(path, disk)
        yield from _readonly(path, disk)
    elif disk.size is not None:
        yield from _volume(path, disk, disk.size)
    else:
        hint = 'file = "data.qcow2", or size = "10G" for a new one'
        yield path, "needs a file or a size", hint, (file, size)


def _path(where: Key, file: str, hint: str) -> Iterator[Objection]:
    if file.startswith("~"):
        hint = "write the directory out: whose home ~ is depends on who runs netorch"
    elif file and "\0" not in file:
        return
    yield where, f"{quoted(file)} is not an image's path", hint, ()


def _backing(path: Key, disk: Disk | Guest) -> Iterator[Objection]:
    chosen = (*path, "format")
    if disk.backing and disk.format == "raw":
        yield (*path, "backing"), "a raw file is no overlay", 'format = "qcow2"', (chosen,)
    for index, layer in enumerate(disk.backing):
        where: Key = (*path, "backing", index)
        yield from _path((*where, "file"), layer.file, "the path of a qcow2 or raw file")
        if layer.format == "raw" and index + 1 < len(disk.backing):
            message = "a raw file is no overlay, so it is the last one"
            yield (*where, "format"), message, '"qcow2", or leave out what follows', ()


def _persistent(path: Key, disk: Disk | Guest) -> Iterator[Objection]:
    if disk.persistent and disk.format == "auto":
        message = "needs the format: into a raw file, a guest can write the header of another one"
        hint = 'format = "qcow2" or "raw"'
        yield (*path, "persistent"), message, hint, ((*path, "format"),)


def _readonly(path: Key, disk: Disk) -> Iterator[Objection]:
    bus = (*path, "bus")
    if disk.persistent and (disk.readonly or disk.cdrom):
        other = "readonly" if disk.readonly else "cdrom"
        hint = "leave one of them out"
        yield (*path, "persistent"), f"nothing is written with {other}", hint, ((*path, other),)
    if disk.cdrom and disk.bus not in CDROM_BUSES:
        message = f"there is no CD-ROM drive on {disk.bus}"
        yield (*path, "cdrom"), message, 'bus = "sata", "ide" or "scsi"', (bus,)
    if disk.readonly and not disk.cdrom and disk.bus in ("ide", "sata"):
        message = f"a disk on {disk.bus} is always writable"
        yield (*path, "readonly"), message, "another bus, or cdrom = true", (bus,)


def _volume(path: Key, disk: Disk, text: str) -> Iterator[Objection]:
    where = (*path, "size")
    try:
        if not MIN_SIZE <= disk_bytes(text) <= MAX_SIZE:
            yield where, f"{quoted(text)} is no size for a disk", "1M to 64T", ()
    except Wrong as wrong:
        yield where, f"{quoted(text)} {wrong.message}", wrong.hint, ()
    if disk.format == "raw":
        yield (*path, "format"), "a new disk is qcow2", "leave it out", (where,)
    if disk.backing:
        yield (*path, "backing"), "a new disk is no overlay", "leave it out", (where,)
    if disk.persistent:
        message = "a new disk is the lab's own, and goes with the lab"
        yield (*path, "persistent"), message, "to keep it, make a file and name that", (where,)
    for key in ("readonly", "cdrom"):
        if getattr(disk, key):
            yield (*path, key), "a new disk is empty", "name a file", (where,)


def _names(path: Key, guest: Guest) -> Iterator[Objection]:
    """What disks are called (`netorch.guest_disks`), each once."""
    seen: dict[str, Key] = {"image": (*path, "image")}
    for index, disk in enumerate(guest.disks):
        place: Key = (*path, "disks", index)
        where = (*place, "name") if disk.name else place
        name = disk.name or f"disk{index}"
        if name in seen:
            message = f"the name {quoted(name)} is taken by {dotted(seen[name])}"
            yield where, message, "each disk of a guest needs its own", ()
        seen.setdefault(name, place)


def _room(path: Key, guest: Guest) -> Iterator[Objection]:
    buses = [guest.bus] if guest.image not in DISKLESS else []
    buses += [disk.bus for disk in guest.disks]
    if guest.machine == "q35":  # has no IDE but SATA
        buses = ["sata" if bus == "ide" else bus for bus in buses]
    for bus, count in Counter(buses).items():
        if count > ROOM.get(bus, count):
            message = f"has {count} on {bus}, which takes at most {ROOM[bus]}"
            yield (*path, "disks"), message, 'bus = "virtio" or "scsi" takes more', ()


def _shared(topology: Topology) -> Iterator[Objection]:
    """A file that one disk writes to is no other's: neither can rely on what is in it."""
    first: dict[str, tuple[Key, bool]] = {}
    for where, file, written in _uses(topology):
        place, has_writer = first.setdefault(posixpath.normpath(file), (where, written))
        if place == where or not (written or has_writer):
            continue
        if has_writer:
            message = f"{quoted(file)} is persistent in {dotted(place[:-1])}"
            yield where, message, "use a copy", (place,)
        else:
            message = f"{quoted(file)} is used by {dotted(place[:-1])} too, so it can't change"
            yield (*where[:-1], "persistent"), message, "leave it out, or use a copy", (place,)


def _uses(topology: Topology) -> Iterator[tuple[Key, str, bool]]:
    """Every file: where it stands, its path, and whether it is written to."""
    for name, guest in topology.guests.items():
        path: Key = ("guests", name)
        if guest.image not in DISKLESS:
            yield (*path, "image"), guest.image, guest.persistent
            yield from _layers(path, guest.backing)
        for index, disk in enumerate(guest.disks):
            if disk.file:
                where: Key = (*path, "disks", index)
                yield (*where, "file"), disk.file, disk.persistent
                yield from _layers(where, disk.backing)


def _layers(path: Key, backing: tuple[Layer, ...]) -> Iterator[tuple[Key, str, bool]]:
    for index, layer in enumerate(backing):
        yield (*path, "backing", index, "file"), layer.file, False
