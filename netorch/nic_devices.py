"""QEMU's two halves of a guest's NIC, as the objects that QEMU takes: pure rendering.

`netdev` is the back-end and `device` the front-end. The command line (-netdev, -device) and QMP
(netdev_add, device_add) take the same objects, so a NIC that is added to a running guest is the one
that a start would have made.
"""

from collections.abc import Sequence

from netorch.resources import GuestNic

# The front-ends. No option ROM: nothing boots from the network, and loading one costs time.
MODELS: dict[str, dict[str, object]] = {
    "virtio-net-pci": {"driver": "virtio-net-pci", "romfile": ""},
    # Linux's driver takes 2 s more until it has a carrier if it has to negotiate for one.
    "e1000": {"driver": "e1000", "romfile": "", "autonegotiation": False},
    "rtl8139": {"driver": "rtl8139", "romfile": ""},
}


def netdev(index: int, queues: Sequence[int]) -> dict[str, object]:
    """The back-end; `queues` are the tap's open descriptors."""
    backend: dict[str, object] = {"type": "tap", "id": f"net{index}"}
    if len(queues) == 1:
        return backend | {"fd": str(queues[0])}
    return backend | {"fds": ":".join(map(str, queues))}


def device(index: int, nic: GuestNic) -> dict[str, object]:
    """The front-end."""
    frontend = {**MODELS[nic.model], "netdev": f"net{index}", "mac": nic.mac}
    if nic.queues > 1:
        # An MSI-X vector for each direction of each queue, one for control, one for configuration.
        frontend |= {"mq": True, "vectors": 2 * nic.queues + 2}
    return frontend
