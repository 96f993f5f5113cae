"""QEMU's command lines, read back: libvirt's in both forms, people's, and ours."""

import json

import pytest

from netorch.qemu_options import Nic, Options, read
from tests.guest_shapes import SHAPES, guest, nic
from tests.pure.test_guests import render

MAC = "52:54:00:4e:aa:fc"
PCI = "virtio-net-pci"


def words(text: str) -> list[str]:
    return ["qemu-system-x86_64", *text.split()]


def test_libvirt_with_json() -> None:
    netdev = {"type": "tap", "fds": "24:26:27", "vhost": True, "vhostfds": "33:34:35", "id": "h0"}
    device = {"driver": PCI, "mq": True, "vectors": 8, "netdev": "h0", "id": "net0", "mac": MAC}
    argv = words("-name guest=win11,debug-threads=on -S")
    argv += ["-netdev", json.dumps(netdev), "-device", json.dumps(device)]
    assert read(argv) == Options(guest="win11", nics=(Nic(model=PCI, mac=MAC, fds=(24, 26, 27)),))


def test_libvirt_with_keys_and_values() -> None:
    argv = words(
        "-name guest=a,debug-threads=on -netdev tap,fd=25,id=hostnet0,vhost=on,vhostfd=26 "
        "-device rtl8139,netdev=hostnet0,id=net0,mac=52:54:00:4E:AA:FC,bus=pci.0,addr=0x3 "
        "-netdev tap,fds=30:31,id=hostnet1 -device virtio-net-pci,mq=on,netdev=hostnet1"
    )
    assert read(argv) == Options(
        guest="a",
        nics=(Nic(model="rtl8139", mac=MAC, fds=(25,)), Nic(model=PCI, fds=(30, 31))),
    )


@pytest.mark.parametrize(
    ("options", "model", "mac"),
    [
        ("-netdev tap,id=n,ifname=lab0,script=no -device e1000,netdev=n", "e1000", None),
        (f"--netdev tap,id=n,ifname=lab0 --device {PCI},netdev=n,mac={MAC}", PCI, MAC),
        (f"-nic tap,ifname=lab0,model={PCI},mac={MAC}", PCI, MAC),
        ("-netdev type=tap,id=n,ifname=lab0", None, None),
    ],
)
def test_a_tap_that_qemu_opens_by_its_name(
    options: str, model: str | None, mac: str | None
) -> None:
    assert read(words(options)).nics == (Nic(model=model, mac=mac, ifname="lab0"),)


@pytest.mark.parametrize(
    ("name", "guest"),
    [
        ("vm1", "vm1"),
        ("vm1,process=x", "vm1"),
        ("process=x,guest=a,,b", "a,b"),
        ("process=x", None),
    ],
)
def test_names(name: str, guest: str | None) -> None:
    argv = ["qemu", "-name", name, "-device", "virtio-rng-pci"]
    assert read(argv).guest == guest


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["java", "-name", "x"],
        ["qemu", "-netdev"],
        ["qemu", "-netdev", "{"],
        ["qemu", "-netdev", "[" * 100_000],
        ["qemu", "-netdev", "{" * 100_000],
        ["qemu", "-netdev", '{"a":' * 100_000],
        ["qemu", "-netdev", '{"type": "tap", "fd": 7, "id": null}', "-device", "{}"],
        ["qemu", "-netdev", "user,id=n", "-device", "e1000,netdev=n", "-nic", "none"],
        ["qemu", "-netdev", "tap,fd=from-monitor,id=n"],
        ["qemu", "-netdev", "tap,fd=²,id=n"],
    ],
)
def test_what_says_nothing_of_taps_is_passed_over(argv: list[str]) -> None:
    assert read(argv) == Options()


@pytest.mark.parametrize("name", SHAPES)
def test_ours(name: str) -> None:
    shape = SHAPES[name]
    found = read(render(shape))
    assert found.guest == shape.name
    assert [(n.model, n.mac, len(n.fds)) for n in found.nics] == [
        (n.model, n.mac, n.queues) for n in shape.nics if n.backend == "tap"
    ]


def test_our_queues() -> None:
    found = read(render(guest(nics=(nic(1, queues=4), nic(2)))))
    assert [n.fds for n in found.nics] == [(13, 14, 15, 16), (17,)]
