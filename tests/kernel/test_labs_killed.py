"""SIGKILL at any moment: the next apply converges, and teardown leaves nothing."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

import pytest

from netorch import labs
from netorch.engine import Progress
from netorch.labs import PlaceChoice
from netorch.system import starting
from netorch.system.capabilities import confine
from netorch.system.places import private_places
from tests.whole_labs import (
    KILLED,
    PLACES,
    At,
    LabMachine,
    calls_into_the_kernel,
    chosen_seed,
    end_now,
    in_child,
    kill_at_call,
    kill_self,
    said,
)

LAB = """
[networks.default]
bridge = "virbr0"
address = "192.168.122.1/24"
[networks.lan]
mode = "bridge"
bridge = "br0"
address = "10.0.0.1/24"
[hosts.client]
nics = [{ network = "default" }]
[hosts.server]
nics = [{ network = "lan", address = "10.0.0.80/24", rate = "8mbit" }]
[taps.lab]
network = "default"
count = 2
"""
CHANGED = """
[networks.default]
bridge = "virbr0"
address = "192.168.122.1/24"
mode = "isolated"
mtu = 1400
[networks.dmz]
bridge = "br1"
address = "10.1.0.1/24"
[hosts.server]
nics = [{ network = "dmz", address = "10.1.0.80/24", rate = { out = "1gbit" } }]
[taps.lab]
network = "dmz"
count = 3
"""

Make = Callable[..., LabMachine]
KILLS = 10  # at random calls, for each test


def converges(machine: LabMachine) -> None:
    machine.up()
    assert machine.differences() == []
    machine.down()


def goes(machine: LabMachine) -> None:
    machine.down()


AFTERWARDS = pytest.mark.parametrize("afterwards", [converges, goes], ids=lambda f: f.__name__)
IN_BOTH = pytest.mark.parametrize("place", PLACES)


@IN_BOTH
@AFTERWARDS
def test_killed_after_each_action(
    lab_machine: Make, place: PlaceChoice, afterwards: Callable[[LabMachine], None]
) -> None:
    machine = lab_machine(place)
    machine.write(LAB)
    number = 0
    while in_child(lambda: machine.apply_here(At(number, kill_self))) == KILLED:  # noqa: B023
        afterwards(machine)
        number += 1
    machine.down()
    assert number > 10


@IN_BOTH
@AFTERWARDS
def test_killed_at_random_calls_into_the_kernel(
    lab_machine: Make, place: PlaceChoice, afterwards: Callable[[LabMachine], None]
) -> None:
    machine = lab_machine(place)
    machine.write(LAB)
    seed = chosen_seed()
    rng = random.Random(seed)
    total = calls_into_the_kernel(lambda: machine.apply_here(Progress()))
    machine.down()

    def cut_short(call: int) -> None:
        kill_at_call(call)
        machine.apply_here(Progress())

    for call in sorted(rng.sample(range(1, total), KILLS)):
        said(f"seed {seed}: killed at call {call} of {total}")
        in_child(lambda call=call: cut_short(call))  # type: ignore[misc]
        afterwards(machine)


@pytest.mark.parametrize(("place", "parity"), [("current", 0), ("private", 1)])
def test_an_update_killed_after_each_action(
    lab_machine: Make, place: PlaceChoice, parity: int
) -> None:
    machine = lab_machine(place)
    number, killed = 0, True
    while killed:
        machine.write(LAB)
        machine.up()
        machine.write(CHANGED)
        progress = At(number, kill_self)
        killed = in_child(lambda: machine.apply_here(progress)) == KILLED  # noqa: B023
        (converges if number % 2 == parity else goes)(machine)
        number += 1
    assert number > 15


def test_a_teardown_killed_after_each_action(lab_machine: Make) -> None:
    machine = lab_machine()
    machine.write(LAB)
    number, killed = 0, True
    while killed:
        machine.up()
        stop = At(number, kill_self)
        killed = in_child(lambda: labs.teardown(labs.find(machine.name), stop)) == KILLED  # noqa: B023
        machine.down()
        number += 1
    assert number > 10


@IN_BOTH
def test_a_teardown_killed_at_random_calls(lab_machine: Make, place: PlaceChoice) -> None:
    machine = lab_machine(place)
    machine.write(LAB)
    seed = chosen_seed()
    rng = random.Random(seed)

    def take_away(call: int = 0) -> None:
        if call:
            kill_at_call(call)
        labs.teardown(labs.find(machine.name), Progress())

    machine.up()
    total = calls_into_the_kernel(take_away)
    for call in sorted(rng.sample(range(1, total), KILLS)):
        said(f"seed {seed}: killed at call {call} of {total}")
        machine.up()
        in_child(lambda call=call: take_away(call))  # type: ignore[misc]
        machine.down()


def test_what_a_killed_apply_was_just_starting_is_seen_by_the_next(lab_machine: Make) -> None:
    """The apply is killed while a process of its own is about to become dnsmasq."""
    machine = lab_machine()
    machine.write(LAB)
    child = os.fork()
    if child == 0:
        _apply_killed_by_what_it_starts(machine)
    os.waitpid(child, 0)
    done = machine.apply()
    assert done.status == 0, done.err
    assert "dnsmasq for lan" in done.err
    assert "dnsmasq for default" not in done.err
    assert machine.differences() == []
    machine.down()


def _apply_killed_by_what_it_starts(machine: LabMachine) -> NoReturn:
    apply = os.getpid()

    def linger(capabilities: Sequence[int]) -> None:
        os.kill(apply, signal.SIGKILL)
        time.sleep(2)
        confine(capabilities)

    try:
        pytest.MonkeyPatch().setattr(starting, "confine", linger)
        machine.apply_here(Progress())
    finally:  # this child must not go on with the test
        os._exit(0)


@IN_BOTH
def test_the_run_directory_deleted_while_the_lab_runs(
    lab_machine: Make, place: PlaceChoice
) -> None:
    machine = lab_machine(place)
    machine.write(LAB)
    for afterwards in (converges, goes):
        machine.up()
        shutil.rmtree(machine.run, ignore_errors=True)  # in a private place /run/netns is a mount
        assert not (machine.run / "record.json").exists()
        listed = machine.netorch("ls")
        assert f"{machine.name} " in listed.out
        assert "record lost" in listed.out
        status = machine.netorch("status", machine.name)
        assert status.status == 3
        assert "record of its topology is lost" in status.out
        assert [
            e["file"] for e in machine.netorch("ls", "--json").json if e["lab"] == machine.name
        ] == [None]
        afterwards(machine)


@AFTERWARDS
def test_a_private_place_killed_from_outside(
    lab_machine: Make, afterwards: Callable[[LabMachine], None]
) -> None:
    machine = lab_machine("private")
    machine.write(LAB)
    machine.up()
    end_now(private_places()[machine.name].init)
    assert "gone" in machine.netorch("ls").out
    status = machine.netorch("status", machine.name)
    assert (status.status, status.out) == (1, "")
    assert "it is gone" in status.err
    afterwards(machine)


def test_only_the_disks_are_left(lab_machine: Make) -> None:
    machine = lab_machine()
    (machine.disks_base / machine.name).mkdir(parents=True)
    machine.down()
