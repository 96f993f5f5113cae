"""Guests on a bridge with a real uplink: the shipped virbr0-vs-br0 with a veth as br0's eth1."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from netorch import labs
from netorch.engine import Progress
from netorch.system.namespaces import in_namespace
from netorch.topology import load, parse
from netorch.verify import verify
from tests.isolation import require_tun
from tests.kernel.cables import sh
from tests.kernel.machine import PREFIX, on_a_machine
from tests.kernel.uplinks import PLAIN, ROUTER, standing, uplink
from tests.qemu.labs.lab import SECONDS, wait_for

pytestmark = pytest.mark.skipif(
    not shutil.which("qemu-system-x86_64"), reason="qemu-system-x86_64 is not installed"
)
TOPOLOGIES = Path(__file__).parents[2] / "topologies"
SHIPPED = TOPOLOGIES / "virbr0-vs-br0.toml"


@on_a_machine
def test_the_bridged_guest_is_on_the_lan_and_the_other_behind_nat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_tun()
    monkeypatch.setenv("NETORCH_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("NETORCH_DISK_DIR", str(tmp_path / "disks"))
    far = uplink(PLAIN)
    before = standing()
    name = f"{PREFIX}br0"
    text, bridges = re.subn(
        r'^bridge  = "br0"$', r'\g<0>\nuplink = "eth1"', SHIPPED.read_text(), flags=re.MULTILINE
    )
    assert bridges == 1
    topology = parse(text, f"{name}.toml", SHIPPED.parent)
    try:
        labs.apply(topology, str(SHIPPED), "current", Progress())
        assert not labs.plan(topology, str(SHIPPED), "current").plan
        assert seen_by(far, name, "vm2") == "10.0.0.120"  # its own address
        assert seen_by(far, name, "vm1") == "10.0.0.5"  # the machine's
        assert seen_by(far, name, "server") == "10.0.0.80"
        with in_namespace(far):
            sh("ping -c 1 -W 60 10.0.0.120")
            sh("ip route add 192.168.122.0/24 via 10.0.0.5")
            with pytest.raises(AssertionError):
                sh("ping -c 1 -W 2 192.168.122.6")
    finally:
        assert labs.teardown(labs.find(name), Progress()) == []
    assert standing() == before


@on_a_machine
def test_the_expectations_hold_with_an_uplink(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The uplink has no address of its own here, so that the LAN's one of the file is br0's."""
    require_tun()
    monkeypatch.setenv("NETORCH_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("NETORCH_DISK_DIR", str(tmp_path / "disks"))
    uplink("")
    name = f"{PREFIX}proved"
    text = SHIPPED.read_text().replace('bridge  = "br0"', 'bridge  = "br0"\nuplink  = "eth1"')
    topology = parse(text, f"{name}.toml", SHIPPED.parent)
    try:
        labs.apply(topology, str(SHIPPED), "current", Progress())
        verdicts = verify(labs.find(name))
        assert len(verdicts) == 8
        assert all(verdict.ok for verdict in verdicts), verdicts
    finally:
        assert labs.teardown(labs.find(name), Progress()) == []


@on_a_machine
def test_the_shipped_br0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its guest asks the LAN's own DHCP server, which is on the far machine."""
    require_tun()
    monkeypatch.setenv("NETORCH_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("NETORCH_DISK_DIR", str(tmp_path / "disks"))
    far = uplink(PLAIN)
    before = standing()
    leases = tmp_path / "leases"
    leases.touch()
    server = ["dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--port=0", "--no-ping"]
    server += ["--user=root", "--group=", "--pid-file=", f"--dhcp-leasefile={leases}"]
    server += ["--interface=eth0", "--dhcp-range=10.0.0.100,10.0.0.110,1h"]
    topology = parse((TOPOLOGIES / "br0.toml").read_text(), f"{PREFIX}shipped.toml", TOPOLOGIES)
    assert topology.networks == load(TOPOLOGIES / "br0.toml").networks
    with in_namespace(far):
        dhcp = subprocess.Popen(server)
    try:
        labs.apply(topology, "br0.toml", "current", Progress())
        wait_for(leases, lambda text: "vm1" in text)
        assert labs.status(labs.find(topology.name)).in_sync
    finally:
        dhcp.kill()
        dhcp.wait()
        assert labs.teardown(labs.find(topology.name), Progress()) == []
    assert standing() == before


def seen_by(far: int, lab: str, node: str) -> str:
    """The source address of a connection from the node to the far machine."""
    with in_namespace(far):
        listening = socket.create_server((ROUTER, 7000))
    with listening:
        listening.settimeout(SECONDS)
        command = [sys.executable, "-m", "netorch", "exec", "--lab", lab, node, "--"]
        command += ["sh", "-c", f"busybox nc -w 60 {ROUTER} 7000 </dev/null"]
        with subprocess.Popen(command, env=dict(os.environ)) as asking:
            accepted, peer = listening.accept()
            accepted.close()
            asking.wait(SECONDS)
    return str(peer[0])
