"""Machines for tests, each a network namespace by its descriptor, and the cables between them.

The test itself is the gateway.
"""

import os
import socket
import subprocess

from netorch.system.namespaces import NEWNET, in_namespace, loopback_up, setns, unshare

PATIENCE = 30  # seconds for what takes no time at all on a machine that isn't busy
_NOTICES = 0x1 | 0x100  # RTMGRP_LINK, RTMGRP_IPV6_IFADDR


def sh(command: str, *, fds: tuple[int, ...] = ()) -> str:
    done = subprocess.run(
        ["sh", "-ec", command], capture_output=True, text=True, check=False, pass_fds=fds
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def machine() -> int:
    """A new network namespace, by descriptor."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    unshare(NEWNET)
    there = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    loopback_up()
    setns(home, NEWNET)
    os.close(home)
    return there


def wire(there: int, port: str, address: str = "", gateway: str = "", mac: str = "") -> None:
    """A cable from the new interface `port` here to a new eth0 of the machine; it carries."""
    peer = f"peer name eth0 {f'address {mac}' if mac else ''} netns /proc/self/fd/{there}"
    sh(f"ip link add {port} type veth {peer}; ip link set {port} up", fds=(there,))
    with in_namespace(there):
        sh("ip link set eth0 up")
        if address:
            sh(f"ip addr add {address} dev eth0; ip route add default via {gateway}")
        wait_for("ip link show dev eth0", "state UP")
    wait_for(f"ip link show dev {port}", "state UP")


def wait_for(command: str, text: str) -> None:
    """Wait until what a command says of a link holds the text, on the kernel's own notices.

    A carrier comes at once, but what follows from it (the state, a bridge's port that forwards,
    IPv6) when a worker of the kernel's gets to it (net/core/link_watch.c).
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as events:
        events.bind((0, _NOTICES))
        events.settimeout(PATIENCE)
        while text not in sh(command):
            events.recv(65536)


def bridge(name: str, address: str) -> None:
    """A bridge that forwards."""
    sh(
        f"ip link add {name} type bridge; ip addr add {address} dev {name}; ip link set {name} up;"
        f"echo 1 > /proc/sys/net/ipv4/conf/{name}/forwarding"
    )


def guest_on(name: str, port: str, address: str = "", gateway: str = "", mac: str = "") -> int:
    """A machine on a bridge."""
    there = machine()
    wire(there, port, address, gateway, mac)
    sh(f"ip link set {port} master {name}")
    wait_for(f"ip -d link show dev {port}", "state forwarding")
    return there


def tcp(
    client: int, server: int, address: str, *, port: int = 8000, source: int = 0
) -> tuple[str, int] | None:
    """Whom the server sees when the client connects; None if the connection is refused."""
    with in_namespace(server):
        listening = socket.create_server(("", port))
    with in_namespace(client):
        connecting = socket.socket()
    with listening, connecting:
        connecting.settimeout(PATIENCE)
        connecting.bind(("", source))
        try:
            connecting.connect((address, port))
        except (ConnectionRefusedError, TimeoutError):
            return None
        accepted, peer = listening.accept()
        accepted.close()
        return str(peer[0]), int(peer[1])
