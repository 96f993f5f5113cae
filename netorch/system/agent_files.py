"""Files of a guest through its agent: guest-file-open, -read, -write and -close.

The agent serves one client at a time, and who waits for it gives up after some seconds. So a long
transfer gives way once a second: it hangs up and comes again, while the agent keeps the file open
(a handle is the agent's, not the connection's). QEMU takes the waiting clients in their order.

The agent writes through a buffer of the C library's, so "no space left" may come as late as with
guest-file-close, whose answer therefore counts as well.
"""

import base64
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from netorch.errors import NetorchError
from netorch.system.copying import PIECE
from netorch.system.qmp import Agent, Completed, QmpError

_TURN = 1.0  # seconds


class AgentFiles:
    """A `copying.Remote`. A context manager."""

    def __init__(self, path: Path, guest: str) -> None:
        """Connect with the agent whose socket is `path`. Raises UsageError, ReadyError."""
        self.guest = guest
        self._path = path
        self._connect()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._agent.close()

    def run(self, script: str, *words: str) -> Completed:
        self._reconnect()  # what an interrupted request left unanswered stays behind
        with _explained():
            return self._agent.run(["/bin/sh", "-c", script, "sh", *words])

    def write(self, path: str, pieces: Iterator[bytes]) -> None:
        self.run('umask 077; : > "$1"', path)  # guest-file-open would make it for all to read
        with self._opened(path, "w") as handle:
            for piece in pieces:
                encoded = base64.b64encode(piece).decode()
                self._ask("guest-file-write", {"handle": handle, "buf-b64": encoded})

    def read(self, path: str) -> Iterator[bytes]:
        with self._opened(path, "r") as handle:
            ended = False
            while not ended:
                answer = self._ask("guest-file-read", {"handle": handle, "count": PIECE})
                ended = answer["eof"] or not answer["count"]
                yield base64.b64decode(answer["buf-b64"])

    @contextmanager
    def _opened(self, path: str, mode: str) -> Iterator[int]:
        handle = self._ask("guest-file-open", {"path": path, "mode": mode})
        try:
            yield handle
        except BaseException:
            with suppress(NetorchError):  # it is why this came here
                self._reconnect()
                self._ask("guest-file-close", {"handle": handle})
            raise
        self._ask("guest-file-close", {"handle": handle})

    def _ask(self, command: str, arguments: dict[str, object]) -> Any:
        if time.monotonic() - self._since > _TURN:
            self._reconnect()
        with _explained():
            return self._agent.ask(command, arguments)

    def _reconnect(self) -> None:
        self._agent.close()
        self._connect()

    def _connect(self) -> None:
        self._agent = Agent(self._path, self.guest)
        self._since = time.monotonic()


@contextmanager
def _explained() -> Iterator[None]:
    """RHEL and Fedora ship an agent that refuses guest-exec and guest-file-open."""
    try:
        yield
    except QmpError as error:
        if "disabled" in error.message or "not been found" in error.message:
            raise NetorchError(
                error.message,
                "let the guest's agent run commands and open files (its option "
                "allow-rpcs, or block-rpcs), or use --ssh",
            ) from error
        raise
