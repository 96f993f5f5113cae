"""Whole labs with a guest: killed, interrupted, late, drifted, changed; then gone."""

import os
import shutil
import signal
from collections.abc import Callable
from typing import Any

import pytest

from netorch import labs
from netorch.errors import ReadyError
from netorch.labs import PlaceChoice
from netorch.planner import Action
from netorch.system.namespaces import wait_exit
from netorch.system.qmp import Qmp
from tests.isolation import ip
from tests.whole_labs import (
    KILLED,
    PLACES,
    At,
    LabMachine,
    Made,
    Monitor,
    Waiting,
    in_child,
    kill_self,
    links,
)

Make = Callable[..., LabMachine]
IN_BOTH = pytest.mark.parametrize("place", PLACES)
DEFAULT = """
[networks.default]
mode    = "nat"
bridge  = "virbr0"
address = "192.168.122.1/24"
dhcp    = { range = ["192.168.122.2", "192.168.122.254"] }
[guests.vm1]
image = "tiny"
memory = 128
nics  = [{ network = "default", address = "192.168.122.6" }]
"""
EVERYTHING = """
[networks.lan]
mode = "bridge"
address = "10.0.0.1/24"
[hosts.client]
nics = [{ network = "default" }]
[hosts.server]
nics = [{ network = "lan", address = "10.0.0.80/24" }]
[taps.lab]
network = "lan"
count = 2
"""
LONG = "timeout = 100"
# Waits for so many addresses in the guest, which hears of a NIC a moment after QEMU.
ADDRESSES = "until set -- /run/lease.eth*; [ $# = {} ]; do usleep 10000; done"


def kill(pid: int) -> None:
    """And wait until it is dead."""
    pidfd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    assert wait_exit(pidfd, 60)
    os.close(pidfd)


def leased(machine: LabMachine) -> list[str]:
    return [e["address"] for e in machine.netorch("leases", machine.name, "--json").json]


@IN_BOTH
def test_killed_after_each_action(lab_machine: Make, place: PlaceChoice) -> None:
    """Teardown after each; after the first action and with the guest there, apply before that."""
    machine = lab_machine(place)
    machine.write(DEFAULT, LONG)
    number = 0
    killed = True
    while killed:
        progress = At(number, kill_self)
        killed = in_child(lambda: machine.apply_here(progress)) == KILLED  # noqa: B023
        there = "guest:vm1" in machine.processes()
        if killed and (number == 1 or (there and place == "current")):
            machine.up()
            assert machine.differences() == []
            assert leased(machine) == ["192.168.122.6"]
        machine.down()
        number += 1
    assert number > 6


def test_killed_while_it_waits_for_the_lease(lab_machine: Make) -> None:
    machine = lab_machine("private")
    machine.write(DEFAULT, LONG)
    assert in_child(lambda: machine.apply_here(Waiting(kill_self))) == KILLED
    assert machine.differences() == []
    machine.up()
    assert leased(machine) == ["192.168.122.6"]
    machine.down()


def test_a_teardown_killed_after_each_action(lab_machine: Make) -> None:
    """Without waiting for leases: the guest is a process, whether it has booted or not."""
    made = Made("guest:vm1", kill_self)
    machine = lab_machine()
    machine.write(DEFAULT, LONG)
    number, killed = 0, True
    while killed:
        assert in_child(lambda: machine.apply_here(made)) == KILLED
        stop = At(number, kill_self)
        killed = in_child(lambda: labs.teardown(labs.find(machine.name), stop)) == KILLED  # noqa: B023
        machine.down()
        number += 1
    assert number > 6


def test_interrupted_while_it_waits(lab_machine: Make) -> None:
    machine = lab_machine()
    machine.write(DEFAULT.replace("image =", 'ready = "console:never"\nimage ='), LONG)
    command = machine.popen(*machine.apply_arguments())
    assert command.stderr is not None
    assert any("guest vm1" in line for line in command.stderr)
    os.killpg(command.pid, signal.SIGINT)
    err = command.stderr.read()
    assert command.wait() == 1
    assert "error: interrupted" in err
    assert "undone: delete guest vm1" in err
    assert machine.leftovers() == []


class Unheard(Waiting):
    """dnsmasq hears nobody, so that the guest has no lease by the time that it is waited for."""

    def __init__(self, machine: LabMachine, act: Callable[[], None]) -> None:
        super().__init__(act)
        self._machine = machine

    def done(self, action: Action) -> None:
        if action.key == "dnsmasq:default":
            os.kill(self._machine.processes()[action.key], signal.SIGSTOP)


