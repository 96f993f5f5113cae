"""Guests on the machine: QEMU processes and their sockets.

Order, and what a crash leaves:
1. For each guest: listening sockets in run/guests/<name>, its taps' queues, then QEMU with these
   descriptors and without any capability. The QMP connection is made before QEMU runs: the socket
   listens already.
2. All greetings are awaited, then each guest is let run (`cont`). A QEMU of an apply that was
   killed before that is observed with the state "prelaunch", and the next apply lets it run.

QEMU's run state is asked by QMP, from all guests at once; one that does not answer has the state
"unreachable" and is started again when the lab is applied. Ending: SIGTERM makes QEMU write back
its disk caches and quit, as its `quit` does, and needs no socket.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from netorch.errors import ImageError, KernelError, MissingError, NetorchError
from netorch.guests import Descriptors, Disk, Kernel, argv, vnc_socket
from netorch.planner import Update
from netorch.resources import Guest, GuestNic, Resource
from netorch.system import disks
from netorch.system.accel import accelerator
from netorch.system.bridge_helper import open_tap
from netorch.system.processes import Child, Marked, end, leaders, marked, program, start
from netorch.system.qmp import Qmp, QmpError, listen
from netorch.system.scope import Scope
from netorch.system.services import note_start
from netorch.system.taps import (
    DEVICE,
    IFF_MULTI_QUEUE,
    IFF_NO_PI,
    IFF_TAP,
    IFF_VNET_HDR,
    IFREQ,
    TUNSETIFF,
)
from netorch.system.tiny import tiny_image

QEMU = "qemu-system-x86_64"
_INSTALL_QEMU = "install qemu-system-x86 (Fedora, Arch: qemu-system-x86-core, qemu-system-x86)"

# Each guest takes two descriptors while it starts, and 1024 is the usual limit of a process.
_AT_ONCE = 200

# How QEMU leaves a run state (qapi/run-state.json). From any other one only a new start leads on.
_RESUME = {"prelaunch": "cont", "paused": "cont", "io-error": "cont", "suspended": "system_wakeup"}
_UNREACHABLE = "unreachable"
_SEVERAL = "running more than once"

_RTMGRP_LINK = 1
_BUSY_SECONDS = 3.0  # the kernel tells of a lost carrier within one second


class _Started(NamedTuple):
    guest: Guest
    child: Child
    qmp: Qmp


class Guests:
    """The adapter for guests. `progress` hears of what takes long (building the image tiny)."""

    kinds: tuple[type[Resource], ...] = (Guest,)

    def __init__(self, scope: Scope, progress: Callable[[str], None]) -> None:
        self._scope = scope
        self._progress = progress

    def observe(self) -> Iterable[Guest]:
        found = _running(self._scope)
        guests = {key: processes[0].resource for key, processes in found.items()}
        states = _states(self._scope, [g.name for g in guests.values() if isinstance(g, Guest)])
        for key, guest in guests.items():
            assert isinstance(guest, Guest)
            state = states[guest.name] if len(found[key]) == 1 else _SEVERAL
            yield msgspec.structs.replace(guest, state=state)

    def check(self, wanted: Sequence[Resource]) -> list[str]:
        guests = [guest for guest in wanted if isinstance(guest, Guest)]
        reasons = []
        if guests and program(QEMU) is None:
            reasons.append(f"{QEMU} is not installed: {_INSTALL_QEMU}")
        for image in dict.fromkeys(guest.image for guest in guests):
            reasons += self._image_reasons(image)
        for guest in guests:
            if guest.image != "tiny" and disks.outdated(self._scope, guest):
                reasons.append(
                    f"image {guest.image} was written to after the disk of guest {guest.name} was "
                    "made from it: take the guest out of the file and apply, then start it anew"
                )
        return reasons

    def create(self, wanted: Sequence[Resource], done: Callable[[Resource], None]) -> None:
        guests = [guest for guest in wanted if isinstance(guest, Guest)]
        errors: list[NetorchError] = []
        for first in range(0, len(guests), _AT_ONCE):
            self._create(guests[first : first + _AT_ONCE], done, errors)
        if errors:
            raise errors[0]

    def update(self, wanted: Sequence[Update], done: Callable[[Resource], None]) -> None:
        again = [change for change in wanted if _state(change.old) not in _RESUME]
        for change in wanted:
            if change not in again and isinstance(change.new, Guest):
                with Qmp(
                    _directory(self._scope, change.new.name) / "qmp.sock", change.new.name
                ) as qmp:
                    qmp.ready()
                    qmp.ask(_RESUME[_state(change.old)])
                done(change.new)
        if again:
            found = _running(self._scope)
            end(self._scope, [p for change in again for p in found.get(change.new.key, ())])
            self.create([change.new for change in again], done)

    def delete(self, unwanted: Sequence[Resource], done: Callable[[Resource], None]) -> None:
        found = _running(self._scope)
        end(self._scope, [p for guest in unwanted for p in found.get(guest.key, ())])
        for guest in unwanted:
            assert isinstance(guest, Guest)
            directory = _directory(self._scope, guest.name)
            if directory.exists():
                shutil.rmtree(directory)
            done(guest)

    def _image_reasons(self, image: str) -> Iterator[str]:
        try:
            if image == "tiny":
                tiny_image(self._progress)
                return
            image_format = disks.image_format(Path(image))
        except ImageError as error:
            yield f"{error.message}: {error.hint}" if error.hint else error.message
            return
        if image_format == "qcow2" and (backing := disks.backing(Path(image))[0]):
            yield (
                f"image {image} is itself an overlay, of {backing}: make one that stands alone "
                f"with `qemu-img convert -O qcow2 {image} NEW`"
            )
        if writer := disks.writer(Path(image)):
            yield f"image {image} is being written to by {writer}: shut that down, or use a copy"

    def _create(
        self, guests: list[Guest], done: Callable[[Resource], None], errors: list[NetorchError]
    ) -> None:
        qemu = program(QEMU)
        if qemu is None:
            raise MissingError(f"{QEMU} is not installed", _INSTALL_QEMU)
        note_start(self._scope, [guest.key for guest in guests])
        started = []
        for guest in guests:
            with _collected(errors):
                started.append(self._start(qemu, guest))
        greeted = []
        for process in started:
            with _collected(errors):
                _await_greeting(process)
                greeted.append(process)
        for process in greeted:
            with _collected(errors), process.qmp:
                process.qmp.ask("cont")
                if process.guest.vnc == "socket":  # QEMU made it, by the person's umask
                    (self._scope.run / vnc_socket(process.guest.name)).chmod(0o600)
                process.child.close()
                done(process.guest)

    def _start(self, qemu: str, guest: Guest) -> _Started:
        directory = _directory(self._scope, guest.name)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        relative = directory.relative_to(self._scope.run)
        with contextlib.ExitStack() as opened:
            qmp_fd, serial_fd, agent_fd = (
                opened.enter_context(listen(directory / f"{name}.sock")).fileno()
                for name in ("qmp", "serial", "agent")
            )
            taps = tuple(
                tuple(_open_tap(self._scope, nic, guest.name, opened)) for nic in guest.nics
            )
            boot = self._boot(guest, opened)
            qmp = Qmp(directory / "qmp.sock", guest.name)
            accel = accelerator() if guest.accel == "auto" else guest.accel
            fds = Descriptors(qmp_fd, serial_fd, agent_fd, taps)
            words = argv(
                guest, program=qemu, accel=accel, boot=boot, fds=fds, log=f"{relative}/serial.log"
            )
            try:
                child = start(
                    self._scope,
                    guest,
                    words,
                    log=directory / "qemu.log",
                    pass_fds=_numbers(fds, boot),
                    capabilities=(),
                    daemon=True,
                )
            except KernelError:
                qmp.close()
                raise
        return _Started(guest, child, qmp)

    def _boot(self, guest: Guest, opened: contextlib.ExitStack) -> Kernel | Disk:
        if guest.image == "tiny":
            tiny = tiny_image(self._progress)
            kernel = tiny.vmlinuz if guest.video else tiny.kernel
            return Kernel(kernel, tiny.initrd, tiny.cmdline)
        base = os.open(guest.image, os.O_RDONLY | os.O_CLOEXEC)
        opened.callback(os.close, base)
        return Disk(disks.overlay_path(self._scope, guest.name), base, guest.format)


def _directory(scope: Scope, guest: str) -> Path:
    return scope.run / "guests" / guest


def _running(scope: Scope) -> dict[str, list[Marked]]:
    """The lab's QEMU processes by key."""
    found = leaders(marked(scope))
    return {key: processes for key, processes in found.items() if key.startswith("guest:")}


