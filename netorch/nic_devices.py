"""QEMU's two halves of a guest's NIC, as the objects that QEMU takes: pure rendering.

`netdev` is the back-end and `device` the front-end. The command line (-netdev, -device) and QMP
(netdev_add, device_add) take the same objects, so a NIC that is added to a running guest is the one
that a start would have made. `spec` goes with them: an object without any effect that carries the
GuestNic as JSON, so that QEMU itself can be asked what its NICs were made from.

All three are named by the NIC's MAC, which no other NIC of the guest has.
"""

from collections.abc import Sequence

import msgspec

from netorch.resources import GuestNic

# The front-ends. No option ROM: nothing boots from the network, and loading one costs time.
MODELS: dict[str, dict[str, object]] = {
    "virtio-net-pci": {"driver": "virtio-net-pci", "romfile": ""},
    # Linux's driver takes 2 s more until it has a carrier if it has to negotiate for one.
    "e1000": {"driver": "e1000", "romfile": "", "autonegotiation": False},
    "rtl8139": {"driver": "rtl8139", "romfile": ""},
}

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


def netdev(nic: GuestNic, queues: Sequence[int | str]) -> dict[str, object]:
    """The back-end; `queues` are the tap's open descriptors: numbers, or names given by getfd."""
    backend: dict[str, object] = {"type": "tap", "id": netdev_id(nic.mac)}
    if len(queues) == 1:
        return backend | {"fd": str(queues[0])}
    return backend | {"fds": ":".join(map(str, queues))}


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
        # An MSI-X vector for each direction of each queue, one for control, one for configuration.
        frontend |= {"mq": True, "vectors": 2 * nic.queues + 2}
    return frontend


def spec(plugged: Plugged) -> dict[str, object]:
    """The object that says what the NIC was made from; see `said`."""
    return {
        "qom-type": "authz-simple",
        "id": device_id(plugged.nic.mac) + SPEC,
        "identity": msgspec.json.encode(plugged).decode(),
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
    """PCIe ports for what comes and goes, eight to a slot: each has room for one device."""
    return [
        {
            "driver": "pcie-root-port",
            "id": f"port{number}",
            "chassis": number + 1,
            "addr": f"{_PORT_SLOT + number // 8:x}.{number % 8}",
            "multifunction": True,
        }
        for number in range(count)
    ]
