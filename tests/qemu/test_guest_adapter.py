"""Guests as the adapter makes them: every golden shape boots, with its sockets, disk and taps."""

import contextlib
import fcntl
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from netorch.errors import NetorchError
from netorch.planner import Update
from netorch.resources import Guest, Overlay, Resource
from netorch.system import accel, disks
from netorch.system.console import console
from netorch.system.guests import Guests
from netorch.system.namespaces import wait_exit
from netorch.system.processes import end, leaders, marked
from netorch.system.qmp import Qmp, agent_exec
from netorch.system.scope import Scope, current_place
from netorch.system.watch import Watch
from tests.guest_shapes import ELSEWHERE, SHAPES, back_end, guest, image_disk
from tests.isolation import ip
from tests.kernel.machine import on_a_machine

SECONDS = 120  # for a boot under TCG on a busy machine
HELLO = b"hello from the boot sector"
# mov si, 0x7c12; next: lodsb; or al, al; jz end; mov dx, 0x3f8; out dx, al; jmp next;
# end: hlt; jmp end
_CODE = bytes.fromhex("be127cac08c07406baf803eeebf5f4ebfd90")
_IFF = re.compile(r"^iff:\t(\S+)$", re.MULTILINE)
BOOT_SECTOR = (_CODE + HELLO + b"\0").ljust(510, b"\0") + b"\x55\xaa"


@contextlib.contextmanager
def lab(directory: Path) -> Iterator[tuple[Scope, Guests]]:
    run = directory / "run"
    run.mkdir()
    scope = Scope(lab=f"t{os.getpid()}", place=current_place(), run=run, disks=directory / "disks")
    try:
        yield scope, Guests(scope, print)
    finally:
        end(scope, marked(scope), grace=1)


def make_taps(wanted: Guest) -> None:
    for nic in wanted.nics:
        flags = 0x1002 | 0x4000 | (0x100 if nic.queues > 1 else 0)  # TAP, NO_PI, VNET_HDR
        try:
            fd = os.open("/dev/net/tun", os.O_RDWR)
        except OSError as error:
            pytest.skip(f"/dev/net/tun can't be opened: {error.strerror}")
        fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", nic.tap.encode(), flags))
        fcntl.ioctl(fd, 0x400454CB, 1)
        os.close(fd)
        ip("link", "set", nic.tap, "up")


def wait_for_console(scope: Scope, text: bytes, name: str = "vm1") -> None:
    log = scope.run / "guests" / name / "serial.log"
    deadline = time.monotonic() + SECONDS
    with Watch() as watch:
        watch.directory(log.parent)
        while not log.exists() or text not in log.read_bytes():
            assert time.monotonic() < deadline, log.read_bytes() if log.exists() else "no log"
            watch.wait(deadline - time.monotonic())


def with_image(wanted: Guest, path: Path, image_format: str) -> Guest:
    disks = (image_disk(image_format, str(path)),)
    return msgspec.structs.replace(wanted, image=str(path), disks=disks)


def nothing(resource: Resource) -> None:
    pass


@pytest.mark.parametrize("name", [name for name in SHAPES if name not in ELSEWHERE])
@on_a_machine
def test_shape(name: str, tmp_path: Path) -> None:
    wanted = SHAPES[name]
    if wanted.image != "tiny":
        base = tmp_path / "a, base.img"
        base.write_bytes(BOOT_SECTOR.ljust(1 << 20, b"\0"))
        image_format = wanted.disks[0].layers[0].format
        if image_format == "qcow2":
            base = base.rename(tmp_path / "raw")
            command = ["qemu-img", "convert", "-O", "qcow2", str(base), str(tmp_path / "base.img")]
            subprocess.run(command, check=True)
            base = tmp_path / "base.img"
        wanted = with_image(wanted, base, image_format)
        before = base.read_bytes()
    make_taps(wanted)
    with lab(tmp_path) as (scope, guests):
        assert guests.check([wanted]) == []
        if wanted.image != "tiny":
            overlay = Overlay(guest="vm1", disk="image", image=str(base), format=image_format)
            disks.Disks(scope).create([overlay], nothing)
        done: list[Resource] = []
        guests.create([wanted], done.append)
        assert done == [wanted] == list(guests.observe())
        (process,) = leaders(marked(scope))[wanted.key]
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert all(
            int(line.split()[1], 16) == 0 for line in status.splitlines() if line[:3] == "Cap"
        )
        if wanted.image != "tiny":
            wait_for_console(scope, HELLO)
            assert base.read_bytes() == before
        elif wanted.nics:
            wait_for_console(scope, b"vm1:")
            _check_front_ends(scope, wanted)
            opened = _open_taps(process.pid)
            assert sorted(opened) == [
                nic.tap for nic in wanted.nics for _queue in range(nic.queues)
            ]
        guests.delete([wanted], nothing)
        assert list(guests.observe()) == []
        assert marked(scope) == []
        assert not list(scope.run.rglob("*vm1*"))
        guests.delete([wanted], nothing)


