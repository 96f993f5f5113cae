"""The shapes of guests whose QEMU command lines are held by golden files and run by tests/qemu."""

import msgspec

from netorch.model import Forward
from netorch.resources import DiskLayer, Guest, GuestBoot, GuestDisk, GuestNic

QUEUES = 8


def guest(**changes: object) -> Guest:
    fields: dict[str, object] = {
        "name": "vm1",
        "image": "tiny",
        "machine": "q35",
        "accel": "tcg",
        "memory": 128,
        "cpus": 1,
        "nics": (nic(1),),
    }
    return Guest(**{**fields, **changes})  # type: ignore[arg-type]


def nic(number: int, model: str = "virtio-net-pci", queues: int = 1) -> GuestNic:
    mac = f"52:54:00:00:00:{number:02x}"
    return GuestNic(id=str(number), mac=mac, model=model, tap=f"vm1-{number}", queues=queues)


def back_end(number: int, backend: str, **fields: object) -> GuestNic:
    return msgspec.structs.replace(nic(number), tap="", backend=backend, **fields)


FORWARD = (
    Forward(port=2222, to=22),
    Forward(port=5353, to=53, protocol="udp", address="0.0.0.0"),
)


def image_disk(format: str, path: str = "/images/base.img") -> GuestDisk:
    """The disk of a guest with an image."""
    layers = (DiskLayer(path, format),)
    return disk("image", "virtio", use="overlay", layers=layers, bootindex=1)


def disk(name: str, bus: str, **changes: object) -> GuestDisk:
    fields: dict[str, object] = {"name": name, "bus": bus, "serial": name, "use": "volume"}
    return GuestDisk(**{**fields, **changes})  # type: ignore[arg-type]


SHAPES = {
    "tiny": guest(),
    "tiny-pc": guest(machine="pc", cpus=2, memory=192),
    "e1000": guest(nics=(nic(1, "e1000"),)),
    "rtl8139": guest(nics=(nic(1, "rtl8139"),)),
    "three-models": guest(nics=(nic(1), nic(2, "e1000"), nic(3, "rtl8139"))),
    "other-models": guest(nics=(nic(1, "e1000e"), nic(2, "vmxnet3"))),
    "back-ends": guest(
        nics=(
            back_end(1, "user", subnet="10.0.2.0/24", forward=FORWARD),
            back_end(2, "user", model="e1000", subnet="10.0.3.0/24"),
            back_end(3, "wire", wire="a-b", end=1),
        )
    ),
    "microvm": guest(machine="microvm", nics=tuple(nic(n, "virtio-net-device") for n in (1, 2, 3))),
    "multi-queue": guest(cpus=QUEUES, nics=(nic(1, queues=QUEUES),)),
    "vnc": guest(vnc="3", video="VGA", nics=()),
    "vnc-socket": guest(vnc="socket", video="virtio-vga", nics=()),
    "qcow2": guest(image="/images/base.img", disks=(image_disk("qcow2"),)),
    "raw": guest(image="/images/base.img", disks=(image_disk("raw"),), machine="pc"),
}

# tests/qemu/labs/test_nic_table.py boots what these have.
ELSEWHERE = ("other-models", "back-ends", "microvm")

# Shapes of other boots, which need files of their own to run.
BOOTS = {
    "network": guest(image="none", nics=(nic(1), nic(2, "e1000")), boot=GuestBoot(nics=(1, 0))),
    "network-then-disk": guest(
        image="/images/base.img",
        disks=(msgspec.structs.replace(image_disk("raw"), bootindex=2),),
        vnc="3",
        video="VGA",
        boot=GuestBoot(nics=(0,)),
    ),
    "kernel-and-disk": guest(
        image="/images/base.img",
        disks=(image_disk("raw"),),
        nics=(),
        boot=GuestBoot(kernel="/boot/vmlinuz", initrd="/boot/initrd", cmdline="quiet", seed=True),
    ),
    "uefi": guest(nics=(), boot=GuestBoot(uefi=True)),
}
