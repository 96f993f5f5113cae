"""Commands that run in a host of a lab: like subprocess.Popen, except that the agent starts them.

The pipes are made here and their far ends go to the agent, so what a command reads and writes
passes through nobody. Its exit status comes back through a pipe of its own.
"""

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO, Any, Self

from netorch import wire
from netorch.errors import CommandError, NetorchError
from netorch.starter import Connection

Stream = int | IO[Any] | None
Completed = subprocess.CompletedProcess[Any]


class Process:
    """A running command. `stdin`, `stdout`, `stderr` are files where PIPE was asked for."""

    def __init__(
        self,
        connection: Connection,
        host: str,
        argv: Sequence[str],
        *,
        stdin: Stream = None,
        stdout: Stream = None,
        stderr: Stream = None,
        text: bool = True,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.args = [os.fspath(word) for word in argv]
        self.returncode: int | None = None
        self._connection = connection
        given: list[int] = []  # to the agent, closed here afterwards
        ours: list[int | None] = []
        try:
            ours.append(_stream(stdin, 0, given))
            ours.append(_stream(stdout, 1, given))
            ours.append(_stream(stderr, 2, given))
            self._status, said = os.pipe()
            given.append(said)
            request = wire.Spawn(
                host=host,
                argv=tuple(self.args),
                cwd=os.path.abspath(cwd) if cwd else os.getcwd(),
                environ=dict(os.environ if env is None else env),
            )
            try:
                self.pid, fds = connection.ask(request, tuple(given))
            except NetorchError:
                os.close(self._status)
                raise
        except BaseException:
            _close(ours)
            raise
        finally:
            _close(given)
        (self._pidfd,) = fds
        self.stdin = _file(ours[0], "w", text)
        self.stdout = _file(ours[1], "r", text)
        self.stderr = _file(ours[2], "r", text)
        self._text = text

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the pipes and wait; after an exception, kill it first."""
        if error is not None:
            self._kill_all()
        self._close_files()
        self.wait()

    def poll(self) -> int | None:
        """The exit status; None while it runs."""
        return self._wait(0)

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, minus the signal that ended it. Raises CommandError after `timeout`
        seconds; the command goes on then.
        """
        code = self._wait(timeout)
        if code is None:
            raise self._late(timeout, "", "")
        return code

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            self._connection.ask(wire.Signal(pid=self.pid, number=int(number)))

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(
        self, input: str | bytes | None = None, timeout: float | None = None
    ) -> tuple[Any, Any]:
        """Give it the input, read all output, wait for its end; (stdout, stderr).

        Raises CommandError after `timeout` seconds, with the output so far, and has then killed it
        and what it started.
        """
        data = input.encode() if isinstance(input, str) else input or b""
        deadline = None if timeout is None else time.monotonic() + timeout
        read, in_time = self._exchange(data, deadline)
        code = self._wait(_left(deadline)) if in_time else None
        if code is None:
            self._kill_all()
        out, err = (self._shown(read.get(file)) for file in (self.stdout, self.stderr))
        self._close_files()
        if code is None:
            self.wait()
            raise self._late(timeout, out, err)
        return out, err

    def _exchange(self, data: bytes, deadline: float | None) -> tuple[dict[Any, bytearray], bool]:
        """What came from each pipe until all were closed, or too late."""
        read = {file: bytearray() for file in (self.stdout, self.stderr) if file is not None}
        with selectors.DefaultSelector() as selector:
            for file in read:
                selector.register(file, selectors.EVENT_READ, file)
            if self.stdin is not None and data:
                os.set_blocking(self.stdin.fileno(), False)
                selector.register(self.stdin, selectors.EVENT_WRITE)
            elif self.stdin is not None:
                self.stdin.close()
            view = memoryview(data)
            while selector.get_map():
                ready = selector.select(_left(deadline))
                if not ready:
                    return read, False
                for key, _events in ready:
                    if key.fileobj is self.stdin:
                        view = view[_write(key.fd, view) :]
                        finished = not view
                    else:
                        part = os.read(key.fd, 65536)
                        read[key.data] += part
                        finished = not part
                    if finished:
                        selector.unregister(key.fileobj)
                        if key.fileobj is self.stdin:
                            self.stdin.close()
        return read, True

    def _wait(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._status, selectors.EVENT_READ)
                if not selector.select(timeout):
                    return None
            said = os.read(self._status, 16)
            os.close(self._status)
            os.close(self._pidfd)
            self.returncode = int(said) if said else -signal.SIGKILL  # the lab has ended
        return self.returncode

    def _kill_all(self) -> None:
        if self.returncode is None:
            self._connection.ask(wire.Signal(pid=self.pid, number=signal.SIGKILL, group=True))

    def _close_files(self) -> None:
        for file in (self.stdin, self.stdout, self.stderr):
            if file is not None:
                file.close()

    def _shown(self, read: bytearray | None) -> Any:
        if read is None:
            return None
        return read.decode(errors="replace") if self._text else bytes(read)

    def _late(self, timeout: float | None, out: Any, err: Any) -> CommandError:
        return CommandError(f"`{self.args[0]}` still ran after {timeout} s", None, out, err)


def run(
    process: Process, node: str, *, check: bool, input: str | bytes | None, timeout: float | None
) -> Completed:
    """See a command through to its end."""
    with process:
        out, err = process.communicate(input, timeout)
        done = Completed(process.args, process.wait(), out, err)
    return checked(done, node, check)


def checked(done: Completed, node: str, check: bool) -> Completed:
    """The result, if it is a good one or nobody checks. Raises CommandError."""
    if check and done.returncode != 0:
        import shlex

        said = [text for text in (done.stderr, done.stdout) if text]
        shown = said[0] if said else ""
        if isinstance(shown, bytes):
            shown = shown.decode(errors="replace")
        how = (
            f"exit status {done.returncode}"
            if done.returncode > 0
            else f"signal {-done.returncode}"
        )
        message = f"`{shlex.join(done.args)}` in {node} failed: {how}"
        if shown.strip():
            message += "\n" + shown.strip()[-4000:]
        raise CommandError(message, done.returncode, done.stdout, done.stderr)
    return done


def _stream(wanted: Stream, number: int, given: list[int]) -> int | None:
    """Add the command's end to `given`; our end, if there is one."""
    if wanted == subprocess.PIPE:
        reader, writer = os.pipe()
        theirs, ours = (reader, writer) if number == 0 else (writer, reader)
        given.append(theirs)
        return ours
    if wanted == subprocess.DEVNULL:
        given.append(os.open(os.devnull, os.O_RDWR))
    elif wanted == subprocess.STDOUT and number == 2:
        given.append(os.dup(given[1]))
    else:
        there = number if wanted is None else wanted if isinstance(wanted, int) else wanted.fileno()
        given.append(os.dup(there))
    return None


def _file(fd: int | None, mode: str, text: bool) -> IO[Any] | None:
    if fd is None:
        return None
    return os.fdopen(fd, mode, errors="replace") if text else os.fdopen(fd, f"{mode}b")


def _write(fd: int, data: memoryview) -> int:
    try:
        return os.write(fd, data[:65536])
    except BrokenPipeError:
        return len(data)  # it doesn't want any more


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def _close(fds: Sequence[int | None]) -> None:
    for fd in fds:
        if fd is not None:
            os.close(fd)
