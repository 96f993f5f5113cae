"""What is refused before the first change, what fails on the way, and what is interrupted."""

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from netorch import report
from netorch.engine import Progress
from netorch.labs import PlaceChoice
from netorch.planner import Action
from netorch.system import namespaces, rundir, starting
from tests import untouched
from tests.isolation import ip
from tests.kernel.test_labs_killed import CHANGED, LAB
from tests.whole_labs import (
    PLACES,
    FailingAt,
    LabMachine,
    Refused,
    in_child,
    stops_dnsmasq,
    without_numbers,
)

Make = Callable[..., LabMachine]
IN_BOTH = pytest.mark.parametrize("place", PLACES)

CONFLICTS: dict[str, tuple[list[str], str]] = {
    "bridge": (
        ["link add virbr0 type bridge"],
        "the name virbr0 is taken by a bridge that looks like libvirt's",
    ),
    "tap": (["tuntap add dev lab1 mode tap"], "the name lab1 is taken by a tap that is not"),
    "lab": (
        ["link add br0 type bridge", "link set br0 alias netorch:other:bridge:x"],
        "the name br0 is taken by a bridge of the netorch lab other",
    ),
    "address": (
        ["addr add 192.168.122.77/28 dev wan0"],
        "192.168.122.0/24 overlaps with 192.168.122.77/28 of wan0",
    ),
    "route": (
        ["route add 10.0.0.0/16 via 10.99.0.1"],
        "10.0.0.0/24 overlaps with route 10.0.0.0/16 of wan0",
    ),
}

MISSING = """
[networks.default]
address = "192.168.122.1/24"
uplink = "eth77"
[guests.vm1]
kernel = "vmlinuz"
image = "none.img"
nics = [{ network = "default" }]
[guests.vm2]
image = "none.img"
"""


@pytest.mark.parametrize("conflict", CONFLICTS)
def test_a_conflict_stops_before_the_first_change(lab_machine: Make, conflict: str) -> None:
    machine = lab_machine()
    commands, expected = CONFLICTS[conflict]
    for command in commands:
        ip(*command.split())
    before = machine.look()
    machine.write(LAB)
    for arguments in (["apply"], ["plan"]):
        done = machine.netorch(*arguments, str(machine.file))
        assert done.status == 1
        assert expected in done.err
        assert machine.look() == before


def test_all_conflicts_come_at_once(lab_machine: Make) -> None:
    machine = lab_machine()
    for name in ("bridge", "tap", "route"):
        for command in CONFLICTS[name][0]:
            ip(*command.split())
    machine.write(LAB)
    done = machine.apply()
    assert all(CONFLICTS[name][1] in done.err for name in ("bridge", "tap", "route"))


@IN_BOTH
def test_what_is_missing_is_told_by_the_plan(
    lab_machine: Make, place: PlaceChoice, tmp_path: Path
) -> None:
    machine = lab_machine(place)
    machine.write(MISSING)
    for command in ("plan", "apply"):
        done = machine.netorch(command, *machine.apply_arguments()[1:])
        assert done.status == 1
        assert sorted(done.err.removeprefix("error: ").splitlines()) == [
            f"failed to read {tmp_path}/vmlinuz of guest vm1: No such file or directory",
            f"guests vm1, vm2: failed to read image {tmp_path}/none.img: No such file or directory",
            "there is no interface eth77, the uplink that the file names",
        ]
        assert machine.leftovers() == []


@pytest.mark.parametrize("program", ["dnsmasq", "busybox"])
def test_a_missing_program_is_named(lab_machine: Make, program: str) -> None:
    machine = lab_machine()
    machine.write(LAB)
    before = machine.look()
    found = starting.program(program)
    assert found is not None
    path = Path(found)
    namespaces.mount("/dev/null", path.resolve(), flags=namespaces.MS_BIND)
    done = machine.apply()
    namespaces.unmount(path.resolve())
    assert done.status == 1
    assert f"{program} is not installed" in done.err
    assert machine.look() == before


def test_taps_that_cannot_be_made_are_refused(lab_machine: Make, tmp_path: Path) -> None:
    machine = lab_machine()
    machine.write(LAB)
    before = machine.look()
    namespaces.mount("/dev/null", "/dev/net/tun", flags=namespaces.MS_BIND)
    (tmp_path / "empty").mkdir()
    namespaces.mount(tmp_path / "empty", "/dev/net", flags=namespaces.MS_BIND)
    done = machine.apply()
    assert done.status == 1
    assert "/dev/net/tun can't be opened: No such file or directory" in done.err
    assert machine.look() == before


@IN_BOTH
def test_a_directory_of_somebody_elses_is_left_alone(lab_machine: Make, place: PlaceChoice) -> None:
    """NETORCH_RUN_DIR and NETORCH_DISK_DIR may be anything, such as a home directory."""
    machine = lab_machine(place)
    machine.write(LAB)
    letters = [
        base / name / "letter"
        for base in (machine.run_base, machine.disks_base)
        for name in (machine.name, "other")
    ]
    for letter in letters:
        letter.parent.mkdir(parents=True)
        letter.write_text("Dear reader")
    done = machine.apply()
    assert done.status == 1
    assert f"{machine.run_base / machine.name} is there already, and not netorch's" in done.err
    assert machine.netorch("ls", "--json").json == []
    assert machine.netorch("teardown", "--all").status == 0
    assert [letter.read_text() for letter in letters] == ["Dear reader"] * 4
    letters[0].unlink()
    letters[0].parent.rmdir()
    machine.before = machine.look()
    machine.up()
    machine.down()  # which compares


