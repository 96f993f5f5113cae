"""From a guest of the file to the resource, as far as that depends on nothing else in the file."""

from netorch.model import Guest
from netorch.resources import Guest as RunningGuest
from netorch.resources import GuestBoot
from netorch.topology import memory_mib


def _display(guest: Guest) -> str:
    if isinstance(guest.vnc, bool):
        return "socket" if guest.vnc else ""
    return str(guest.vnc)


def bare_guest(name: str, guest: Guest) -> RunningGuest:
    """The guest as far as it depends on itself alone: without its NICs and disks."""
    return RunningGuest(
        name=name,
        image=guest.image,
        machine=guest.machine,
        accel=guest.accel,
        memory=memory_mib(guest.memory),
        cpus=guest.cpus,
        vnc=_display(guest),
        video=guest.video or ("" if guest.vnc is False else "VGA"),
        boot=boot_of(guest),
        ports=ports_of(guest),
    )


def boot_of(guest: Guest, nics: tuple[int, ...] = ()) -> GuestBoot:
    return GuestBoot(
        kernel=guest.kernel or "",
        initrd=guest.initrd or "",
        cmdline=guest.cmdline or "",
        nics=nics,
        uefi=guest.firmware == "uefi",
        seed=bool(guest.user_data or guest.ssh_keys),
    )


def ports_of(guest: Guest) -> int:
    """Each costs a start some hundredths of a second; a `pc` has hot-plug without any."""
    if guest.machine != "q35":
        return 0
    return 4 if guest.ports is None else guest.ports
