"""A guest through the fixture: used, its cable pulled, and shown when a test fails."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = '''
import pytest
import netorch
from netorch.errors import CommandError
from netorch.pytest_plugin import lab_fixture

LAB = """
[networks.default]
mode = "isolated"
address = "192.168.122.1/24"
[guests.vm1]
nics = [{ network = "default", address = "192.168.122.6" }]
[hosts.a]
nics = [{ network = "default", address = "192.168.122.7/24" }]
"""
lab = lab_fixture(LAB, scope="module")

def test_used(lab):
    vm1 = lab.guest("vm1")
    assert lab.ip("vm1") == "192.168.122.6"
    done = vm1.exec(["sh", "-c", "cat; exit 3"], input="said", check=False)
    assert (done.stdout, done.returncode) == ("said", 3)
    with pytest.raises(CommandError, match="in vm1 failed: exit status 1"):
        vm1.exec(["false"])
    with pytest.raises(CommandError, match="was ended after"):
        vm1.exec(["sleep", "100"], timeout=0.5)
    assert vm1.console_log()

def test_cable(lab):
    ping = ["ping", "-c", "1", "192.168.122.6", "-W"]
    with lab.capture("vm1") as packets:
        lab.host("a").run([*ping, "60"])
    assert packets.count >= 2
    lab.link("vm1", network="default").down()
    await_carrier(lab, 0)
    assert lab.host("a").run([*ping, "2"], check=False).returncode != 0
    lab.link("vm1").up()
    await_carrier(lab, 1)
    assert {row.state for row in lab.status()} == {"ok"}

def await_carrier(lab, wanted):  # the guest's kernel hears of it a moment after QEMU
    until = f"until [ $(cat /sys/class/net/eth0/carrier) = {wanted} ]; do usleep 10000; done"
    lab.guest("vm1").exec(["sh", "-c", until], timeout=60)

def test_failed(lab):
    assert False
'''


def test_a_guest_through_the_fixture(tmp_path: Path) -> None:
    installed = [point.name for point in metadata.entry_points(group="pytest11")]
    plugin = [] if "netorch" in installed else ["-p", "netorch.pytest_plugin"]
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_guest.py").write_text(TESTS)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rs", *plugin],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "NETORCH_RUN_DIR": str(tmp_path / "run"),
            "NETORCH_DISK_DIR": str(tmp_path / "disks"),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=300,
    )
    shown = done.stdout
    assert "1 failed, 2 passed" in shown, shown
    assert "console of vm1" in shown
    assert "192.168.122.6 (DHCP)" in shown
    assert not (tmp_path / "run").exists()
