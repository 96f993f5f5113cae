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
whose answer comes after a 0xFF of its own; an agent that ends takes such a request with it, so it
is repeated. There are no events: the end of a command can only be asked for again and again
(`Agent.run`).
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

from netorch.errors import NetorchError, ReadyError, not_running
from netorch.system.scope import Scope

# A QEMU that is alive answers in milliseconds, but a machine that starts a hundred guests is busy.
SECONDS = 30.0
_AGENT_SECONDS = 5.0
# From the start of QEMU. A lease is no sign of an agent: tiny's comes a second after it, or ten on
# a busy machine.
_BOOT_SECONDS = 60.0
_SYNC_AGAIN = 1.0  # until a silent agent is asked again whether it is there; doubled each time
_DELAYS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25)  # of guest-exec-status; the last one repeats
CUT = "the guest agent hands over 16 MiB of a command's output, and dropped the rest"
CUT_HINT = "let the command write to a file, and fetch that with `netorch copy`"
_GRACE = 2.0  # from SIGTERM to SIGKILL, for a command in a guest that has to end
_KILL_SECONDS = 10.0  # for a busy guest to look for the processes, and for these to go

# Signals a process and its descendants. Where a kernel lists children (/proc/PID/task/TID/children)
# depends on its configuration; the parent in /proc/PID/stat it always has (proc(5): after the name,
# which is in parentheses and may hold anything, state and parent).
_KILL = """\
tree() {
    echo "$1"
    for stat in /proc/[0-9]*/stat; do
        { read -r line < "$stat"; } 2> /dev/null || continue
        rest=${line##*) }
        parent=${rest#* }
        [ "${parent%% *}" != "$1" ] || (tree "${line%% *}")
    done
}
kill -s "$1" $(tree "$2") 2> /dev/null
"""


class QmpError(NetorchError):
    """QEMU or the guest agent refused a command, or does not answer."""


