"""Changing a guest that runs: NICs come, go, change their network and their link; VNC moves; for
disks see netorch.system.disk_changes.

What is to be done follows from what QEMU has at that moment, not from what a plan knew, so that
doing it twice is silent and what a killed run left half made is cleared first. Order:
- plugging: the spec, the tap's queues (their descriptors by getfd), netdev_add, device_add
- unplugging: device_del, then DEVICE_DELETED, which comes when the guest's system has let go of the
  device; then netdev_del and the spec.
So a spec without its device is what is left of either (netorch.system.guest_devices). A killed
run may also have left a queue open in QEMU, as a descriptor that nothing uses: closefd by the name
that it was given.

A NIC whose network has changed (its tap has moved by then) loses its link for a moment, since
nothing else makes a guest ask for an address again. That the guest has seen it is not known to
QEMU, so the moment is as long as the usual systems need. Guests are changed side by side, stage by
stage.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

from netorch.errors import NetorchError
from netorch.nic_devices import SPEC, Ends, Plugged, device, device_id, netdev, netdev_id, spec
from netorch.resources import Guest, GuestNic, Resource
from netorch.system.back_ends import open_ends
from netorch.system.disk_changes import DiskChanges
from netorch.system.guest_devices import look, reach
from netorch.system.guest_processes import collected, directory_of
from netorch.system.hotplug import RESUME, FreePorts, ask_to_let_go, await_gone, resume
from netorch.system.namespaces import wait_exit
from netorch.system.processes import Marked
from netorch.system.qmp import Qmp, QmpError
from netorch.system.scope import Scope
from netorch.system.services import nic_key, note_start

# How long a link is down for a guest to see it. NetworkManager takes a carrier that comes back
# within 4 s for the same one (src/core/devices/nm-device.c, carrier_changed); tiny counts changes.
_DOWN_SECONDS = {"tiny": 0.5}
_OTHERS_DOWN_SECONDS = 5.0
_VNC_PORT = 5900


class Running:
    """A session with a running guest that is to become `wanted`."""

    def __init__(self, scope: Scope, wanted: Guest, process: Marked) -> None:
        self._scope = scope
        self.wanted = wanted
        self.process = process
        self.qmp = reach(scope, wanted.name)
        try:
            self.qmp.ready()
            self._seen = look(self.qmp, process)
        except BaseException:
            self.qmp.close()
            raise
        have = {p.nic.mac: p for p in self._seen.nics}
        self._kept: list[tuple[int, GuestNic, Plugged]] = []
        self._fresh: list[tuple[int, GuestNic]] = []
        for index, nic in enumerate(wanted.nics):
            old = have.get(nic.mac)
            if old is not None and old.nic.hardware == nic.hardware:
                self._kept.append((index, nic, have.pop(nic.mac)))
            else:
                self._fresh.append((index, nic))
        self._gone = {device_id(mac): p for mac, p in have.items()}
        self._leaving: list[str] = []  # those whose DEVICE_DELETED is still to come
        self._disks = DiskChanges(scope, self.qmp, wanted, self._seen)

    def resume(self) -> None:
        """Let it run, if it doesn't: one that stands still lets go of nothing."""
        if self._seen.state == "prelaunch":
            set_links(self.qmp, self.wanted)
        resume(self._scope, self.qmp, self.wanted.name, self._seen.state)

    def ask_to_let_go(self) -> None:
        present = [name for name in self._gone if name in self._seen.devices]
        self._leaving = list(ask_to_let_go(self.qmp, present))
        self._disks.ask_to_let_go()

    def unplug(self) -> None:
        for name, plugged in self._gone.items():
            if name in self._leaving:
                await_gone(self.qmp, name, plugged.nic.describe(), self.wanted.name)
            self._clear(name, plugged)
        self._disks.unplug()

    def plug(self) -> None:
        taken = {p.port for _, _, p in self._kept} | self._disks.ports()
        ports = [port for port in self._seen.ports if port not in taken]
        free = FreePorts(self.wanted.name, self.wanted.machine, ports)
        if self._fresh:
            self._note_start([nic for _, nic in self._fresh])
        for index, nic in self._fresh:
            # Without vhost: a NIC that is added to a running guest has no time to lose.
            plugged = Plugged(nic=nic, index=index, port=free.take(nic.describe()))
            plug(self._scope, self.qmp, self.wanted.name, plugged, accel="")
        self._disks.plug(free)

    def _note_start(self, nics: Iterable[GuestNic]) -> None:
        console = directory_of(self._scope, self.wanted.name) / "serial.log"
        note_start(self._scope, {nic_key(nic.mac): console for nic in nics})

    def take_links(self) -> None:
        """Links that are to be down, and those of NICs whose network has changed, for a moment."""
        for _index, nic, old in self._kept:
            if (nic.link == "down" and old.nic.link == "up") or self._has_moved(nic, old.nic):
                _set_link(self.qmp, nic, up=False)

    @property
    def pause(self) -> float:
        """For how long the links have to be down for the guest to see it."""
        if not any(self._has_moved(nic, old.nic) for _, nic, old in self._kept):
            return 0.0
        return _DOWN_SECONDS.get(self.wanted.image, _OTHERS_DOWN_SECONDS)

    def give_links(self) -> None:
        asking = [
            nic
            for _, nic, old in self._kept
            if nic.link == "up" and (old.nic.link == "down" or self._has_moved(nic, old.nic))
        ]
        if asking:
            self._note_start(asking)
        for nic in asking:
            _set_link(self.qmp, nic, up=True)
        for index, nic, old in self._kept:
            new = Plugged(nic=nic, index=index, port=old.port)
            if new != old:
                name = f"/objects/{device_id(nic.mac)}{SPEC}"
                text = spec(new)["identity"]
                self.qmp.ask("qom-set", {"path": name, "property": "identity", "value": text})
        self._disks.settle()

    def move_screen(self) -> None:
        if self._seen.vnc == self.wanted.vnc:
            return
        addresses = []
        if self.wanted.vnc:
            port = str(_VNC_PORT + int(self.wanted.vnc))
            addresses = [{"type": "inet", "host": "127.0.0.1", "port": port}]
        self.qmp.ask("display-update", {"type": "vnc", "addresses": addresses})

    @staticmethod
    def _has_moved(new: GuestNic, old: GuestNic) -> bool:
        return new.network != old.network and new.link == "up"

    def _clear(self, name: str, plugged: Plugged) -> None:
        """What is left of a NIC without its device: any part of it may be missing."""
        mac = plugged.nic.mac
        with contextlib.suppress(QmpError):
            self.qmp.ask("netdev_del", {"id": netdev_id(mac)})
        for queue in range(plugged.nic.queues):
            with contextlib.suppress(QmpError):
                self.qmp.ask("closefd", {"fdname": _queue_name(mac, queue)})
        self.qmp.ask("object-del", {"id": name + SPEC})