def test_late_since_its_tap_is_down(lab_machine: Make) -> None:
    machine = lab_machine()
    machine.write(DEFAULT, "timeout = 4")

    def take_down() -> None:
        ip("link", "set", "vm1-0", "down")

    def late() -> str:
        with pytest.raises(ReadyError) as raised:
            machine.apply_here(Unheard(machine, take_down))
        return raised.value.message

    said = in_child(late)
    assert said == "vm1 has no lease of network default yet: its link vm1-0 is down"
    assert "guest:vm1" in machine.processes()
    assert machine.differences() == ["changed tap:vm1:0", "not in sync"]
    assert machine.netorch("teardown", machine.name).status == 0
    assert machine.leftovers() == []


def test_the_life_of_a_lab(lab_machine: Make) -> None:
    """Up with every kind; silent when applied again; edited, drifted, and its directory lost."""
    machine = lab_machine()
    machine.write(DEFAULT + EVERYTHING, LONG)
    machine.up()
    before = {**links(), **machine.processes()}

    monitor = Monitor()
    again = machine.apply()
    assert (again.status, again.out) == (0, f"lab {machine.name}: nothing to do\n")
    assert machine.netorch("status", machine.name).status == 0
    assert monitor.changes() == []

    text = DEFAULT.replace('mode    = "nat"', 'mode    = "isolated"')
    other = text.replace("192.168.122.6", "192.168.122.7") + EVERYTHING.replace(
        "count = 2", "count = 3"
    )
    machine.write(other.replace('"10.0.0.80/24"', '"10.0.0.81/24"'), LONG)
    machine.up()
    assert machine.differences() == []
    after = {**links(), **machine.processes()}
    kept = ["virbr0", "vm1-0", "client-0", "guest:vm1", "dhcp:client:eth0"]
    assert {key: after[key] for key in kept} == {key: before[key] for key in kept}
    ping = machine.netorch(
        "exec", "--lab", machine.name, "vm1", "--", *["ping", "-c1", "-W60"], "192.168.122.1"
    )
    assert ping.status == 0, ping.err

    kill(machine.processes()["guest:vm1"])
    machine.up()
    assert machine.differences() == []
    assert machine.processes()["guest:vm1"] != before["guest:vm1"]
    assert machine.processes()["dnsmasq:default"] == after["dnsmasq:default"]

    shutil.rmtree(machine.run)
    assert "record lost" in machine.netorch("ls").out
    status = machine.netorch("status", machine.name)
    assert status.status == 3
    assert "record of its topology is lost" in status.out
    machine.up()
    assert machine.differences() == []
    assert "192.168.122.7" in leased(machine)

    machine.write(EVERYTHING.partition("[hosts.client]")[0], LONG)
    in_child(lambda: machine.apply_here(Waiting(kill_self)))
    assert "guest:vm1" not in machine.processes()
    machine.down()


def test_the_run_directory_lost_in_a_private_place(lab_machine: Make) -> None:
    machine = lab_machine("private")
    machine.write(DEFAULT, LONG)
    machine.up()
    shutil.rmtree(machine.run, ignore_errors=True)
    machine.down()


def test_a_missing_qemu_is_named(lab_machine: Make) -> None:
    from netorch.system import namespaces

    machine = lab_machine()
    machine.write(DEFAULT, LONG)
    path = os.path.realpath(shutil.which("qemu-system-x86_64") or "")
    namespaces.mount("/dev/null", path, flags=namespaces.MS_BIND)
    done = machine.apply()
    namespaces.unmount(path)
    assert done.status == 1
    assert "qemu-system-x86_64 is not installed" in done.err
    assert machine.leftovers() == []


def test_killed_at_each_command_of_a_hot_plug(
    lab_machine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever QEMU was told last: the next apply makes the NIC whole, or takes all of it away."""
    machine = lab_machine()
    one = DEFAULT
    two = DEFAULT.replace('122.6" }]', '122.6" }, { network = "default" }]')
    machine.write(one, LONG)
    machine.up()
    pid = machine.processes()["guest:vm1"]
    number, killed = 0, [True, True]
    while any(killed):
        number += 1
        for index, text in enumerate((two, one)):
            machine.write(text, LONG)
            with monkeypatch.context() as patched:
                patched.setattr(Qmp, "send", killed_at(number))
                killed[index] = in_child(lambda: machine.apply_here(At(1000, kill_self))) == KILLED
            machine.up()
            assert machine.differences() == []
            assert machine.processes()["guest:vm1"] == pid
            addresses = ["sh", "-c", ADDRESSES.format(2 - index)]
            assert machine.netorch("exec", "vm1", "--", *addresses).status == 0
    assert number > 4


def killed_at(number: int) -> Callable[..., None]:
    """Qmp.send, but it kills this process instead of the n-th command that changes anything."""
    changing = ("object-", "getfd", "closefd", "netdev_", "device_")
    send = Qmp.send
    left = number

    def counted(self: Qmp, command: str, *arguments: Any) -> None:
        nonlocal left
        left -= command.startswith(changing)
        if left == 0:
            kill_self()
        send(self, command, *arguments)

    return counted