def _open_taps(pid: int) -> list[str]:
    """The name of its tap, for each open queue."""
    found = []
    for fd in Path(f"/proc/{pid}/fdinfo").iterdir():
        with contextlib.suppress(FileNotFoundError):  # QEMU opens and closes others meanwhile
            found += _IFF.findall(fd.read_text())
    return found


def _check_front_ends(scope: Scope, wanted: Guest) -> None:
    script = (
        "for nic in /sys/class/net/eth*; do "
        "cat $nic/address; readlink -f $nic/device/driver; ls -d $nic/queues/rx-* | wc -l; done"
    )
    done = agent_exec(scope, "vm1", ["/bin/sh", "-c", script])
    lines = done.out.decode().split()
    found = {mac: (driver, queues) for mac, driver, queues in zip(*[iter(lines)] * 3, strict=True)}
    assert set(found) == {nic.mac for nic in wanted.nics}, done
    drivers = {"virtio-net-pci": "virtio_net", "e1000": "e1000", "rtl8139": "8139cp"}
    for nic in wanted.nics:
        driver, queues = found[nic.mac]
        assert Path(driver).name == drivers[nic.model]
        assert int(queues) == nic.queues


@on_a_machine
def test_a_guest_that_was_never_continued_is_seen_and_continued(tmp_path: Path) -> None:
    wanted = guest(nics=())
    with lab(tmp_path) as (scope, guests):
        guests.create([wanted], nothing)
        path = scope.run / "guests" / "vm1" / "qmp.sock"
        with Qmp(path, "vm1") as qmp:
            qmp.ready()
            qmp.ask("stop")
        (seen,) = guests.observe()
        assert seen == msgspec.structs.replace(wanted, state="paused")
        (process,) = leaders(marked(scope))[wanted.key]
        guests.update([Update(seen, wanted)], nothing)
        assert list(guests.observe()) == [wanted]
        assert [again.pid for again in leaders(marked(scope))[wanted.key]] == [process.pid]
        path.unlink()  # nobody can ask it any more: it is made again
        (seen,) = guests.observe()
        assert seen.state == "unreachable"
        guests.update([Update(seen, wanted)], nothing)
        assert list(guests.observe()) == [wanted]
        assert [again.pid for again in leaders(marked(scope))[wanted.key]] != [process.pid]


@on_a_machine
def test_a_guest_that_has_lost_its_passt_is_seen_and_made_again(tmp_path: Path) -> None:
    if not shutil.which("passt"):
        pytest.skip("passt is not installed")
    nics = (back_end(1, "user", subnet="10.0.2.0/24"), back_end(2, "passt", subnet="10.0.3.0/24"))
    wanted = guest(nics=nics)
    with lab(tmp_path) as (scope, guests):
        assert guests.check([wanted]) == []
        guests.create([wanted], nothing)
        assert list(guests.observe()) == [wanted]
        found = leaders(marked(scope))
        (passt,) = found[f"passt:vm1:{nics[1].mac}"]
        pidfd = os.pidfd_open(passt.pid)
        os.kill(passt.pid, signal.SIGKILL)
        assert wait_exit(pidfd, SECONDS)
        os.close(pidfd)
        (seen,) = guests.observe()
        assert [nic.attached for nic in seen.nics] == [True, False]
        guests.delete([seen], nothing)
        guests.create([wanted], nothing)
        assert list(guests.observe()) == [wanted]
        (qemu,) = leaders(marked(scope))[wanted.key]
        (passt,) = leaders(marked(scope))[f"passt:vm1:{nics[1].mac}"]
        pidfd = os.pidfd_open(passt.pid)
        os.kill(qemu.pid, signal.SIGKILL)
        assert wait_exit(pidfd, SECONDS), "passt goes with its QEMU"
        os.close(pidfd)


@on_a_machine
def test_guests_that_fail_say_why_and_the_others_run(tmp_path: Path) -> None:
    good = guest(nics=())
    bad = guest(name="vm2")  # its tap is missing
    worse = guest(name="vm3", nics=(), memory=1 << 40)
    with lab(tmp_path) as (_scope, guests):
        done: list[Resource] = []
        with pytest.raises(
            NetorchError, match="failed to open tap vm1-1 for guest vm2: No such dev"
        ):
            guests.create([bad, good, worse], done.append)
        assert done == [good]
        with pytest.raises(NetorchError, match=r"failed to create guest vm3: .*(memory|RAM|ram)"):
            guests.create([worse], done.append)
        assert list(guests.observe()) == [good]


