"""Snapshots of the disks of a lab's guests."""

import time

import msgspec

from netorch.engine import Progress
from netorch.errors import UsageError
from netorch.labs import Lab, intended, machine
from netorch.lifecycle import inside, start_inside
from netorch.resources import Guest
from netorch.system import disk_snapshots, power, saved
from netorch.system.disk_snapshots import Snapshot, WritableDisk


def listed(lab: Lab, guest: str) -> list[Snapshot]:
    """The snapshots of a guest, oldest first. Raises UsageError for one without disks."""
    with inside(lab):
        there = _look(lab, guest)
        return disk_snapshots.listed(lab.scope, guest, there.disks, there.runs)


def make(lab: Lab, guest: str, name: str | None) -> str:
    """Make a snapshot of all disks of a guest, running or not; its name, by default the time."""
    name = name or time.strftime("%Y-%m-%dT%H.%M.%S")
    with inside(lab):
        there = _look(lab, guest)
        disk_snapshots.make(lab.scope, guest, there.disks, name, there.runs)
    return name


def delete(lab: Lab, guest: str, name: str) -> None:
    with inside(lab):
        there = _look(lab, guest)
        disk_snapshots.delete(lab.scope, guest, there.disks, name, there.runs)


def revert(lab: Lab, guest: str, name: str, seconds: float | None, progress: Progress) -> None:
    """Put the disks of a guest back to a snapshot. A running guest is stopped for that within
    `seconds` and started again; with None, it is a UsageError that it runs.
    """
    with inside(lab):
        there = _look(lab, guest)
        disk_snapshots.known(lab.scope, guest, there.disks, name, there.runs)
        if there.runs and seconds is None:
            raise UsageError(
                f"guest {guest} runs, and would not notice that its disks change",
                f"add --restart, or stop it first: netorch stop {guest}",
            )
        if not there.runs and guest in saved.states(lab.scope):
            raise UsageError(
                f"guest {guest} is saved, and goes on only with its disks as they are",
                f"`netorch start --discard {guest}` forgets that and boots it afresh",
            )
        if seconds is not None:
            power.stop(lab.scope, [guest], seconds, progress.waiting)
        saved.drop(lab.scope, guest)
        disk_snapshots.revert(lab.scope, there.disks, name)
        if there.runs:
            start_inside(lab, [guest], progress)


class _There(msgspec.Struct, frozen=True):
    disks: list[WritableDisk]
    runs: bool


def _look(lab: Lab, name: str) -> _There:
    """The disks of a guest, and whether it runs. Raises UsageError for one without disks."""
    guest = intended(lab)[1].get(f"guest:{name}")
    disks = disk_snapshots.writable_disks(lab.scope, guest) if isinstance(guest, Guest) else []
    if not disks:
        raise UsageError(
            f"guest {name} has no disk of the lab's own: all of it is in memory",
            f"`netorch save {name}` keeps that",
        )
    return _There(disks, f"guest:{name}" in machine(lab.scope, only={Guest}).observe())