def test_an_empty_directory_of_somebody_elses_is_no_lab(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs").mkdir()
    assert rundir.all_of(tmp_path) == [tmp_path / "theirs"]
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    assert rundir.all_of(tmp_path) == []


@pytest.mark.parametrize("network", ['external = true\nbridge = "br9"', 'uplink = "eth9"'])
def test_what_a_private_place_cannot_have_leaves_nothing(lab_machine: Make, network: str) -> None:
    machine = lab_machine("private")
    machine.write(f'[networks.lan]\nmode = "bridge"\n{network}\n')
    before = machine.look()
    done = machine.apply()
    assert done.status == 1
    assert "can't be had in a private namespace" in done.err
    assert machine.netorch("ls", "--json").json == []
    assert machine.look() == before


def test_a_disk_that_is_full_is_named(lab_machine: Make) -> None:
    machine = lab_machine()
    machine.write(LAB)
    machine.run_base.mkdir()
    namespaces.mount("none", machine.run_base, "tmpfs", data="size=4k")
    (machine.run_base / "filler").write_bytes(bytes(4096))
    done = machine.apply()
    assert done.status == 1
    assert f"failed to write {machine.run_base / machine.name}/place: No space left" in done.err
    assert "Traceback" not in done.err
    assert [path.name for path in machine.run_base.iterdir()] == ["filler"]


@pytest.mark.parametrize("port", [53, 67])
def test_a_port_that_is_taken_names_the_holder(lab_machine: Make, port: int) -> None:
    machine = lab_machine()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder:
        holder.bind(("", port))
        machine.before = machine.look()
        machine.write(LAB)
        done = machine.apply()
        assert done.status == 1
        assert f"(process {os.getpid()})" in done.err
        assert machine.leftovers() == []


def test_one_name_in_two_namespaces_is_refused(lab_machine: Make) -> None:
    machine = lab_machine()
    machine.write(LAB)
    machine.up()
    running = machine.look()

    def elsewhere() -> tuple[int, str]:
        namespaces.unshare(namespaces.NEWNET)
        done = machine.apply()
        return done.status, done.err

    assert in_child(elsewhere)[0] == 1  # type: ignore[index]
    assert "another lab" in in_child(elsewhere)[1]  # type: ignore[index]
    assert machine.look() == running
    machine.down()


@IN_BOTH
@pytest.mark.parametrize("running", [False, True], ids=["fresh", "running"])
def test_a_failure_at_each_action_leaves_all_as_before(
    lab_machine: Make, place: PlaceChoice, running: bool
) -> None:
    machine = lab_machine(place)
    if running:
        machine.write(LAB)
        machine.up()
    before = machine.look()
    machine.write(CHANGED)
    number = 0
    while True:
        number += 1
        refused = in_child(
            lambda: machine.apply_here(Progress(), lambda s: FailingAt(s, number))  # noqa: B023
        )
        if not isinstance(refused, Refused):
            break
        assert "no luck" in refused.message
        assert not refused.left
        assert bool(refused.undone) == (number > 1), number
        changed = untouched.differences(without_numbers(before), without_numbers(machine.look()))
        assert not changed, "\n".join([f"at {number}", *changed])
        if running:
            assert machine.differences() == [], number
    assert number > 12
    machine.down()


@IN_BOTH
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_in_the_middle(
    lab_machine: Make, place: PlaceChoice, number: signal.Signals
) -> None:
    """The signal comes at each third action, and once more at each action of the rollback."""
    machine = lab_machine(place)
    machine.write(LAB)
    for action in range(1, 14, 3):
        with machine.apply_in_fork(_Interrupting(action, number)) as command:
            text = command.output.read()
        assert command.status == 1, text
        assert "error: interrupted" in text
        assert "undoing what was done" in text
        assert "undone: delete record" in text
        assert "left behind" not in text
        assert machine.leftovers() == [], text


@IN_BOTH
def test_interrupted_while_it_waits_for_the_lease(lab_machine: Make, place: PlaceChoice) -> None:
    """The signal goes to the whole process group, as Ctrl-C does. dnsmasq is stopped as soon as it
    is there, and so no lease ever comes.
    """
    machine = lab_machine(place)
    machine.write(LAB, "timeout = 600")
    with machine.apply_in_fork(stops_dnsmasq(machine)) as command:
        for line in command.output:
            if "DHCP client" in line:
                break
        os.killpg(command.pid, signal.SIGINT)
        said = command.output.read()
    assert command.status == 1
    assert "error: interrupted" in said
    assert "left behind" not in said
    assert machine.leftovers() == []


def _Interrupting(action: int, number: signal.Signals) -> type[report.Printer]:
    class Interrupting(report.Printer):
        def done(self, action_done: Action) -> None:
            super().done(action_done)
            if self.count == action:
                os.kill(os.getpid(), number)

        def undone(self, action_done: Action) -> None:
            super().undone(action_done)
            os.kill(os.getpid(), number)

    return Interrupting
