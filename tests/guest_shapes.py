"""The shapes of guests whose QEMU command lines are held by golden files and run by tests/qemu."""

from netorch.resources import Guest, GuestBoot, GuestNic

QUEUES = 2


def guest(**changes: object) -> Guest:
    fields: dict[str, object] = {
        "name": "vm1",
        "image": "tiny",
        "format": "",
        "machine": "q35",
        "accel": "tcg",
        "memory": 128,
        "cpus": 1,
        "nics": (nic(1),),
    }
    return Guest(**{**fields, **changes})  # type: ignore[arg-type]


def nic(number: int, model: str = "virtio-net-pci", queues: int = 1) -> GuestNic:
    mac = f"52:54:00:00:00:{number:02x}"
    return GuestNic(mac=mac, model=model, tap=f"vm1-{number}", queues=queues)


SHAPES = {
    "tiny": guest(),
    "tiny-pc": guest(machine="pc", cpus=2, memory=192),
    "e1000": guest(nics=(nic(1, "e1000"),)),
    "rtl8139": guest(nics=(nic(1, "rtl8139"),)),
    "three-models": guest(nics=(nic(1), nic(2, "e1000"), nic(3, "rtl8139"))),
    "multi-queue": guest(cpus=2, nics=(nic(1, queues=QUEUES),)),
    "vnc": guest(vnc=3, nics=()),
    "qcow2": guest(image="/images/base.img", format="qcow2"),
    "raw": guest(image="/images/base.img", format="raw", machine="pc"),
}

# Shapes of other boots, which need files of their own to run.
BOOTS = {
    "network": guest(image="none", nics=(nic(1), nic(2, "e1000")), boot=GuestBoot(nics=(1, 0))),
    "network-then-disk": guest(
        image="/images/base.img", format="raw", vnc=3, boot=GuestBoot(nics=(0,))
    ),
    "kernel-and-disk": guest(
        image="/images/base.img",
        format="raw",
        nics=(),
        boot=GuestBoot(kernel="/boot/vmlinuz", initrd="/boot/initrd", cmdline="quiet", seed=True),
    ),
    "uefi": guest(nics=(), boot=GuestBoot(uefi=True)),
}
