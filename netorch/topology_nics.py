"""What types can't say about a guest's NICs: front-ends and machines, back-ends, wires, ports.

A NIC is on a network (a tap on its bridge), on a wire to the NIC of another guest, or has a
back-end that leads out of the lab without either. What belongs to one of these means nothing with
the others, and is a mistake there rather than ignored.
"""

from collections.abc import Iterator

from netorch.errors import Finding, Key, dotted, quoted
from netorch.model import Forward, Guest, Nic, Topology
from netorch.topology_values import Wrong, address, nearest

Doubt = tuple[Key, str, str, tuple[Key, ...]]
"""A finding, and what it rests on: it is an echo if one of these is reported already."""

MICROVM = "microvm"
_MMIO = "virtio-net-device"
_SEVERAL_QUEUES = ("virtio-net-pci", _MMIO)
MICROVM_NICS = (
    21  # of a microvm's 24 places (hw/i386/microvm.c); the others are for its disk, port and rng
)
_EVERY = "0.0.0.0"


def model_of(guest: Guest, nic: Nic) -> str:
    """The NIC's model, by default virtio as the machine has it."""
    return nic.model or (_MMIO if guest.machine == MICROVM else "virtio-net-pci")


def nics(topology: Topology) -> Iterator[Doubt]:
    """Everything that is wrong with the guests' NICs, but for their networks and addresses."""
    for name, guest in topology.guests.items():
        path: Key = ("guests", name)
        yield from _machine(path, guest)
        for index, nic in enumerate(guest.nics):
            where: Key = (*path, "nics", index)
            yield from _front_end(where, guest, nic)
            yield from _back_end(where, nic)
            for number, forward in enumerate(nic.forward):
                yield from _forward((*where, "forward", number), forward)
    yield from _wires(topology)
    for finding in _ports(topology):
        yield (*finding, ())


def _machine(path: Key, guest: Guest) -> Iterator[Doubt]:
    if guest.machine != MICROVM:
        return
    machine = ((*path, "machine"),)
    if guest.image != "tiny":
        message = f"a microvm does not boot from {quoted(guest.image)}: its firmware starts no disk"
        yield (*path, "image"), message, '"tiny", or machine = "q35"', machine
    if guest.disks:
        message = "disks are PCI devices, and a microvm has no PCI"
        yield (*path, "disks"), message, 'machine = "q35" has them', machine
    for key, absent in (("vnc", False), ("video", None)):
        if getattr(guest, key) is not absent:
            yield (*path, key), "a microvm has no screen", "netorch console shows it", machine
    for key, usual in (("firmware", "bios"), ("boot", "disk"), ("user_data", None)):
        if getattr(guest, key) != usual:
            message = f"a microvm boots {quoted('tiny')} alone"
            yield (*path, key), message, 'machine = "q35" boots anything', machine
    if len(guest.nics) > MICROVM_NICS:
        message = f"a microvm has room for {MICROVM_NICS} NICs, not for {len(guest.nics)}"
        yield (*path, "nics"), message, 'machine = "q35" has more', machine


def _front_end(where: Key, guest: Guest, nic: Nic) -> Iterator[Doubt]:
    model = model_of(guest, nic)
    machine = (*where[:2], "machine")
    if guest.machine == MICROVM and model != _MMIO:
        message = f"{model} is a PCI device, and a microvm has no PCI"
        yield (*where, "model"), message, f"{quoted(_MMIO)}, or leave it out", (machine,)
    if guest.machine != MICROVM and model == _MMIO:
        message = f"{model} is for a microvm; {guest.machine} has PCI"
        yield (*where, "model"), message, '"virtio-net-pci", or leave it out', (machine,)
    if nic.queues > 1 and model not in _SEVERAL_QUEUES:
        hint = 'several queues need model = "virtio-net-pci"'
        yield (*where, "queues"), f"{model} has one queue", hint, ((*where, "model"),)


def _back_end(where: Key, nic: Nic) -> Iterator[Doubt]:
    """What the NIC is connected to: exactly one thing, and only the keys that belong to it."""
    backend: Key = (*where, "backend")
    wire: Key = (*where, "wire")
    because: tuple[Key, ...] = (backend,)
    unfit: tuple[str, ...] = ("network", "wire", "address", "tap", "queues")
    if nic.backend != "tap":
        what = f'backend = "{nic.backend}"'
    elif nic.wire is not None:
        what, because = "a wire", (wire,)
        unfit = ("network", "address", "tap", "queues", "forward")
    elif nic.network is None:
        hint = 'network = "...", wire = "...", or backend = "user" (no network needed)'
        yield (*where, "network"), "is missing", hint, (backend, wire)
        return
    else:
        what, because = "a network", ((*where, "network"), backend, wire)
        unfit = ("forward",)
    for key in unfit:
        if getattr(nic, key) not in (None, (), 1):
            hint = "leave one of them out"
            if key == "forward":
                hint = 'ports are forwarded by backend = "user" or "passt"'
            yield (*where, key), f"does not go with {what}", hint, because


def _forward(where: Key, forward: Forward) -> Iterator[Doubt]:
    try:
        address(forward.address)
    except Wrong as wrong:
        message = f"{quoted(forward.address)} {wrong.message}"
        yield (*where, "address"), message, f'"127.0.0.1", or "{_EVERY}" for all', ()


def _wires(topology: Topology) -> Iterator[Doubt]:
    """A wire has two ends, in two guests."""
    ends: dict[str, list[Key]] = {}
    for name, guest in topology.guests.items():
        for index, nic in enumerate(guest.nics):
            if nic.wire:
                ends.setdefault(nic.wire, []).append(("guests", name, "nics", index))
    for wire, paths in ends.items():
        for path in paths[2:]:
            taken = " and ".join(dotted(end) for end in paths[:2])
            hint = 'it has two ends; use a network of mode "bridge" for more'
            yield (*path, "wire"), f"the wire {quoted(wire)} has {taken} on it", hint, ()
        if len(paths) == 1:
            meant = nearest(wire, [other for other in ends if other != wire])
            hint = "name it in a NIC of another guest"
            hint = f"did you mean {quoted(meant)}?" if meant else hint
            message = f"nothing is at the other end of the wire {quoted(wire)}"
            yield (*paths[0], "wire"), message, hint, (("guests",),)
        elif paths[0][1] == paths[1][1]:
            message = f"both ends of the wire {quoted(wire)} are in {paths[0][1]}"
            yield (*paths[1], "wire"), message, "a wire leads to another guest", ()


def _ports(topology: Topology) -> Iterator[Finding]:
    """A port of an address is forwarded once; all addresses have it where 0.0.0.0 has it."""
    seen: dict[tuple[str, int], list[tuple[str, Key]]] = {}
    for name, guest in topology.guests.items():
        for index, nic in enumerate(guest.nics):
            for number, one in enumerate(nic.forward):
                path: Key = ("guests", name, "nics", index, "forward", number, "port")
                others = seen.setdefault((one.protocol, one.port), [])
                for other, taken in others:
                    if other == one.address or _EVERY in (other, one.address):
                        message = f"{one.protocol} port {one.port} is taken by {dotted(taken)}"
                        yield path, message, "choose another port, or another address"
                        break
                others.append((one.address, path))
