"""dnsmasq itself, started with our texts: leases for udhcpc and names, for every shape."""

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from ipaddress import IPv4Address
from pathlib import Path

import dns.message
import dns.query
import dns.rcode
import pytest

from netorch.networks import Reservation, Segment, dhcp_hosts, dnsmasq_config, ruleset, static_names
from netorch.system.namespaces import in_namespace, wait_exit
from tests.kernel.cables import PATIENCE, bridge, guest_on, machine, sh, wire

pytestmark = [
    pytest.mark.skipif(not shutil.which(program), reason=f"{program} is not installed")
    for program in ("dnsmasq", "busybox")
]

GATEWAY = "192.168.122.1"
VM1 = Reservation(mac="52:54:00:00:00:01", address="192.168.122.66", name="vm1")
ODD = Reservation(mac="52:54:00:00:00:02", address="192.168.122.67", name="1h")
OUTSIDE = Reservation(mac="52:54:00:00:00:03", address="192.168.122.9", name="vm3")
SHAPES: dict[str, dict[str, object]] = {
    "nat": {},
    "isolated": {"mode": "isolated"},
    "no-dns": {"dns": False},
    "mtu": {"mtu": 1400},
    "domain": {"domain": "lab.example"},
    "infinite": {"lease": "infinite"},
}


def segment(shape: str) -> Segment:
    fields: dict[str, object] = {
        "network": "default",
        "mode": "nat",
        "bridge": "virbr0",
        "subnet": "192.168.122.0/24",
        "gateway": GATEWAY,
        "dhcp_first": "192.168.122.2",
        "dhcp_last": "192.168.122.254",
        "reservations": (VM1, ODD),
        "names": (("192.168.122.80", "server"),),
    }
    return Segment(**{**fields, **SHAPES[shape]})  # type: ignore[arg-type]


