"""Guests on the machine: QEMU processes and their sockets.

Order, and what a crash leaves:
1. For each guest: listening sockets in run/guests/<name>, its taps' queues, then QEMU with these
   descriptors and without any capability. The QMP connection is made before QEMU runs: the socket
   listens already.
2. All greetings are awaited; a guest that was saved reads its state, and that is awaited, too. One
   that starts warm takes its template's state, and gets its NICs then (netorch.system.warm_starts);
   if it can't, it is started once more, cold.
3. Each guest is let run (`cont`), and has no saved state from then on. A QEMU of an apply that was
   killed before that is observed with the state "prelaunch" or "paused", and the next apply lets it
   run.

QEMU's run state is asked by QMP, from all guests at once; one that does not answer has the state
"unreachable" and is started again when the lab is applied. Ending: SIGTERM makes QEMU write back
its disk caches and quit, as its `quit` does, and needs no socket.
"""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import msgspec

from netorch.disk_devices import IMAGE
from netorch.errors import ImageError, MissingError, NetorchError
from netorch.guests import Descriptors, Ram, argv, needs_network, vnc_socket
from netorch.planner import Update
from netorch.resources import Guest, Resource
from netorch.system import boots, disk_checks, incoming, saved, warm_starts
from netorch.system.back_ends import (
    open_ends,
    parts,
    passt_reasons,
    wire_path,
)
from netorch.system.disk_snapshots import writable_disks
from netorch.system.disks import open_disk
from netorch.system.guest_changes import change, must_start_again, set_links
from netorch.system.guest_devices import look_at_all
from netorch.system.guest_processes import (
    UNREACHABLE,
    collected,
    directory_of,
    end_guests,
    end_is_meant,
    running,
)
from netorch.system.processes import end, processes_of
from netorch.system.qemu_devices import lacking, qemu_devices
from netorch.system.qmp import Qmp, QmpError, listen
from netorch.system.readiness import start_line
from netorch.system.scope import Scope
from netorch.system.services import note_start
from netorch.system.starting import Child, Start, program, start_all
from netorch.system.templates import Template
from netorch.system.tiny import tiny_image
from netorch.system.warm_starts import accel_of

QEMU = "qemu-system-x86_64"
_INSTALL_QEMU = "install qemu-system-x86 (Fedora, Arch: qemu-system-x86-core, qemu-system-x86)"

# What guests that start side by side may have open: 1024 descriptors are the usual limit.
_DESCRIPTORS = 800
_EACH = 10  # three sockets, the connection, the process, and all that a guest may boot

_SEVERAL = "running more than once"


class _Started(NamedTuple):
    guest: Guest
    child: Child
    qmp: Qmp
    saved: bool  # it goes on from its saved state
    template: Template | None  # it goes on from this


