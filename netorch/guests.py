"""QEMU's command line for a guest: pure rendering.

Whatever QEMU has to open is opened by netorch and handed over as a descriptor: taps, the listening
sockets of QMP, serial console and guest agent, and the files behind disks. So QEMU needs no
capability and no path of the person's own, and who connects to a socket need not wait until QEMU
has made it.
Options that hold values of the person's are JSON where QEMU takes JSON: no comma in a value can
become an option. The guest starts stopped (-S); netorch lets it run by QMP when all is in place.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from netorch import disk_devices, nic_devices
from netorch.disk_devices import Source
from netorch.resources import Guest, GuestNic

# What no guest here uses, and what the firmware and the kernel would look for.
_MACHINES = {"q35": "q35,sata=off,smbus=off,vmport=off", "pc": "pc,vmport=off"}

# The processor that shows the guest all that the accelerator can do. The tiny guest has no use for
# TCG's "max", whose features cost it 0.1 s of its boot.
_CPUS = {"kvm": "host", "tcg": "max"}


class Kernel(msgspec.Struct, frozen=True):
    """A guest that boots a kernel directly."""

    kernel: Path
    initrd: Path
    cmdline: str


class Descriptors(msgspec.Struct, frozen=True):
    """What QEMU inherits: listening Unix sockets, for each NIC one tap descriptor a queue, and for
    each disk its files (`netorch.disk_devices.blockdevs`).
    """

    qmp: int
    serial: int
    agent: int
    taps: tuple[tuple[int, ...], ...] = ()
    disks: tuple[tuple[Source, ...], ...] = ()

    def numbers(self) -> list[int]:
        """All of them."""
        queues = [fd for tap in self.taps for fd in tap]
        files = [source.fd for disk in self.disks for source in disk]
        return [self.qmp, self.serial, self.agent, *queues, *files]


def argv(
    guest: Guest, *, program: str, accel: str, kernel: Kernel | None, fds: Descriptors, log: str
) -> list[str]:
    """The command line. `accel` is kvm or tcg; `log`, from QEMU's directory, is the console's.
    Without a `kernel` the guest boots from a disk.
    """
    return [
        *(program, "-name", f"guest={guest.name},process=qemu:{guest.name}"),
        *("-no-user-config", "-nodefaults", "-display", "none", "-S"),
        *(
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        ),
        *("-machine", f"{_MACHINES[guest.machine]},usb=off,dump-guest-core=off"),
        *("-accel", accel),
        *(() if guest.image == "tiny" and accel == "tcg" else ("-cpu", _CPUS[accel])),
        *("-smp", f"cpus={guest.cpus}", "-m", f"size={guest.memory}M"),
        *_character_devices(fds, log),
        *(word for port in nic_devices.ports(guest.ports) for word in _json("-device", port)),
        *(
            word
            for index, nic in enumerate(guest.nics)
            for word in _nic(index, nic, fds.taps[index], guest.port_of(index))
        ),
        *(_kernel(guest, kernel) if kernel else ()),
        *_disks(guest, fds.disks),
        *_json("-object", {"qom-type": "rng-builtin", "id": "rng"}),
        *_json("-device", {"driver": "virtio-rng-pci", "rng": "rng"}),
        *_json("-device", {"driver": "virtio-serial-pci", "id": "ports"}),
        *_json(
            "-device",
            {"driver": "virtserialport", "chardev": "agent", "name": "org.qemu.guest_agent.0"},
        ),
        *screen(guest),
    ]


def needs_network(guest: Guest) -> bool:
    """Whether QEMU itself opens connections or ports, in the network namespace that it runs in."""
    return guest.vnc not in ("", "socket")


def _character_devices(fds: Descriptors, log: str) -> Iterator[str]:
    """QMP, the serial console with its log, and the guest agent's channel."""
    yield from ("-chardev", f"socket,id=qmp,fd={fds.qmp},server=on,wait=off")
    yield from ("-mon", "chardev=qmp,mode=control")
    log = log.replace(",", ",,")
    yield from (
        "-chardev",
        f"socket,id=serial,fd={fds.serial},server=on,wait=off,logfile={log},logappend=on",
    )
    yield from ("-serial", "chardev:serial")
    yield from ("-chardev", f"socket,id=agent,fd={fds.agent},server=on,wait=off")


def _nic(index: int, nic: GuestNic, queues: Sequence[int], port: str) -> Iterator[str]:
    plugged = nic_devices.Plugged(nic=nic, index=index, port=port)
    yield from _json("-object", nic_devices.spec(plugged))
    yield from _json("-netdev", nic_devices.netdev(nic, queues))
    yield from _json("-device", nic_devices.device(nic, port))


def _kernel(guest: Guest, boot: Kernel) -> Iterator[str]:
    yield from ("-kernel", str(boot.kernel), "-initrd", str(boot.initrd))
    yield from ("-append", f"{boot.cmdline} netorch.hostname={guest.name}")


def _disks(guest: Guest, sources: Sequence[Sequence[Source]]) -> Iterator[str]:
    for option, value in disk_devices.options(guest.disks, sources, guest.disk_ports()):
        yield from (option, value) if isinstance(value, str) else _json(option, value)


def screen(guest: Guest) -> Iterator[str]:
    """The display adapter, and where VNC viewers find it. The path is from QEMU's directory, the
    lab's: a socket's has at most 107 bytes.
    """
    if guest.vnc == "socket":
        yield from ("-vnc", f"unix:{vnc_socket(guest.name)}")
    elif guest.vnc:
        yield from ("-vnc", f"127.0.0.1:{guest.vnc}")
    if guest.video:
        yield from _json("-device", {"driver": guest.video})


def vnc_socket(guest: str) -> str:
    """The path of a guest's VNC socket, from the run directory of the lab."""
    return f"guests/{guest}/vnc.sock"


def _json(option: str, value: dict[str, object]) -> tuple[str, str]:
    return option, json.dumps(value)
