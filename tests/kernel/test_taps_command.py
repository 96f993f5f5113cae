"""`netorch taps` with real taps, opened by processes of every kind."""

import ctypes
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from netorch.resources import encode
from netorch.system import namespaces, places
from netorch.system.scope import current_place
from netorch.system.starting import program
from netorch.system.taps import (
    DEVICE,
    IFF_MULTI_QUEUE,
    IFF_NO_PI,
    IFF_TAP,
    IFF_VNET_HDR,
    IFREQ,
    TUNSETIFF,
)
from netorch.tap_queues import find
from netorch.tap_report import chosen
from tests.guest_shapes import guest, nic
from tests.isolation import ip, require_tun
from tests.whole_labs import LabMachine, settle_carriers

ROOT = Path(__file__).parents[2]
TUNSETPERSIST = 0x400454CB
IFF_TUN = 0x0001
PR_SET_DUMPABLE = 4
MAC, OTHER = "52:54:00:4e:aa:fc", "52:54:00:4e:aa:fd"
QEMU = "qemu-system-x86_64"

PRIVATE = """
[networks.lan]
mode = "bridge"

[taps.lab]
network = "lan"
count = 2
"""

# Whoever has no capability may not ask the kernel where a tap is, nor look into what protects
# itself: what an ordinary user is to other people's processes.
NOBODY = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")


def own(name: str) -> str:
    """A name that no test beside this one has: its taps are seen as well."""
    return f"{name}-{os.getpid()}"


def open_tap(name: str, flags: int = 0, *, persist: bool = False) -> int:
    fd = os.open(DEVICE, os.O_RDWR)
    kind = flags if flags & IFF_TUN else flags | IFF_TAP
    fcntl.ioctl(fd, TUNSETIFF, IFREQ.pack(name.encode(), kind | IFF_NO_PI | IFF_VNET_HDR))
    if persist:
        fcntl.ioctl(fd, TUNSETPERSIST, 1)
    return fd


