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

from netorch import boot_devices, disk_devices, nic_devices
from netorch.boot_devices import Firmware, Kernel
from netorch.disk_devices import Source
from netorch.nic_devices import Ends
from netorch.resources import Guest, GuestNic

# What no guest here uses, and what the firmware and the kernel would look for.
_MACHINES = {
    "q35": "q35,sata=off,smbus=off,vmport=off,usb=off",
    "pc": "pc,vmport=off,usb=off",
    "microvm": "microvm,usb=off",
}

# The processor that shows the guest all that the accelerator can do. The tiny guest has no use for
# TCG's "max", whose features cost it 0.1 s of its boot.
_CPUS = {"kvm": "host", "tcg": "max"}

# What QEMU itself calls the memory of a q35, where nobody names it: a saved state names it, too.
_RAM = "pc.ram"


class Boot(msgspec.Struct, frozen=True, kw_only=True):
    """What a guest boots besides its disks: a kernel, by which firmware, and the seed that its
    cloud-init finds. By its `identity`, another one of the same length in each QEMU, a copy of
    tiny knows that it is one (netorch.system.templates).
    """

    kernel: Kernel | None = None
    firmware: Firmware | None = None
    seed_fd: int | None = None
    identity: str = ""


class Ram(msgspec.Struct, frozen=True):
    """A file that is the guest's memory, or where it is `private`, what that starts from."""

    file: Path
    private: bool


class Descriptors(msgspec.Struct, frozen=True):
    """What QEMU inherits: listening Unix sockets, for each NIC what its back-end needs, and for
    each disk its files (`netorch.disk_devices.blockdevs`).
    """

    qmp: int
    serial: int
    agent: int
    nics: tuple[Ends, ...] = ()
    disks: tuple[tuple[Source, ...], ...] = ()

    def numbers(self) -> list[int]:
        """All of them."""
        back_ends = [int(fd) for ends in self.nics for fd in (*ends.fds, *ends.vhost)]
        files = [source.fd for disk in self.disks for source in disk]
        return [self.qmp, self.serial, self.agent, *back_ends, *files]


def argv(
    guest: Guest,
    *,
    program: str,
    accel: str,
    boot: Boot,
    fds: Descriptors,
    log: str,
    incoming: bool = False,
    ram: Ram | None = None,
    spares: Sequence[str] = (),
) -> list[str]:
    """The command line. `accel` is kvm or tcg; `log`, from QEMU's directory, is the console's.
    Without a kernel the guest boots from a disk, or from the network; `incoming`, it does not boot,
    and its state will come by QMP (migrate-incoming). `spares` are the MACs of NICs without a
    back-end, where a template's copies have theirs.
    """
    return [
        *(program, "-name", f"guest={guest.name},process=qemu:{guest.name}"),
        *("-no-user-config", "-nodefaults", "-display", "none", "-S"),
        *(
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        ),
        *("-machine", _machine(guest, boot) + (f",memory-backend={_RAM}" if ram else "")),
        *("-accel", accel),
        *(() if guest.image == "tiny" and accel == "tcg" else ("-cpu", _CPUS[accel])),
        *("-smp", f"cpus={guest.cpus}", "-m", f"size={guest.memory}M"),
        *(_json("-object", _memory(guest, ram)) if ram else ()),
        *_character_devices(fds, log),
        *(word for port in nic_devices.ports(guest.ports) for word in _json("-device", port)),
        *(
            word
            for index, nic in enumerate(guest.nics)
            for word in _nic(guest, index, nic, fds.nics[index])
        ),
        *(
            word
            for index, mac in enumerate(spares)
            for word in _json("-device", nic_devices.spare(mac, guest.port_of(index)))
        ),
        *(boot_devices.kernel_options(boot.kernel) if boot.kernel else ()),
        *_disks(guest, fds.disks),
        *(_firmware(boot.firmware) if boot.firmware else ()),
        *(_seed(boot.seed_fd) if boot.seed_fd is not None else ()),
        *_json("-object", {"qom-type": "rng-builtin", "id": "rng"}),
        *_json("-device", {"driver": _virtio(guest, "rng"), "rng": "rng"}),
        *_json("-device", {"driver": _virtio(guest, "serial"), "id": "ports"}),
        *_json(
            "-device",
            {"driver": "virtserialport", "chardev": "agent", "name": "org.qemu.guest_agent.0"},
        ),
        *(_generation(boot) if guest.machine != "microvm" else ()),
        *screen(guest),
        *(("-incoming", "defer") if incoming else ()),
    ]


def needs_network(guest: Guest) -> bool:
    """Whether QEMU itself opens connections or ports, in the network namespace that it runs in.
    All else it is handed, or has as Unix sockets.
    """
    listens = guest.vnc not in ("", "socket")
    return listens or any(nic.backend == "user" for nic in guest.nics)


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


def _machine(guest: Guest, boot: Boot) -> str:
    options = f"{_MACHINES[guest.machine]},dump-guest-core=off"
    if guest.boot.nics and not guest.video:
        options += ",graphics=off"  # SeaBIOS and iPXE then speak on the serial console
    return options + (boot_devices.FLASH_OPTIONS if boot.firmware else "")


def _memory(guest: Guest, ram: Ram) -> dict[str, object]:
    return {
        "qom-type": "memory-backend-file",
        "id": _RAM,
        "mem-path": str(ram.file),
        "size": guest.memory << 20,
        "share": not ram.private,
        "merge": False,
    }


def _generation(boot: Boot) -> Iterator[str]:
    """What tells a guest that it goes on in another QEMU: as a copy, or restored."""
    yield from _json("-device", {"driver": "vmgenid", "guid": "auto"})
    if boot.identity:
        yield from ("-fw_cfg", f"name=opt/netorch/identity,string={boot.identity}")


def _nic(guest: Guest, index: int, nic: GuestNic, ends: Ends) -> Iterator[str]:
    port = guest.port_of(index)
    device = nic_devices.device(nic, port)
    if index in guest.boot.nics:
        device = boot_devices.from_network(device, 1 + guest.boot.nics.index(index))
    plugged = nic_devices.Plugged(nic=nic, index=index, port=port)
    yield from _json("-object", nic_devices.spec(plugged))
    yield from _json("-netdev", nic_devices.netdev(nic, ends))
    yield from _json("-device", device)


def _disks(guest: Guest, sources: Sequence[Sequence[Source]]) -> Iterator[str]:
    for option, value in disk_devices.options(guest.disks, sources, guest.disk_ports()):
        yield from (option, value) if isinstance(value, str) else _json(option, value)


def _virtio(guest: Guest, kind: str) -> str:
    """A virtio device's name: a microvm has no PCI, and its devices are found by virtio-mmio."""
    return f"virtio-{kind}-{'device' if guest.machine == 'microvm' else 'pci'}"


def _firmware(firmware: Firmware) -> Iterator[str]:
    yield from ("-add-fd", f"fd={firmware.fd},set={boot_devices.FIRMWARE_SET}")
    for node in boot_devices.flash(firmware):
        yield from _json("-blockdev", node)


def _seed(fd: int) -> Iterator[str]:
    yield from ("-add-fd", f"fd={fd},set={boot_devices.SEED_SET}")
    yield from _json("-blockdev", boot_devices.seed_blockdev())
    yield from _json("-device", boot_devices.seed_device())


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
