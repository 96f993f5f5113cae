"""What is behind a guest's NIC on this machine, opened for its QEMU: taps, vhost, passt, wires.

passt moves a guest's traffic as an ordinary process's: it runs in the lab's place and opens there a
socket for each of the guest's connections. Each NIC has one of its own, joined to QEMU by a socket
pair. passt ends as soon as the other end of that is closed, so it goes with its QEMU, and with a
netorch that is killed before QEMU was started. It goes into the background once it serves, and
its parent's exit status says so. The other way round, a guest whose passt has ended is not as it
should be: QEMU has noticed that the socket is closed, and is asked (`severed`).
"""

import contextlib
import errno
import os
import re
import socket
from collections.abc import Iterable, Iterator, Set
from pathlib import Path

from netorch.errors import MissingError, NetorchError, dotted
from netorch.nic_devices import WIRES, Ends, netdev_id, passt_options, wants_vhost
from netorch.resources import Guest, GuestNic, Passt
from netorch.system.guest_processes import directory_of
from netorch.system.guest_taps import open_queues
from netorch.system.qemu_devices import QemuDevices
from netorch.system.qmp import Qmp
from netorch.system.scope import Scope
from netorch.system.starting import program, start

_VHOST = "/dev/vhost-net"
_PASST_SECONDS = 10.0
_NO_PASST = "passt is not installed"
_INSTALL_PASST = 'install passt, or use backend = "user"'
_OTHERWISE = 'use model = "rtl8139" or a virtio one, or backend = "user"'

# Which models' frames a passt can't take, and from when on it can.
# QEMU pads what an e1000 sends to the least length of an Ethernet frame. A passt from before this
# day (its commit d8c4f23) drops that, a TCP connection's bare acknowledgements among it.
_PADS, _TAKES_PADDED = "e1000", "20230829"
# QEMU cuts what these leave to be segmented into IP fragments (hw/net/net_tx_pkt.c), which passt
# drops; from this version on into TCP segments.
_FRAGMENT, _SEGMENTS = ("e1000e", "vmxnet3"), (8, 0)


def open_ends(
    scope: Scope, guest: str, nic: GuestNic, accel: str, opened: contextlib.ExitStack
) -> Ends:
    """What QEMU needs for this NIC; closed with `opened`. Raises NetorchError."""
    if nic.backend == "tap":
        queues = list(open_queues(scope, nic, guest, opened))
        return Ends(queues, _vhost(len(queues), opened) if wants_vhost(nic, accel) else ())
    if nic.backend == "passt":
        return Ends([_start_passt(scope, guest, nic, opened)])
    if nic.backend == "wire":
        wire_path(scope, nic).parent.mkdir(mode=0o700, exist_ok=True)
    return Ends()


def wire_path(scope: Scope, nic: GuestNic) -> Path:
    """The socket of the NIC's own end of its wire."""
    return scope.run / WIRES / f"{nic.wire}.{nic.end}"


def passt_reasons(guests: Iterable[Guest], devices: QemuDevices) -> Iterator[str]:
    """Why guests can't have the passt that they need, a sentence each."""
    wanted = [
        (guest.name, index, nic.model)
        for guest in guests
        for index, nic in enumerate(guest.nics)
        if nic.backend == "passt"
    ]
    if not wanted:
        return
    path = program("passt")
    if path is None:
        names = ", ".join(dict.fromkeys(name for name, _index, _model in wanted))
        yield f"{_NO_PASST}, which guest {names} needs: {_INSTALL_PASST}"
    refused = _refused_models({model for _name, _index, model in wanted}, path, devices)
    for name, index, model in wanted:
        if model in refused:
            key = dotted(("guests", name, "nics", index, "model"))
            yield f"{key}: {refused[model]}; {_OTHERWISE}"


