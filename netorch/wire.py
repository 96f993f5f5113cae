"""What a process that uses netorch.Lab and its lab's agent say to each other.

Over a Unix stream socket: a length, then JSON, with open descriptors beside it. One request at a
time, each answered by one Reply. Errors cross as what they are: the class, and all its fields.
"""

import socket
import struct
from typing import Any, Literal

import msgspec

from netorch import errors
from netorch.errors import NetorchError
from netorch.model import Topology

Uplink = Literal["auto", "pasta", "slirp4netns", "none"]

_LENGTH = struct.Struct("=I")
_MAX_DESCRIPTORS = 8


class Request(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The base of all requests."""


class Start(Request, frozen=True, kw_only=True):
    """To the starter: make a lab, and an agent for it. Its end of a socket pair comes along."""

    lab: str
    named: bool  # by a person, so that it may be that of another
    topology: Topology
    source: str
    private: bool
    keep: bool
    uplink: Uplink
    environ: dict[str, str]
    cwd: str


class Apply(Request, frozen=True, kw_only=True):
    topology: Topology
    source: str
    restart: bool


class Status(Request, frozen=True, kw_only=True):
    """Answered with rows (state, key, description)."""


class Spawn(Request, frozen=True, kw_only=True):
    """Run a command in a host. Descriptors: input, output, errors, and a pipe that will be told the
    exit status. Answered with the pid.
    """

    host: str
    argv: tuple[str, ...]
    cwd: str | None
    environ: dict[str, str]


class Signal(Request, frozen=True, kw_only=True):
    """Signal a command, or with `group` all of its session's process group."""

    pid: int
    number: int
    group: bool = False


class Packets(Request, frozen=True, kw_only=True):
    """Capture on an interface of a host ("": of the lab's place). Answered with a socket."""

    host: str
    device: str
    frames: int


class Wire(Request, frozen=True, kw_only=True):
    """Put a host's cable (`server:0`) in or out."""

    id: str
    up: bool


class Picture(Request, frozen=True, kw_only=True):
    """Answered with sections (title, text): nodes and networks, leases, nft rules."""


class End(Request, frozen=True, kw_only=True):
    pass


AnyRequest = Start | Apply | Status | Spawn | Signal | Packets | Wire | Picture | End


class Failure(msgspec.Struct, frozen=True):
    kind: str
    fields: dict[str, Any]
    notes: tuple[str, ...] = ()


class Reply(msgspec.Struct, frozen=True):
    value: Any = None
    failure: Failure | None = None


def send(channel: socket.socket, message: Request | Reply, fds: tuple[int, ...] = ()) -> None:
    """Raises OSError."""
    text = msgspec.json.encode(message)
    data = _LENGTH.pack(len(text)) + text
    sent = socket.send_fds(channel, [data], list(fds)) if fds else channel.send(data)
    if sent < len(data):  # an empty rest would be sent too: to who has read all and may be gone
        channel.sendall(data[sent:])


def receive(channel: socket.socket) -> tuple[bytes, list[int]]:
    """The next message and its descriptors; b"" at the end."""
    data, fds, _flags, _address = socket.recv_fds(channel, _LENGTH.size, _MAX_DESCRIPTORS)
    for fd in fds:
        _close_on_exec(fd)
    head = data + _exactly(channel, _LENGTH.size - len(data)) if data else b""
    if len(head) < _LENGTH.size:
        return b"", fds
    return _exactly(channel, _LENGTH.unpack(head)[0]), fds


def failure(error: NetorchError) -> Failure:
    return Failure(type(error).__name__, dict(vars(error)), tuple(getattr(error, "__notes__", ())))


def error(failed: Failure) -> NetorchError:
    """The error that `failure` took apart."""
    kind = getattr(errors, failed.kind, NetorchError)
    made: NetorchError = kind.__new__(kind)
    made.args = (failed.fields["message"],)
    fields = {k: v for k, v in failed.fields.items() if k != "__notes__"}
    made.__dict__.update({k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
    for note in failed.notes:
        made.add_note(note)
    return made


def _exactly(channel: socket.socket, size: int) -> bytes:
    """So many bytes, or fewer if the other side has gone."""
    parts = bytearray()
    while len(parts) < size:
        part = channel.recv(min(size - len(parts), 1 << 20))
        if not part:
            return b""
        parts += part
    return bytes(parts)


def _close_on_exec(fd: int) -> None:
    import fcntl

    fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
