"""The caller's side of the agents: the starter process, and one connection for each lab.

A Python process has one starter (see netorch.agents), begun when it is first needed or by `warm`,
which doesn't wait for it. A process that was forked from a caller is another caller: it gets a
starter of its own when it makes labs, and can't use its parent's.
"""

import atexit
import os
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any

import msgspec

from netorch import wire
from netorch.errors import NetorchError, UsageError

if TYPE_CHECKING:
    pass

_reply = msgspec.json.Decoder(wire.Reply)
_lock = threading.Lock()
_current: "_Starter | None" = None

_SCRIPT = """
import sys
sys.path[:] = {path!r}
from netorch.agents import main
main({channel}, {caller})
"""


class Connection:
    """A socket to the agent of one lab. Requests of several threads take turns."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._turn = threading.Lock()
        self._process = os.getpid()

    @property
    def is_here(self) -> bool:
        """Whether this process made it; a copy in a forked child is not to be used."""
        return self._process == os.getpid()

    def ask(self, request: wire.Request, fds: tuple[int, ...] = ()) -> tuple[Any, list[int]]:
        """The answer, and the descriptors that came with it. Raises NetorchError."""
        if not self.is_here:
            raise UsageError("a lab can be used by the process that made it, not by a fork of that")
        with self._turn:
            try:
                wire.send(self._channel, request, fds)
                return self.answer()
            except NetorchError:
                raise
            except OSError as error:
                raise _gone() from error
            except BaseException:  # interrupted between a request and its answer
                self._channel.close()
                raise

    def answer(self) -> tuple[Any, list[int]]:
        """The answer to the request that was sent last."""
        text, fds = wire.receive(self._channel)
        if not text:
            raise _gone()
        reply = _reply.decode(text)
        if reply.failure is not None:
            raise wire.error(reply.failure)
        return reply.value, fds

    def end(self) -> None:
        """Have the lab taken down, and wait until its agent has gone."""
        try:
            self.ask(wire.End())
        finally:
            self._channel.close()


class _Starter:
    def __init__(self) -> None:
        from subprocess import DEVNULL, Popen

        ours, theirs = socket.socketpair()
        self._said = os.memfd_create("netorch")
        script = _SCRIPT.format(path=sys.path, channel=theirs.fileno(), caller=os.getpid())
        with theirs:
            self._process: Popen[bytes] = Popen(
                [sys.executable, "-c", script],
                stdin=DEVNULL,
                stdout=self._said,
                stderr=self._said,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._channel = ours
        self._turn = threading.Lock()
        self.caller = os.getpid()

    @property
    def is_usable(self) -> bool:
        """Whether it is this process's, and alive."""
        return self.caller == os.getpid() and self._process.poll() is None

    def start(self, request: wire.Start) -> tuple[Connection, Any]:
        """An agent that has made the lab, and what it says of it. Raises NetorchError."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                with self._turn:
                    wire.send(self._channel, request, (theirs.fileno(),))
            except OSError as error:
                ours.close()
                raise self._gone() from error
        connection = Connection(ours)
        try:
            value, _fds = connection.answer()
        except BaseException:
            ours.close()  # an agent that was interrupted at its work takes everything back
            if self._process.poll() is not None:
                raise self._gone() from None
            raise
        return connection, value

    def end(self) -> None:
        """Wait until all labs of this process are gone."""
        self._channel.close()
        if self.caller == os.getpid():
            self._process.wait()
        os.close(self._said)

    def _gone(self) -> NetorchError:
        self._process.wait()
        said = os.pread(self._said, 65536, 0).decode(errors="replace").strip()
        error = NetorchError(
            f"netorch's helper process has ended ({self._process.returncode})",
            said.rpartition("\n")[2],
        )
        if said:
            error.add_note(said)
        return error


def warm() -> None:
    """Begin to start the starter, so that the first lab doesn't wait for its imports."""
    _starter()


def start(request: wire.Start) -> tuple[Connection, Any]:
    """As _Starter.start."""
    return _starter().start(request)


def finish() -> None:
    """Take down all labs of this process, and wait until they are gone."""
    global _current
    with _lock:
        if _current is not None and _current.caller == os.getpid():
            _current.end()
        _current = None


def _starter() -> _Starter:
    global _current
    with _lock:
        if _current is None:
            atexit.register(finish)
        if _current is None or not _current.is_usable:
            _current = _Starter()
        return _current


def _gone() -> NetorchError:
    return NetorchError("the lab is gone: its agent has ended", "was it killed?")
