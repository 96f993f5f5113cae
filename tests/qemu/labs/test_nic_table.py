"""Every front-end on every back-end: each NIC has its address, and moves 10 MB each way.

Three guests carry all combinations, since booting is what takes time:
- `all`, q35, has every PCI model on a network, behind QEMU's own stack, behind a passt, and on a
  wire to
- `far`, q35, which has every PCI model at the other ends of the wires, in another order
- `micro`, microvm, has its one model on each back-end, the wire to `far` too.

Which models there are is asked: of QEMU, and, of the drivers, of the guest.

What a guest's NIC exchanges data with, this machine or `far`, serves two ports: one sends data, one
answers with the digest of what it gets. Both close the connection first: passt harms one whose
guest has closed its direction and not yet got everything (docs/guests-nics.md).
"""

import hashlib
import os
import socket
import subprocess
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple

from netorch.nic_devices import MODELS
from netorch.system.back_ends import passt_reasons
from netorch.system.qemu_devices import QemuDevices, qemu_devices
from netorch.system.starting import program
from tests import guest_shapes
from tests.isolation import ip
from tests.qemu.labs.lab import SECONDS, Lab, Machine

SIZE = 10 << 20
SENDS, TAKES = 7001, 7002
MMIO = "virtio-net-device"
DRIVERS = {
    "virtio-net-pci": "virtio_net",
    "virtio-net-device": "virtio_net",
    "e1000": "e1000",
    "e1000e": "e1000e",
    "rtl8139": "8139cp",
    "vmxnet3": "vmxnet3",
}


class End(NamedTuple):
    """A NIC of the lab. `far` is the address that it exchanges data with."""

    guest: str
    model: str
    backend: str
    number: int

    @property
    def mac(self) -> str:
        return f"52:54:00:{ord(self.guest[0]):02x}:{ord(self.backend[0]):02x}:{self.number:02x}"

    @property
    def toml(self) -> str:
        keys = {"tap": f'network = "n{self.number}"', "wire": f'wire = "w{self.number}"'}
        what = keys.get(self.backend, f'backend = "{self.backend}"')
        return f'{{ {what}, model = "{self.model}", mac = "{self.mac}" }}'

    @property
    def far(self) -> str:
        network = {"tap": "10.8", "user": "10.7", "passt": "10.6", "wire": "10.9"}[self.backend]
        return f"{network}.{self.number}.1"

    @property
    def own(self) -> str:
        """The address that it gives itself, on a wire."""
        return f"10.9.{self.number}.{1 if self.guest == 'far' else 2}"


def table() -> list[End]:
    qemu = program("qemu-system-x86_64")
    assert qemu is not None
    has = qemu_devices(qemu)
    backends = ["tap", "user", "wire", *(["passt"] if program("passt") else [])]
    pci = [model for model in MODELS if model in has.nics and model != MMIO]
    ends = [End("all", model, b, n) for b in backends for n, model in enumerate(pci)]
    ends = [end for end in ends if not (end.backend == "passt" and refused(end.model, has))]
    ends += [End("far", model, "wire", n) for n, model in enumerate([*pci[1:], pci[0]])]
    if "microvm" in has.machines:
        ends += [End("micro", MMIO, b, len(pci)) for b in backends]
        ends.append(End("far", pci[0], "wire", len(pci)))
    return ends


def refused(model: str, has: QemuDevices) -> bool:
    """Whether netorch refuses this model on the installed QEMU and passt."""
    nic = guest_shapes.back_end(1, "passt", model=model)
    shape = guest_shapes.guest(nics=(nic,))
    return bool(list(passt_reasons([shape], has)))


def topology(ends: list[End]) -> str:
    numbers = [end.number for end in ends if end.backend == "tap"]
    text = "".join(f'[networks.n{n}]\naddress = "10.8.{n}.1/24"\n' for n in numbers)
    for guest in dict.fromkeys(end.guest for end in ends):
        nics = ",\n    ".join(end.toml for end in ends if end.guest == guest)
        machine = "microvm" if guest == "micro" else "q35"
        text += f'[guests.{guest}]\nmachine = "{machine}"\nnics = [\n    {nics},\n]\n'
        if guest == "far":  # it asks for no address, so nothing else says that its agent is there
            text += 'ready = "agent"\n'
    return text


def test_every_front_end_on_every_back_end(machine: Machine) -> None:
    ends = table()
    guests = [guest for guest in ("far", "all", "micro") if any(e.guest == guest for e in ends)]
    data = os.urandom(SIZE)
    with way_out(ends), served(data):
        lab = machine.up("table", topology(ends))
        for guest in guests:
            settled(lab, guest, [end for end in ends if end.guest == guest])
        digest = serve_from(lab, "far")
        digests = {end: digest if end.backend == "wire" else md5(data) for end in ends}
        for guest in guests[1:]:
            exchanged(lab, guest, {e: digests[e] for e in ends if e.guest == guest})
        lab.unchanged()


