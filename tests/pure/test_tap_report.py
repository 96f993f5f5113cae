"""What `netorch taps` prints."""

import json

import pytest

from netorch.errors import UsageError
from netorch.tap_queues import Found, TapRow
from netorch.tap_report import chosen, json_out, ranges, text, unseen

OURS = TapRow(
    tap="vm1-0",
    state="open",
    namespace=1,
    namespace_from="kernel",
    place="here",
    lab="demo",
    bridge="virbr0",
    queues=8,
    idle=6,
    process="qemu:vm1",
    pid=144776,
    descriptors=(8, 9, 10, 11, 13, 15, 16, 17),
    guest="vm1",
    model="virtio-net-pci",
    mac="52:54:00:5a:98:34",
    address="192.168.122.6",
)
FOUND = Found([OURS, TapRow(tap="vnet2", state="open", process="x\x1b[2J\udcff", pid=12)], 0)


def test_by_tap_and_by_process() -> None:
    assert chosen(FOUND, None) == FOUND.rows
    assert chosen(FOUND, "vm1-0") == chosen(FOUND, "144776") == [OURS]


@pytest.mark.parametrize(
    ("wanted", "message", "hint"),
    [
        ("vnet3", "no tap 'vnet3' can be seen", "near: vnet2"),
        ("144775", "process 144775 has no tap open that can be seen", "near: 144776"),
        ("eth0", "no tap 'eth0' can be seen", "there are: vm1-0, vnet2"),
    ],
)
def test_what_is_not_there(wanted: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as raised:
        chosen(FOUND, wanted)
    assert (raised.value.message, raised.value.hint) == (message, hint)


def test_what_is_not_there_may_be_hidden() -> None:
    with pytest.raises(UsageError, match="no tap 'a'") as raised:
        chosen(Found([], 212), "a")
    assert raised.value.hint == "there is none; not looked into, for want of rights: 212 processes"


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    text(FOUND.rows)
    printed = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()) for line in printed] == [
        "TAP STATE BRIDGE QUEUES PROCESS PID FDS GUEST NIC MAC ADDRESS LAB PLACE",
        "vm1-0 open virbr0 8 (6 idle) qemu:vm1 144776 8-11,13,15-17 vm1 virtio-net-pci "
        "52:54:00:5a:98:34 192.168.122.6 demo here",
        r"vnet2 open - - x\x1b[2J\udcff 12 - - - - - - -",
    ]


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    json_out(FOUND.rows)
    ours, other = json.loads(capsys.readouterr().out)
    assert ours["descriptors"] == list(OURS.descriptors)
    assert (ours["queues"], ours["idle"], ours["namespace_from"]) == (8, 6, "kernel")
    assert other["process"] == "x\x1b[2J\\udcff"
    assert [name for name, value in other.items() if value is None][:3] == [
        "namespace",
        "namespace_from",
        "place",
    ]


def test_ranges() -> None:
    assert [ranges(n) for n in [(), (3,), (3, 4), (3, 5, 6, 7, 9)]] == ["", "3", "3-4", "3,5-7,9"]


def test_what_could_not_be_seen_is_said() -> None:
    hidden = TapRow(tap="vnet1", state="open", namespace_from="kernel")
    found = Found([hidden], 212)
    (line,) = unseen(found, found.rows, root=False)
    assert line == (
        "other users' processes can't be looked into (1 of these taps held there); "
        "to see all: sudo netorch taps"
    )
    assert unseen(found, found.rows, root=True)[0].startswith("212 processes can't")
    assert unseen(FOUND, FOUND.rows, root=True) == []
