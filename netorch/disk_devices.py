"""QEMU's two halves of a guest's disk, as the objects that QEMU takes: pure rendering.

`blockdevs` are the back-end's nodes, each before what names it, and `device` is the front-end. The
command line (-blockdev, -device) and QMP (blockdev-add, device_add) take the same objects. Formats
are always given: a guest may write any header into raw data.
"""

from pathlib import Path

import msgspec

# The set of descriptors through which QEMU opens the base image (docs: -add-fd).
BASE_SET = 1


class Disk(msgspec.Struct, frozen=True):
    """A guest that boots from a qcow2 overlay; `base_fd` is the base image, open for reading."""

    overlay: Path
    base_fd: int
    base_format: str


def blockdevs(boot: Disk) -> list[dict[str, object]]:
    """The base image and the overlay over it."""
    base: dict[str, object] = {
        "driver": boot.base_format,
        "node-name": "base",
        "read-only": True,
        "file": {"driver": "file", "filename": f"/dev/fdset/{BASE_SET}", "read-only": True},
    }
    if boot.base_format == "qcow2":
        base["backing"] = None  # an image that names another file does not get it opened
    overlay: dict[str, object] = {
        "driver": "qcow2",
        "node-name": "disk",
        "file": {"driver": "file", "filename": str(boot.overlay), "locking": "on"},
        "backing": "base",
        "discard": "unmap",
    }
    return [base, overlay]


def device() -> dict[str, object]:
    return {"driver": "virtio-blk-pci", "drive": "disk", "bootindex": 1}
