"""One ICMP echo request (RFC 792), and what came back for it."""

import os
import select
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from netorch.errors import NetorchError
from netorch.system.namespaces import in_namespace
from netorch.system.qmp import agent_exec
from netorch.system.scope import Scope

SECONDS = 2  # for the answer: a guest under TCG on a busy machine takes its time
_HEADER = struct.Struct("!BBHHH")  # type, code, checksum, id, sequence number
_REPLY, _UNREACHABLE, _REQUEST = 0, 3, 8


class Echo(msgspec.Struct, frozen=True):
    """`tried`: the node was told to send it; `said`: in words, what came of it."""

    tried: bool
    answered: bool
    said: str


def from_guest(scope: Scope, guest: str, address: str) -> Echo:
    """Have the guest's own ping send it, by the guest agent."""
    try:
        done = agent_exec(scope, guest, ["ping", "-c", "1", "-W", str(SECONDS), address])
    except NetorchError as error:
        return Echo(False, False, error.message)
    if done.code == 0:
        return Echo(True, True, f"{address} answers a ping from {guest}")
    words = done.err.decode(errors="replace").strip().splitlines()
    if words:  # its ping, or the kernel below it, refused
        return Echo(True, False, f"{guest} can't send to {address}: {words[-1]}")
    return Echo(True, False, f"{address} does not answer a ping from {guest}")


def from_host(namespace: Path, host: str, address: str) -> Echo:
    """Send it from a host's network namespace."""
    identity = int.from_bytes(os.urandom(2))
    try:
        with in_namespace(namespace):
            icmp = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    except OSError as error:  # a container without CAP_NET_RAW
        return Echo(False, False, f"{host} can't send a ping: {error.strerror}")
    try:
        with icmp:
            icmp.sendto(_request(identity), (address, 0))
            said = _answer(icmp, identity)
    except OSError as error:
        return Echo(True, False, f"{host} can't send to {address}: {error.strerror}")
    if said == "":
        return Echo(True, True, f"{address} answers a ping from {host}")
    return Echo(True, False, f"{address} does not answer a ping from {host}{said}")


def knock_from_host(namespace: Path, kind: str, address: str, port: int) -> Echo:
    """Send a TCP connection's first packet, or a UDP datagram, from a host's network namespace."""
    stream = kind == "tcp"
    with in_namespace(namespace):
        client = socket.socket(socket.AF_INET, socket.SOCK_STREAM if stream else socket.SOCK_DGRAM)
    with client:
        client.settimeout(SECONDS)
        try:
            client.connect((address, port))
            if not stream:
                client.send(b"\n")
                client.recv(65536)
        except ConnectionRefusedError:
            return Echo(True, True, f"{address} refuses {kind}:{port}")
        except OSError as error:
            return Echo(True, False, f"{address} does not answer at {kind}:{port}: {error}")
    return Echo(True, True, f"{address} answers at {kind}:{port}")


def knock_from_guest(scope: Scope, guest: str, kind: str, address: str, port: int) -> Echo:
    """The same from a guest, by the nc that is in it."""
    udp = "-u " if kind == "udp" else ""
    command = f"echo | nc {udp}-w {SECONDS} {address} {port}"
    try:
        done = agent_exec(scope, guest, ["sh", "-c", command])
    except NetorchError as error:
        return Echo(False, False, error.message)
    refused = b"refused" in done.err
    if (done.code == 0 and (kind == "tcp" or done.out)) or refused:
        return Echo(True, True, f"{address} answers at {kind}:{port}")
    return Echo(True, False, f"{address} does not answer at {kind}:{port}")


def _request(identity: int) -> bytes:
    words = (_REQUEST << 8, identity, 1)
    total = sum(words)
    checksum = ~(total + (total >> 16)) & 0xFFFF
    return _HEADER.pack(_REQUEST, 0, checksum, identity, 1)


def _answer(icmp: socket.socket, identity: int) -> str:
    """Nothing for a reply; else what was said instead."""
    for data in _until(time.monotonic() + SECONDS, icmp):
        at = (data[0] & 15) * 4
        kind, code, _, id_, _ = _HEADER.unpack_from(data, at)
        if kind == _REPLY and id_ == identity:
            return ""
        inner = at + 8 + 20  # behind the IP header that the error quotes; ours has no options
        if kind == _UNREACHABLE and len(data) >= inner + 8:
            quoted = _HEADER.unpack_from(data, inner)
            if quoted[0] == _REQUEST and quoted[3] == identity:
                by = socket.inet_ntoa(data[12:16])
                return f": {by} says that it is unreachable (ICMP 3/{code})"
    return f" within {SECONDS} s"


def _until(deadline: float, icmp: socket.socket) -> Iterator[bytes]:
    poll = select.poll()
    poll.register(icmp, select.POLLIN)
    while (left := deadline - time.monotonic()) > 0 and poll.poll(left * 1000):
        yield icmp.recv(65536)
