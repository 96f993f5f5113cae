"""What of a guest changes while it runs, and what is a restart."""

import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from netorch import engine, model
from netorch.compiler import compile
from netorch.engine import Progress
from netorch.errors import ConflictError
from netorch.facts import Facts
from netorch.guest_disks import disks_of, hot_disks
from netorch.model import Lab, Network, Nic, Topology
from netorch.planner import Delete, Plan, Update, diff
from netorch.resources import (
    DiskLayer,
    Guest,
    GuestDisk,
    GuestNic,
    Overlay,
    Record,
    Resource,
    Tap,
    Volume,
)
from netorch.state import State
from tests.engine.fake import FakeSystem
from tests.guest_shapes import disk, guest, image_disk, nic

RECORD = Record(text="{}", source="lab.toml")


def state(wanted: Guest, *others: Resource) -> State:
    taps = [Tap(id=f"vm1:{n.id}", name=n.tap, network="", bridge="", mac="") for n in wanted.nics]
    return State([RECORD, *taps, *files_of(wanted), *others, wanted])


def files_of(wanted: Guest) -> Iterator[Resource]:
    for one in wanted.disks:
        if one.use == "volume":
            yield Volume(guest=wanted.name, disk=one.name, size=1 << 20)
        elif one.use == "overlay":
            (layer,) = one.layers
            yield Overlay(guest=wanted.name, disk=one.name, image=layer.file, format=layer.format)


def plan_of(old: Guest, new: Guest) -> Plan:
    return diff(state(new), state(old))


def q35(*nics: GuestNic, **changes: object) -> Guest:
    return guest(nics=nics, **{"ports": 2, **changes})


def hot(name: str, bus: str = "virtio", **changes: object) -> GuestDisk:
    return disk(name, bus, hot=True, **changes)


LIVE = {
    "a NIC more": (q35(nic(1)), q35(nic(1), nic(2))),
    "a NIC less": (q35(nic(1), nic(2)), q35(nic(2))),
    "another model": (q35(nic(1)), q35(nic(1, "e1000"))),
    "more queues": (q35(nic(1)), q35(nic(1, queues=2))),
    "another network": (q35(nic(1)), q35(msgspec.structs.replace(nic(1), network="b"))),
    "a link": (q35(nic(1), ports=0), q35(msgspec.structs.replace(nic(1), link="down"), ports=0)),
    "the display's number": (q35(vnc="1"), q35(vnc="2")),
    "no display": (q35(vnc="1"), q35()),
    "a pc without ports": (guest(machine="pc"), guest(machine="pc", nics=())),
    "a disk more": (q35(), q35(disks=(hot("a"),))),
    "a disk less": (q35(disks=(hot("a"), hot("b", "usb"))), q35(disks=(hot("b", "usb"),), ports=2)),
    "a disk on a controller": (q35(disks=(hot("a", "scsi"),)), q35(disks=(hot("b", "scsi"),))),
    "another bus": (q35(disks=(hot("a"),)), q35(disks=(hot("a", "nvme"),))),
    "a half-made disk": (q35(disks=(hot("a", attached=False),)), q35(disks=(hot("a"),))),
    "a disk of a pc": (guest(machine="pc"), guest(machine="pc", disks=(hot("a"),))),
    "the order of disks": (
        q35(disks=(hot("a", "scsi"), hot("b", "scsi"))),
        q35(disks=(hot("b", "scsi"), hot("a", "scsi"))),
    ),
    "the order": (q35(nic(1), nic(2)), q35(nic(2), nic(1))),
}
RESTARTS = {
    "memory": (q35(), q35(memory=256), "memory 128 -> 256"),
    "a third NIC of two ports": (q35(nic(1), nic(2)), q35(nic(1), nic(2), nic(3)), "add NIC vm1-3"),
    "one less of three": (q35(nic(1), nic(2), nic(3)), q35(nic(1), nic(2)), "remove NIC vm1-3"),
    "a display": (q35(), q35(vnc="3"), "vnc  -> 3"),
    "a disk without a port": (
        q35(nic(1), nic(2)),
        q35(nic(1), nic(2), disks=(disk("a", "virtio"),)),
        "add disk a (virtio)",
    ),
    "a NIC that disks leave no port": (
        q35(nic(1), disks=(hot("a"),)),
        q35(nic(1), nic(2), disks=(disk("a", "virtio"),)),
        "add NIC vm1-2",
    ),
    "a sata disk less": (q35(disks=(disk("a", "sata"),)), q35(), "remove disk a (sata)"),
    "another image": (
        q35(image="/a", disks=(image_disk("raw", "/a"),)),
        q35(image="/b", disks=(image_disk("raw", "/b"),)),
        "image /a -> /b",
    ),
    "ports": (q35(), q35(ports=3), "ports 2 -> 3"),
}


@pytest.mark.parametrize("name", LIVE)
def test_live(name: str) -> None:
    old, new = LIVE[name]
    plan = plan_of(old, new)
    assert plan.restarts == {}
    of_guest = [action for action in plan if action.key == new.key]
    assert [type(action) for action in of_guest] == [Update]


