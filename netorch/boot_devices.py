"""What QEMU boots from, other than a guest's own disks: pure rendering.

A kernel and its initramfs are opened by netorch. QEMU reads them with fopen (hw/i386/x86.c,
x86_load_linux) and GLib, which know no /dev/fdset, so it gets the paths of its own descriptors.
For flash memory and the seed, block devices, there are sets of descriptors.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

# Sets of descriptors, away from the disks' (docs: -add-fd).
FIRMWARE_SET = 101
SEED_SET = 102


class Kernel(msgspec.Struct, frozen=True):
    """A kernel to boot directly; `initrd` is "" where it has none."""

    kernel: str
    initrd: str
    cmdline: str


class Firmware(msgspec.Struct, frozen=True):
    """UEFI firmware, `fd` open for reading, and the file in which it keeps its variables."""

    fd: int
    format: str
    variables: Path
    variables_format: str


def kernel_options(kernel: Kernel) -> Iterator[str]:
    yield from ("-kernel", kernel.kernel)
    if kernel.initrd:
        yield from ("-initrd", kernel.initrd)
    if kernel.cmdline:
        yield from ("-append", kernel.cmdline)


def flash(firmware: Firmware) -> list[dict[str, object]]:
    """The nodes of the two chips: `firmware` and `variables`, as the machine's options name them.

    Each is read from the start to the end of its file, so the format is all that may differ.
    """
    code = {
        "driver": "file",
        "filename": f"/dev/fdset/{FIRMWARE_SET}",
        "read-only": True,
    }
    variables = {"driver": "file", "filename": str(firmware.variables)}
    return [
        {"driver": firmware.format, "node-name": "firmware", "read-only": True, "file": code},
        {"driver": firmware.variables_format, "node-name": "variables", "file": variables},
    ]


FLASH_OPTIONS = ",pflash0=firmware,pflash1=variables"
"""Of -machine, with `flash`."""


def seed_blockdev() -> dict[str, object]:
    file = {"driver": "file", "filename": f"/dev/fdset/{SEED_SET}", "read-only": True}
    return {"driver": "raw", "node-name": "seed", "read-only": True, "file": file}


def seed_device() -> dict[str, object]:
    """A disk: q35 has no controller for a CD drive here, and cloud-init looks at its label only."""
    return {"driver": "virtio-blk-pci", "drive": "seed"}


def from_network(device: Mapping[str, object], index: int) -> dict[str, object]:
    """A NIC's front-end as one that is booted from: with QEMU's own option ROM, which is iPXE."""
    kept = {key: value for key, value in device.items() if key != "romfile"}
    return {**kept, "bootindex": index}
