"""What the installed QEMU has: its machines, its NICs, its network back-ends.

Distributions build QEMU with fewer devices than the sources have, so QEMU itself is asked
(`-device help`), which boots nothing and takes 0.2 s. The answer is kept in the cache directory
under the identity of the binary: path, size and time of change.
"""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import msgspec

from netorch.errors import NetorchError, dotted
from netorch.nic_devices import TYPES
from netorch.resources import Guest
from netorch.system.cache import cache_directory


class QemuDevices(msgspec.Struct, frozen=True):
    """Names as -machine, -device and -netdev take them."""

    machines: tuple[str, ...]
    nics: tuple[str, ...]
    netdevs: tuple[str, ...]

    @property
    def version(self) -> tuple[int, int] | None:
        """Of its newest machine; None where a distribution names machines its own way."""
        found = [re.fullmatch(r"pc-q35-(\d+)\.(\d+)", machine) for machine in self.machines]
        return max(((int(one[1]), int(one[2])) for one in found if one), default=None)


class _Known(msgspec.Struct):
    """The cache's file."""

    path: str
    size: int
    changed: int  # nanoseconds since 1970
    devices: QemuDevices


def lacking(guests: Iterable[Guest], devices: QemuDevices) -> Iterator[str]:
    """What these guests need and QEMU has not, a sentence each."""
    for guest in guests:
        if guest.machine not in devices.machines:
            yield _lack(("guests", guest.name, "machine"), guest.machine, devices.machines)
        for index, nic in enumerate(guest.nics):
            path = ("guests", guest.name, "nics", index)
            if nic.model not in devices.nics:
                yield _lack((*path, "model"), nic.model, devices.nics)
            if (netdev := TYPES[nic.backend]) not in devices.netdevs:
                key = "wire" if nic.wire else "backend"
                yield _lack((*path, key), f"{netdev} (-netdev)", devices.netdevs)


def qemu_devices(qemu: str) -> QemuDevices:
    """What the program `qemu` has. Raises NetorchError if it doesn't say."""
    path = Path(qemu).resolve()
    found = path.stat()
    memory = cache_directory() / f"qemu-{path.name}"
    with contextlib.suppress(OSError, msgspec.DecodeError):  # none, or somebody else's
        known = msgspec.json.decode(memory.read_bytes(), type=_Known)
        if (known.path, known.size, known.changed) == (str(path), found.st_size, found.st_mtime_ns):
            return known.devices
    devices = _ask(qemu)
    known = _Known(str(path), found.st_size, found.st_mtime_ns, devices)
    with contextlib.suppress(OSError):  # a cache that can't be written, as in containers
        memory.parent.mkdir(parents=True, exist_ok=True)
        new = memory.with_suffix(f".{os.getpid()}")
        new.write_bytes(msgspec.json.encode(known))
        new.rename(memory)
    return devices


def parse(texts: Mapping[str, str]) -> QemuDevices:
    """QEMU's answers to `-machine help`, `-device help` and `-netdev help`."""
    machines = [line.split()[0] for line in texts["machine"].splitlines()[1:] if line.strip()]
    section = texts["device"].partition("Network devices:\n")[2].partition("\n\n")[0]
    nics = [line.split('"')[1] for line in section.splitlines() if line.startswith('name "')]
    netdevs = [line.strip() for line in texts["netdev"].splitlines()[1:] if line.strip()]
    return QemuDevices(tuple(machines), tuple(nics), tuple(netdevs))


def _ask(qemu: str) -> QemuDevices:
    import subprocess

    texts = {}
    for option in ("machine", "device", "netdev"):
        command = [qemu, f"-{option}", "help"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = (done.stderr or done.stdout).strip()
            raise NetorchError(f"failed to ask {qemu} for its devices: {said}")
        texts[option] = done.stdout
    devices = parse(texts)
    if not (devices.machines and devices.nics and devices.netdevs):
        raise NetorchError(f"failed to ask {qemu} for its devices: its answer is not understood")
    return devices


def _lack(path: tuple[str | int, ...], wanted: str, there: Iterable[str]) -> str:
    return f"{dotted(path)}: the installed QEMU has no {wanted}; it has {', '.join(there)}"