def plug(scope: Scope, qmp: Qmp, guest: str, plugged: Plugged, accel: str) -> None:
    """Plug a NIC into a guest, running or not. Raises NetorchError."""
    nic = plugged.nic
    qmp.ask("object-add", spec(plugged))
    with contextlib.ExitStack() as opened:
        ends = open_ends(scope, guest, nic, accel, opened)
        queues = _hand_over(qmp, nic.mac, ends.fds)
        vhost = _hand_over(qmp, f"{nic.mac}.vhost", ends.vhost)
    qmp.ask("netdev_add", netdev(nic, Ends(queues, vhost)))
    qmp.ask("device_add", device(nic, plugged.port))
    if nic.link == "down":
        _set_link(qmp, nic, up=False)


def _hand_over(qmp: Qmp, name: str, fds: Sequence[int | str]) -> list[str]:
    """Give QEMU descriptors; their names there."""
    names = [_queue_name(name, number) for number in range(len(fds))]
    for fdname, fd in zip(names, fds, strict=True):
        qmp.ask("getfd", {"fdname": fdname}, [int(fd)])
    return names


def set_links(qmp: Qmp, guest: Guest) -> None:
    """Take the links that the file has down, from a guest that has not begun to run."""
    for nic in guest.nics:
        if nic.link == "down":
            _set_link(qmp, nic, up=False)


def change(
    scope: Scope, wanted: Sequence[tuple[Guest, Marked]], done: Callable[[Resource], None]
) -> list[NetorchError]:
    """Make running guests what they are wanted to be; returns why those that failed did."""
    errors: list[NetorchError] = []
    with contextlib.ExitStack() as opened:
        guests: list[Running] = []
        for guest, process in wanted:
            with collected(errors):
                guests.append(Running(scope, guest, process))
                opened.callback(guests[-1].qmp.close)
        for stage in (Running.resume, Running.ask_to_let_go, Running.unplug, Running.plug):
            guests = list(_passed(guests, stage, errors))
        guests = list(_passed(guests, Running.take_links, errors))
        _pause(guests)
        for stage in (Running.give_links, Running.move_screen):
            guests = list(_passed(guests, stage, errors))
        for running in guests:
            done(running.wanted)
    return errors


def must_start_again(old: Resource, new: Resource) -> bool:
    """Whether no change of the running QEMU makes it `new`: it has crashed, can't be asked, or has
    never run and is to have other devices, which only a running system lets go of.
    """
    if not isinstance(old, Guest) or not isinstance(new, Guest):
        return True
    if old.state == "prelaunch":
        nics = [nic.hardware for nic in old.nics] != [nic.hardware for nic in new.nics]
        return nics or old.disks != new.disks
    return old.state != "running" and old.state not in RESUME


def _passed(
    guests: Sequence[Running], stage: Callable[[Running], None], errors: list[NetorchError]
) -> Iterator[Running]:
    """Those that came through a stage."""
    for running in guests:
        with collected(errors):
            stage(running)
            yield running


def _pause(guests: Sequence[Running]) -> None:
    """Give the guests time to see that links are down; a guest that ends needs none."""
    for running in sorted(guests, key=lambda running: running.pause)[-1:]:
        if running.pause:
            pidfd = os.pidfd_open(running.process.pid)
            wait_exit(pidfd, running.pause)
            os.close(pidfd)


def _set_link(qmp: Qmp, nic: GuestNic, up: bool) -> None:
    qmp.ask("set_link", {"name": netdev_id(nic.mac), "up": up})


def _queue_name(mac: str, queue: int) -> str:
    return f"{netdev_id(mac)}.{queue}"
