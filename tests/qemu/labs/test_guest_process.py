"""What a guest's QEMU may do, and what is known of it when it has ended."""

import json
import os
import re
import signal
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from netorch.system.watch import Watch
from tests.qemu.labs.lab import SECONDS, Lab, Machine

GUEST = """
[networks.default]
address = "192.168.122.1/24"

[guests.vm1]
nics = [{ network = "default" }]
"""


@pytest.mark.parametrize("place", ["current", "private"])
def test_least_privilege_and_the_end(machine: Machine, place: str) -> None:
    lab = machine.up("ends", GUEST, *(["--private"] if place == "private" else []))
    pid = qemu(lab)
    _has_no_privileges(pid)
    parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
    _has_no_network(pid, "self" if place == "current" else parent)
    for path in (lab.run / "guests" / "vm1").iterdir():
        mode = path.stat().st_mode
        assert stat.S_IMODE(mode) == 0o600 or not stat.S_ISSOCK(mode), path
    for directory in (lab.run, lab.run / "guests" / "vm1"):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700

    _wait_for_end(lab, lambda: os.kill(pid, signal.SIGKILL))
    row = _row(lab)
    assert (row["state"], row["ended"]["killed"], row["ended"]["status"]) == ("missing", True, 9)
    assert any("vm1" in line for line in row["ended"]["console"])
    said = machine.netorch("status", lab.name, status=3).stdout
    assert re.search(r"missing +guest:vm1 .*: it was killed by signal 9 on 20", said)
    assert "vm1: the last lines of its console:" in said

    machine.netorch("apply", str(lab.file))
    lab.unchanged()
    _wait_for_end(lab, lambda: lab.sh("vm1", "poweroff", status=None))
    row = _row(lab)
    assert (row["state"], row["ended"]["killed"], row["ended"]["status"]) == ("missing", False, 0)


def qemu(lab: Lab, guest: str = "vm1") -> int:
    """The pid of a guest's QEMU."""
    (found,) = (
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/environ")
        if _is_qemu_of(lab, guest, path)
    )
    return found


def _is_qemu_of(lab: Lab, guest: str, environ: Path) -> bool:
    try:
        marks = environ.read_bytes().split(b"\0")
    except OSError:
        return False
    return f"NETORCH_LAB={lab.name}".encode() in marks and any(
        mark.startswith(f'NETORCH_RESOURCE={{"kind":"guest","name":"{guest}"'.encode())
        for mark in marks
    )


def _has_no_privileges(pid: int) -> None:
    lines = (line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    status = {line[0]: line[-1].strip() for line in lines}
    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(status[name], 16) == 0, name
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"  # a filter: QEMU's sandbox


def _has_no_network(pid: int, member: str) -> None:
    """`member` is a process in the lab's network namespace."""
    lines = Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
    assert {line.split(":")[0].strip() for line in lines} <= {"lo", "ifb0", "ifb1"}
    # Nor has it brought along a socket of the lab's network namespace.
    assert os.stat(f"/proc/{member}/ns/net").st_ino != os.stat(f"/proc/{pid}/ns/net").st_ino
    links = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # QEMU opens and closes others meanwhile
            links.append(os.readlink(fd))
    sockets = {link[8:-1] for link in links if link.startswith("socket:")}
    assert sockets
    for table in ("tcp", "tcp6", "udp", "udp6", "raw", "packet"):
        rows = Path(f"/proc/{member}/net/{table}").read_text().splitlines()[1:]
        assert sockets.isdisjoint(word for row in rows for word in row.split()), table


def _row(lab: Lab) -> dict[str, Any]:
    said = lab.machine.netorch("status", "--json", lab.name, status=3).stdout
    (row,) = (row for row in json.loads(said)["resources"] if row["key"] == "guest:vm1")
    assert isinstance(row, dict)
    return row


def _wait_for_end(lab: Lab, begin: Callable[[], object]) -> None:
    directory = lab.run / "guests" / "vm1"
    with Watch() as watch:
        watch.directory(directory)
        begin()
        while not (directory / "ended").exists() or not (directory / "ended").read_text():
            changed, _ = watch.wait(SECONDS)
            assert changed
