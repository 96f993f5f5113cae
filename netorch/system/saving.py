"""Saving guests: the running state goes to a file, and QEMU ends.

Order, and what a crash leaves:
1. A file under another name, with its header. A crash leaves it; the next start deletes it.
2. The guest stands still, and QEMU writes its memory and devices into the file, whose descriptor it
   got over QMP (its sandbox lets it start no program). A crash leaves a guest that stands still:
   a difference for `status`, and an apply lets it go on.
3. The file is synced and gets its name: the guest is saved. A crash leaves a QEMU that stands
   still beside it; an apply drops the file and lets the guest go on.
4. QEMU ends.

A state can only be taken in by a QEMU with the same devices in the same places. A start puts them
where the file's order says; so a guest whose NICs or disks have changed since its start can't be
saved before it has restarted.

What fails before 3 lets the guest go on, and deletes the file.
"""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from netorch.disk_devices import IMAGE
from netorch.errors import NetorchError, UsageError
from netorch.resources import Guest
from netorch.system import rundir, saved
from netorch.system.guest_devices import look_at_all
from netorch.system.guest_processes import end_guests, end_is_meant, running
from netorch.system.incoming import hand_over, wait_migrated
from netorch.system.power import session
from netorch.system.qmp import Qmp, QmpError
from netorch.system.scope import Scope

_CAN_BE_SAVED = ("running", "paused")
_BANDWIDTH = 1 << 40  # bytes a second; the default is 128 MiB/s


def save(scope: Scope, guest: Guest, progress: Callable[[str], None]) -> None:
    """Save one running guest. Raises UsageError, NetorchError; then it runs as before."""
    name = guest.name
    if guest.state not in _CAN_BE_SAVED:
        raise UsageError(f"guest {name} can't be saved: its state is {guest.state!r}")
    if not _is_as_started(scope, guest):
        raise UsageError(
            f"guest {name} can't be saved: its NICs or disks were changed while it ran",
            f"after `netorch restart {name}` it can",
        )
    file = saved.unfinished(scope, name)
    try:
        rundir.make_disks(scope)
        file.parent.mkdir(mode=0o700, exist_ok=True)
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            _write(scope, guest, fd)
            os.fsync(fd)
            size = os.fstat(fd).st_size
        finally:
            os.close(fd)
        file.rename(saved.path(scope, name))
    except BaseException as error:
        _go_on(scope, guest)
        if isinstance(error, OSError):
            raise NetorchError(f"failed to save guest {name}: {error}", "it runs on") from error
        raise
    _sync(file.parent)
    end_is_meant(scope, name)
    end_guests(scope, running(scope).get(guest.key, ()))
    progress(f"{name} is saved: {size / (1 << 20):.1f} MiB")


def _is_as_started(scope: Scope, guest: Guest) -> bool:
    """Whether its devices are those of its start, and where they were then."""
    for process in running(scope).get(guest.key, ()):
        started = process.resource
        assert isinstance(started, Guest)
        seen = look_at_all(scope, [process]).get(guest.name)
        if seen is None:
            return False
        nics = [(nic.hardware, started.port_of(i)) for i, nic in enumerate(started.nics)]
        ports = started.disk_ports()
        disks = [
            (disk.name, disk.bus, ports.get(f"disk-{disk.name}", ""))
            for disk in started.disks
            if disk.name != IMAGE
        ]
        if [(p.nic.hardware, p.port) for p in seen.nics] != nics:
            return False
        if [(p.disk.name, p.disk.bus, p.port) for p in seen.disks] != disks:
            return False
    return True


def _write(scope: Scope, guest: Guest, fd: int) -> None:
    with session(scope, guest.name) as qmp:
        accel = "kvm" if qmp.ask("query-kvm")["enabled"] else "tcg"
        _write_all(fd, saved.header(guest, accel))
        qmp.ask("migrate-set-parameters", {"max-bandwidth": _BANDWIDTH})
        qmp.ask("stop")
        qmp.ask("migrate", {"uri": hand_over(qmp, fd)})
        if wait_migrated(qmp) != "completed":
            raise _failure(guest, qmp)


def _failure(guest: Guest, qmp: Qmp) -> NetorchError:
    found = qmp.ask("query-migrate")
    reason = found.get("error-desc", found["status"])
    return NetorchError(f"failed to save guest {guest.name}: {reason}", "it runs on")


def _write_all(fd: int, data: bytes) -> None:
    with open(fd, "wb", closefd=False) as file:
        file.write(data)


def _go_on(scope: Scope, guest: Guest) -> None:
    """Give up, and let the guest be as it was, over a QMP session of its own: the first one may
    have been left in the middle of a line.
    """
    saved.drop(scope, guest.name)
    with contextlib.suppress(QmpError, UsageError), session(scope, guest.name) as qmp:
        qmp.ask("migrate_cancel")  # does nothing where nothing is under way
        if guest.state == "running":
            qmp.ask("cont")


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