class Completed(NamedTuple):
    """A command that ran in a guest; `code` is its exit status, 128 + N if signal N ended it, None
    if its time was over. `cut` says that the agent has dropped a part of its output.
    """

    code: int | None
    out: bytes
    err: bytes
    cut: bool = False


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
        data = memoryview(json.dumps(message).encode() + b"\n")
        try:
            if fds:  # they go with the first bytes
                data = data[socket.send_fds(self._socket, [data], fds) :]
            while data:  # each part has the whole time limit, which with sendall they would share
                data = data[self._socket.send(data) :]
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
        """The answer to a command, for which QEMU may be given descriptors."""
        self.send(command, arguments, fds)
        return self.answer(command)

    def event(self, name: str, device: str, seconds: float) -> bool:
        """Wait for an event about a device; False if it does not come in time, and then the session
        is of no more use.
        """
        import time

        deadline = time.monotonic() + seconds
        while not any(
            e["event"] == name and e.get("data", {}).get("device") == device for e in self._events
        ):
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self._socket.settimeout(left)
            try:
                message = json.loads(self.line())
            except QmpError as error:
                if isinstance(error.__cause__, TimeoutError):
                    return False
                raise
            self._events.append(message)
        self._socket.settimeout(SECONDS)
        return True

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

    def __init__(
        self, path: Path, guest: str, seconds: float | None = None, each: float = SECONDS
    ) -> None:
        """Connect and synchronize, within `seconds`, by default for as long as the guest may boot;
        `each` is for each later request. Raises UsageError without guest, ReadyError without agent.
        """
        try:
            seconds = _agent_seconds(path) if seconds is None else seconds
            client = connect(path, seconds)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise not_running(guest) from error
        super().__init__(client, f"the guest agent of {guest}")
        try:
            self._synchronize(seconds)
        except (OSError, QmpError) as error:
            self.close()
            raise ReadyError(
                f"the guest agent of {guest} does not answer",
                "it may be paused or still boot; an image of your own needs qemu-guest-agent",
            ) from error
        client.settimeout(each)

    def _synchronize(self, seconds: float) -> None:
        """Have all answers to earlier requests behind us. Raises OSError or QmpError after
        `seconds`.

        An agent that ends has lost what it was sent, so this asks again. The answer to the last
        request is the end, as no other can come after it; so an agent that is just slow gets ever
        more time for that.
        """
        import time

        deadline = time.monotonic() + seconds
        patience = _SYNC_AGAIN
        while True:
            token = int.from_bytes(os.urandom(4))
            self._socket.settimeout(max(min(patience, deadline - time.monotonic()), 0.001))
            self._socket.sendall(b"\xff")
            self.send("guest-sync-delimited", {"id": token})
            try:
                while _returned(self.line()) != token:
                    continue
                return
            except QmpError as error:
                if not isinstance(error.__cause__, TimeoutError) or time.monotonic() >= deadline:
                    raise
            self._lines.close()  # after a timeout it reads no more
            self._lines = self._socket.makefile("rb")
            patience *= 2

    def ask(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        self.send(command, arguments)
        return self.answer(command)

    def run(
        self, argv: Sequence[str], input: bytes = b"", seconds: float | None = None
    ) -> Completed:
        """Run a command and wait for its end; after so many seconds it is ended, with all that it
        started, and `code` is None.
        """
        pid = self.start(argv, input)
        if (status := self._ended(pid, seconds)) is not None:
            return _completed(status)
        for signal in ("TERM", "KILL"):
            killer = self.start(["/bin/sh", "-c", _KILL, "sh", signal, str(pid)])
            self._ended(killer, _KILL_SECONDS)
            grace = _GRACE if signal == "TERM" else _KILL_SECONDS
            if (status := self._ended(pid, grace)) is not None:
                return _completed(status)._replace(code=None)
        return Completed(None, b"", b"")  # somebody that it started still has its output open

    def start(self, argv: Sequence[str], input: bytes = b"") -> int:
        """Start a command; its pid in the guest."""
        arguments: dict[str, object] = {
            "path": argv[0],
            "arg": list(argv[1:]),
            "capture-output": True,
        }
        if input:
            arguments["input-data"] = base64.b64encode(input).decode()
        return int(self.ask("guest-exec", arguments)["pid"])

    def _ended(self, pid: int, seconds: float | None) -> dict[str, Any] | None:
        """The status of a command that `start` started, once it has ended; None after `seconds`.

        The agent tells of a command's end only when asked, so this asks, at intervals from 2 to
        250 ms.
        """
        import time

        asked = 0
        began = time.monotonic()
        while not (status := self.ask("guest-exec-status", {"pid": pid}))["exited"]:
            if seconds is not None and time.monotonic() - began >= seconds:
                return None
            time.sleep(_DELAYS[min(asked, len(_DELAYS) - 1)])
            asked += 1
        return dict(status)


def _returned(line: bytes) -> object:
    """What a line of the agent returns; None if it does not, as an error or the end of a line whose
    beginning another client had.
    """
    try:
        message = json.loads(line.rpartition(b"\xff")[2])
    except ValueError:
        return None
    return message.get("return") if isinstance(message, dict) else None


def _agent_seconds(path: Path) -> float:
    """How long to wait for the agent behind a socket, which was made when its QEMU was started."""
    import time

    age = time.time() - path.stat().st_mtime
    return max(_AGENT_SECONDS, _BOOT_SECONDS - max(age, 0.0))


def agent_path(scope: Scope, guest: str) -> Path:
    return scope.run / "guests" / guest / "agent.sock"


def agent_exec(
    scope: Scope,
    guest: str,
    argv: Sequence[str],
    input: bytes = b"",
    seconds: float | None = None,
) -> Completed:
    """As `Agent.run`, over a connection of its own. Raises UsageError, ReadyError, QmpError."""
    with Agent(agent_path(scope, guest), guest) as agent:
        return agent.run(argv, input, seconds)


def _completed(status: Mapping[str, Any]) -> Completed:
    out, err = (base64.b64decode(status.get(f"{name}-data", "")) for name in ("out", "err"))
    code = status["exitcode"] if "exitcode" in status else 128 + status.get("signal", 0)
    return Completed(
        code, out, err, bool(status.get("out-truncated") or status.get("err-truncated"))
    )