@contextmanager
def serving(served: Segment, run: Path, resolv: str = "") -> Iterator[None]:
    """It runs in the block; the exit status 0 of what was started says that its ports are bound."""
    run.mkdir(exist_ok=True)
    conf = run / "conf"
    conf.write_text(
        dnsmasq_config(
            served,
            leases=str(run / "leases"),
            hosts=str(run / "hosts"),
            names=str(run / "names"),
            log=str(run / "log"),
            resolv=resolv,
        )
    )
    (run / "hosts").write_text(dhcp_hosts(served))
    (run / "names").write_text(static_names(served))
    command = ["dnsmasq", f"--conf-file={conf}"]
    try:
        for arguments in (["--test"], []):
            done = subprocess.run(
                [*command, *arguments], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
        yield
    finally:
        for pid in _processes(command):
            process = os.pidfd_open(pid)
            signal.pidfd_send_signal(process, signal.SIGTERM)
            assert wait_exit(process, PATIENCE)
            os.close(process)


def _processes(command: list[str]) -> list[int]:
    line = "\0".join(command).encode() + b"\0"
    return [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and _command_line(entry) == line
    ]


def _command_line(entry: Path) -> bytes:
    try:
        return (entry / "cmdline").read_bytes()
    except OSError:  # it ended meanwhile
        return b""


def lease(guest: int, run: Path, tries: int = PATIENCE) -> Mapping[str, str]:
    """What udhcpc was offered; empty if nothing, after as many tries, a second each."""
    script = run / "script"
    script.write_text(f"#!/bin/sh\n[ $1 != bound ] || env > {run}/bound\n")
    script.chmod(0o755)
    (run / "bound").unlink(missing_ok=True)
    with in_namespace(guest):
        subprocess.run(
            [
                "busybox",
                "udhcpc",
                "-fnq",
                "-i",
                "eth0",
                "-s",
                str(script),
                "-t",
                str(tries),
                "-T",
                "1",
                "-A1",
            ]
            + [word for option in ("mtu", "domain") for word in ("-O", option)],
            capture_output=True,
            check=False,
        )
    if not (run / "bound").exists():
        return {}
    lines = (run / "bound").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def ask(guest: int, name: str, kind: str = "A") -> tuple[str, list[str]]:
    """The answer's code and its values."""
    with in_namespace(guest):
        answer = dns.query.udp(dns.message.make_query(name, kind), GATEWAY, timeout=PATIENCE)
    values = [str(item) for entry in answer.answer for item in entry]
    return dns.rcode.to_text(answer.rcode()), values


@pytest.mark.parametrize("shape", SHAPES)
def test_a_guest_gets_its_reservation_and_its_name(shape: str, tmp_path: Path) -> None:
    served = segment(shape)
    bridge("virbr0", f"{GATEWAY}/24")
    guest = guest_on("virbr0", "tap0", mac=VM1.mac)
    stranger = guest_on("virbr0", "tap1", mac="52:54:00:00:00:99")
    rules = ruleset("netorch_t", [served])  # they let DHCP through as it is
    assert rules is not None
    (tmp_path / "rules").write_text(rules.text)
    sh(f"nft -f {tmp_path}/rules")
    with serving(served, tmp_path / "a dir, # odd"):
        _check_leases(served, guest, stranger, tmp_path)
        _check_names(served, guest)


def _check_leases(served: Segment, guest: int, stranger: int, tmp_path: Path) -> None:
    offered = lease(guest, tmp_path)
    assert offered["ip"] == VM1.address
    assert offered["subnet"] == "255.255.255.0"
    assert offered.get("router") == (None if served.mode == "isolated" else GATEWAY)
    assert offered.get("dns") == (GATEWAY if served.dns else None)
    assert offered.get("mtu") == (None if served.mtu == 1500 else str(served.mtu))
    assert offered.get("domain", "") == served.domain
    assert offered["lease"] == ("4294967295" if served.lease == "infinite" else "3600")
    other = lease(stranger, tmp_path)["ip"]
    assert IPv4Address("192.168.122.2") <= IPv4Address(other) <= IPv4Address("192.168.122.254")
    assert other not in (GATEWAY, VM1.address, ODD.address)
    leases = (tmp_path / "a dir, # odd" / "leases").read_text()
    assert f" {VM1.mac} {VM1.address} vm1 " in leases


def _check_names(served: Segment, guest: int) -> None:
    with in_namespace(guest):
        sh(f"ip addr add {VM1.address}/24 dev eth0")
        if not served.dns:
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((GATEWAY, 53), timeout=PATIENCE)
            return
    suffixes = ("", f".{served.domain}") if served.domain else ("",)
    for suffix in suffixes:
        assert ask(guest, f"vm1{suffix}") == ("NOERROR", [VM1.address])
        assert ask(guest, f"server{suffix}") == ("NOERROR", ["192.168.122.80"])
        assert ask(guest, f"1h{suffix}") == ("NOERROR", [ODD.address])
    back = ask(guest, "66.122.168.192.in-addr.arpa", "PTR")
    assert back == ("NOERROR", [f"vm1{suffixes[-1]}."])


def test_the_labs_names_are_never_asked_of_anyone_else(tmp_path: Path) -> None:
    bridge("virbr0", f"{GATEWAY}/24")
    guest = guest_on("virbr0", "tap0", "192.168.122.9/24", GATEWAY)
    far = machine()
    wire(far, "eth0", "10.9.0.2/24", "10.9.0.1")
    sh("ip addr add 10.9.0.1/24 dev eth0")
    with in_namespace(far):
        upstream = socket.socket(type=socket.SOCK_DGRAM)
    (tmp_path / "resolv.conf").write_text("nameserver 10.9.0.2\n")
    upstream.bind(("", 53))
    resolv = str(tmp_path / "resolv.conf")
    with upstream, serving(segment("domain"), tmp_path / "run", resolv):
        for name, kind in (
            ("nosuch", "A"),
            ("nosuch", "TXT"),
            ("nosuch.lab.example", "A"),
            ("99.122.168.192.in-addr.arpa", "PTR"),
        ):
            assert ask(guest, name, kind) == ("NXDOMAIN", [])
        upstream.setblocking(False)
        with pytest.raises(BlockingIOError):
            upstream.recv(512)
        query = dns.message.make_query("www.example.org", "A")
        with in_namespace(guest):
            asking = socket.socket(type=socket.SOCK_DGRAM)
        with asking:
            asking.sendto(query.to_wire(), (GATEWAY, 53))
            upstream.settimeout(PATIENCE)
            assert dns.message.from_wire(upstream.recv(512)).question == query.question


def test_a_network_that_is_full_refuses(tmp_path: Path) -> None:
    full = Segment(
        network="small",
        mode="nat",
        bridge="virbr0",
        subnet="192.168.122.0/24",
        gateway=GATEWAY,
        dhcp_first=VM1.address,
        dhcp_last=VM1.address,
        reservations=(VM1, OUTSIDE),
    )
    bridge("virbr0", f"{GATEWAY}/24")
    with serving(full, tmp_path / "run"):
        assert lease(guest_on("virbr0", "tap2", mac=OUTSIDE.mac), tmp_path)["ip"] == OUTSIDE.address
        stranger = guest_on("virbr0", "tap0", mac="52:54:00:00:00:99")
        assert lease(stranger, tmp_path, tries=3) == {}
        assert lease(guest_on("virbr0", "tap1", mac=VM1.mac), tmp_path)["ip"] == VM1.address


def test_two_networks_are_served_side_by_side(tmp_path: Path) -> None:
    bridge("virbr0", f"{GATEWAY}/24")
    bridge("virbr1", "192.168.123.1/24")
    other = Segment(
        network="other",
        mode="nat",
        bridge="virbr1",
        subnet="192.168.123.0/24",
        gateway="192.168.123.1",
        dhcp_first="192.168.123.2",
        dhcp_last="192.168.123.254",
    )
    with serving(segment("nat"), tmp_path / "one"), serving(other, tmp_path / "two"):
        first = lease(guest_on("virbr0", "tap0", mac=VM1.mac), tmp_path)
        second = lease(guest_on("virbr1", "tap1", mac=VM1.mac), tmp_path)
    assert first["ip"] == VM1.address
    assert second["ip"].startswith("192.168.123.")
