"""Throughput and latency through a running lab: 100 MB each way, and pings, in milliseconds."""

import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.turns import Clock

_NONE = subprocess.DEVNULL
SIZE = 100 << 20
GATEWAY = "192.168.122.1"
SERVER = "10.99.0.80"
MODELS = ("virtio-net-pci", "e1000", "rtl8139")

LAB = f"""
[networks.default]
address = "{GATEWAY}/24"
uplink = "br-lan"
[networks.lan]
mode = "bridge"
address = "10.99.0.1/24"
[hosts.a]
nics = [{{ network = "lan", address = "10.99.0.2/24" }}]
[hosts.server]
nics = [{{ network = "lan", address = "{SERVER}/24" }}]
[guests.vm]
accel = "tcg"
nics = [{{ network = "default", address = "192.168.122.6", model = "MODEL" }}]
"""

# Receives one connection's bytes, or sends SIZE of them, and says how many milliseconds it took.
_PEER = """
import socket, sys, time
way, address, port, size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
chunk = bytes(1 << 20)
with socket.create_server((address, port)) as listening:
    print("ready", flush=True)
    connection, _ = listening.accept()
    began = time.perf_counter()
    if way == "receive":
        while connection.recv(1 << 20):
            pass
    else:
        for _ in range(size >> 20):
            connection.sendall(chunk)
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)
    print((time.perf_counter() - began) * 1000)
"""
_CLIENT = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as connection:
    for _ in range(int(sys.argv[3]) >> 20):
        connection.sendall(bytes(1 << 20))
"""


def turn(netorch: str, python: str, model: str, directory: Path, clock: Clock) -> None:
    """Bring the lab up, measure, take it down. The lab's files are in `directory`."""
    file = directory / "lab.toml"
    file.write_text(LAB.replace("MODEL", model))
    subprocess.run([netorch, "apply", str(file)], check=True, capture_output=True, stdin=_NONE)
    try:
        _measure(netorch, python, clock, hosts=model == MODELS[0])
    finally:
        subprocess.run([netorch, "teardown"], check=True, capture_output=True, stdin=_NONE)


def _measure(netorch: str, python: str, clock: Clock, hosts: bool) -> None:
    inside = [netorch, "exec", "vm", "--", "sh", "-c"]
    send = f"head -c {SIZE} /dev/zero | nc"
    with _peer([python], "receive", GATEWAY) as (port, took):
        subprocess.run([*inside, f"{send} {GATEWAY} {port}"], check=True, stdin=_NONE)
    clock.note("100 MB guest to machine", took())
    with _peer([python], "send", GATEWAY) as (port, took):
        subprocess.run(
            [*inside, f"nc {GATEWAY} {port} < /dev/null > /dev/null"], check=True, stdin=_NONE
        )
    clock.note("100 MB machine to guest", took())
    server = [netorch, "exec", "server", "--", python]
    with _peer(server, "receive", SERVER) as (port, took):
        subprocess.run([*inside, f"{send} {SERVER} {port}"], check=True, stdin=_NONE)
    clock.note("100 MB guest through NAT to host", took())
    clock.note("ping machine to guest", _ping([], "192.168.122.6"))
    if hosts:
        with _peer(server, "receive", SERVER) as (port, took):
            client = [netorch, "exec", "a", "--", python, "-c", _CLIENT, SERVER, str(port)]
            subprocess.run([*client, str(SIZE)], check=True, stdin=_NONE)
        clock.note("100 MB host to host", took())
        clock.note("ping host to host", _ping([netorch, "exec", "a", "--"], SERVER))


@contextmanager
def _peer(python: list[str], way: str, address: str) -> Iterator[tuple[int, "_Result"]]:
    port = 5001 + int(time.monotonic() * 10) % 20000
    argv = [*python, "-c", _PEER, way, address, str(port), str(SIZE)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    result = _Result(process)
    try:
        yield port, result
    finally:
        result.wait()


class _Result:
    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self._said = ""

    def wait(self) -> None:
        self._said, _ = self._process.communicate(timeout=120)

    def __call__(self) -> float:
        return float(self._said)


def _ping(prefix: list[str], address: str) -> float:
    argv = [*prefix, "ping", "-q", "-c", "20", "-i", "0.05", address]
    said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    found = re.search(r"= [\d.]+/([\d.]+)/", said)
    assert found is not None, said
    return float(found[1])
