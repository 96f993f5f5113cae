"""QMP and the guest agent: a request and its answer over a Unix socket, one JSON object a line.

A client of our own and not qemu.qmp: that is built on asyncio, and importing it takes 35 ms on top
of json and socket (10 ms), in every command that looks at a guest, where QEMU itself takes 17 ms
from exec to greeting. What netorch asks for is a handful of commands, in order, and some events,
and that is the length of `_Lines`.

QMP (docs/interop/qmp-spec.txt): a greeting, then `qmp_capabilities`, then commands; events may
stand between, and those that come before an answer are kept for `event`. Descriptors go along with
a command (SCM_RIGHTS), and `getfd` names them. A QMP server serves one client at a time; the next
one waits in its backlog until the first has left.

Guest agent (docs/interop/qemu-ga-ref): no greeting. The port may still hold what an earlier client
left, so a session starts with 0xFF (which resets the agent's parser) and guest-sync-delimited,
whose answer comes after a 0xFF of its own. There are no events: the end of a command can only be
asked for again and again (`agent_exec`).
"""

import base64
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from netorch.errors import NetorchError, ReadyError, UsageError
from netorch.system.scope import Scope

# A QEMU that is alive answers in milliseconds, but a machine that starts a hundred guests is busy.
SECONDS = 30.0
_AGENT_SECONDS = 5.0
_DELAYS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25)  # of guest-exec-status; the last one repeats


class QmpError(NetorchError):
    """QEMU or the guest agent refused a command, or does not answer."""


class Completed(NamedTuple):
    """A command that ran in a guest; `code` is its exit status, 128 + N if signal N ended it, None
    if it still runs.
    """

    code: int | None
    out: bytes
    err: bytes


@contextmanager
def socket_path(path: Path) -> Iterator[str]:
    """A short name for `path` while the block runs: a socket's has at most 107 bytes (unix(7))."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def listen(path: Path) -> socket.socket:
    """A Unix socket that listens at `path`, for QEMU to inherit."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    os.fchmod(listener.fileno(), 0o600)  # the mode of the file that bind makes
    with socket_path(path) as short:
        listener.bind(short)
    listener.listen()
    return listener


def connect(path: Path, seconds: float = SECONDS) -> socket.socket:
    """A connection to the Unix socket at `path`. Raises OSError."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(seconds)
    try:
        with socket_path(path) as short:
            client.connect(short)
    except OSError:
        client.close()
        raise
    return client


class _Lines:
    """JSON objects by lines over a connected socket."""

    def __init__(self, client: socket.socket, name: str) -> None:
        self._socket = client
        self._lines = client.makefile("rb")
        self._name = name
        self._events: list[Any] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._lines.close()
        self._socket.close()

    def send(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        fds: Sequence[int] = (),
    ) -> None:
        message = {"execute": command, **({"arguments": arguments} if arguments else {})}
        data = json.dumps(message).encode() + b"\n"
        try:
            sent = socket.send_fds(self._socket, [data], fds) if fds else 0
            self._socket.sendall(data[sent:])
        except OSError as error:
            raise QmpError(f"failed to ask {self._name}: {error}") from error

    def line(self) -> bytes:
        try:
            text = self._lines.readline()
        except OSError as error:
            raise QmpError(f"{self._name} does not answer: {error}") from error
        if not text:
            raise QmpError(f"{self._name} has closed the connection")
        return text

    def answer(self, command: str) -> Any:
        """The result of the command that was sent first and not answered yet. Raises QmpError."""
        while True:
            message = json.loads(self.line())
            if "return" in message:
                return message["return"]
            if "error" in message:
                reason = message["error"]["desc"]
                raise QmpError(f"failed to {command} in {self._name}: {reason}")
            if "event" in message:
                self._events.append(message)


class Qmp(_Lines):
    """A QMP session. Commands may be sent before the answers to earlier ones are read."""

    def __init__(self, path: Path, guest: str) -> None:
        """Connect; raises QmpError. The negotiation is sent, and awaited by `ready`."""
        try:
            client = connect(path)
        except OSError as error:
            raise QmpError(f"failed to reach QEMU of guest {guest}: {error.strerror}") from error
        super().__init__(client, f"QEMU of guest {guest}")
        self.send("qmp_capabilities")

    def ready(self) -> None:
        """Wait for the greeting and the end of the negotiation."""
        self.answer("qmp_capabilities")

    def ask(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        fds: Sequence[int] = (),
    ) -> Any:
        self.send(command, arguments, fds)
        return self.answer(command)

    def wait_event(self, satisfied: Callable[[Any], bool]) -> Any:
        """Wait for an event that satisfies, for as long as QEMU lives; the event."""
        self._socket.settimeout(None)
        while True:
            for event in self._events:
                if satisfied(event):
                    self._events.remove(event)
                    self._socket.settimeout(SECONDS)
                    return event
            self._events.append(json.loads(self.line()))


class Agent(_Lines):
    """A session with the agent inside a guest."""

    def __init__(self, path: Path, guest: str, seconds: float = _AGENT_SECONDS) -> None:
        """Connect and synchronize, within `seconds`. Raises UsageError without guest, ReadyError
        without agent.
        """
        try:
            client = connect(path, seconds)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise UsageError(f"guest {guest} does not run") from error
        super().__init__(client, f"the guest agent of {guest}")
        token = int.from_bytes(os.urandom(4))
        client.sendall(b"\xff")
        self.send("guest-sync-delimited", {"id": token})
        try:
            while json.loads(self.line().rpartition(b"\xff")[2]).get("return") != token:
                continue
        except QmpError as error:
            self.close()
            raise ReadyError(
                f"the guest agent of {guest} does not answer",
                "the guest may still be booting; an image of your own needs qemu-guest-agent",
            ) from error

    def ask(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        self.send(command, arguments)
        return self.answer(command)


def agent_path(scope: Scope, guest: str) -> Path:
    return scope.run / "guests" / guest / "agent.sock"


def agent_exec(
    scope: Scope,
    guest: str,
    argv: Sequence[str],
    input: bytes = b"",
    seconds: float | None = None,
) -> Completed:
    """Run a command in a guest and wait for its end, or at most so many seconds.

    Raises UsageError, ReadyError, QmpError.

    The agent tells of a command's end only when asked, so this asks, at intervals from 2 to 250 ms.
    """
    import time

    with Agent(agent_path(scope, guest), guest) as agent:
        arguments: dict[str, object] = {
            "path": argv[0],
            "arg": list(argv[1:]),
            "capture-output": True,
        }
        if input:
            arguments["input-data"] = base64.b64encode(input).decode()
        pid = agent.ask("guest-exec", arguments)["pid"]
        asked = 0
        began = time.monotonic()
        while not (status := agent.ask("guest-exec-status", {"pid": pid}))["exited"]:
            if seconds is not None and time.monotonic() - began >= seconds:
                return Completed(None, b"", b"")
            time.sleep(_DELAYS[min(asked, len(_DELAYS) - 1)])
            asked += 1
    code = status["exitcode"] if "exitcode" in status else 128 + status.get("signal", 0)
    return Completed(
        code,
        base64.b64decode(status.get("out-data", "")),
        base64.b64decode(status.get("err-data", "")),
    )
