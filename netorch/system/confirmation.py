"""A change that has to be confirmed: the watchdog process that takes it back.

The person may be connected over the very interface that is about to become a bridge's port. So
before the first change `netorch apply --confirm SECONDS` starts a process of its own
(`netorch.watchdog`) in a session of its own, which a lost connection or a killed netorch doesn't
touch. It waits in one poll for the first of

    the control socket      apply says "applied" (the seconds count anew from there), or "cancel"
                            (it has taken everything back itself)
    its listening socket    `netorch confirm`: done; `netorch status`: the seconds left
    the time

The listening socket has an abstract name, which belongs to the network namespace: it leaves no
file, goes with its process, and is found without the run directory. Only the same user, and root,
are answered. A file in the run directory says that a confirmation was pending, so that `status` can
tell if the watchdog itself was killed: then nothing will be put back.

A second apply is refused while one waits: taken back, the first would take the second with it. A
teardown calls it off.
"""

import os
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import msgspec

from netorch.errors import NetorchError, ReadyError, UsageError
from netorch.resources import Record
from netorch.system.rundir import recorded, write
from netorch.system.scope import Scope

Choice = Literal["auto", "current", "private"]

MARK = "NETORCH_CONFIRM"
_FILE = "confirmation.json"
_LOG = "confirm.log"
_ANSWER_SECONDS = 5.0


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What the watchdog is started with. `previous` is the topology to go back to, if any."""

    lab: str
    seconds: float
    choice: Choice
    run: str
    applier: int  # the pid of the apply
    control: int  # descriptors
    listening: int
    previous: Record | None = None


class Pending(msgspec.Struct, frozen=True):
    """A change that waits for its confirmation; without a living watchdog it stays for good."""

    seconds_left: float
    alive: bool


class Watchdog:
    """The apply's end of the control socket."""

    def __init__(self, control: socket.socket, run: Path) -> None:
        self._control = control
        self._run = run

    def applied(self) -> None:
        """The change is made: from now on the seconds count."""

        try:
            self._control.send(b"applied")
        except ConnectionError as error:
            raise NetorchError(
                "failed to reach the watchdog that would put everything back: it has ended",
                f"see {self._run / _LOG}; the lab is up",
            ) from error

    def cancel(self) -> None:
        """There is nothing to take back. If it is at it already, it will see that itself."""
        with suppress(ConnectionError):
            self._control.send(b"cancel")
            self._control.recv(16)  # its end
            forget(self._run)

    def close(self) -> None:
        """The apply has ended."""
        self._control.close()


@contextmanager
def guarded(scope: Scope, seconds: float | None, choice: Choice) -> Iterator[Watchdog | None]:
    """A block that changes the lab, under the eyes of a watchdog where `seconds` are given.

    When the block fails it has taken everything back itself; only where all was made and something
    did not come to life (ReadyError) does the watchdog stay on guard.
    """
    forget(scope.run)
    if seconds is None:
        yield None
        return
    watchdog = begin(scope, seconds, choice, recorded(scope.run))
    try:
        yield watchdog
    except ReadyError:
        raise
    except BaseException:
        watchdog.cancel()
        raise
    finally:
        watchdog.close()


def begin(
    scope: Scope,
    seconds: float,
    choice: Choice,
    previous: Record | None,
) -> Watchdog:
    """Start the watchdog; when this returns it is on guard. Raises NetorchError."""
    from netorch.system.starting import start  # few changes are to be confirmed

    control, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    log = scope.run / _LOG
    with far, listening:
        listening.bind(_address(scope.lab))
        listening.listen()
        order = Order(
            lab=scope.lab,
            seconds=seconds,
            choice=choice,
            run=str(scope.run),
            applier=os.getpid(),
            control=far.fileno(),
            listening=listening.fileno(),
            previous=previous,
        )
        orders = _in_memory(msgspec.json.encode(order))
        try:
            child = start(
                scope,
                None,
                [sys.executable, "-m", "netorch.watchdog", str(orders)],
                log=log,
                cwd=Path("/"),
                pass_fds=[orders, far.fileno(), listening.fileno()],
                environment=_environment(scope.lab),
                daemon=True,
            )
        finally:
            os.close(orders)
    write(scope.run / _FILE, msgspec.json.encode({"pid": child.pid}).decode())
    if control.recv(16) != b"ready":
        forget(scope.run)
        said = child.output()
        child.close()
        raise NetorchError(f"failed to start the watchdog for --confirm: {said or 'it ended'}")
    child.close()
    return Watchdog(control, scope.run)


