"""Guests that are saved and go on, whatever comes in between; and snapshots of their disks."""

import json
import signal
import subprocess
import sys
import time
from typing import Any

from netorch.system import namespaces
from tests.qemu.labs.lab import Lab, Machine, wait_for
from tests.qemu.labs.test_guest_process import qemu

GUEST = """
[networks.default]
address = "192.168.122.1/24"

[guests.vm1]
memory = "128M"
nics   = [{ network = "default" }]
"""

DISK = """
[guests.disk]
image  = "raw.img"
memory = "64M"

[guests.tiny]
memory = "128M"
ready  = "none"
"""

COUNT = """
(i=0; while :; do i=$((i+1)); echo $i > /run/count; sleep 0.1; done) > /dev/null 2>&1 < /dev/null &
echo $! > /run/counter
"""

# Runs a command line that is killed where it calls a function.
KILLED = """
import os, signal, sys
from netorch.cli import main
from netorch.system import {module}
{module}.{function} = lambda *words: os.kill(os.getpid(), signal.SIGKILL)
main()
"""


def test_a_saved_guest_goes_on(machine: Machine) -> None:
    lab = machine.up("save", GUEST)
    lab.sh("vm1", COUNT)
    before = _count(lab)

    said = machine.netorch("save", "vm1").stderr
    assert "vm1 is saved: " in said
    state = machine.disks_base / lab.name / "vm1" / "running.state"
    assert state.stat().st_mode & 0o777 == 0o600
    assert [row["key"] for row in _missing(lab)] == ["guest:vm1"]
    assert abs(_missing(lab)[0]["saved"] - time.time()) < 60
    assert "ended" not in _missing(lab)[0]
    assert ": saved on 20" in machine.netorch("status", lab.name, status=3).stdout
    assert "does not run" in machine.netorch("save", "vm1", status=2).stderr

    _refused_as_another_one(lab)

    time.sleep(3)  # by which the guest's clock would be late
    said = machine.netorch("start", "vm1").stderr
    assert "vm1 goes on from 20" in said
    assert not state.parent.exists()
    after = _count(lab)
    assert before < after < before + 10_000
    _on_time(lab)
    lab.sh("vm1", "ping -c 1 -W 60 192.168.122.1")
    lab.unchanged()

    _no_space_leaves_it_running(lab)
    _killed_commands_lose_nothing(lab)
    _an_interrupted_apply_saves_it_again(lab)

    machine.netorch("save", "vm1")
    machine.netorch("start", "--discard", "vm1")
    assert lab.sh("vm1", "ls /run/count", status=1) == ""
    lab.unchanged()
    _killed(lab, "saving", "wait_migrated", "save", "vm1")
    lab.teardown()
    assert machine.left() == []


def _on_time(lab: Lab) -> None:
    """Its clock is wrong by no more than a second, and `date` leaves out up to another one."""
    began = time.time()
    assert began - 2 < int(lab.sh("vm1", "date +%s")) < time.time() + 1


def _refused_as_another_one(lab: Lab) -> None:
    text = lab.file.read_text()
    lab.file.write_text(text.replace('"128M"', '"192M"'))
    for command in ("plan", "apply"):
        said = lab.machine.netorch(command, str(lab.file), status=1).stderr
        assert "guest vm1 was saved as another one (memory 128 -> 192) on 20" in said
        assert "`netorch start --discard vm1`" in said
        assert said.count("error:") == 1
    lab.file.write_text(text)
    assert len(_missing(lab)) == 1


def _no_space_leaves_it_running(lab: Lab) -> None:
    disks = lab.machine.disks_base / lab.name
    pid = qemu(lab)
    namespaces.mount("tmpfs", str(disks), "tmpfs", data="size=4m")
    try:
        said = lab.machine.netorch("save", "vm1", status=1).stderr
        assert "error: failed to save guest vm1: " in said
        assert "No space left on device" in said
        assert "hint: it runs on" in said
        assert [path.name for path in disks.iterdir()] == [".netorch"]
    finally:
        namespaces.unmount(str(disks))
    assert qemu(lab) == pid
    _count(lab)
    lab.unchanged()


def _killed_commands_lose_nothing(lab: Lab) -> None:
    """After each, an apply makes it whole, and the same process counts on in the guest."""
    pid = qemu(lab)
    for function in ("wait_migrated", "_sync"):
        _killed(lab, "saving", function, "save", "vm1")
        lab.machine.netorch("apply", str(lab.file))
        assert qemu(lab) == pid
        _count(lab)
        assert [p.name for p in (lab.machine.disks_base / lab.name).iterdir()] == [".netorch"]
    lab.machine.netorch("save", "vm1")
    _killed(lab, "saved", "drop", "start", "vm1")
    lab.machine.netorch("apply", str(lab.file))
    _count(lab)
    assert [p.name for p in (lab.machine.disks_base / lab.name).iterdir()] == [".netorch"]
    lab.unchanged()