def settled(lab: Lab, guest: str, ends: list[End]) -> None:
    """Hold that each NIC has its driver and its address. Wires get theirs from here, and what is
    behind "user" and "passt" a route to the address that this NIC alone is to reach.
    """
    lines = []
    for end in ends:
        own = f"ip addr add {end.own}/24 dev $nic; " if end.backend == "wire" else ""
        routed = end.backend in ("user", "passt")
        route = f"ip route add {end.far} via ${{address%.*}}.2 dev $nic; " if routed else ""
        lines.append(
            f"nic=$(grep -l {end.mac} /sys/class/net/*/address); "
            "nic=${nic%/*}; nic=${nic##*/}; "
            f"{own} until address=$(ip -4 -o addr show dev $nic | grep -o 'inet [0-9.]*'); "
            f"do sleep 0.1; done; address=${{address#inet }}; {route}"
            "driver=$(readlink /sys/class/net/$nic/device/driver); echo ${driver##*/} $address"
        )
    found = lab.sh(guest, "\n".join(lines)).splitlines()
    played = iter(f"10.0.{n}.15" for n in range(2, 100))
    leases = {end: f"10.8.{end.number}." for end in ends if end.backend == "tap"}
    for end, line in zip(ends, found, strict=True):
        driver, address = line.split()
        assert driver == DRIVERS[end.model], end
        if end in leases:
            assert address.startswith(leases[end]), end
        else:
            assert address == (end.own if end.backend == "wire" else next(played)), end


def serve_from(lab: Lab, guest: str) -> str:
    """Let a guest serve; the digest of its data."""
    serving = (f"-p {SENDS} -e cat /data", f"-p {TAKES} -e sh -c 'head -c {SIZE} | md5sum'")
    background = " ".join(f"(nc -ll {words} < /dev/null > /dev/null 2>&1 &);" for words in serving)
    ready = "; ".join(
        f"until grep -q ':{port:04X} .* 0A ' /proc/net/tcp*; do usleep 10000; done"
        for port in (SENDS, TAKES)
    )
    made = lab.sh(guest, f"head -c {SIZE} /dev/urandom > /data; md5sum /data; {background} {ready}")
    return made.split()[0]


def exchanged(lab: Lab, guest: str, digests: Mapping[End, str]) -> None:
    """Hold that each NIC brings what it was sent, and takes what is sent to it."""
    up = sending(lab, guest)
    for end in sorted(digests, key=lambda end: end.backend == "passt"):  # which may restart it
        for left in (2, 1, 0):
            try:
                pulled, said = moved(lab, end)
                break
            except (AssertionError, subprocess.TimeoutExpired):
                if end.backend != "passt" or not left:
                    raise
                # A busy machine was late: docs/guests-nics.md. The guest gets a new passt.
                lab.machine.netorch("restart", "--lab", lab.name, guest)
                settled(lab, guest, list(digests))
                up = sending(lab, guest)
        assert pulled.split()[0] == digests[end], end
        assert said.split()[0] == up, end


def sending(lab: Lab, guest: str) -> str:
    """Make what a guest sends; its digest."""
    # A pipe that nc has open for writing too never ends, so nc doesn't close its direction.
    made = lab.sh(guest, f"mkfifo /pipe; head -c {SIZE} /dev/urandom > /up; md5sum < /up")
    return made.split()[0]


def moved(lab: Lab, end: End) -> list[str]:
    """The digests of what a NIC's guest got, and of what was got from it; fails if a connection
    doesn't end well.
    """
    return lab.sh(
        end.guest,
        f"set -o pipefail; nc {end.far} {SENDS} <> /pipe | md5sum && "
        f"{{ cat /up > /pipe & nc {end.far} {TAKES} <> /pipe; }}",
    ).splitlines()


@contextmanager
def served(data: bytes) -> Iterator[None]:
    """The two ports on this machine."""
    with ThreadPoolExecutor(2) as pool, ExitStack() as listening:
        for port, sent in ((SENDS, data), (TAKES, b"")):
            listener = listening.enter_context(socket.create_server(("0.0.0.0", port)))
            listening.callback(listener.shutdown, socket.SHUT_RDWR)
            pool.submit(serve, listener, sent)
        yield


def serve(listener: socket.socket, sent: bytes) -> None:
    """Send that to each that connects, or answer with the digest of what it sends."""
    while True:
        try:
            connection, _peer = listener.accept()
        except OSError:
            return  # the test is over
        # One that is lost is told of by the guest, whose next one is served.
        with connection, suppress(OSError):
            connection.settimeout(SECONDS)
            if sent:
                connection.sendall(sent)
            else:
                digest, left = hashlib.md5(), SIZE
                while block := connection.recv(min(left, 1 << 16)):
                    digest.update(block)
                    left -= len(block)
                connection.sendall(f"{digest.hexdigest()}  -\n".encode())
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1)  # until all has arrived


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


@contextmanager
def way_out(ends: list[End]) -> Iterator[None]:
    """A default route, which passt looks for, and this machine's addresses beside its networks'."""
    ip("link", "add", "wan", "type", "bridge")
    ip("addr", "add", "10.99.0.2/24", "dev", "wan")
    for end in ends:
        if end.backend in ("user", "passt"):
            ip("addr", "add", f"{end.far}/32", "dev", "wan")
    ip("link", "set", "wan", "up")
    ip("route", "add", "default", "via", "10.99.0.1")
    try:
        yield
    finally:
        ip("link", "del", "wan")
