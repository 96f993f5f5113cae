"""QEMU's command lines, against golden files: a word a line, a blank line before each option."""

import json
from collections.abc import Callable
from itertools import count
from pathlib import Path

import msgspec
import pytest

from netorch.boot_devices import Firmware, Kernel
from netorch.disk_devices import Disk
from netorch.guests import Boot, Descriptors, argv
from netorch.model import DISKLESS, Model
from netorch.nic_devices import MODELS
from netorch.resources import Guest
from tests.guest_shapes import BOOTS, SHAPES, guest, nic

GOLDEN = Path(__file__).parent / "golden" / "guests"
KERNEL = Kernel("/cache/kernel", "/cache/initrd", "console=ttyS0 quiet netorch.hostname=vm1")


def render(shape: Guest, accel: str = "tcg", overlay: str = "/disks/vm1.qcow2") -> list[str]:
    numbers = count(10)
    fds = Descriptors(
        qmp=next(numbers),
        serial=next(numbers),
        agent=next(numbers),
        taps=tuple(tuple(next(numbers) for _ in range(nic.queues)) for nic in shape.nics),
    )
    boot = Boot(
        kernel=KERNEL if shape.image == "tiny" or shape.boot.kernel else None,
        disk=None if shape.image in DISKLESS else Disk(Path(overlay), next(numbers), shape.format),
        firmware=Firmware(next(numbers), "raw", Path("/disks/vm1.q35.uefi-variables"), "raw")
        if shape.boot.uefi
        else None,
        seed_fd=next(numbers) if shape.boot.seed else None,
    )
    log = f"guests/{shape.name}/serial.log"
    return argv(shape, program="/usr/bin/qemu", accel=accel, boot=boot, fds=fds, log=log)


@pytest.mark.parametrize("name", [*SHAPES, *BOOTS])
def test_command_line(name: str, golden: Callable[[Path, str], None]) -> None:
    words = render((SHAPES | BOOTS)[name])
    text = "\n".join(words).replace("\n-", "\n\n-")
    golden(GOLDEN / f"{name}.txt", f"{text}\n")


def test_kvm_shows_the_guest_the_host_processor() -> None:
    words = render(guest(), accel="kvm")
    assert words[words.index("-accel") + 1] == "kvm"
    assert words[words.index("-cpu") + 1] == "host"


def test_every_model_of_the_file_has_a_front_end() -> None:
    assert set(MODELS) == set(msgspec.json.schema(Model)["enum"])


def test_a_comma_in_a_path_does_not_become_an_option() -> None:
    overlay = "/disks/a,b=c/vm1.qcow2"
    words = render(SHAPES["qcow2"], overlay=overlay)
    disk = next(json.loads(word) for word in words if '"disk"' in word)
    assert disk["file"]["filename"] == overlay


def test_each_queue_has_its_descriptor() -> None:
    words = render(guest(nics=(nic(1, queues=4), nic(2))))
    netdevs = [json.loads(words[i + 1]) for i, word in enumerate(words) if word == "-netdev"]
    assert netdevs[0]["fds"] == "13:14:15:16"
    assert netdevs[1]["fd"] == "17"
