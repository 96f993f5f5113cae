"""The shapes of guests whose QEMU command lines are held by golden files and run by tests/qemu."""

from netorch.resources import DiskLayer, Guest, GuestDisk, GuestNic

QUEUES = 2


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
    "multi-queue": guest(cpus=2, nics=(nic(1, queues=QUEUES),)),
    "vnc": guest(vnc="3", video="VGA", nics=()),
    "vnc-socket": guest(vnc="socket", video="virtio-vga", nics=()),
    "qcow2": guest(image="/images/base.img", disks=(image_disk("qcow2"),)),
    "raw": guest(image="/images/base.img", disks=(image_disk("raw"),), machine="pc"),
}
