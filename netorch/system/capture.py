"""What arrives at a NIC, and from which source address: packet sockets (packet(7)).

Whether the far side has seen a packet is asked of its NIC and not of the program that listens
there, so it works for ping as for TCP, for guests as for hosts, and for services that are not
netorch's. A host's NIC is looked at inside the host; a guest's at its tap, where frames to the
guest leave this machine (after NAT and bridge); this machine's at all of its interfaces.

Packets of one probe are told from those of others by a mark that NAT leaves alone: the size of an
echo request, or a token in the data of TCP and UDP.
"""

import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from netorch.system.namespaces import in_namespace

_ETH_P_ALL = 0x0003  # of all sockets only those for all protocols see what leaves
_ETH_P_IP = 0x0800
_ICMP_ECHO = 8
_UNREACHABLE = 3


class Seen(NamedTuple):
    """An IPv4 packet of a probe that arrived."""

    source: str
    target: str


class Rejection(NamedTuple):
    """Who turned a packet away, and the code of the ICMP message that says why."""

    by: str
    code: int


class Mark(NamedTuple):
    """How the packets of one probe are known: `size` is that of the echo request's data."""

    size: int
    token: bytes

    def is_on(self, packet: bytes) -> bool:
        protocol, data = packet[9], packet[(packet[0] & 15) * 4 :]
        if protocol == socket.IPPROTO_ICMP:
            return len(data) == 8 + self.size and data[0] == _ICMP_ECHO
        return protocol in (socket.IPPROTO_TCP, socket.IPPROTO_UDP) and self.token in data


class Capture:
    """Sees what arrives from now on; a context manager. Raises OSError.

    `links` are interfaces whose outgoing packets arrive somewhere (taps); without any, what comes
    in by all interfaces of the namespace is looked at.
    """

    def __init__(self, namespace: Path | None = None, links: Sequence[str] = ()) -> None:
        self._sockets: list[socket.socket] = []
        self._kind = socket.PACKET_OUTGOING if links else socket.PACKET_HOST
        with ExitStack() as stack:
            if namespace is not None:
                stack.enter_context(in_namespace(namespace))
            for link in links or [""]:
                self._sockets.append(_packets(link))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for one in self._sockets:
            one.close()

    def seen(self, mark: Mark) -> Seen | None:
        """The last packet with the mark that arrived since the last call."""
        found = None
        for packet in self._arrived():
            if mark.is_on(packet):
                found = Seen(_address(packet, 12), _address(packet, 16))
        return found

    def rejection(self, address: str, protocol: int) -> Rejection | None:
        """The last ICMP message that turned away a packet to `address`, since the last call."""
        found = None
        for packet in self._arrived():
            message = packet[(packet[0] & 15) * 4 :]
            if packet[9] != socket.IPPROTO_ICMP or len(message) < 28 or message[0] != _UNREACHABLE:
                continue
            if message[17] == protocol and _address(message, 24) == address:
                found = Rejection(_address(packet, 12), message[1])
        return found

    def _arrived(self) -> Iterator[bytes]:
        for one in self._sockets:
            while True:
                try:
                    packet, address = one.recvfrom(65535)
                except BlockingIOError:
                    break
                if address[1] == _ETH_P_IP and address[2] == self._kind and len(packet) >= 20:
                    yield _whole(packet)


def _address(packet: bytes, offset: int) -> str:
    return socket.inet_ntoa(packet[offset : offset + 4])


def _whole(packet: bytes) -> bytes:
    """The packet without Ethernet's padding."""
    return packet[: struct.unpack_from("!H", packet, 2)[0]]


def _packets(link: str) -> socket.socket:
    flags = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    one = socket.socket(socket.AF_PACKET, flags, socket.htons(_ETH_P_ALL))
    try:
        if link:
            one.bind((link, _ETH_P_ALL))
            _discard(one)
    except OSError:
        one.close()
        raise
    return one


def _discard(one: socket.socket) -> None:
    """What came by other interfaces before the socket was bound to its own."""
    try:
        while True:
            one.recv(1)
    except BlockingIOError:
        return
