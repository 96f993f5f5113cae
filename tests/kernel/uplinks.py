"""A machine with an uplink for tests: eth1 on a LAN, a far machine with a router's address there.

eth1 is one end of a veth and has what an interface of a server may have. `standing` is all of it
in text, to be compared before and after, without regard to the order of a list.
"""

import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from netorch.system.namespaces import in_namespace
from tests.kernel.cables import PATIENCE, machine, sh, wait_for

ROUTER = "10.0.0.254"
PLAIN = """
ip addr add 10.0.0.5/24 brd + dev eth1
ip route add default via 10.0.0.254 dev eth1 proto static metric 100
"""
RICH = """
ip addr add 10.0.0.5/24 brd + dev eth1
ip addr add 10.0.0.6/24 dev eth1 label eth1:web
ip addr add 10.7.0.1/32 dev eth1 scope host
ip addr add 172.16.3.9/16 brd + dev eth1 metric 77 valid_lft 5400 preferred_lft 4400
ip addr add 172.18.0.1/24 dev eth1 noprefixroute
ip addr add 10.9.9.1 peer 10.9.9.2/32 dev eth1
ip route add 172.18.0.0/24 dev eth1 proto dhcp scope link src 172.18.0.1 metric 100
ip route add default via 10.0.0.254 dev eth1 proto static metric 100 src 10.0.0.6
ip route add default via 10.0.0.253 dev eth1 metric 300 mtu 1400 advmss 1300
ip route add 192.0.2.0/24 via 198.51.100.1 dev eth1 onlink table 77
ip route add 203.0.113.0/24 nexthop via 10.0.0.254 weight 1 nexthop via 10.0.0.253 weight 3
ip route add 203.0.114.0/24 dev other src 10.0.0.6
ip route add blackhole 203.0.115.0/24
ip neigh add 10.0.0.44 lladdr 52:54:00:00:00:44 dev eth1 nud permanent
ip route add 198.18.0.0/15 dev eth1 scope link tos 0x10
"""
RICH6 = """
ip -6 addr add 2001:db8::5/64 dev eth1 nodad
ip -6 addr add 2001:db8::6/64 dev eth1
ip -6 addr add 2001:db8:1::6/64 dev eth1 valid_lft 5400 preferred_lft 4400
ip -6 addr add 2001:db8:2::7/128 dev eth1 noprefixroute
# settle
ip -6 route add default via fe80::1 dev eth1 proto static metric 512
ip -6 route add default via fe80::2 dev eth1 proto ra metric 1024 expires 2400
ip -6 route add 2001:db8:77::/48 via 2001:db8::1 dev eth1 table 77
ip -6 route add 2001:db8:88::/48 dev other src 2001:db8::6
"""


def has_ipv6() -> bool:
    return os.path.exists("/proc/sys/net/ipv6/conf/all")


def uplink(configuration: str = PLAIN, *, mtu: int = 1500, detection: bool = False) -> int:
    """eth1 with this configuration, and `other` beside it; the far machine, by descriptor.

    Without IPv6's duplicate `detection` of addresses, every one is there at once.
    """
    if has_ipv6() and not detection:
        sh("echo 0 > /proc/sys/net/ipv6/conf/default/dad_transmits")
    far = machine()
    sh(
        f"ip link add eth1 type veth peer name eth0 netns /proc/self/fd/{far};"
        f"ip link set eth1 alias 'of the admin' mtu {mtu} up;"
        "ip link add other type veth peer name other-end; ip link set other up;"
        "ip link set other-end up; ip addr add 10.55.0.1/24 dev other",
        fds=(far,),
    )
    with in_namespace(far):
        sh(f"ip link set eth0 mtu {mtu} up; ip addr add {ROUTER}/24 dev eth0")
        if has_ipv6():
            sh("ip -6 addr add 2001:db8::1/64 dev eth0 nodad; ip -6 addr add fe80::1/64 dev eth0")
    for name in ("eth1", "other"):
        wait_for(f"ip link show dev {name}", "state UP")
    if has_ipv6():
        for name in ("eth1", "other"):  # the kernel's own address, and its route with it
            wait_for(f"ip -6 addr show dev {name} scope link", "inet6 fe80")
        settle("eth1")
    for part in configuration.split("# settle"):
        sh(part)
        if has_ipv6():
            settle("eth1")
    return far


def settle(name: str) -> None:
    """Wait until duplicate address detection is through, on the kernel's own notices."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as events:
        events.bind((0, 0x100))  # RTMGRP_IPV6_IFADDR
        events.settimeout(PATIENCE)
        while " tentative" in sh(f"ip -6 addr show dev {name}"):
            events.recv(65536)


def standing(name: str = "eth1") -> dict[str, list[str]]:
    """The interface's addresses, all routes of the machine but table local, and its link."""
    link = sh(f"ip -d link show dev {name}").split("promiscuity")[0]
    return {
        "link": [re.sub(r"\d+: ", "", link, count=1)],
        "addresses": _addresses(name),
        "routes": _routes(),
        "neighbours": sorted(sh(f"ip neigh show dev {name} nud permanent").splitlines()),
    }


def _addresses(name: str) -> list[str]:
    lines = [line.strip() for line in sh(f"ip -d addr show dev {name}").splitlines()]
    pairs = zip(lines, [*lines[1:], ""], strict=True)
    return sorted(
        f"{_without_time(line)} {_without_time(after)}"
        for line, after in pairs
        if line.startswith("inet")
    )


def _routes() -> list[str]:
    lines = []
    for family in ("-4", "-6"):
        listed = sh(f"ip -d {family} route show table all").replace("\n\t", " ")
        lines += [line for line in listed.splitlines() if " table local " not in line]
    return sorted(_without_time(line) for line in lines)


def _without_time(line: str) -> str:
    """Lifetimes run; what they were is rounded to 1,000 s. They begin at 400 s above, so that no
    test takes as long as it takes them to be rounded to the next.
    """
    return re.sub(r"\b(\d{3,})sec\b", lambda m: f"{round(int(m[1]), -3)}sec", line).strip()


@contextmanager
def talking(far: int, address: str = "10.0.0.5") -> Iterator["Talk"]:
    """A TCP connection between the machine and the far one, which goes on while others work."""
    with in_namespace(far):
        listening = socket.create_server((ROUTER, 7000))
    with listening:
        near = socket.create_connection((ROUTER, 7000), PATIENCE, source_address=(address, 0))
        there, _ = listening.accept()
    with near, there:
        there.settimeout(PATIENCE)
        near.settimeout(PATIENCE)
        yield Talk(near, there)


class Talk:
    def __init__(self, near: socket.socket, there: socket.socket) -> None:
        self._near = near
        self._there = there
        self._sent = 0

    def goes_on(self) -> None:
        """A message each way arrives."""
        self._sent += 1
        text = f"message {self._sent}".encode()
        for sender, receiver in ((self._near, self._there), (self._there, self._near)):
            answers: list[bytes] = []
            reader = threading.Thread(target=lambda r=receiver, a=answers: a.append(r.recv(99)))
            reader.start()
            sender.sendall(text)
            reader.join()
            assert answers == [text]