@on_a_machine
def test_images_that_can_not_be_used_are_named(tmp_path: Path) -> None:
    base, overlay = tmp_path / "base.img", tmp_path / "overlay.img"
    base.write_bytes(BOOT_SECTOR.ljust(1 << 20, b"\0"))
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "raw"]
    subprocess.run([*command, str(overlay)], check=True)
    with lab(tmp_path) as (_scope, guests):
        missing = with_image(guest(), tmp_path / "none", "raw")
        assert guests.check([missing]) == [
            f"guest vm1: failed to read image {tmp_path}/none: No such file or directory"
        ]
        assert (
            f"is itself an overlay, of {base}"
            in guests.check([with_image(guest(), overlay, "qcow2")])[0]
        )
        holder = subprocess.Popen(
            [
                *("qemu-system-x86_64", "-S", "-nodefaults", "-display", "none", "-accel", "tcg"),
                *("-drive", f"file={base},format=raw,if=virtio", "-qmp", "stdio"),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdin.write(b'{"execute": "qmp_capabilities"}\n')
        holder.stdin.flush()
        holder.stdout.readline()  # the greeting, which comes before the disks are opened
        holder.stdout.readline()
        reasons = guests.check([with_image(guest(), base, "raw")])
        holder.terminate()
        holder.communicate()
        (reason,) = reasons
        assert f"is being written to by process {holder.pid} (qemu-system-x86)" in reason


@on_a_machine
def test_an_overlay_outlives_its_guest_and_is_refused_over_a_changed_image(tmp_path: Path) -> None:
    base = tmp_path / "base.img"
    base.write_bytes(BOOT_SECTOR.ljust(1 << 20, b"\0"))
    wanted = with_image(guest(nics=()), base, "raw")
    with lab(tmp_path) as (scope, guests):
        overlays = disks.Disks(scope)
        overlay = Overlay(guest="vm1", disk="image", image=str(base), format="raw")
        overlays.create([overlay], nothing)
        assert list(overlays.observe()) == [overlay]
        guests.create([wanted], nothing)
        guests.delete([wanted], nothing)
        assert list(overlays.observe()) == [overlay]
        assert guests.check([wanted]) == []
        os.utime(base, (time.time() + 5, time.time() + 5))
        (reason,) = guests.check([wanted])
        assert f"image {base} was written to after the disk image was made" in reason
        overlays.delete([overlay], nothing)
        overlays.delete([overlay], nothing)
        assert list(overlays.observe()) == []


@on_a_machine
def test_the_console_is_left_with_its_key(tmp_path: Path) -> None:
    wanted = guest(nics=())
    with lab(tmp_path) as (scope, guests):
        guests.create([wanted], nothing)
        wait_for_console(scope, b"vm1:")
        directory = scope.run / "guests" / "vm1"
        child, terminal = pty.fork()
        if child == 0:
            status = 99
            try:
                status = console(directory / "serial.sock", log=directory / "serial.log")
            finally:
                os._exit(status)
        shown = _read_until(terminal, b"vm1:")
        assert b"ctrl-] leaves" in shown
        os.write(terminal, b"echo $((6 * 7))\r")
        _read_until(terminal, b"42")
        os.write(terminal, b"\x1d")
        _read_until(terminal, b"[left]")
        assert os.waitpid(child, 0)[1] == 0
        os.close(terminal)


def _read_until(terminal: int, text: bytes) -> bytes:
    signal.alarm(SECONDS)  # ends the test's own process
    shown = b""
    while text not in shown:
        shown += os.read(terminal, 4096)
    signal.alarm(0)
    return shown


def test_the_accelerator_is_tried_once_a_boot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = accel.accelerator()
    assert first in ("kvm", "tcg")
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        assert first == "tcg"
        assert not (tmp_path / "netorch").exists()
        return
    monkeypatch.setattr(accel, "_guest_runs", lambda: pytest.fail("tried twice"))
    assert accel.accelerator() == first
    (tmp_path / "netorch" / "accel").write_text(f"another-boot {first}")
    monkeypatch.setattr(accel, "_guest_runs", lambda: True)
    assert accel.accelerator() == "kvm"


def test_a_cache_that_can_not_be_written_forgets_the_accelerator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    monkeypatch.setattr(accel, "_KVM", "/dev/null")
    monkeypatch.setattr(accel, "_guest_runs", lambda: True)
    assert accel.accelerator() == "kvm"
