"""Whole labs with an uplink, or on somebody else's bridge: from the file to the kernel and back."""

import os
from pathlib import Path

import pytest

from netorch import labs
from netorch.engine import Progress
from netorch.errors import ConflictError, NetorchError
from netorch.model import Topology
from netorch.topology import parse
from tests.isolation import require_tun
from tests.kernel.cables import guest_on, sh, tcp
from tests.kernel.uplinks import RICH, standing, uplink

LAN = """
[networks.lan]
mode = "bridge"
bridge = "br0"
uplink = "eth1"
"""
MEMBER = (
    LAN
    + """
[hosts.member]
nics = [{ network = "lan", address = "10.0.0.80/24", gateway = "10.0.0.254" }]
"""
)
EXTERNAL = """
[networks.lan]
mode = "bridge"
bridge = "br7"
external = true

[taps.t]
network = "lan"

[hosts.member]
nics = [{ network = "lan", address = "10.0.0.80/24", gateway = false }]
"""


@pytest.fixture
def directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NETORCH_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("NETORCH_DISK_DIR", str(tmp_path / "disks"))
    return tmp_path


def lab(text: str) -> Topology:
    return parse(text, "t.toml", Path("/"))


def apply(text: str, progress: Progress | None = None) -> labs.Outcome:
    return labs.apply(lab(text), "/t.toml", "current", progress or Progress())


def teardown() -> None:
    assert labs.teardown(labs.find("t"), Progress()) == []


def test_a_host_on_the_lan_and_the_machine_itself(directories: Path) -> None:
    far = uplink(RICH)
    before = standing()
    apply(MEMBER)
    assert not labs.plan(lab(MEMBER), "/t.toml", "current").plan
    assert labs.status(labs.find("t")).in_sync
    member = os.open(f"/run/netns/netorch:t:member:{os.stat('/proc/self/ns/net').st_ino}", 0)
    here = os.open("/proc/self/ns/net", os.O_RDONLY)
    assert tcp(member, far, "10.0.0.254") is not None
    assert (tcp(far, member, "10.0.0.80") or ("",))[0] == "10.0.0.254"
    assert (tcp(here, far, "10.0.0.254") or ("",))[0] == "10.0.0.5"
    teardown()
    assert standing() == before


def test_nat_leaves_by_the_bridge_that_took_the_uplink(directories: Path) -> None:
    far = uplink()
    before = standing()
    text = LAN + "[networks.default]\n[hosts.inner]\nnics = [{ network = 'default' }]\n"
    apply(text.replace("'", '"'))
    assert not labs.plan(lab(text.replace("'", '"')), "/t.toml", "current").plan
    inner = os.open(f"/run/netns/netorch:t:inner:{os.stat('/proc/self/ns/net').st_ino}", 0)
    seen = tcp(inner, far, "10.0.0.254")
    assert seen is not None
    assert seen[0] == "10.0.0.5"
    teardown()
    assert standing() == before


def test_an_uplink_comes_and_goes_with_the_file(directories: Path) -> None:
    uplink(RICH)
    before = standing()
    without = LAN.replace('uplink = "eth1"', "")
    apply(without)
    apply(LAN)
    assert "master br0" in sh("ip link show dev eth1")
    apply(without)
    assert [line for line in standing()["addresses"] if "fe80" not in line] == [
        line for line in before["addresses"] if "fe80" not in line
    ]
    assert "inet6" not in sh("ip addr show dev br0")
    teardown()
    assert standing() == before


def test_other_networks_keep_clear_of_the_lan(directories: Path) -> None:
    uplink("ip addr add 192.168.122.77/24 dev eth1")
    apply(LAN)
    apply(LAN + "[networks.default]\n")
    assert "192.168.123.1/24" in sh("ip addr show dev virbr0")
    teardown()


def test_the_bridge_forwards_if_the_interface_did(directories: Path) -> None:
    uplink("echo 1 > /proc/sys/net/ipv4/conf/eth1/forwarding")
    apply(LAN)
    assert Path("/proc/sys/net/ipv4/conf/br0/forwarding").read_text() == "1\n"
    teardown()
    assert Path("/proc/sys/net/ipv4/conf/eth1/forwarding").read_text() == "1\n"


@pytest.mark.skipif(not Path("/proc/sys/net/ipv6").exists(), reason="no IPv6 in this kernel")
def test_ipv6_settings_are_those_of_the_interface(directories: Path) -> None:
    conf = Path("/proc/sys/net/ipv6/conf")
    uplink("echo 2 > /proc/sys/net/ipv6/conf/eth1/accept_ra")
    apply(LAN)
    assert (conf / "br0/accept_ra").read_text() == "2\n"
    assert (conf / "br0/addr_gen_mode").read_text() == (conf / "eth1/addr_gen_mode").read_text()
    teardown()


def test_a_private_lab_says_why_not(directories: Path) -> None:
    for text in (LAN, EXTERNAL):
        with pytest.raises(NetorchError, match="can't be had in a private namespace") as caught:
            labs.apply(lab(text), "/t.toml", "private", Progress())
        assert 'mode = "nat"' in caught.value.hint
        with pytest.raises(NetorchError, match="can't be had in a private namespace"):
            labs.plan(lab(text), "/t.toml", "private")


# Somebody else's bridge


def link_of(name: str) -> str:
    return sh(f"ip -d link show dev {name}").split("gc_timer")[0].split("hello_timer")[0]


def foreign_bridge() -> int:
    sh("ip link add br7 type bridge; ip addr add 10.0.0.9/24 dev br7; ip link set br7 mtu 1400 up")
    return guest_on("br7", "port", "10.0.0.30/24", "10.0.0.9")


def test_ports_join_somebody_elses_bridge_and_leave_it(directories: Path) -> None:
    require_tun()
    other = foreign_bridge()
    before = link_of("br7")
    apply(EXTERNAL)
    assert labs.status(labs.find("t")).in_sync
    for port in ("t0", "member-0"):
        assert "master br7" in sh(f"ip link show dev {port}")
        assert "mtu 1400" in sh(f"ip link show dev {port}")
    member = os.open(f"/run/netns/netorch:t:member:{os.stat('/proc/self/ns/net').st_ino}", 0)
    assert tcp(member, other, "10.0.0.30") is not None
    assert link_of("br7") == before
    sh("ip link set t0 nomaster")
    assert not labs.status(labs.find("t")).in_sync
    apply(EXTERNAL)
    assert "master br7" in sh("ip link show dev t0")
    teardown()
    assert link_of("br7") == before
    assert sh("ip -br link show master br7").split("@")[0] == "port"


@pytest.mark.parametrize("instead", ["", "ip link add br7 type veth peer name x"])
def test_a_bridge_that_is_not_there_is_named(instead: str, directories: Path) -> None:
    require_tun()
    sh(instead)
    with pytest.raises(ConflictError, match="br7"):
        apply(EXTERNAL)
    assert "t0" not in sh("ip link")


def test_from_a_bridge_of_its_own_to_somebody_elses(directories: Path) -> None:
    require_tun()
    foreign_bridge()
    own = EXTERNAL.replace('"br7"', '"br0"').replace("external = true", "")
    apply(own)
    apply(EXTERNAL)
    assert "br0" not in sh("ip -br link")
    apply(own)
    assert "master br0" in sh("ip link show dev t0")
    teardown()
