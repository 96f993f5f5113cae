"""The three NICs that guests have drivers for, in one lab: leases, and bytes both ways."""

import hashlib
import os
import socket
import urllib.request
from concurrent.futures import ThreadPoolExecutor

from tests.qemu.labs.lab import Machine

GATEWAY = "192.168.122.1"
GUESTS = {
    "virtio": ("192.168.122.11", "virtio_net"),
    "intel": ("192.168.122.12", "e1000"),
    "realtek": ("192.168.122.13", "8139cp"),
}
SIZE = 1 << 20


def test_three_nics_take_leases_and_move_a_megabyte_each_way(machine: Machine) -> None:
    lab = machine.shipped("three-nics")
    assert lab.leases() == {name: address for name, (address, _driver) in GUESTS.items()}
    data = os.urandom(SIZE)
    digest = hashlib.md5(data).hexdigest()
    for name, (address, driver) in GUESTS.items():
        assert lab.sh(name, "basename $(readlink /sys/class/net/eth0/device/driver)") == driver
        with socket.create_server((GATEWAY, 0)) as listening, ThreadPoolExecutor(1) as pool:
            listening.settimeout(60)
            sending = pool.submit(_send, listening, data)
            port = listening.getsockname()[1]
            received = lab.sh(name, f"nc {GATEWAY} {port} < /dev/null | md5sum")
            sending.result()
        assert received.split()[0] == digest
        made = lab.sh(
            name,
            f"mkdir /www && cd /www && head -c {SIZE} /dev/urandom > data && md5sum data && "
            "httpd -p 0.0.0.0:80 -h /www < /dev/null > /dev/null 2>&1",
        )
        with urllib.request.urlopen(f"http://{address}/data", timeout=60) as answer:
            taken = answer.read()
        assert len(taken) == SIZE
        assert made.split()[0] == hashlib.md5(taken).hexdigest()
    lab.unchanged()


def _send(listening: socket.socket, data: bytes) -> None:
    connection, _peer = listening.accept()
    with connection:
        connection.sendall(data)
