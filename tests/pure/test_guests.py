"""QEMU's command lines, against golden files: a word a line, a blank line before each option."""

import json
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import msgspec
import pytest

from netorch.disk_devices import Disk
from netorch.guests import Descriptors, Kernel, argv, needs_network
from netorch.model import Model
from netorch.nic_devices import MODELS, Ends, idle_queues, passt_options, wants_vhost
from netorch.resources import Guest, GuestNic
from tests.guest_shapes import FORWARD, SHAPES, back_end, guest, nic

GOLDEN = Path(__file__).parent / "golden" / "guests"
KERNEL = Kernel(Path("/cache/kernel"), Path("/cache/initrd"), "console=ttyS0 quiet")


def render(shape: Guest, accel: str = "tcg", overlay: str = "/disks/vm1.qcow2") -> list[str]:
    numbers = count(10)
    fds = Descriptors(
        qmp=next(numbers),
        serial=next(numbers),
        agent=next(numbers),
        nics=tuple(ends(nic, numbers, vhost=wants_vhost(nic, accel)) for nic in shape.nics),
    )
    boot = KERNEL if shape.image == "tiny" else Disk(Path(overlay), next(numbers), shape.format)
    log = f"guests/{shape.name}/serial.log"
    return argv(shape, program="/usr/bin/qemu", accel=accel, boot=boot, fds=fds, log=log)


def ends(nic: GuestNic, numbers: Iterator[int], *, vhost: bool) -> Ends:
    """As the adapter opens them."""
    count = {"tap": nic.queues, "passt": 1}.get(nic.backend, 0)
    fds = [next(numbers) for _ in range(count)]
    return Ends(fds, [next(numbers) for _ in fds] if vhost else ())


@pytest.mark.parametrize("name", SHAPES)
def test_command_line(name: str, golden: Callable[[Path, str], None]) -> None:
    words = render(SHAPES[name])
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


def test_vhost_has_a_descriptor_for_each_queue_and_only_where_the_processor_is_real() -> None:
    shape = guest(nics=(nic(1, queues=2), nic(2), nic(3, "e1000")))
    words = render(shape, accel="kvm")
    netdevs = [json.loads(words[i + 1]) for i, word in enumerate(words) if word == "-netdev"]
    assert netdevs[0] == {
        "type": "tap",
        "id": "net0",
        "fds": "13:14",
        "vhost": True,
        "vhostfds": "15:16",
    }
    assert (netdevs[1]["fd"], netdevs[1]["vhostfd"]) == ("17", "18")
    assert "vhost" not in netdevs[2]
    assert not any("vhost" in word for word in render(shape))


def test_passt_has_a_socket_of_its_own_and_forwards_only_what_it_is_told() -> None:
    shape = guest(nics=(back_end(1, "passt", subnet="10.0.2.0/24", forward=FORWARD),))
    words = render(shape)
    assert json.loads(words[words.index("-netdev") + 1]) == {
        "type": "stream",
        "id": "net0",
        "server": False,
        "addr": {"type": "fd", "str": "13"},
    }
    words = passt_options(shape.nics[0])
    where = ["--address", "10.0.2.15", "--netmask", "24", "--gateway", "10.0.2.2"]
    assert words == [*where, "-t", "127.0.0.1/2222:22", "-u", "0.0.0.0/5353:53"]
    assert passt_options(back_end(1, "passt"))[-4:] == ["-t", "none", "-u", "none"]


def test_who_needs_the_labs_network_namespace() -> None:
    assert not needs_network(guest(nics=(nic(1), back_end(2, "passt"), back_end(3, "wire"))))
    assert needs_network(guest(nics=(nic(1), back_end(2, "user"))))
    assert needs_network(guest(vnc=3))


def test_queues_without_a_processor_are_told_of() -> None:
    assert idle_queues(guest(cpus=2, nics=(nic(1, queues=2),))) == []
    (line,) = idle_queues(guest(cpus=2, nics=(nic(1), nic(2, queues=8))))
    assert line.startswith("guest vm1: NIC 1 has 8 queues")
