"""Saved guests: files with the running state of guests whose QEMU has ended.

A state file is beside the guest's disks: a line that says what it is, a line with the Guest
that it belongs to, and QEMU's migration stream. It has its name only when all of it is on the disk.

A state is worth something only together with the disks as they were then. So whoever lets a guest
run drops its state first (`drop`): there is never a state of a guest that runs on. A guest that
stands still with its state there (netorch was killed in between) loses nothing by that.
"""

import contextlib
import os
import time
from collections.abc import Container
from pathlib import Path

import msgspec

from netorch.errors import NetorchError
from netorch.resources import Guest
from netorch.system.accel import accelerator
from netorch.system.scope import Scope

MAGIC = b"netorch saved guest 1\n"
_NAME = "running.state"
_UNFINISHED = "running.unsaved"
_HEADER = 1 << 16


class Saved(msgspec.Struct, frozen=True):
    """What a state belongs to. `accel` is what the guest ran on, kvm or tcg."""

    guest: Guest
    accel: str


def path(scope: Scope, guest: str) -> Path:
    return scope.disks / guest / _NAME


def unfinished(scope: Scope, guest: str) -> Path:
    return scope.disks / guest / _UNFINISHED


def states(scope: Scope) -> dict[str, int]:
    """The saved guests, and when they were saved, in seconds since 1970."""
    return {
        found.parent.name: int(found.stat().st_mtime)
        for found in sorted(scope.disks.glob(f"*/{_NAME}"))
    }


def drop(scope: Scope, guest: str) -> None:
    """Delete the state of a guest, whole or not; it is about to run, or will never again."""
    path(scope, guest).unlink(missing_ok=True)
    unfinished(scope, guest).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # its disks are there, or it has nothing there
        (scope.disks / guest).rmdir()


def keep_only(scope: Scope, guests: Container[str]) -> None:
    """Delete the states of all guests but these."""
    for name in states(scope):
        if name not in guests:
            drop(scope, name)


def when(at: float) -> str:
    return time.strftime("%F %T", time.localtime(at))


def header(guest: Guest, accel: str) -> bytes:
    """What a state file begins with."""
    running = msgspec.structs.replace(guest, state="running")
    return MAGIC + msgspec.json.encode(Saved(running, accel)) + b"\n"


def open_stream(scope: Scope, guest: str) -> int:
    """The state file, open for reading at the start of QEMU's stream."""
    fd = os.open(path(scope, guest), os.O_RDONLY | os.O_CLOEXEC)
    os.lseek(fd, _length(os.pread(fd, _HEADER, 0)), os.SEEK_SET)
    return fd


def refusal(scope: Scope, guest: Guest) -> str | None:
    """Why the guest can't go on from its saved state, in words; None: it can, or has none."""
    file = path(scope, guest.name)
    try:
        with file.open("rb") as state:
            text = state.read(_HEADER)
        saved = msgspec.json.decode(text[len(MAGIC) : _length(text)], type=Saved)
    except FileNotFoundError:
        return None
    except (NetorchError, msgspec.DecodeError):
        return _refusal(guest, "by another version of netorch", file)
    wanted = msgspec.structs.replace(guest, state=saved.guest.state)
    changes = saved.guest.changes(wanted)
    accel = accelerator() if guest.accel == "auto" else guest.accel
    if not changes and accel != saved.accel:
        changes = [f"accel {saved.accel} -> {accel}"]
    return _refusal(guest, f"as another one ({', '.join(changes)})", file) if changes else None


def _refusal(guest: Guest, how: str, file: Path) -> str:
    return (
        f"guest {guest.name} was saved {how} on {when(file.stat().st_mtime)}: "
        f"`netorch start --discard {guest.name}` forgets that and boots it afresh"
    )


def _length(text: bytes) -> int:
    """The length of the header, which `text` begins with."""
    if not text.startswith(MAGIC) or (end := text.find(b"\n", len(MAGIC))) < 0:
        raise NetorchError("not a saved guest of this version of netorch")
    return end + 1
