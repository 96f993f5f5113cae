"""Images of one's own: they run on an overlay, and are never written."""

import hashlib
import os
import subprocess
from pathlib import Path

from tests.qemu.labs.lab import Lab, Machine, wait_for

SECTOR = 512
WROTE = b"netorch wrote this sector"
FAILED = b"the sector could not be written"
_ORIGIN = 0x7C00
_CODE = 41

LAB = """
[guests.raw]
image  = "raw.img"
memory = "64M"

[guests.qcow2]
image   = "qcow2.img"
format  = "qcow2"
machine = "pc"
memory  = "64M"
"""


def test_guests_write_to_overlays_and_never_to_the_image(machine: Machine) -> None:
    raw, qcow2 = _images(machine.directory)
    before = [_digest(image) for image in (raw, qcow2)]
    lab = machine.up("disks", LAB)
    for guest in ("raw", "qcow2"):
        log = lab.run / "guests" / guest / "serial.log"
        text = wait_for(log, lambda text: "sector" in text and text.endswith("\n\n"))
        assert WROTE.decode() in text
        assert _boot_sector() * 2 in _overlay(lab, guest).read_bytes()
    lab.unchanged()
    assert [_digest(image) for image in (raw, qcow2)] == before
    lab.teardown()
    assert machine.left() == []
    assert [_digest(image) for image in (raw, qcow2)] == before
    assert WROTE not in raw.read_bytes()[SECTOR:]


def test_an_image_that_cannot_be_used_is_one_error_and_nothing_is_changed(
    machine: Machine,
) -> None:
    raw, qcow2 = _images(machine.directory)
    file = machine.file("images", LAB)

    def refused(*words: str) -> None:
        for command in ("plan", "apply"):
            done = machine.netorch(command, str(file), status=1)
            assert done.stderr.count("error:") == 1
            assert "Traceback" not in done.stderr
            assert all(word in done.stderr for word in words), done.stderr
            assert machine.left() == []

    drive = f"file={qcow2},format=qcow2,if=virtio"
    qemu = "qemu-system-x86_64 -S -nodefaults -display none -accel tcg -qmp stdio -drive"
    holder = machine.started(
        [*qemu.split(), drive],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    holder.stdin.write('{"execute": "qmp_capabilities"}\n')
    holder.stdin.flush()
    holder.stdout.readline()  # the greeting, which comes before the disks are opened
    holder.stdout.readline()
    for word in ("plan", "apply"):
        done = machine.netorch(word, str(file), status=1)
        assert f"{qcow2} is being written to by process {holder.pid}" in done.stderr
    holder.terminate()
    holder.communicate()
    qcow2.unlink()
    refused(f"failed to read image {qcow2}: No such file")
    raw.unlink()
    raw.mkdir()
    refused(f"failed to open image {raw}: it is a directory")
    command = ["qemu-img", "create", "-q", "-f", "qcow2", str(qcow2), "1M"]
    subprocess.run(command, check=True)
    raw.rmdir()
    os.symlink("/proc/1/mem", raw)
    if not os.access(raw, os.R_OK):  # the machine's root may read everything
        refused(f"failed to read image {raw}: Permission denied")


def _images(directory: Path) -> tuple[Path, Path]:
    raw, qcow2 = directory / "raw.img", directory / "qcow2.img"
    raw.write_bytes(_boot_sector().ljust(1 << 20, b"\0"))
    command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(qcow2)]
    subprocess.run(command, check=True)
    return raw, qcow2


def _boot_sector() -> bytes:
    """Writes itself to the next sector, then tells the first serial port how that went."""
    wrote = _ORIGIN + _CODE
    failed = wrote + len(WROTE) + 3
    code = b"".join(
        (
            bytes.fromhex("31c0 8ed8 8ec0"),  # xor ax, ax; mov ds, ax; mov es, ax
            bytes.fromhex("b80103 bb007c"),  # mov ax, 0301h (write one sector); mov bx, 7c00h
            bytes.fromhex("b90200 b600 cd13"),  # mov cx, 2 (sector); mov dh, 0; int 13h
            b"\xbe" + wrote.to_bytes(2, "little"),  # mov si, wrote
            bytes.fromhex("7303"),  # jnc next
            b"\xbe" + failed.to_bytes(2, "little"),  # mov si, failed
            bytes.fromhex("ac 08c0 7406"),  # next: lodsb; or al, al; jz end
            bytes.fromhex("baf803 ee ebf5"),  # mov dx, 3f8h; out dx, al; jmp next
            bytes.fromhex("f4 ebfd"),  # end: hlt; jmp end
        )
    )
    assert len(code) == _CODE
    texts = b"".join(text + b"\n\n\0" for text in (WROTE, FAILED))
    return (code + texts).ljust(SECTOR - 2, b"\0") + b"\x55\xaa"


def _overlay(lab: Lab, guest: str) -> Path:
    return lab.machine.disks_base / lab.name / guest / "image.qcow2"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
