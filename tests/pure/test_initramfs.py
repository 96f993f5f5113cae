"""The archive writer, the ELF readers and the module resolver, on made-up bytes."""

from __future__ import annotations

import shutil
import struct
import subprocess

import pytest

from netorch.system import initramfs
from netorch.system.initramfs import Entry, Module


def elf(sections: dict[str, bytes]) -> bytes:
    """A relocatable ELF file with these sections and no program headers."""
    names = [*sections, ".shstrtab"]
    table = b"\0" + b"".join(name.encode() + b"\0" for name in names)
    body, headers = bytearray(64), [bytes(64)]
    for name in names:
        data = table if name == ".shstrtab" else sections[name]
        start = table.index(name.encode() + b"\0")
        headers.append(struct.pack("<IIQQQQIIQQ", start, 1, 0, 0, len(body), len(data), *[0] * 4))
        body += data
    header = struct.pack("<QQI6H", 0, len(body), 0, 64, 0, 0, 64, len(headers), len(names))
    body[:64] = b"\x7fELF\x02\x01\x01".ljust(32, b"\0") + header
    return bytes(body) + b"".join(headers)


def kernel(note_kind: int) -> bytes:
    """An ELF file whose only segment is one note of Xen's."""
    note = struct.pack("<III4sQ", 4, 8, note_kind, b"Xen\0", 0x1000000)
    header = b"\x7fELF\x02\x01\x01".ljust(32, b"\0") + struct.pack("<QQIHHH", 64, 0, 0, 64, 56, 1)
    header = header.ljust(64, b"\0")
    return header + struct.pack("<IIQQQQQQ", 4, 4, 120, 0, 0, len(note), len(note), 4) + note


@pytest.mark.skipif(not shutil.which("cpio"), reason="needs cpio to read the archive back")
def test_cpio_lists_what_was_written() -> None:
    archive = initramfs.newc(
        [
            initramfs.file("init", b"#!/bin/sh\n", 0o755),
            initramfs.directory("tmp", 0o1777),
            initramfs.symlink("lib64", "lib"),
            Entry("dev/console", 0o020600, device=(5, 1)),
            initramfs.file("lib/modules/6.1/modules.dep", b""),
        ]
    )
    listing = subprocess.run(
        ["cpio", "-tv", "--numeric-uid-gid", "--quiet"],
        input=archive,
        stdout=subprocess.PIPE,
        env={"TZ": "UTC", "LC_ALL": "C", "PATH": "/usr/bin:/bin"},
        check=True,
    )
    lines = [" ".join(line.split()) for line in listing.stdout.decode().splitlines()]
    assert lines == [
        "-rwxr-xr-x 1 0 0 10 Jan 1 1970 init",
        "drwxrwxrwt 2 0 0 0 Jan 1 1970 tmp",
        "lrwxrwxrwx 1 0 0 3 Jan 1 1970 lib64 -> lib",
        "drwxr-xr-x 2 0 0 0 Jan 1 1970 dev",
        "crw------- 1 0 0 5, 1 Jan 1 1970 dev/console",
        "drwxr-xr-x 2 0 0 0 Jan 1 1970 lib",
        "drwxr-xr-x 2 0 0 0 Jan 1 1970 lib/modules",
        "drwxr-xr-x 2 0 0 0 Jan 1 1970 lib/modules/6.1",
        "-rw-r--r-- 1 0 0 0 Jan 1 1970 lib/modules/6.1/modules.dep",
    ]


def test_a_path_comes_once() -> None:
    with pytest.raises(ValueError, match="init is in the archive twice"):
        initramfs.newc([initramfs.file("init", b""), initramfs.file("init", b"")])


def test_a_module_tells_its_dependencies_and_loses_its_signature() -> None:
    plain = elf(
        {".modinfo": b"alias=virtio:d00000001v*\0depends=net-failover,virtio\0license=GPL\0"}
    )
    signature = b"x" * 32
    signed = plain + signature + struct.pack(">5B3xI", 0, 0, 2, 0, 0, 32)
    signed += b"~Module signature appended~\n"
    expected = Module("virtio_net", plain, ("net_failover", "virtio"), ("virtio:d00000001v*",))
    assert initramfs.read_module("virtio_net", signed) == expected
    assert initramfs.read_module("virtio_net", plain) == expected


def test_modules_come_after_what_they_need() -> None:
    have = {
        "virtio_net": Module("virtio_net", b"", ("net_failover", "virtio"), ("virtio:d1v*",)),
        "net_failover": Module("net_failover", b"", ("failover",)),
        "failover": Module("failover", b""),
    }
    found, absent = initramfs.resolve(("virtio_net", "e1000"), have.get)
    assert list(found) == ["failover", "net_failover", "virtio_net"]
    assert absent == {"e1000"}  # virtio itself is taken as built in
    dependencies, aliases = initramfs.module_index(found)
    assert dependencies.splitlines() == [
        "failover.ko:",
        "net_failover.ko: failover.ko",
        "virtio_net.ko: net_failover.ko failover.ko",
    ]
    assert aliases == "alias virtio:d1v* virtio_net\n"


def test_modules_that_need_each_other_end() -> None:
    have = {"a": Module("a", b"", ("b",)), "b": Module("b", b"", ("a",))}
    assert set(initramfs.resolve(("a",), have.get)[0]) == {"a", "b"}


@pytest.mark.parametrize(
    ("file_name", "name"),
    [("usb-storage.ko.xz", "usb_storage"), ("8139cp.ko", "8139cp"), ("nvme.ko.zst", "nvme")],
)
def test_module_name(file_name: str, name: str) -> None:
    assert initramfs.module_name(file_name) == name


def test_pvh_note() -> None:
    assert initramfs.has_pvh_entry(kernel(initramfs.PHYS32_ENTRY))
    assert not initramfs.has_pvh_entry(kernel(1))


def test_the_payload_of_a_bzimage() -> None:
    image = bytearray(5 * 512 + 100)
    image[0x1F1] = 3
    image[0x202:0x208] = b"HdrS\x0c\x02"
    struct.pack_into("<II", image, 0x248, 512, 7)
    image[2560:2567] = b"payload"
    assert initramfs.compressed_kernel(bytes(image)) == b"payload"
    with pytest.raises(ValueError, match="not a bzImage"):
        initramfs.compressed_kernel(bytes(5120))
