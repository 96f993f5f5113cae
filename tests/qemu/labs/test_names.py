"""Leases and names: the guest, netorch, dnsmasq's file and DNS agree."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dns.message
import dns.query
import dns.rcode
import dns.rdatatype
import dns.reversename
import dns.rrset

from netorch.system import namespaces
from tests.qemu.labs.lab import SECONDS, Lab, Machine

GATEWAY = "192.168.122.1"
ELSEWHERE = "198.51.100.7"  # what the machine's own name server answers

WITH_DOMAIN = """
[networks.default]
address = "192.168.122.1/24"
domain  = "lab.test"
mtu     = 1400

[guests.vm1]
nics = [{ network = "default" }]

[hosts.client]
nics = [{ network = "default" }]

[hosts.printer]
nics = [{ network = "default", address = "192.168.122.200/24" }]
"""


def test_the_reserved_lease_is_the_same_everywhere(machine: Machine) -> None:
    lab = machine.shipped("default")
    assert "vm1 has 192.168.122.6" in lab.said
    assert _everywhere(lab, "vm1") == {"192.168.122.6"}
    assert _asked("vm1") == ["192.168.122.6"]
    assert _asked_back("192.168.122.6") == ["vm1."]
    lab.unchanged()


def test_names_of_a_domain(machine: Machine) -> None:
    with _name_server_of_the_machine(machine.directory) as asked:
        lab = machine.up("domain", WITH_DOMAIN)
        leased = lab.leases()
        assert set(leased) == {"vm1", "client"}
        assert _everywhere(lab, "vm1") == {leased["vm1"]}
        for name, address in {**leased, "printer": "192.168.122.200"}.items():
            assert _asked(f"{name}.lab.test") == [address]
            assert _asked(name) == [address]
            assert _asked_back(address) == [f"{name}.lab.test."]
            assert address in lab.sh("vm1", f"ping -c 1 -W 60 {name}")
        assert leased["vm1"] in lab.sh("client", "getent ahostsv4 vm1")
        assert "search lab.test" in lab.sh("client", "cat /etc/resolv.conf")
        for unknown in ("vm2.lab.test", "vm2", "a.b.lab.test"):
            assert _answer(unknown, "A").rcode() == dns.rcode.NXDOMAIN
        back = dns.reversename.from_address("192.168.122.199").to_text()
        assert _answer(back, "PTR").rcode() == dns.rcode.NXDOMAIN
        assert asked == [], "the lab's own names were asked of the machine's name server"
        assert _asked("www.example.org") == [ELSEWHERE]
        assert asked == ["www.example.org."]
        assert lab.sh("vm1", "cat /sys/class/net/eth0/mtu") == "1400"
        assert lab.sh("client", "cat /sys/class/net/eth0/mtu") == "1400"
        too_long, fits = (f"ping -c 1 -W 60 -s {size} {GATEWAY}" for size in (1373, 1372))
        lab.sh("vm1", fits)
        lab.sh("client", f"busybox {fits}")
        lab.sh("client", f"busybox {too_long}")  # in fragments
        lab.unchanged()


def _everywhere(lab: Lab, guest: str) -> set[str]:
    """The addresses that the guest, status, leases and dnsmasq's file have for a guest."""
    told = [lease for lease in lab.status()["leases"] if lease["name"] == guest]
    assert [lease["network"] for lease in told] == ["default"]
    file = (lab.run / "dnsmasq-default.leases").read_text()
    lines = [line.split() for line in file.splitlines()]
    in_guest = lab.sh(guest, "ip -4 -o addr show dev eth0 | awk '{print $4}'")
    mac = lab.sh(guest, "cat /sys/class/net/eth0/address")
    assert [lease["mac"] for lease in told] == [mac]
    assert in_guest.endswith("/24")
    return {
        in_guest.removesuffix("/24"),
        lab.leases()[guest],
        *(lease["address"] for lease in told),
        *(address for _expires, _mac, address, name, _client in lines if name == guest),
    }


def _asked(name: str) -> list[str]:
    return [str(record) for rrset in _answer(name, "A").answer for record in rrset]


def _asked_back(address: str) -> list[str]:
    answer = _answer(dns.reversename.from_address(address).to_text(), "PTR")
    return [str(record) for rrset in answer.answer for record in rrset]


def _answer(name: str, kind: str) -> dns.message.Message:
    return dns.query.udp(dns.message.make_query(name, kind), GATEWAY, timeout=SECONDS)


@contextmanager
def _name_server_of_the_machine(directory: Path) -> Iterator[list[str]]:
    """The machine's /etc/resolv.conf names a server on loopback, whose questions are listed."""
    asked: list[str] = []
    resolv = directory / "resolv.conf"
    resolv.write_text("nameserver 127.0.0.1\n")
    namespaces.mount(resolv, "/etc/resolv.conf", None, namespaces.MS_BIND)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listening:
        listening.bind(("127.0.0.1", 53))

        def serve() -> None:
            while True:
                packet, client = listening.recvfrom(4096)
                query = dns.message.from_wire(packet)
                question = query.question[0]
                asked.append(question.name.to_text())
                answer = dns.message.make_response(query)
                if question.rdtype == dns.rdatatype.A:
                    answer.answer.append(
                        dns.rrset.from_text(question.name, 60, "IN", "A", ELSEWHERE)
                    )
                listening.sendto(answer.to_wire(), client)

        threading.Thread(target=serve, daemon=True).start()
        yield asked
