"""Snapshots of guests' disks, inside of the qcow2 files themselves.

A running QEMU has its files locked and their tables in memory, so it makes and deletes them by
itself, over QMP; of a guest that is off, qemu-img does. What a running guest had not written to its
disk yet is not in it: to the guest, the snapshot is what a power cut leaves. A guest's disks are
one: a snapshot is made of all of them, and only what all of them have can be reverted to.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from netorch.errors import ImageError, MissingError, UsageError
from netorch.resources import Guest
from netorch.system.disks import disk_path
from netorch.system.power import session
from netorch.system.scope import Scope
from netorch.system.starting import program, start


class WritableDisk(msgspec.Struct, frozen=True):
    """A qcow2 file that a guest writes to; `node` is QEMU's name for it."""

    path: Path
    node: str


class Snapshot(msgspec.Struct, frozen=True):
    """`at` is in seconds since 1970."""

    name: str
    at: int


def writable_disks(scope: Scope, guest: Guest) -> list[WritableDisk]:
    """The disks of a guest that are the lab's own; those of the person are the person's to keep."""
    return [
        WritableDisk(disk_path(scope, guest.name, disk.name), f"disk-{disk.name}")
        for disk in guest.disks
        if disk.use in ("overlay", "volume")
    ]


def listed(scope: Scope, guest: str, disks: Sequence[WritableDisk], runs: bool) -> list[Snapshot]:
    """The snapshots that all disks of a guest have, oldest first."""
    found = _running(scope, guest, disks) if runs else [_image(scope, disk) for disk in disks]
    first, *others = ({s["name"]: s["date-sec"] for s in one} for one in found)
    common = [Snapshot(name, at) for name, at in first.items() if all(name in o for o in others)]
    return sorted(common, key=lambda snapshot: snapshot.at)


def known(scope: Scope, guest: str, disks: Sequence[WritableDisk], name: str, runs: bool) -> None:
    """Raise UsageError unless the guest has this snapshot."""
    names = [snapshot.name for snapshot in listed(scope, guest, disks, runs)]
    if name not in names:
        raise UsageError(
            f"guest {guest} has no snapshot {name!r}", f"it has: {', '.join(names) or 'none'}"
        )


def make(scope: Scope, guest: str, disks: Sequence[WritableDisk], name: str, runs: bool) -> None:
    if name.isdigit():
        raise UsageError(f"{name!r} can't be the name of a snapshot: QEMU would take it for an id")
    if any(snapshot.name == name for snapshot in listed(scope, guest, disks, runs)):
        raise UsageError(
            f"guest {guest} has a snapshot {name!r} already",
            f"netorch snapshot --delete {name} {guest}",
        )
    if runs:
        kind = "blockdev-snapshot-internal-sync"
        actions = [{"type": kind, "data": {"device": d.node, "name": name}} for d in disks]
        with session(scope, guest) as qmp:
            qmp.ask("transaction", {"actions": actions})
        return
    for disk in disks:
        _qemu_img(scope, "snapshot", "-c", name, str(disk.path))


def delete(scope: Scope, guest: str, disks: Sequence[WritableDisk], name: str, runs: bool) -> None:
    known(scope, guest, disks, name, runs)
    if not runs:
        for disk in disks:
            _qemu_img(scope, "snapshot", "-d", name, str(disk.path))
        return
    with session(scope, guest) as qmp:
        for disk in disks:
            what = {"device": disk.node, "name": name}
            qmp.ask("blockdev-snapshot-delete-internal-sync", what)


def revert(scope: Scope, disks: Sequence[WritableDisk], name: str) -> None:
    """Put the disks of a guest that is off back to a snapshot that it has."""
    for disk in disks:
        _qemu_img(scope, "snapshot", "-a", name, str(disk.path))


def _running(scope: Scope, guest: str, disks: Sequence[WritableDisk]) -> list[Any]:
    with session(scope, guest) as qmp:
        nodes = qmp.ask("query-named-block-nodes", {"flat": True})
    images = {node["node-name"]: node["image"] for node in nodes}
    return [images[disk.node].get("snapshots", []) for disk in disks]


def _image(scope: Scope, disk: WritableDisk) -> Any:
    if not disk.path.exists():
        return []  # the guest has never run
    # -U: it may be the disk of a QEMU that does not answer.
    said = _qemu_img(scope, "info", "-U", "--output=json", str(disk.path))
    return msgspec.json.decode(said).get("snapshots", [])


def _qemu_img(scope: Scope, *words: str) -> str:
    """What qemu-img says. Raises ImageError."""
    qemu_img = program("qemu-img")
    if qemu_img is None:
        raise MissingError("qemu-img is not installed", "install qemu-utils (Fedora: qemu-img)")
    child = start(scope, None, [qemu_img, *words], log=scope.run / "qemu-img.log")
    try:
        if child.exit_status() != 0:
            raise ImageError(f"`qemu-img {' '.join(words)}` failed: {child.output()}")
        return child.output()
    finally:
        child.close()