def _state(resource: Resource) -> str:
    return resource.state if isinstance(resource, Guest) else ""


def _states(scope: Scope, names: Sequence[str]) -> Mapping[str, str]:
    """The run state of each guest. All are asked before the first answer is awaited."""
    states = {}
    with contextlib.ExitStack() as opened:
        asked = {}
        for name in names:
            states[name] = _UNREACHABLE
            with contextlib.suppress(QmpError, FileNotFoundError):
                asked[name] = opened.enter_context(Qmp(_directory(scope, name) / "qmp.sock", name))
                asked[name].send("query-status")
        for name, qmp in asked.items():
            with contextlib.suppress(QmpError):
                qmp.ready()
                states[name] = qmp.answer("query-status")["status"]
    return states


def _await_greeting(started: _Started) -> None:
    try:
        started.qmp.ready()
    except QmpError as error:
        started.qmp.close()
        ended = started.child.has_ended(timeout=1.0)
        output = started.child.output()
        started.child.close()
        if not ended:
            raise
        cause = output or "QEMU ended and said nothing"
        raise NetorchError(f"failed to create guest {started.guest.name}: {cause}") from error


def _open_tap(
    scope: Scope, nic: GuestNic, guest: str, opened: contextlib.ExitStack
) -> Iterator[int]:
    """A descriptor for each queue of the tap. Raises KernelError."""
    if nic.bridge:
        fd = open_tap(scope, nic.bridge, scope.run / "bridge-helper.log")
        opened.callback(os.close, fd)
        yield fd
        return
    # All flags but IFF_MULTI_QUEUE are taken over from who opens the tap (drivers/net/tun.c,
    # tun_set_iff).
    flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | (IFF_MULTI_QUEUE if nic.queues > 1 else 0)
    if nic.tap not in (name for _index, name in socket.if_nameindex()):  # TUNSETIFF would make one
        reason = os.strerror(errno.ENODEV)
        raise KernelError(f"failed to open tap {nic.tap} for guest {guest}: {reason}", errno.ENODEV)
    try:
        for _queue in range(nic.queues):
            fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
            opened.callback(os.close, fd)
            _attach(fd, IFREQ.pack(nic.tap.encode(), flags))
            yield fd
    except OSError as error:
        raise KernelError(
            f"failed to open tap {nic.tap} for guest {guest}: {error.strerror}", error.errno or 0
        ) from error


def _attach(fd: int, request: bytes) -> None:
    """TUNSETIFF; while the tap is busy, wait for news of links and try again.

    A QEMU that was killed lets go of its taps only after it has ceased to be seen (kernel/exit.c,
    do_exit: exit_mm comes before exit_files).
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as events:
        events.bind((0, _RTMGRP_LINK))
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                fcntl.ioctl(fd, TUNSETIFF, request)
                return
            except OSError as error:
                left = deadline - time.monotonic()
                if error.errno != errno.EBUSY or left <= 0:
                    raise
            events.settimeout(left)
            with contextlib.suppress(TimeoutError):
                events.recv(65536)


def _numbers(fds: Descriptors, boot: Kernel | Disk) -> list[int]:
    queues = [fd for tap in fds.taps for fd in tap]
    base = [boot.base_fd] if isinstance(boot, Disk) else []
    return [fds.qmp, fds.serial, fds.agent, *queues, *base]


@contextlib.contextmanager
def _collected(errors: list[NetorchError]) -> Iterator[None]:
    """Remember an error and go on: guests that start side by side don't fail for each other."""
    try:
        yield
    except NetorchError as error:
        errors.append(error)
