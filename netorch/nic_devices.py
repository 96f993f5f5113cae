"""QEMU's two halves of a guest's NIC, as the objects that QEMU takes: pure rendering.

`netdev` is the back-end and `device` the front-end. The command line (-netdev, -device) and QMP
(netdev_add, device_add) take the same objects, so a NIC that is added to a running guest is the one
that a start would have made. `spec` goes with them: an object without any effect that carries the
GuestNic as JSON, so that QEMU itself can be asked what its NICs were made from. All three are named
by the NIC's MAC, which no other NIC of the guest has.

Back-ends get what they need as descriptors: a tap's queues, the socket that leads to passt. The
exceptions are "user", which opens sockets as its guest does, and "wire". A wire is a pair of Unix
datagram sockets in the lab's run directory, QEMU's working directory. Each QEMU binds its own end
and sends to the other's name, so either may start first and be started again. A stream knows who
has to be there first, and before QEMU 8.0 its client can't connect again; a descriptor of a
connected datagram socket would be lost with the first QEMU that ends.
"""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from netorch.resources import Guest, GuestNic

WIRES = "wires"  # in the run directory

# The front-ends. No option ROM: nothing boots from the network, and loading one costs time.
MODELS: dict[str, dict[str, object]] = {
    "virtio-net-pci": {"driver": "virtio-net-pci", "romfile": ""},
    # Linux's driver takes 2 s more until it has a carrier if it has to negotiate for one.
    "e1000": {"driver": "e1000", "romfile": "", "autonegotiation": False},
    "e1000e": {"driver": "e1000e", "romfile": ""},
    "rtl8139": {"driver": "rtl8139", "romfile": ""},
    "vmxnet3": {"driver": "vmxnet3", "romfile": ""},
    "virtio-net-device": {"driver": "virtio-net-device"},  # has no option ROM
}
VIRTIO = ("virtio-net-pci", "virtio-net-device")

# What -netdev calls the back-ends.
TYPES = {"tap": "tap", "user": "user", "passt": "stream", "wire": "dgram"}

SPEC = ".spec"
_PORT_SLOT = 0x10  # behind what stands on the root bus itself


class Plugged(msgspec.Struct, frozen=True, kw_only=True):
    """What a spec carries: a NIC, its place among the guest's NICs, and its port ("": none)."""

    nic: GuestNic
    index: int
    port: str = ""


def device_id(mac: str) -> str:
    return f"nic-{mac.replace(':', '')}"


def netdev_id(mac: str) -> str:
    return f"net-{mac.replace(':', '')}"


class Ends(NamedTuple):
    """What QEMU inherits for a NIC: a tap's queues or the socket of its passt, and for each queue
    a descriptor of /dev/vhost-net, where the kernel is to move the packets. In QMP, names of
    descriptors.
    """

    fds: Sequence[int | str] = ()
    vhost: Sequence[int | str] = ()


def wants_vhost(nic: GuestNic, accel: str) -> bool:
    """Is the kernel to move the packets? Under TCG it would have to ask QEMU for each access to
    the guest's memory map, and gains nothing over a processor that QEMU has to emulate anyway.
    """
    return accel == "kvm" and nic.backend == "tap" and nic.model in VIRTIO


def netdev(nic: GuestNic, ends: Ends) -> dict[str, object]:
    """The back-end."""
    backend: dict[str, object] = {"type": TYPES[nic.backend], "id": netdev_id(nic.mac)}
    if nic.backend == "tap":
        return backend | _descriptors("fd", ends.fds) | _vhost(ends)
    if nic.backend == "user":
        forwards = [{"str": _hostfwd(nic, n)} for n in range(len(nic.forward))]
        backend |= {"net": nic.subnet, "ipv6": False}
        return backend | ({"hostfwd": forwards} if forwards else {})
    if nic.backend == "passt":
        return backend | {"server": False, "addr": {"type": "fd", "str": str(ends.fds[0])}}
    here, there = (f"{WIRES}/{nic.wire}.{end}" for end in (nic.end, 1 - nic.end))
    return backend | {
        "local": {"type": "unix", "path": here},
        "remote": {"type": "unix", "path": there},
    }


