"""`apply --confirm`: the watchdog puts everything back, whoever else is killed.

netorch runs as it does for a person, as a process; the machine is a network namespace of the
test's own, with a LAN at eth1 (tests/kernel/uplinks.py). On a busy machine nobody knows what is
done within two seconds. So for a watchdog the time stands still, until a test says that it is up;
test_not_confirmed_the_previous_topology_comes_back alone goes by a real clock.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from netorch.system.confirmation import MARK
from netorch.system.namespaces import wait_exit
from tests.kernel.cables import sh
from tests.kernel.uplinks import RICH, standing, talking, uplink

LAN = """
[networks.lan]
mode = "bridge"
bridge = "br0"
uplink = "eth1"
"""
LAB = f"t{os.getpid()}"  # other labs of this user may run beside the tests
LONG = "600"  # seconds that no test waits for
SHORT = "1"  # second, which is over when the test says so

# Python runs it at the start, since it is on PYTHONPATH.
CLOCK = """
import os, sys
if "netorch.watchdog" in sys.orig_argv:
    import time
    since_boot = time.monotonic
    time.monotonic = lambda: since_boot() if os.path.exists({up!r}) else 0.0
"""


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NETORCH_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("NETORCH_DISK_DIR", str(tmp_path / "disks"))
    clock = tmp_path / "clock"
    clock.mkdir()
    (clock / "sitecustomize.py").write_text(CLOCK.format(up=str(clock / "up")))
    monkeypatch.setenv("PYTHONPATH", str(clock), prepend=os.pathsep)
    write(tmp_path, LAN)
    return tmp_path


def write(directory: Path, text: str) -> None:
    (directory / f"{LAB}.toml").write_text(text)


def file_of(directory: Path) -> str:
    return str(directory / f"{LAB}.toml")


def netorch(*words: str, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "netorch", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == status, f"{words}: {done.returncode}: {done.stdout}"
    return done.stdout


def apply(directory: Path, *more: str, status: int = 0) -> str:
    return netorch("apply", *more, file_of(directory), status=status)


def applying(directory: Path) -> "subprocess.Popen[str]":
    """Start `apply --confirm`."""
    words = [sys.executable, "-m", "netorch", "apply", "--confirm", SHORT, file_of(directory)]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True)


def read_until(process: "subprocess.Popen[str]", text: str) -> None:
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if text in line:
            return
    raise AssertionError("".join(said))


def watchdogs() -> Iterator[int]:
    """The watchdogs of this network namespace."""
    here = os.stat("/proc/self/ns/net").st_ino
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            marked = f"{MARK}={LAB}".encode() in (entry / "environ").read_bytes().split(b"\0")
            if marked and (entry / "ns/net").stat().st_ino == here:
                yield int(entry.name)
        except OSError:
            continue


def time_is_up(directory: Path) -> None:
    (directory / "clock" / "up").touch()


def wait_for_its_end() -> None:
    for pid in watchdogs():
        with suppress(ProcessLookupError):  # it has ended since
            pidfd = os.pidfd_open(pid)
            assert wait_exit(pidfd, 120)
            os.close(pidfd)


def log(directory: Path) -> str:
    return (directory / f"run/{LAB}/confirm.log").read_text()


def test_confirmed_it_stays(directory: Path) -> None:
    uplink()
    said = apply(directory, "--confirm", LONG)
    assert f"it is put back in 600 s unless you say `netorch confirm {LAB}`" in said
    assert f"`netorch confirm {LAB}` comes in time: " in netorch("status", LAB)
    assert f"{LAB} stays as it is\n" in netorch("confirm", LAB)
    wait_for_its_end()
    assert "in time" not in netorch("status", LAB)
    assert "waits for no confirmation" in netorch("confirm", LAB, status=2)
    netorch("teardown", LAB)


def test_not_confirmed_it_is_taken_away(directory: Path) -> None:
    far = uplink(RICH)
    before = standing()
    with talking(far) as talk:
        apply(directory, "--confirm", SHORT)
        talk.goes_on()
        assert "master br0" in sh("ip link show dev eth1")
        time_is_up(directory)
        wait_for_its_end()
        talk.goes_on()
    assert standing() == before
    assert "br0" not in sh("ip link")
    assert not (directory / f"run/{LAB}").exists()


def test_not_confirmed_the_previous_topology_comes_back(directory: Path) -> None:
    time_is_up(directory)  # the watchdog has a real clock
    uplink(RICH)
    before = standing()
    write(directory, LAN.replace('uplink = "eth1"', ""))
    apply(directory)
    write(directory, LAN)
    apply(directory, "--confirm", "10")
    wait_for_its_end()
    addresses = [line for line in standing()["addresses"] if "fe80" not in line]
    assert addresses == [line for line in before["addresses"] if "fe80" not in line]
    netorch("status", LAB)  # in sync with the first file
    assert "not confirmed within 10 s" in log(directory)
    assert "delete uplink eth1 of br0" in log(directory)
    netorch("teardown", LAB)
    assert standing() == before


@pytest.mark.parametrize("lost", [False, True], ids=["", "run directory lost"])
def test_netorch_killed_on_the_way(lost: bool, directory: Path) -> None:
    uplink(RICH)
    before = standing()
    write(directory, LAN + "[networks.default]\n")
    with applying(directory) as process:
        read_until(process, "uplink eth1")
        process.kill()
    assert "master br0" in sh("ip link show dev eth1")
    if lost:
        sh(f"rm -r {directory / 'run'}")
    time_is_up(directory)
    wait_for_its_end()
    assert standing() == before
    assert "netorch" not in sh("ip link")


def test_an_apply_that_hangs_is_interrupted(directory: Path) -> None:
    """It waits for a lease that nobody gives; the time is up meanwhile."""
    uplink(RICH)
    before = standing()
    write(
        directory,
        LAN.replace("[networks", "[lab]\ntimeout = 600\n[networks", 1)
        + '[networks.x]\nmode = "isolated"\n[hosts.h]\nnics = [{ network = "x" }]\n',
    )
    sh(
        "nft 'add table inet n; add chain inet n c { type filter hook input priority 0; };"
        "add rule inet n c udp dport 67 drop'"
    )
    with applying(directory) as process:
        read_until(process, "DHCP client on h")
        time_is_up(directory)
        assert process.stderr is not None
        said = process.stderr.read()
    assert "undoing what was done" in said
    assert "interrupted" in said
    wait_for_its_end()
    assert standing() == before
    assert "br0" not in sh("ip link")


def test_a_killed_watchdog_is_missed_by_status(directory: Path) -> None:
    uplink()
    apply(directory, "--confirm", LONG)
    for pid in watchdogs():
        os.kill(pid, signal.SIGKILL)
    wait_for_its_end()
    assert "the watchdog that would put it back was killed" in netorch("status", LAB)
    assert "its watchdog had ended before" in netorch("confirm", LAB)
    assert "was killed" not in netorch("status", LAB)
    netorch("teardown", LAB)


def test_a_second_apply_is_refused_and_a_teardown_calls_it_off(directory: Path) -> None:
    uplink()
    before = standing()
    apply(directory, "--confirm", LONG)
    assert "waits for a confirmation" in apply(directory, status=2)
    assert "waits for a confirmation" in apply(directory, "--confirm", "9", status=2)
    netorch("teardown", LAB)
    wait_for_its_end()
    assert standing() == before


def test_nothing_changed_nothing_to_confirm(directory: Path) -> None:
    uplink()
    apply(directory)
    assert "nothing to do" in apply(directory, "--confirm", LONG)
    wait_for_its_end()
    assert "in time" not in netorch("status", LAB)
    netorch("teardown", LAB)


def test_a_failed_apply_needs_no_watchdog(directory: Path) -> None:
    uplink()
    sh("ip link add br0 type bridge")
    assert "br0 is taken" in apply(directory, "--confirm", LONG, status=1)
    wait_for_its_end()
    assert not (directory / f"run/{LAB}").exists()


def test_a_private_lab_as_well(directory: Path) -> None:
    write(directory, '[lab]\nuplink = "none"\n[networks.default]\n')
    apply(directory, "--private", "--confirm", SHORT)
    assert "comes in time" in netorch("status", LAB)
    time_is_up(directory)
    wait_for_its_end()
    assert "no lab" in netorch("status", LAB, status=2)
