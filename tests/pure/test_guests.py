"""QEMU's command lines, against golden files: a word a line, a blank line before each option."""

import json
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import msgspec
import pytest

from netorch import disk_devices
from netorch.boot_devices import Firmware, Kernel
from netorch.disk_devices import Source
from netorch.guests import Boot, Descriptors, argv, needs_network
from netorch.model import Bus, Model
from netorch.nic_devices import MODELS, Ends, idle_queues, passt_options, wants_vhost
from netorch.resources import DiskLayer, Guest, GuestDisk, GuestNic
from netorch.topology_disks import CDROM_BUSES
from tests.guest_shapes import BOOTS, FORWARD, SHAPES, back_end, disk, guest, nic

GOLDEN = Path(__file__).parent / "golden" / "guests"
KERNEL = Kernel("/cache/kernel", "/cache/initrd", "console=ttyS0 quiet netorch.hostname=vm1")


def render(shape: Guest, accel: str = "tcg") -> list[str]:
    numbers, sets = count(10), count(1)
    fds = Descriptors(
        qmp=next(numbers),
        serial=next(numbers),
        agent=next(numbers),
        nics=tuple(ends(nic, numbers, vhost=wants_vhost(nic, accel)) for nic in shape.nics),
        disks=tuple(
            tuple(Source(next(numbers), next(sets)) for _ in range(files_behind(disk)))
            for disk in shape.disks
        ),
    )
    boot = Boot(
        kernel=KERNEL if shape.image == "tiny" or shape.boot.kernel else None,
        firmware=Firmware(next(numbers), "raw", Path("/disks/vm1.q35.uefi-variables"), "raw")
        if shape.boot.uefi
        else None,
        seed_fd=next(numbers) if shape.boot.seed else None,
    )
    log = f"guests/{shape.name}/serial.log"
    return argv(shape, program="/usr/bin/qemu", accel=accel, boot=boot, fds=fds, log=log)


def files_behind(disk: GuestDisk) -> int:
    return len(disk.layers) + (disk.use in ("overlay", "volume"))


def ends(nic: GuestNic, numbers: Iterator[int], *, vhost: bool) -> Ends:
    """As the adapter opens them."""
    count = {"tap": nic.queues, "passt": 1}.get(nic.backend, 0)
    fds = [next(numbers) for _ in range(count)]
    return Ends(fds, [next(numbers) for _ in fds] if vhost else ())


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


def back_ends(bus: str) -> dict[str, tuple[GuestDisk, list[Source]]]:
    """Every kind of back-end on one bus, with its files."""
    raw, qcow2 = DiskLayer("/a, b=c.img", "raw"), DiskLayer("/b.qcow2", "qcow2")
    use = "use"
    made: dict[str, tuple[dict[str, object], list[Source]]] = {
        "new": ({use: "volume"}, [Source(10, 1)]),
        "raw": ({use: "overlay", "layers": (raw,)}, [Source(10, 1), Source(11, 2)]),
        "qcow2": ({use: "overlay", "layers": (qcow2,)}, [Source(10, 1), Source(11, 2)]),
        "chain": (
            {use: "overlay", "layers": (qcow2, qcow2, raw)},
            [Source(10 + i, 1 + i) for i in range(4)],
        ),
        "device": ({use: "overlay", "layers": (raw,)}, [Source(10, 1), Source(11, 2, True)]),
        "persistent-raw": ({use: "write", "layers": (raw,)}, [Source(10, 1)]),
        "persistent-qcow2": ({use: "write", "layers": (qcow2,)}, [Source(10, 1)]),
        "persistent-chain": (
            {use: "write", "layers": (qcow2, raw)},
            [Source(10, 1), Source(11, 2)],
        ),
        "persistent-device": ({use: "write", "layers": (raw,)}, [Source(10, 1, True)]),
    }
    if bus not in ("ide", "sata"):
        made["readonly"] = ({use: "read", "layers": (qcow2,)}, [Source(10, 1)])
    if bus in CDROM_BUSES:
        made["cdrom"] = ({use: "read", "layers": (raw,), "cdrom": True}, [Source(10, 1)])
    unit = 3 if bus in ("ide", "sata") else 0
    return {
        name: (disk("data", bus, serial="S1", unit=unit, **fields), sources)
        for name, (fields, sources) in made.items()
    }


@pytest.mark.parametrize("bus", disk_devices.FRONT_ENDS)
def test_every_back_end_of_a_disk(bus: str, golden: Callable[[Path, str], None]) -> None:
    parts = []
    for name, (one, sources) in back_ends(bus).items():
        words = [f"{name}:"]
        for option, value in disk_devices.options([one], [sources]):
            words.append(f"{option} {value if isinstance(value, str) else json.dumps(value)}")
        parts.append("\n    ".join(words))
    golden(GOLDEN.with_name("disks") / f"{bus}.txt", "\n\n".join(parts) + "\n")


def test_disks_of_one_bus_share_its_controller() -> None:
    disks = [disk(f"d{index}", bus) for index, bus in enumerate(["scsi", "usb", "scsi", "nvme"])]
    sources = [[Source(10 + index, index)] for index in range(4)]
    drivers = [
        value["driver"]
        for option, value in disk_devices.options(disks, sources)
        if option == "-device" and isinstance(value, dict)
    ]
    assert drivers == [
        *("virtio-scsi-pci", "qemu-xhci"),
        *("scsi-hd", "usb-storage", "scsi-hd", "nvme"),
    ]


def test_every_bus_of_the_file_has_a_front_end() -> None:
    assert set(disk_devices.FRONT_ENDS) == set(msgspec.json.schema(Bus)["enum"])
    assert set(disk_devices.CDROMS) == set(CDROM_BUSES)


def test_every_file_is_the_descriptor_that_was_opened() -> None:
    """And no path of the person's is on the command line."""
    for one, sources in back_ends("virtio").values():
        nodes = disk_devices.blockdevs(one, sources)
        files = [node["file"] for node in reversed(nodes)]
        names = [file["filename"] for file in files if isinstance(file, dict)]
        assert names == [f"/dev/fdset/{source.set}" for source in sources]
        assert "b.qcow2" not in json.dumps(nodes)


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
        "id": "net-525400000001",
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
        "id": "net-525400000001",
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
    assert needs_network(guest(vnc="3"))
    assert not needs_network(guest(vnc="socket"))


def test_queues_without_a_processor_are_told_of() -> None:
    assert idle_queues(guest(cpus=2, nics=(nic(1, queues=2),))) == []
    (line,) = idle_queues(guest(cpus=2, nics=(nic(1), nic(2, queues=8))))
    assert line.startswith("guest vm1: NIC 1 has 8 queues")
