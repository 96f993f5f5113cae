"""One rtnetlink socket: requests in batches, dumps as raw bytes.

Theory of operation ------------------- The kernel works through all messages of one sendmsg in the
sender's own context, before it looks at any signal. So what has to be there together or not at all
(a link and its mark) goes into one *group* of messages, and a group is never split over two calls:
SIGKILL comes before it or after it.

Only the last message of a call asks for an acknowledgement. The kernel answers in order, and
reports an error whether or not it was asked to, so that one answer ends the batch and the errors
before it are all there are. A message that fails doesn't stop those behind it. A group must
therefore name its link in a way that can't hit anything else if its first message fails;
`netorch.system.bridges` says how.

Answers that a batch leaves behind (after Ctrl-C) carry older sequence numbers, and are passed over.
"""

import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from netorch.errors import KernelError

REQUEST, ACK, DUMP = 0x1, 0x4, 0x300
HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence number, port

_ERROR, _DONE = 2, 3
_DUMP_INTERRUPTED = 0x10
_ACK_TLVS = 0x200
_SOL_NETLINK = 270
_CAP_ACK, _EXT_ACK, _STRICT_CHECK = 10, 11, 12
_EXT_ACK_TEXT = 1
# An error answer takes below 1 KiB of the receive buffer, which has 208 KiB unless someone made it
# smaller.
_MESSAGES, _BYTES = 128, 65536
_DUMP_TRIES = 100

Group = Sequence[bytearray]
Outcomes = list[KernelError | None]


class Netlink:
    """An rtnetlink socket in this network namespace, or in that of a path or an open descriptor."""

    def __init__(self, namespace: Path | int | None = None) -> None:
        self._sequence = 0
        if namespace is None:
            self._socket = open_socket()
            return
        from netorch.system.namespaces import in_namespace  # ctypes, only for labs with hosts

        with in_namespace(namespace):
            self._socket = open_socket()

    @classmethod
    def over(cls, opened: socket.socket) -> Self:
        """Over a socket of `open_socket`, which stays in the namespace that it was made in."""
        netlink = cls.__new__(cls)
        netlink._sequence = 0
        netlink._socket = opened
        return netlink

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._socket.close()

    def send(self, groups: Sequence[Group]) -> Outcomes:
        """Send all groups, each whole in one call; for each its first error, or None."""
        outcomes: Outcomes = [None] * len(groups)
        for chunk in _chunks(groups):
            self._send_chunk(chunk, groups, outcomes)
        return outcomes

    def send_whole(self, messages: Sequence[bytearray]) -> Outcomes:
        """Send all messages in one call, whatever their number; for each its error, or None.

        The call may have 200 KB, less than the least send buffer of a system.
        """
        outcomes: Outcomes = [None] * len(messages)
        self._send_chunk(range(len(messages)), [[message] for message in messages], outcomes)
        return outcomes

    def dump(self, kind: int, body: bytes) -> list[memoryview]:
        """The bodies of the answers to a dump request, from one consistent walk of the kernel."""
        for _ in range(_DUMP_TRIES):
            bodies = self._dump_once(kind, body)
            if bodies is not None:
                return bodies
        raise KernelError("failed to list links: they change all the time", errno.EAGAIN)

    def get(self, kind: int, body: bytes) -> memoryview:
        """The body of the one answer to a request. Raises KernelError with the kernel's reason."""
        self._sequence += 1
        header = HEADER.pack(HEADER.size + len(body), kind, REQUEST, self._sequence, 0)
        self._socket.send(header + body)
        _, answer, flags, data = next(self._answers({self._sequence}))
        if answer == _ERROR:
            code = -struct.unpack_from("=i", data)[0]
            raise KernelError(_reason(code, flags, data), code)
        return data

    def _send_chunk(self, chunk: range, groups: Sequence[Group], outcomes: Outcomes) -> None:
        owners: dict[int, int] = {}
        data = bytearray()
        last = 0
        for index in chunk:
            for message in groups[index]:
                self._sequence += 1
                owners[self._sequence] = index
                last = len(data)
                data += message
                HEADER.pack_into(
                    data, last, len(message), *_type_and_flags(message), self._sequence, 0
                )
        if not data:
            return
        length, kind, flags, sequence, port = HEADER.unpack_from(data, last)
        HEADER.pack_into(data, last, length, kind, flags | ACK, sequence, port)
        self._socket.send(data)
        for answer, _, flags, body in self._answers(set(owners)):
            code = -struct.unpack_from("=i", body)[0]
            owner = owners[answer]
            if code and outcomes[owner] is None:
                outcomes[owner] = KernelError(_reason(code, flags, body), code)
            if answer == self._sequence:
                return

    def _dump_once(self, kind: int, body: bytes) -> list[memoryview] | None:
        """One walk; None if the kernel changed something under it."""
        self._sequence += 1
        flags = REQUEST | DUMP
        header = HEADER.pack(HEADER.size + len(body), kind, flags, self._sequence, 0)
        self._socket.send(header + body)
        bodies: list[memoryview] = []
        interrupted = False
        for _, answer, flags, data in self._answers({self._sequence}):
            interrupted = interrupted or bool(flags & _DUMP_INTERRUPTED)
            if answer in (_DONE, _ERROR):
                code = -struct.unpack_from("=i", data)[0] if len(data) >= 4 else 0
                if code:
                    raise KernelError(f"failed to list links: {_reason(code, flags, data)}", code)
                break
            bodies.append(data)
        return None if interrupted else bodies

    def _answers(self, wanted: set[int]) -> Iterator[tuple[int, int, int, memoryview]]:
        """(sequence number, type, flags, body) of every message that answers one of `wanted`."""
        while True:
            data = memoryview(self._socket.recv(1 << 18))
            at = 0
            while at + HEADER.size <= len(data):
                length, kind, flags, sequence, _ = HEADER.unpack_from(data, at)
                if sequence in wanted:
                    yield sequence, kind, flags, data[at + HEADER.size : at + length]
                at += length + 3 & ~3


def open_socket() -> socket.socket:
    """An rtnetlink socket in this network namespace."""
    opened = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
    )
    for option in (_CAP_ACK, _EXT_ACK, _STRICT_CHECK):
        opened.setsockopt(_SOL_NETLINK, option, 1)
    return opened


def _type_and_flags(message: bytearray) -> tuple[int, int]:
    kind, flags = struct.unpack_from("=HH", message, 4)
    return kind, flags | REQUEST


def _chunks(groups: Sequence[Group]) -> Iterator[range]:
    """Runs of whole groups that fit one call; a group that is larger than a call goes alone."""
    start = messages = size = 0
    for index, group in enumerate(groups):
        length = sum(map(len, group))
        if index > start and (messages + len(group) > _MESSAGES or size + length > _BYTES):
            yield range(start, index)
            start, messages, size = index, 0, 0
        messages += len(group)
        size += length
    yield range(start, len(groups))


def _reason(code: int, flags: int, body: memoryview) -> str:
    """The kernel's reason in words: the errno's, and the extended acknowledgement's if any."""
    text = os.strerror(code)
    at = 4 + HEADER.size
    while flags & _ACK_TLVS and at + 4 <= len(body):
        length, kind = struct.unpack_from("=HH", body, at)
        if kind == _EXT_ACK_TEXT:
            said = bytes(body[at + 4 : at + length]).rstrip(b"\0").decode(errors="replace")
            return f"{text} ({said.rstrip('.')})"
        at += max(length + 3 & ~3, 4)
    return text