def netorch(*arguments: str, before: tuple[str, ...] = (), status: int = 0) -> Any:
    done = subprocess.run(
        [*before, sys.executable, "-m", "netorch", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return done


def taps(wanted: str | None = None, before: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """The rows; without `wanted` those of this network namespace."""
    if before:
        rows = json.loads(netorch("taps", "--json", *filter(None, [wanted]), before=before).stdout)
    else:
        rows = json.loads(msgspec.json.encode(chosen(find(), wanted)))
    return [row for row in rows if wanted or row["namespace"] == current_place()]


@contextmanager
def holding(
    *fds: int,
    words: tuple[str, ...] = (),
    env: dict[str, str] | None = None,
    before: tuple[str, ...] = (),
) -> Iterator[int]:
    """A process that has these descriptors, this end of a command line, and this environment.

    This process closes them. The other one ends with the block.
    """
    script = "import sys; print(flush=True); sys.stdin.read()"
    child = subprocess.Popen(
        [*before, sys.executable, "-c", script, *words],
        pass_fds=fds,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **(env or {})},
    )
    for fd in fds:
        os.close(fd)
    with child:
        assert child.stdout is not None
        child.stdout.readline()
        yield child.pid


@contextmanager
def elsewhere() -> Iterator[int]:
    """Another network namespace, by the pid of a process that is in it."""
    child = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "echo; cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with child:
        assert child.stdout is not None
        child.stdout.readline()
        yield child.pid


def inode(pid: int) -> int:
    return os.stat(f"/proc/{pid}/ns/net").st_ino


def test_a_queue_for_each_descriptor_both_ways() -> None:
    require_tun()
    ip("link", "add", "br0", "type", "bridge")
    fds = [open_tap(own("many0"), IFF_MULTI_QUEUE) for _ in range(8)]
    ip("link", "set", own("many0"), "master", "br0")
    with holding(*fds) as pid:
        (row,) = taps()
        assert row == {
            "tap": own("many0"),
            "state": "open",
            "namespace": current_place(),
            "namespace_from": "kernel",
            "place": "here",
            "lab": None,
            "bridge": "br0",
            "queues": 8,
            "idle": 0,
            "process": Path(f"/proc/{pid}/comm").read_text().strip(),
            "pid": pid,
            "descriptors": fds,
            "guest": None,
            "model": None,
            "mac": None,
            "address": None,
        }
        assert taps(own("many0")) == taps(str(pid)) == [row]
        assert json.loads(netorch("taps", "--json", own("many0")).stdout) == [row]
        refused = netorch("taps", own("meny0"), status=2)
        assert f"no tap {own('meny0')!r} can be seen" in refused.stderr
        assert own("many0") in refused.stderr
        refused = netorch("taps", str(os.getpid()), status=2)
        assert f"process {os.getpid()} has no tap open" in refused.stderr
    assert taps() == []


def test_taps_that_nobody_has_open() -> None:
    require_tun()
    ip("link", "add", "br0", "type", "bridge")
    for name, flags in (("lone", 0), ("mq", IFF_MULTI_QUEUE), ("vpn", IFF_TUN)):
        os.close(open_tap(own(name), flags, persist=True))
    ip("link", "set", own("lone"), "master", "br0")
    found = {row["tap"]: (row["state"], row["bridge"], row["queues"]) for row in taps()}
    assert found == {own("lone"): ("free", "br0", 0), own("mq"): ("free", None, 0)}, "vpn is no tap"
    with holding(open_tap(own("lone")), open_tap(own("vpn"), IFF_TUN)) as pid:
        (row,) = taps(own("lone"))
        assert (row["state"], row["queues"], row["pid"]) == ("open", 1, pid)
        assert [row["tap"] for row in taps(str(pid))] == [own("lone")]


def test_two_of_one_name_and_one_that_was_moved() -> None:
    """The namespace is the tap's, not that of the process, nor that where the tap was made."""
    require_tun()
    with elsewhere() as there:
        moved = open_tap(own("vnet0"))
        ip("link", "set", own("vnet0"), "netns", str(there))
        here = open_tap(own("vnet0"))
        with holding(moved, here) as pid:
            rows = taps(str(pid))
            assert [(row["namespace"], row["descriptors"]) for row in rows] == [
                (current_place(), [here]),
                (inode(there), [moved]),
            ]
            assert [row["place"] for row in rows] == ["here", f"net:[{inode(there)}]"]
            assert {row["namespace_from"] for row in rows} == {"kernel"}


def test_a_namespace_of_ip_netns_is_called_by_its_name() -> None:
    require_tun()
    ip("netns", "add", "blue")
    os.close(open_tap(own("moved0"), persist=True))
    ip("link", "set", own("moved0"), "netns", "blue")
    assert [(r["place"], r["state"]) for r in taps(own("moved0"))] == [("netns blue", "free")]
    ip("netns", "delete", "blue")


def test_what_may_not_be_looked_into_is_said() -> None:
    require_tun()
    fds = [open_tap(own("vnet7")), open_tap(own("vnet8"))]
    with holding(fds[1], before=NOBODY) as pid:
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0)  # this process, which has vnet7
        done = netorch("taps", before=NOBODY)
        rows = {row["tap"]: row for row in taps(before=NOBODY)}
    hidden, assumed = rows[own("vnet7")], rows[own("vnet8")]
    assert (hidden["state"], hidden["pid"], hidden["queues"]) == ("open", None, 1)
    assert (assumed["pid"], assumed["namespace_from"]) == (pid, "process")
    line = next(line for line in done.stdout.splitlines() if line.startswith(own("vnet8")))
    assert line.endswith("here?")
    assert "can't be looked into" in done.stderr
    assert "of these taps held there" in done.stderr
    assert "?: where the process is" in done.stderr
    os.close(fds[0])


def test_our_mark_says_where_the_tap_is_if_the_kernel_does_not() -> None:
    """As netorch's own QEMU is: in an empty namespace, with descriptors of another's taps."""
    require_tun()
    fd = open_tap(own("vm1-1"))
    shape = guest(nics=(msgspec.structs.replace(nic(1, "e1000"), tap=own("vm1-1")),))
    marks = {"NETORCH_PLACE": str(current_place()), "NETORCH_RESOURCE": encode(shape)}
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    namespaces.unshare(namespaces.NEWNET)
    try:
        with holding(fd, env=marks, before=NOBODY) as pid:
            namespaces.setns(home, namespaces.NEWNET)
            for before, by in (((), "kernel"), (NOBODY, "mark")):
                (row,) = taps(own("vm1-1"), before=before)
                assert (row["namespace_from"], row["namespace"]) == (by, current_place())
                assert (row["pid"], row["guest"], row["model"]) == (pid, "vm1", "e1000")
                assert (row["mac"], row["place"]) == ("52:54:00:00:00:01", "here")
    finally:
        os.close(home)


def test_unknown_is_not_guessed() -> None:
    """No mark, no right to ask, and no such tap where the process is."""
    require_tun()
    fd = open_tap(own("far0"))
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    namespaces.unshare(namespaces.NEWNET)
    with holding(fd, before=NOBODY) as pid:
        namespaces.setns(home, namespaces.NEWNET)
        os.close(home)
        rows = taps(own("far0"), before=NOBODY)
        assert [(r["pid"], r["namespace"], r["place"], r["queues"]) for r in rows] == [
            (None, current_place(), "here", 1),
            (pid, None, None, None),
        ]


def test_the_nic_of_a_stranger_and_what_is_too_old_to_be_true() -> None:
    require_tun()
    ip("link", "add", "br0", "type", "bridge")
    ip("link", "set", "br0", "up")
    fd = open_tap(own("vnet2"), persist=True)
    ip("link", "set", own("vnet2"), "address", f"fe{MAC[2:]}", "master", "br0")
    ip("link", "set", own("vnet2"), "up")
    ip("neigh", "add", "192.168.122.77", "lladdr", MAC, "dev", "br0", "nud", "stale")
    ip("neigh", "add", "192.168.122.78", "lladdr", MAC, "dev", "br0", "nud", "permanent")
    words = ("-name", "guest=old,debug-threads=on", "-netdev", f"tap,fd={fd},id=h0", "-device")
    device = "virtio-net-pci,netdev=h0,id=net0,mac="

    def row() -> list[object]:
        (found,) = taps(own("vnet2"))
        return [found[name] for name in ("guest", "model", "mac", "address")]

    with holding(os.dup(fd), words=(*words, device + MAC)):
        os.close(fd)
        assert row() == ["old", None, None, None], "its command line is of another descriptor"
    assert open_tap(own("vnet2")) == fd
    with holding(fd, words=(*words, device + MAC)):
        assert row() == ["old", "virtio-net-pci", MAC, "192.168.122.78"]
    assert open_tap(own("vnet2")) == fd
    with holding(fd, words=(*words, device + "52:54:00:00:00:01")):
        assert row() == ["old", None, None, None], "that NIC has left"
        settle_carriers()  # until then the bridge does not learn on this port
        learned = ["bridge", "fdb", "add", MAC, "dev", own("vnet2"), "master", "dynamic"]
        subprocess.run(learned, check=True)
        assert row() == ["old", None, MAC, "192.168.122.78"]


@pytest.mark.parametrize("before", [(), NOBODY], ids=["root", "user"])
def test_free_taps_of_a_private_lab(
    before: tuple[str, ...], lab_machine: Callable[..., LabMachine]
) -> None:
    """Also for who may only get there by way of the user namespace that the lab is in."""
    machine = lab_machine("private")
    machine.write(PRIVATE, 'uplink = "none"')
    machine.up()
    (place,) = {p.inode for p in places.private_places().values() if p.lab == machine.name}
    found = [row for row in taps("lab1", before) if row["lab"] == machine.name]
    assert [(r["state"], r["bridge"], r["place"]) for r in found] == [("free", "br-lan", "private")]
    assert found[0]["namespace"] == place
    machine.down()


@pytest.mark.skipif(program(QEMU) is None, reason=f"{QEMU} is not installed")
def test_a_real_qemu_as_libvirt_starts_it() -> None:
    """Eight queues, of which a guest that has not booted uses one, and a NIC of another model."""
    require_tun()
    ip("link", "add", "virbr9", "type", "bridge")
    many = [open_tap(own("vnet2"), IFF_MULTI_QUEUE) for _ in range(8)]
    one = open_tap(own("vnet3"))
    for name, mac in ((own("vnet2"), MAC), (own("vnet3"), OTHER)):
        ip("link", "set", name, "address", f"fe{mac[2:]}", "master", "virbr9")
    queues = ":".join(map(str, many))
    device = {"driver": "virtio-net-pci", "mq": True, "vectors": 18, "netdev": "hostnet0"}
    child = subprocess.Popen(
        [
            *(QEMU, "-name", "guest=win11,debug-threads=on", "-S", "-accel", "tcg"),
            *("-machine", "q35", "-m", "64", "-nodefaults", "-display", "none"),
            *("-netdev", json.dumps({"type": "tap", "fds": queues, "id": "hostnet0"})),
            *("-device", json.dumps({**device, "mac": MAC, "romfile": ""})),
            *("-netdev", f"tap,fd={one},id=hostnet1"),
            *("-device", f"e1000,netdev=hostnet1,mac={OTHER},romfile="),
            *("-qmp", "stdio"),
        ],
        pass_fds=[*many, one],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    for fd in (*many, one):
        os.close(fd)
    with child:
        try:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(b'{"execute": "qmp_capabilities"}')
            child.stdin.flush()
            greeting, answer = child.stdout.readline(), child.stdout.readline()
            assert b"return" in answer, f"its devices are there: {greeting!r} {answer!r}"
            first, second = taps(str(child.pid))
        finally:
            child.kill()
    assert (first["tap"], first["queues"], first["idle"]) == (own("vnet2"), 8, 7)
    assert (first["descriptors"], second["descriptors"]) == (many, [one])
    names = ("guest", "model", "mac", "bridge", "process")
    assert [first[name] for name in names] == ["win11", "virtio-net-pci", MAC, "virbr9", QEMU[:15]]
    assert [second[name] for name in names] == ["win11", "e1000", OTHER, "virbr9", QEMU[:15]]