def _an_interrupted_apply_saves_it_again(lab: Lab) -> None:
    lab.machine.netorch("save", "vm1")
    text = lab.file.read_text()
    lab.file.write_text(text.replace("[guests.vm1]", '[guests.vm1]\nready = "tcp:1"'))
    applying = lab.machine.start("apply", str(lab.file))
    assert applying.stderr is not None
    assert any("vm1 goes on from" in line for line in applying.stderr)
    applying.send_signal(signal.SIGINT)
    said = applying.stderr.read()
    assert "vm1 is saved: " in said
    assert "error: interrupted" in said
    assert applying.wait() == 1
    assert ": saved on 20" in lab.machine.netorch("status", lab.name, status=3).stdout
    lab.file.write_text(text)
    assert "vm1 goes on from" in lab.machine.netorch("apply", str(lab.file)).stderr
    _count(lab)
    lab.unchanged()


def test_snapshots_of_a_disk(machine: Machine) -> None:
    image = machine.directory / "raw.img"
    image.write_bytes(_counting_boot_sector().ljust(1 << 20, b"\0"))
    lab = machine.up("snaps", DISK)

    def netorch(*words: str, status: int = 0) -> str:
        done = machine.netorch(*words, status=status)
        return done.stderr if status else done.stdout

    def names() -> list[str]:
        return [one["name"] for one in json.loads(netorch("snapshot", "--list", "--json", "disk"))]

    _booted(lab, 1)
    assert "guest disk has no snapshot" in netorch("snapshot", "--list", "disk")
    assert netorch("snapshot", "disk", "one") == "disk: snapshot one\n"
    assert "has a snapshot 'one' already" in netorch("snapshot", "disk", "one", status=2)
    assert "guest tiny has no disk" in netorch("snapshot", "tiny", status=2)
    netorch("restart", "--timeout", "0", "disk")
    _booted(lab, 2)
    assert "add --restart" in netorch("snapshot", "--revert", "one", "disk", status=2)
    assert "it has: one" in netorch("snapshot", "--revert", "two", "disk", status=2)
    netorch("snapshot", "--revert", "one", "--restart", "--timeout", "0", "disk")
    _booted(lab, 2)

    netorch("stop", "--timeout", "0", "disk")
    netorch("snapshot", "disk", "off")
    assert names() == ["one", "off"]
    netorch("start", "disk")
    _booted(lab, 3)
    assert names() == ["one", "off"]

    netorch("save", "disk")
    assert "disk is saved, and goes on" in netorch("snapshot", "--revert", "one", "disk", status=2)
    netorch("start", "disk")
    lab.unchanged()
    log = lab.run / "guests" / "disk" / "serial.log"
    assert log.read_text().endswith("\n3\n")  # it has not booted
    netorch("snapshot", "--delete", "one", "disk")
    assert names() == ["off"]
    netorch("stop", "--timeout", "0", "disk")
    netorch("snapshot", "--revert", "off", "disk")
    netorch("snapshot", "--delete", "off", "disk")
    assert names() == []
    netorch("start", "disk")
    _booted(lab, 3)

    # A guest that is taken out of the file has nothing to go on from.
    netorch("save", "disk", "tiny")
    lab.file.write_text("")
    netorch("apply", str(lab.file))
    assert [p.name for p in (machine.disks_base / lab.name).iterdir()] == [".netorch"]


def _killed(lab: Lab, module: str, function: str, *command: str) -> None:
    code = KILLED.format(module=module, function=function)
    child = lab.machine.started(
        [sys.executable, "-c", code, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    said = child.communicate()[0]
    assert child.returncode == -9, said


def _count(lab: Lab) -> int:
    """How far the counter in the guest is; it is the same process, and counts on."""
    script = """
        kill -0 $(cat /run/counter) || exit
        count() {
            until now=$(cat /run/count) && [ "$now" ]; do :; done # it is just being written
        }
        count
        was=$now
        until [ "$now" -gt "$was" ]; do sleep 0.1; count; done
        echo "$was"
    """
    return int(lab.sh("vm1", script))


def _missing(lab: Lab) -> list[dict[str, Any]]:
    found = json.loads(lab.machine.netorch("status", "--json", lab.name, status=3).stdout)
    return [row for row in found["resources"] if row["state"] == "missing"]


def _booted(lab: Lab, number: int) -> None:
    log = lab.run / "guests" / "disk" / "serial.log"
    wait_for(log, lambda text: text.endswith(f"]\n{number}\n"))


def _counting_boot_sector() -> bytes:
    """Adds one to the first byte of the next sector and tells the first serial port."""
    address = bytes.fromhex("bb007e b90200 b600")  # mov bx, 7e00h; mov cx, 2; mov dh, 0
    code = b"".join(
        (
            bytes.fromhex("31c0 8ed8 8ec0"),  # xor ax, ax; mov ds, ax; mov es, ax
            bytes.fromhex("b80102") + address + bytes.fromhex("cd13"),  # read it
            bytes.fromhex("fe06007e"),  # inc byte [7e00h]
            bytes.fromhex("b80103") + address + bytes.fromhex("cd13"),  # write it
            bytes.fromhex("a0007e 0430 baf803 ee"),  # mov al, [7e00h]; add al, '0'; out
            bytes.fromhex("b00a ee"),  # a newline
            bytes.fromhex("f4 ebfd"),  # end: hlt; jmp end
        )
    )
    return code.ljust(510, b"\0") + b"\x55\xaa"