def device(nic: GuestNic, port: str = "") -> dict[str, object]:
    """The front-end."""
    frontend = {
        **MODELS[nic.model],
        "id": device_id(nic.mac),
        "netdev": netdev_id(nic.mac),
        "mac": nic.mac,
    }
    if port:
        frontend["bus"] = port
    if nic.queues > 1:
        frontend["mq"] = True
    if nic.queues > 1 and nic.model == "virtio-net-pci":
        # An MSI-X vector for each direction of each queue, one for control, one for configuration.
        frontend["vectors"] = 2 * nic.queues + 2
    return frontend


def spare(mac: str, port: str) -> dict[str, object]:
    """The front-end of a virtio NIC, without its back-end."""
    return {**MODELS["virtio-net-pci"], "mac": mac, "bus": port}


def spec(plugged: Plugged) -> dict[str, object]:
    """The object that says what the NIC was made from; see `said`."""
    return carrier(device_id(plugged.nic.mac), plugged)


def carrier(device: str, carried: msgspec.Struct) -> dict[str, object]:
    """The object beside a device that carries a value as JSON, without any effect."""
    return {
        "qom-type": "authz-simple",
        "id": device + SPEC,
        "identity": msgspec.json.encode(carried).decode(),
    }


def said(name: str, identity: str) -> Plugged:
    """What the spec of this name carries; a NIC that nobody asked for if that can't be read, since
    another version of netorch wrote it.
    """
    try:
        return msgspec.json.decode(identity, type=Plugged)
    except msgspec.DecodeError:
        digits = name.removesuffix(SPEC).removeprefix(device_id(""))
        mac = ":".join(digits[at : at + 2] for at in range(0, len(digits), 2))
        return Plugged(nic=GuestNic(id="", mac=mac, model="", tap="", attached=False), index=0)


def ports(count: int) -> list[dict[str, object]]:
    """PCIe ports for what comes and goes, eight to a slot: each has room for one device.

    The last one comes first: where several ports have something new at once, the guest hears of the
    port first that was made last (QEMU, hw/i386/acpi-build.c, build_append_pci_bus_devices, goes
    through a list that grows at its head), and NICs are to be found in their order.
    """
    return [
        {
            "driver": "pcie-root-port",
            "id": f"port{number}",
            "chassis": number + 1,
            "addr": f"{_PORT_SLOT + number // 8:x}.{number % 8}",
            "multifunction": True,
        }
        for number in reversed(range(count))
    ]


def idle_queues(guest: Guest) -> list[str]:
    """What to say of queues that the guest has no processor for: Linux uses one for each."""
    return [
        f"guest {guest.name}: NIC {index} has {nic.queues} queues, and the guest uses no more of "
        f"them than it has cpus ({guest.cpus})"
        for index, nic in enumerate(guest.nics)
        if nic.queues > guest.cpus
    ]


def passt_options(nic: GuestNic) -> list[str]:
    """passt's options: the subnet with the addresses that QEMU's own stack has in it, and ports.
    Of a protocol that isn't named, passt forwards nothing.
    """
    subnet, _, length = nic.subnet.partition("/")
    base = subnet.removesuffix(".0")
    words = ["--address", f"{base}.15", "--netmask", length, "--gateway", f"{base}.2"]
    if nic.model not in VIRTIO:
        words += ["--mtu", "1500"]  # passt's own 65520 is more than other devices take
    for protocol, option in (("tcp", "-t"), ("udp", "-u")):
        specs = [
            f"{one.address}/{one.port}:{one.to or one.port}"
            for one in nic.forward
            if one.protocol == protocol
        ]
        for spec in specs or ["none"]:
            words += [option, spec]
    return words


def _hostfwd(nic: GuestNic, number: int) -> str:
    one = nic.forward[number]
    return f"{one.protocol}:{one.address}:{one.port}-:{one.to or one.port}"


def _descriptors(name: str, fds: Sequence[int | str]) -> dict[str, object]:
    if len(fds) == 1:
        return {name: str(fds[0])}
    return {f"{name}s": ":".join(map(str, fds))}


def _vhost(ends: Ends) -> dict[str, object]:
    return {"vhost": True, **_descriptors("vhostfd", ends.vhost)} if ends.vhost else {}