@pytest.mark.parametrize("name", RESTARTS)
def test_restart(name: str) -> None:
    old, new, why = RESTARTS[name]
    plan = plan_of(old, new)
    assert plan.restarts.keys() == {"guest:vm1"}
    assert plan.restarts["guest:vm1"].startswith(why)
    lines = plan.describe()
    assert any(line.startswith(f"restart guest vm1: {why}") for line in lines)
    assert any(line.startswith("create again guest vm1 (") for line in lines)
    machine = FakeSystem(state(old))
    refusal = re.escape(f"guest vm1 has to restart: {why}")
    with pytest.raises(ConflictError, match=refusal) as refused:
        engine.apply(machine, state(new), Progress(), restart=False)
    assert "netorch apply --restart" in refused.value.hint
    assert machine.changes == 0
    engine.apply(machine, state(new), Progress(), restart=True)
    assert machine.observe() == state(new)


@pytest.mark.parametrize("crashed", ["unreachable", "internal-error", "guest-panicked"])
def test_what_does_not_run_is_no_restart(crashed: str) -> None:
    plan = plan_of(q35(state=crashed), q35(memory=256))
    assert plan
    assert plan.restarts == {}


def test_a_guest_that_is_taken_out_is_no_restart() -> None:
    plan = diff(State([RECORD]), state(q35(nic(1))))
    assert plan.restarts == {}
    assert any(isinstance(action, Delete) and action.key == "guest:vm1" for action in plan)


def test_a_tap_that_is_made_again_is_plugged_again() -> None:
    wanted = q35(nic(1), nic(2))
    machine = FakeSystem(state(wanted))
    tap = machine.there["tap:vm1:2"]
    assert isinstance(tap, Tap)
    machine.there[tap.key] = msgspec.structs.replace(tap, multi_queue=True)
    plan = diff(state(wanted), machine.observe())
    (update,) = [action for action in plan if action.key == wanted.key]
    assert isinstance(update, Update)
    assert "plug NIC vm1-2" in update.describe()
    assert "NIC vm1-1" not in update.describe()
    engine.apply(machine, state(wanted), Progress(), restart=False)
    assert machine.observe() == state(wanted)


def test_a_disk_over_another_image_is_plugged_again_once_its_overlay_is_new() -> None:
    old, new = (
        q35(disks=(hot("a", use="overlay", layers=(DiskLayer(file, "raw"),)),))
        for file in ("/a", "/b")
    )
    plan = plan_of(old, new)
    done = [(type(action).__name__, action.key) for action in plan]
    assert done == [
        ("Delete", "overlay:vm1:a"),
        ("Create", "overlay:vm1:a"),
        ("Update", "guest:vm1"),
    ]
    assert plan.describe()[-1].endswith("plug disk a (virtio) again")


def test_a_guest_that_does_not_run_goes_before_the_file_of_its_disk() -> None:
    """Only a running system lets go of a disk."""
    old = q35(disks=(hot("a"),), state="prelaunch")
    deleted = [action.key for action in plan_of(old, q35()) if isinstance(action, Delete)]
    assert deleted == ["guest:vm1", "volume:vm1:a"]


def test_a_file_has_hot_disks_while_there_are_ports_for_all() -> None:
    disks = tuple(model.Disk(size="1G", bus=bus) for bus in ("virtio", "sata", "usb", "usb"))
    for ports, expected in ((2, [True, False, True, True]), (1, [False] * 4)):
        wanted = model.Guest(disks=disks, ports=ports)
        made = hot_disks(disks_of(wanted, {}), wanted, ports)
        assert [one.hot for one in made] == expected
    started = q35(nic(1), disks=(hot("a"), hot("b", "usb"), hot("c", "usb")), ports=3)
    assert started.disk_ports() == {"disk-a": "port1", "usb": "port2"}


def test_a_machine_without_hot_plug_restarts_for_its_tap() -> None:
    wanted = q35(nic(1), ports=0)
    old = state(wanted)
    tap = old.get("tap:vm1:1")
    assert isinstance(tap, Tap)
    seen = State([*old, msgspec.structs.replace(tap, multi_queue=True)])
    assert diff(old, seen).restarts == {"guest:vm1": "tap:vm1:1 is made again"}


def test_a_nic_with_a_mac_and_a_tap_of_its_own_keeps_them_wherever_it_stands() -> None:
    both = (
        Nic(network="lan", mac="52:54:00:00:01:01", tap="vm1-lan"),
        Nic(network="wan", mac="52:54:00:00:01:02", tap="vm1-wan"),
    )
    plan = diff(compiled(both[1:]), compiled(both))
    touched = {action.key for action in plan if action.key.startswith(("tap:", "guest:"))}
    assert touched == {"tap:vm1:vm1-lan", "guest:vm1"}
    (line,) = [line for line in plan.describe() if line.startswith("update guest")]
    assert line.endswith(": remove NIC vm1-lan on lan")


def test_a_nic_without_takes_the_place_of_the_one_before_it() -> None:
    both = (Nic(network="lan"), Nic(network="wan"))
    plan = diff(compiled(both[1:]), compiled(both))
    (line,) = [line for line in plan.describe() if line.startswith("update guest")]
    assert line.endswith(": remove NIC vm1-1 on wan, NIC vm1-0 network lan -> wan")


def compiled(nics: tuple[Nic, ...]) -> State:
    networks = {"lan": Network(address="10.0.0.1/24"), "wan": Network(address="10.1.0.1/24")}
    topology = Topology(
        lab=Lab(name="x"), networks=networks, guests={"vm1": model.Guest(nics=nics)}
    )
    return compile(topology, Facts(), Path("/run/netorch/x"), "netorch_x", "/x.toml")
