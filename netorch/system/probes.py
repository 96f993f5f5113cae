"""Probes from a host, or from the place itself: sockets that are made in its network namespace.

A socket belongs to the namespace that it was made in, so one process can hold sockets of many
hosts: the thread of a probe is in the host only for that moment. Each function here is one attempt,
with the seconds that it waits for an answer. They count from when it was sent, however long that
took: who was not asked is not called silent. Whether to try again is `netorch.verify`'s affair.

What comes back instead of an answer is told apart by the kernel's error queue (ip(7), IP_RECVERR):
a refusal of the far end's own (RST) leaves nothing there, an ICMP message leaves its type, its code
and who sent it. connect() alone says ECONNREFUSED to both.
"""

import errno
import fcntl
import os
import select
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal, NamedTuple

from netorch.system.capture import Mark
from netorch.system.namespaces import in_namespace
from netorch.system.patience import Patience

_SIOCGIFADDR = 0x8915
_IP_RECVERR = 11  # <linux/in.h>
_SO_EE_ORIGIN_ICMP = 2  # <linux/errqueue.h>
_ERROR = struct.Struct("=IBBBxII")  # struct sock_extended_err; then the offender's sockaddr_in
_ICMP_UNREACHABLE = 3
_REASONS = {
    0: "network unreachable",
    1: "host unreachable",
    2: "protocol unreachable",
    3: "port unreachable",
    9: "network prohibited",
    10: "host prohibited",
    13: "prohibited",
}
_AGAIN = 0.5  # seconds until a datagram is sent once more

Kind = Literal["reached", "refused", "rejected", "unreachable", "silent", "broken"]


class Answer(NamedTuple):
    """What an attempt came to.

    reached      the far end answered; `text` is how fast, or what
    refused      the far end answered that it will not (RST)
    rejected     somebody on the way, or the far end's filter, said so by ICMP
    unreachable  no route, or nobody answers ARP for the address
    silent       nothing came back
    broken       the attempt could not be made
    """

    kind: Kind
    text: str
    by: str = ""  # who rejected