def _refused_models(models: Set[str], passt: str | None, devices: QemuDevices) -> dict[str, str]:
    """Which of these models passt can't carry, and why."""
    refused = {}
    if _PADS in models and passt is not None and not _takes_padded(passt):
        refused[_PADS] = (
            "the installed passt is from before 2023-08-29, or doesn't say its date: it drops the "
            f"short frames of an {_PADS}, and TCP with them"
        )
    version = devices.version
    if version is not None and version < _SEGMENTS:
        for model in _FRAGMENT:
            refused[model] = (
                f"the installed QEMU, from before 8.0, sends TCP from {model} in IP fragments, "
                "which passt drops"
            )
    return refused


def _takes_padded(passt: str) -> bool:
    """By the date in its version, such as 2024_06_24.1ee2eca or 0.0~git20250503.587980c-2."""
    import subprocess

    done = subprocess.run([passt, "--version"], capture_output=True, text=True, check=False)
    date = re.search(r"(20\d\d)_?(\d\d)_?(\d\d)", done.stdout.partition("\n")[0])
    return date is not None and "".join(date.groups()) >= _TAKES_PADDED


def parts(guest: Guest) -> Iterator[Passt]:
    """The processes that a guest has beside its QEMU. Not everybody can see them: passt is not
    dumpable, so its marks are readable with CAP_SYS_PTRACE alone.
    """
    for nic in guest.nics:
        if nic.backend == "passt":
            yield Passt(guest=guest.name, mac=nic.mac)


def severed(qmp: Qmp, nics: Iterable[GuestNic]) -> set[str]:
    """The MACs of those NICs whose QEMU has lost their passt. Raises QmpError.

    No QMP command tells of back-ends' connections; net/stream.c empties the text that follows the
    type here ("unix:") when the other end closes.
    """
    asked = [nic for nic in nics if nic.backend == "passt"]
    if not asked:
        return set()
    said = qmp.ask("human-monitor-command", {"command-line": "info network"})
    lines = {line.strip(" \\") for line in str(said).splitlines()}
    return {nic.mac for nic in asked if f"{netdev_id(nic.mac)}: index=0,type=stream," in lines}


def _vhost(count: int, opened: contextlib.ExitStack) -> list[int]:
    """A descriptor of vhost-net for each queue; none where the kernel has it not or refuses it."""
    found: list[int] = []
    for _queue in range(count):
        try:
            fd = os.open(_VHOST, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.EACCES, errno.EPERM):
                return []  # QEMU moves the packets itself
            raise NetorchError(f"failed to open {_VHOST}: {error.strerror}") from error
        opened.callback(os.close, fd)
        found.append(fd)
    return found


def _start_passt(scope: Scope, guest: str, nic: GuestNic, opened: contextlib.ExitStack) -> int:
    """Start the passt of a NIC; QEMU's end of its socket."""
    path = program("passt")
    if path is None:
        raise MissingError(_NO_PASST, _INSTALL_PASST)
    ours, theirs = socket.socketpair()
    opened.enter_context(ours)
    with theirs:
        child = start(
            scope,
            Passt(guest=guest, mac=nic.mac),
            [*_passt(path, nic), "--fd", str(theirs.fileno())],
            log=directory_of(scope, guest) / f"passt-{nic.mac}.log",
            pass_fds=[theirs.fileno()],
            capabilities=(),
        )
    try:
        status = child.exit_status(_PASST_SECONDS)
        if status != 0:
            raise _refusal(guest, nic, "" if status is None else child.output())
    finally:
        child.close()
    return ours.fileno()


def _passt(path: str, nic: GuestNic) -> list[str]:
    # As root it would become "nobody", which is somebody else, whom netorch does not look at. It
    # has no capability either way.
    who = ["--runas", "0:0"] if os.geteuid() == 0 else []
    return [path, *who, "--quiet", "--ipv4-only", "--no-map-gw", *passt_options(nic)]


def _refusal(guest: str, nic: GuestNic, output: str) -> NetorchError:
    """Why passt did not start, from its own words."""
    lines = [line for line in output.splitlines() if line and "to syslog" not in line]
    cause = " ".join(lines) or "it says nothing"
    hint = ""
    if "routable" in cause:
        hint = "passt takes a default route of the lab's place: give the lab an uplink"
    return NetorchError(
        f"failed to start passt for {nic.describe()} of guest {guest}: {cause}", hint
    )