def pending(lab: str, run: Path) -> Pending | None:
    """Whether a change of the lab waits for its confirmation. To be asked outside of its place."""
    answer = _ask(lab, b"status")
    if answer:
        return Pending(float(answer), alive=True)
    return Pending(0.0, alive=False) if os.path.exists(run / _FILE) else None


def refuse_while_pending(lab: str, run: Path) -> None:
    """A second change on top of one that may be taken back would be taken back with it."""
    waiting = pending(lab, run)
    if waiting is not None and waiting.alive:
        raise UsageError(
            f"lab {lab} waits for a confirmation ({waiting.seconds_left:.0f} s left)",
            f"netorch confirm {lab}, or let it put everything back first",
        )


def confirm(lab: str, run: Path) -> bool:
    """Keep the change. False if its watchdog had ended, so that it was going to stay anyway.

    Raises UsageError if nothing waits for it, NetorchError if it is being taken back already.
    """
    answer = _ask(lab, b"confirm")
    if answer == b"confirmed":
        return True
    if answer == b"applying":
        raise UsageError(f"lab {lab} is still being changed", "confirm it when apply is done")
    if not (run / _FILE).exists():
        raise UsageError(f"lab {lab} waits for no confirmation")
    if _is_undoing(run):
        raise NetorchError(f"too late: lab {lab} is being put back", f"see {run / _LOG}")
    forget(run)
    return False


def call_off(lab: str, run: Path) -> None:
    """End the watchdog, if there is one: a teardown leaves nothing to put back."""
    _ask(lab, b"cancel")
    forget(run)


def forget(run: Path) -> None:
    (run / _FILE).unlink(missing_ok=True)


def note_undoing(run: Path) -> None:
    """The watchdog's: from here on it is too late."""
    if run.is_dir():
        write(run / _FILE, msgspec.json.encode({"undoing": os.getpid()}).decode())


def is_friend(peer: socket.socket) -> bool:
    """Does the same user, or root, talk to us?"""
    ids = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    uid: int = struct.unpack("3i", ids)[1]
    return uid in (0, os.geteuid())


def _is_undoing(run: Path) -> bool:
    try:
        noted: dict[str, int] = msgspec.json.decode((run / _FILE).read_bytes())
        return Path(f"/proc/{noted['undoing']}").exists()
    except (OSError, KeyError, msgspec.DecodeError):
        return False


def _ask(lab: str, word: bytes) -> bytes:
    """The watchdog's answer; empty if there is none."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking:
        asking.settimeout(_ANSWER_SECONDS)
        try:
            asking.connect(_address(lab))
            asking.send(word)
            return asking.recv(64)
        except (ConnectionError, TimeoutError):
            return b""


def _address(lab: str) -> str:
    return f"\0netorch-confirm-{os.geteuid()}-{lab}"


def _environment(lab: str) -> dict[str, str]:
    """The caller's, with the watchdog's mark; netorch is found where this one was."""
    ours = str(Path(__file__).parents[2])
    path = [ours, *filter(None, [os.environ.get("PYTHONPATH")])]
    kept = {k: v for k, v in os.environ.items() if k not in ("NETORCH_LAB", "NETORCH_PLACE")}
    return {**kept, MARK: lab, "PYTHONPATH": os.pathsep.join(path)}


def _in_memory(text: bytes) -> int:
    memory = os.memfd_create("netorch-confirm")
    os.write(memory, text)
    os.lseek(memory, 0, os.SEEK_SET)
    return memory