class Vantage(NamedTuple):
    """Where a probe starts: a host's namespace, None for the place itself."""

    namespace: Path | None
    patience: Patience

    def ping(self, address: str, mark: Mark, seconds: float) -> Answer:
        try:
            with self._socket(socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
                return self._ping(sock, address, mark, seconds)
        except OSError as error:
            return _local(error, address)

    def tcp(self, address: str, port: int, mark: Mark, seconds: float) -> Answer:
        began = time.monotonic()
        try:
            with self._socket(socket.SOCK_STREAM) as sock:
                sock.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
                number = sock.connect_ex((address, port))
                if number not in (0, errno.EINPROGRESS):
                    return _local(OSError(number, os.strerror(number)), address)
                until = time.monotonic() + seconds
                if not self.patience.wait(until, sock.fileno(), select.POLLOUT):
                    return Answer("silent", "no answer")
                if number := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    return _refusal(sock, number, address)
                sock.send(mark.token)
                return Answer("reached", f"connected in {_ms(began)}")
        except OSError as error:
            return _local(error, address)

    def udp(self, address: str, port: int, mark: Mark, seconds: float) -> Answer:
        answer = self._ask(address, port, mark.token, seconds)
        return answer if isinstance(answer, Answer) else Answer("reached", f"echo in {answer[1]}")

    def dns(
        self, name: str, servers: Sequence[str], seconds: float
    ) -> tuple[Answer, tuple[str, ...]]:
        """What the first server says, and the addresses in it: with "refused" it knows none."""
        if not servers:
            return Answer("broken", "it has no name server of this lab to ask"), ()
        server = servers[0]
        import dns.message
        import dns.rcode
        import dns.rdatatype

        query = dns.message.make_query(name, dns.rdatatype.A)
        got = self._ask(server, 53, query.to_wire(), seconds)
        if isinstance(got, Answer):
            return got, ()
        response = dns.message.from_wire(got[0], ignore_trailing=True)
        records = [r for answer in response.answer for r in answer if r.rdtype == dns.rdatatype.A]
        found = tuple(str(record) for record in records)
        if found:
            return Answer("reached", f"{', '.join(found)} in {got[1]}"), found
        reason = dns.rcode.to_text(response.rcode())
        said = f"{server} knows no address of it ({reason})"
        return Answer("refused", said), ()

    def address_of(self, device: str) -> str:
        """The first IPv4 address of an interface, "" without one."""
        try:
            with self._socket(socket.SOCK_DGRAM) as sock:
                request = struct.pack("16s16x8x", device.encode())
                return socket.inet_ntoa(fcntl.ioctl(sock, _SIOCGIFADDR, request)[20:24])
        except OSError:
            return ""

    def _socket(self, kind: int, protocol: int = 0) -> socket.socket:
        with ExitStack() as stack:
            if self.namespace is not None:
                stack.enter_context(in_namespace(self.namespace))
            flags = kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
            return socket.socket(socket.AF_INET, flags, protocol)

    def _ask(
        self, address: str, port: int, data: bytes, seconds: float
    ) -> tuple[bytes, str] | Answer:
        """Send a datagram until something comes back: the reply and its time, or why not."""
        try:
            with self._socket(socket.SOCK_DGRAM) as sock:
                sock.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
                sock.connect((address, port))
                until = 0.0
                while True:
                    began = time.monotonic()
                    sock.send(data)
                    until = until or time.monotonic() + seconds
                    if self.patience.wait(min(until, began + _AGAIN), sock.fileno()):
                        try:
                            return sock.recv(65535), _ms(began)
                        except OSError as error:
                            return _refusal(sock, error.errno or 0, address)
                    if time.monotonic() >= until:
                        return Answer("silent", "no answer")
        except OSError as error:
            return _local(error, address)

    def _ping(self, sock: socket.socket, address: str, mark: Mark, seconds: float) -> Answer:
        identity = int.from_bytes(os.urandom(2))
        body = mark.token.ljust(mark.size, b".")[: mark.size]
        header = struct.pack("!BBHHH", 8, 0, 0, identity, 1)
        request = header[:2] + struct.pack("!H", _checksum(header + body)) + header[4:] + body
        began = time.monotonic()
        sock.sendto(request, (address, 0))
        until = time.monotonic() + seconds
        while self.patience.wait(until, sock.fileno()):
            packet, (sender, _) = sock.recvfrom(65535)
            answer = _icmp(packet, sender, address, identity, began)
            if answer is not None:
                return answer
        return Answer("silent", "no answer")


def _icmp(packet: bytes, sender: str, address: str, identity: int, began: float) -> Answer | None:
    """What an ICMP message says of our echo request; None if it is about something else."""
    message = packet[(packet[0] & 15) * 4 :]
    if len(message) < 8:
        return None
    kind, code, _, number, _ = struct.unpack_from("!BBHHH", message)
    if kind == 0 and number == identity and sender == address:
        return Answer("reached", _ms(began))
    if kind != _ICMP_UNREACHABLE or len(message) < 8 + 28:
        return None
    quoted = message[8:]
    echo = quoted[(quoted[0] & 15) * 4 :]
    about_us = len(echo) >= 6 and echo[0] == 8 and echo[4:6] == identity.to_bytes(2)
    return rejected(code, sender, socket.inet_ntoa(packet[16:20]), address) if about_us else None


def rejected(code: int, sender: str, own: str, address: str) -> Answer:
    """What ICMP's "destination unreachable" with this code says; `own` is the source's address."""
    if code == 1 and sender == own:  # the kernel to itself, when ARP has failed
        return Answer("unreachable", f"nobody answers ARP for {address}")
    reason = _REASONS.get(code, f"unreachable, code {code}")
    return Answer("rejected", f"rejected by {sender} (ICMP {reason})", sender)


def _refusal(sock: socket.socket, number: int, address: str) -> Answer:
    """What stands behind an error of a connected socket."""
    try:
        _, ancillary, _, _ = sock.recvmsg(512, 512, socket.MSG_ERRQUEUE)
    except OSError:
        ancillary = []
    for _level, _type, data in ancillary:
        _, origin, kind, code, _, _ = _ERROR.unpack_from(data)
        if origin == _SO_EE_ORIGIN_ICMP and kind == _ICMP_UNREACHABLE:
            sender = socket.inet_ntoa(data[_ERROR.size + 4 : _ERROR.size + 8])
            return rejected(code, sender, sock.getsockname()[0], address)
    if number == errno.ECONNREFUSED:
        return Answer("refused", f"refused by {address} (TCP RST)")
    return _local(OSError(number, os.strerror(number)), address)


def _local(error: OSError, address: str) -> Answer:
    """What this end's own kernel says."""
    if error.errno == errno.EHOSTUNREACH:
        return Answer("unreachable", f"nobody answers ARP for {address}")
    if error.errno == errno.ENETUNREACH:
        return Answer("unreachable", f"no route to {address}")
    if error.errno in (errno.EPERM, errno.EACCES):  # netfilter's verdict on what leaves
        return Answer("rejected", f"rejected by its own filter ({os.strerror(error.errno)})")
    return Answer("broken", f"failed to probe {address}: {error.strerror or error}")


def _checksum(data: bytes) -> int:
    """RFC 1071."""
    padded = data + bytes(len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _ms(began: float) -> str:
    return f"{(time.monotonic() - began) * 1000:.1f} ms"
