"""QEMU's two halves of a guest's NIC, as the objects that QEMU takes: pure rendering.

`netdev` is the back-end and `device` the front-end. The command line (-netdev, -device) and QMP
(netdev_add, device_add) take the same objects, so a NIC that is added to a running guest is the one
that a start would have made.

Back-ends get what they need as descriptors: a tap's queues, the socket that leads to passt. The
exceptions are "user", which opens sockets as its guest does, and "wire". A wire is a pair of Unix
datagram sockets in the lab's run directory, QEMU's working directory. Each QEMU binds its own end
and sends to the other's name, so either may start first and be started again. A stream knows who
has to be there first, and before QEMU 8.0 its client can't connect again; a descriptor of a
connected datagram socket would be lost with the first QEMU that ends.
"""

from collections.abc import Sequence
from typing import NamedTuple

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


def netdev(index: int, nic: GuestNic, ends: Ends) -> dict[str, object]:
    """The back-end."""
    backend: dict[str, object] = {"type": TYPES[nic.backend], "id": f"net{index}"}
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


def device(index: int, nic: GuestNic) -> dict[str, object]:
    """The front-end."""
    frontend = {**MODELS[nic.model], "netdev": f"net{index}", "mac": nic.mac}
    if nic.queues > 1:
        frontend["mq"] = True
    if nic.queues > 1 and nic.model == "virtio-net-pci":
        # An MSI-X vector for each direction of each queue, one for control, one for configuration.
        frontend["vectors"] = 2 * nic.queues + 2
    return frontend


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