class Guests:
    """The adapter for guests. `progress` hears of what takes long (building the image tiny)."""

    kinds: tuple[type[Resource], ...] = (Guest,)

    def __init__(self, scope: Scope, progress: Callable[[str], None]) -> None:
        self._scope = scope
        self._progress = progress
        self._went_on: set[str] = set()  # from their saved states, by `create`

    def observe(self, look: object = None) -> Iterable[Guest]:
        found = running(self._scope)
        seen = look_at_all(self._scope, [processes[0] for processes in found.values()])
        for processes in found.values():
            guest = processes[0].resource
            assert isinstance(guest, Guest)
            look = seen.get(guest.name)
            if len(processes) > 1 or look is None:
                state = _SEVERAL if len(processes) > 1 else UNREACHABLE
                yield msgspec.structs.replace(guest, state=state)
                continue
            nics = tuple(plugged.nic for plugged in look.nics)
            image = [disk for disk in guest.disks if disk.name == IMAGE]
            disks = (*image, *(plugged.disk for plugged in look.disks))
            yield msgspec.structs.replace(
                guest, state=look.state, nics=nics, disks=disks, vnc=look.vnc
            )

    def check(self, wanted: Sequence[Resource]) -> list[str]:
        guests = [guest for guest in wanted if isinstance(guest, Guest)]
        reasons = []
        qemu = program(QEMU)
        if guests and qemu is None:
            reasons.append(f"{QEMU} is not installed: {_INSTALL_QEMU}")
        if guests and qemu is not None:
            devices = qemu_devices(qemu)
            reasons += [*lacking(guests, devices), *passt_reasons(guests, devices)]
        if any(guest.image == "tiny" for guest in guests):
            reasons += self._tiny_reasons()
        reasons += [reason for guest in guests for reason in boots.reasons(guest)]
        for guest in guests:
            reasons += self._saved_reasons(guest)
        return reasons + disk_checks.reasons(self._scope, guests)

    def create(self, wanted: Sequence[Resource], done: Callable[[Resource], None]) -> None:
        guests = [guest for guest in wanted if isinstance(guest, Guest)]
        errors: list[NetorchError] = []
        for batch in _batches(guests):
            self._create(batch, done, errors)
        if errors:
            raise errors[0]

    def update(self, wanted: Sequence[Update], done: Callable[[Resource], None]) -> None:
        found = running(self._scope)
        again, live = [], []
        for one in wanted:
            assert isinstance(one.new, Guest)
            if must_start_again(one.old, one.new) or one.new.key not in found:
                again.append(one.new)
            else:
                live.append((one.new, found[one.new.key][0]))
        errors = change(self._scope, live, done)
        if again:
            self._end(again)
            self.create(again, done)
        if errors:
            raise errors[0]

    def delete(self, unwanted: Sequence[Resource], done: Callable[[Resource], None]) -> None:
        import shutil  # 2 ms with what it imports, and most commands end no guest

        guests = [guest for guest in unwanted if isinstance(guest, Guest)]
        self._save_again(guests)
        self._end(guests)
        for guest in guests:
            for nic in guest.nics:
                if nic.wire:
                    wire_path(self._scope, nic).unlink(missing_ok=True)
            directory = directory_of(self._scope, guest.name)
            end_is_meant(self._scope, guest.name)  # first: the keeper then writes nothing there
            if directory.exists():
                shutil.rmtree(directory)
            done(guest)

    def _save_again(self, guests: Sequence[Guest]) -> None:
        """What has gone on from its saved state and is deleted by the same command is undone."""
        for guest in guests:
            if guest.name in self._went_on:
                from netorch.system.saving import save

                try:
                    save(self._scope, guest, self._progress)
                except NetorchError as error:
                    self._progress(f"what was saved of {guest.name} is lost: {error.message}")

    def _end(self, guests: Sequence[Guest]) -> None:
        """End what runs for these guests."""
        end_guests(self._scope, processes_of(self._scope, [guest.key for guest in guests]))
        passts = [passt.key for guest in guests for passt in parts(guest)]
        if passts:
            end(self._scope, processes_of(self._scope, passts))

    def _saved_reasons(self, guest: Guest) -> Iterator[str]:
        if reason := saved.refusal(self._scope, guest):
            yield reason
        elif saved.path(self._scope, guest.name).exists():
            for disk in writable_disks(self._scope, guest):
                if not disk.path.exists():
                    yield (
                        f"guest {guest.name} was saved with a disk that is gone, {disk.path}: "
                        f"`netorch start --discard {guest.name}` boots it afresh"
                    )

    def _tiny_reasons(self) -> Iterator[str]:
        try:
            tiny_image(self._progress)
        except ImageError as error:
            yield f"{error.message}: {error.hint}" if error.hint else error.message

    def _create(
        self,
        guests: list[Guest],
        done: Callable[[Resource], None],
        errors: list[NetorchError],
        cold: bool = False,
    ) -> None:
        qemu = program(QEMU)
        if qemu is None:
            raise MissingError(f"{QEMU} is not installed", _INSTALL_QEMU)
        states = saved.states(self._scope)
        warm = warm_starts.WarmStarts(self._scope, self._progress)
        consoles = {g.key: directory_of(self._scope, g.name) / "serial.log" for g in guests}
        note_start(self._scope, {g.key: consoles[g.key] for g in guests if g.name not in states})
        started = []
        with contextlib.ExitStack() as opened:
            prepared = []
            for guest in guests:
                with collected(errors):
                    is_saved = guest.name in states
                    source = None if cold or is_saved else warm.template_for(qemu, guest)
                    start = self._prepare(qemu, guest, is_saved, source, opened)
                    prepared.append((guest, source, self._connect(guest), start))
            children = start_all(self._scope, [start for *_rest, start in prepared])
            for (guest, source, qmp, _start), child in zip(prepared, children, strict=True):
                if isinstance(child, Child):
                    started.append(_Started(guest, child, qmp, guest.name in states, source))
                else:
                    qmp.close()
                    errors.append(child)
        loaded, refused = self._load(started, errors)
        if refused:
            self._end(refused)
            self._create(refused, done, errors, cold=True)
        for process in loaded:
            with collected(errors), process.qmp, contextlib.closing(process.child):
                if process.saved and errors:
                    continue  # all will be undone, and its state is good for another start
                if process.template is None:
                    set_links(process.qmp, process.guest)
                else:
                    warm_starts.give_nics(self._scope, process.qmp, process.template, process.guest)
                if process.saved:
                    self._went_on.add(process.guest.name)
                saved.drop(self._scope, process.guest.name)
                process.qmp.ask("cont")
                if process.guest.vnc == "socket":  # QEMU made it, by the person's umask
                    (self._scope.run / vnc_socket(process.guest.name)).chmod(0o600)
                if process.saved:
                    incoming.settle(self._scope, process.guest.name, process.qmp)
                    at = saved.when(states[process.guest.name])
                    self._progress(f"{process.guest.name} goes on from {at}, when it was saved")
                done(process.guest)

    def _load(
        self, started: Sequence[_Started], errors: list[NetorchError]
    ) -> tuple[list[_Started], list[Guest]]:
        """Await the greetings, and the states that are read. Returns what is ready to run, and the
        guests that can't start warm.
        """
        loaded, refused = list(started), []
        for step in (self._greet, self._finish_loading):
            for process in list(loaded):
                loaded.remove(process)
                with collected(errors):
                    try:
                        with _explained(process):
                            step(process)
                            loaded.append(process)
                    except (NetorchError, OSError) as error:
                        if process.template is None:
                            raise
                        warm_starts.refuse(process.guest, process.template, error, self._progress)
                        refused.append(process.guest)
        return loaded, refused

    def _greet(self, process: _Started) -> None:
        process.qmp.ready()
        if process.saved:
            self._begin_loading(process)
        elif process.template is not None:
            warm_starts.begin(process.qmp, process.template, process.guest)

    def _finish_loading(self, process: _Started) -> None:
        if process.saved:
            incoming.finish(process.qmp)
        elif process.template is not None:
            warm_starts.finish(process.qmp)

    def _begin_loading(self, process: _Started) -> None:
        state = saved.open_stream(self._scope, process.guest.name)
        try:
            incoming.begin(process.qmp, state)
        finally:
            os.close(state)

    def _prepare(
        self,
        qemu: str,
        guest: Guest,
        is_saved: bool,
        source: Template | None,
        opened: contextlib.ExitStack,
    ) -> Start:
        """Open what QEMU is to inherit."""
        directory = directory_of(self._scope, guest.name)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not is_saved:
            with (directory / "serial.log").open("a") as log:
                log.write(start_line(guest.name))
        relative = directory.relative_to(self._scope.run)
        qmp_fd, serial_fd, agent_fd = (
            opened.enter_context(listen(directory / f"{name}.sock")).fileno()
            for name in ("qmp", "serial", "agent")
        )
        accel = accel_of(guest)
        nics = guest.nics if source is None or source.nics else ()  # a copy gets others later
        ends = tuple(open_ends(self._scope, guest.name, nic, accel, opened) for nic in nics)
        sets = itertools.count(1)
        files = tuple(
            open_disk(self._scope, guest.name, disk, sets, opened) for disk in guest.disks
        )
        opening = boots.Opening(self._scope, guest, accel, opened, self._progress)
        boot = opening.boot()
        fds = Descriptors(qmp_fd, serial_fd, agent_fd, ends, files)
        words = argv(
            msgspec.structs.replace(guest, nics=nics),
            program=qemu,
            accel=accel,
            boot=boot,
            fds=fds,
            log=f"{relative}/serial.log",
            incoming=is_saved or source is not None,
            ram=Ram(source.ram, private=True) if source else None,
        )
        return Start(
            guest,
            words,
            log=directory / "qemu.log",
            pass_fds=[*fds.numbers(), *opening.fds],
            capabilities=(),
            apart=not needs_network(guest),
            kept=directory,
        )

    def _connect(self, guest: Guest) -> Qmp:
        """A session with a QEMU that is not there yet: its socket listens already."""
        return Qmp(directory_of(self._scope, guest.name) / "qmp.sock", guest.name)


@contextlib.contextmanager
def _explained(started: _Started) -> Iterator[None]:
    """Where QEMU ends in the block, it said why."""
    try:
        yield
    except QmpError as error:
        started.qmp.close()
        ended = started.child.has_ended(timeout=1.0)
        output = started.child.output()
        started.child.close()
        if not ended:
            raise
        name = started.guest.name
        cause = output or "QEMU ended and said nothing"
        if started.saved:
            raise NetorchError(
                f"failed to start guest {name} from its saved state: {cause}",
                f"`netorch start --discard {name}` forgets that and boots it afresh",
            ) from error
        raise NetorchError(f"failed to create guest {name}: {cause}") from error


def _batches(guests: Sequence[Guest]) -> Iterator[list[Guest]]:
    batch: list[Guest] = []
    left = _DESCRIPTORS
    for guest in guests:
        needed = _EACH + sum(2 * nic.queues for nic in guest.nics)  # each may have vhost
        needed += sum(len(disk.layers) + 1 for disk in guest.disks)
        if batch and needed > left:
            yield batch
            batch, left = [], _DESCRIPTORS
        batch.append(guest)
        left -= needed
    if batch:
        yield batch
