"""What the installed QEMU has: asked once for each binary."""

import os
from pathlib import Path

import pytest

from netorch.errors import NetorchError
from netorch.system.back_ends import passt_reasons
from netorch.system.qemu_devices import QemuDevices, lacking, qemu_devices
from tests.guest_shapes import back_end, guest, nic

# Answers of QEMU 7.2, shortened; each question leaves a line.
QEMU = """#!/bin/sh
echo "$*" >> "$0.asked"
case $1 in
-machine) echo 'Supported machines are:
microvm              microvm (i386)
q35                  Standard PC (Q35 + ICH9, 2009) (alias of pc-q35-7.2)' ;;
-device) echo 'Storage devices:
name "nvme", bus PCI, desc "Non-Volatile Memory Express"

Network devices:
name "e1000", bus PCI, alias "e1000-82540em", desc "Intel Gigabit Ethernet"
name "virtio-net-pci", bus PCI, alias "virtio-net"

Input devices:
name "virtio-serial-pci", bus PCI, alias "virtio-serial"' ;;
-netdev) echo 'Available netdev backend types:
tap
user' ;;
esac
"""


@pytest.fixture
def qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    program = tmp_path / "qemu"
    program.write_text(QEMU)
    program.chmod(0o755)
    return program


def asked(qemu: Path) -> list[str]:
    return Path(f"{qemu}.asked").read_text().splitlines()


def test_qemu_is_asked_once_until_its_binary_changes(qemu: Path) -> None:
    first = qemu_devices(str(qemu))
    assert first.machines == ("microvm", "q35")
    assert first.nics == ("e1000", "virtio-net-pci")
    assert first.netdevs == ("tap", "user")
    assert qemu_devices(str(qemu)) == first
    assert len(asked(qemu)) == 3
    os.utime(qemu, (1, 1))
    assert qemu_devices(str(qemu)) == first
    assert len(asked(qemu)) == 6
    memory = next((qemu.parent / "cache" / "netorch").iterdir())
    memory.write_text("half a fi")
    assert qemu_devices(str(qemu)) == first
    memory.unlink()
    memory.mkdir()  # can't be read, nor written
    assert qemu_devices(str(qemu)) == first


def test_what_it_lacks_is_named_with_what_it_has(qemu: Path) -> None:
    devices = qemu_devices(str(qemu))
    assert (
        list(lacking([guest(nics=(nic(1), nic(2, "e1000"), back_end(3, "user")))], devices)) == []
    )
    assert list(lacking([guest(machine="pc", nics=(nic(1), nic(2, "vmxnet3")))], devices)) == [
        "guests.vm1.machine: the installed QEMU has no pc; it has microvm, q35",
        "guests.vm1.nics[1].model: the installed QEMU has no vmxnet3; it has e1000, virtio-net-pci",
    ]
    wired = guest(nics=(back_end(1, "wire", wire="w"), back_end(2, "passt")))
    assert list(lacking([wired], devices)) == [
        "guests.vm1.nics[0].wire: the installed QEMU has no dgram (-netdev); it has tap, user",
        "guests.vm1.nics[1].backend: the installed QEMU has no stream (-netdev); it has tap, user",
    ]


def test_a_program_that_does_not_answer_as_qemu_is_an_error(qemu: Path) -> None:
    qemu.write_text("#!/bin/sh\n")
    with pytest.raises(NetorchError, match="its answer is not understood"):
        qemu_devices(str(qemu))
    qemu.write_text("#!/bin/sh\necho broken >&2\nexit 1\n")
    with pytest.raises(NetorchError, match=r"failed to ask \S+ for its devices: broken"):
        qemu_devices(str(qemu))


@pytest.mark.parametrize(
    ("version", "refused"),
    [
        ("passt unknown version", True),  # Debian 12
        ("passt 2023_08_18.0af928e", True),
        ("passt 0.0~git20240220.1e6f92b-1", False),
        ("passt 0^20240426.gd03c4e2-1.fc40.x86_64", False),
    ],
)
def test_a_passt_that_drops_padded_frames_is_refused_for_an_e1000(
    version: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passt = tmp_path / "passt"
    passt.write_text(f"#!/bin/sh\necho '{version}'\n")
    passt.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    nics = (back_end(1, "passt"), back_end(2, "passt", model="e1000"))
    guests = [guest(nics=nics), guest(name="vm2", nics=nics[:1])]
    reasons = list(passt_reasons(guests, QemuDevices(("pc-q35-9.2",), (), ())))
    assert [reason.startswith("guests.vm1.nics[1].model: ") for reason in reasons] == (
        [True] if refused else []
    )


@pytest.mark.parametrize(
    ("machines", "refused"),
    [
        (("pc-q35-7.2", "pc-q35-2.12", "q35", "pc-i440fx-10.0"), True),
        (("pc-q35-8.0", "pc-q35-7.2"), False),
        (("pc-q35-10.1",), False),
        (("pc-q35-rhel9.2.0",), False),
    ],
)
def test_a_qemu_that_fragments_is_refused_for_passt(
    machines: tuple[str, ...], refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "passt").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    nics = (back_end(1, "passt", model="vmxnet3"), back_end(2, "user", model="e1000e"))
    reasons = list(passt_reasons([guest(nics=nics)], QemuDevices(machines, (), ())))
    assert [reason.startswith("guests.vm1.nics[0].model: ") for reason in reasons] == (
        [True] if refused else []
    )
