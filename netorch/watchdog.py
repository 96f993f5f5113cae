"""The process behind `apply --confirm`: puts everything back unless it hears `netorch confirm`.

`netorch.system.confirmation` has the theory and starts it: `python -m netorch.watchdog FD`, with
its orders behind the descriptor FD. What it prints is the log in the run directory.

Putting back is what a person would do: apply the previous topology, or tear the lab down if there
was none. An apply that is still at it when the time is up is interrupted first, and rolls back by
itself; one that doesn't listen is killed.
"""

import os
import select
import signal
import socket
import sys
import time
from pathlib import Path

import msgspec

from netorch import labs
from netorch.engine import Progress
from netorch.errors import ApplyError, NetorchError, UsageError
from netorch.planner import Action
from netorch.system import confirmation, rundir
from netorch.system.confirmation import Order
from netorch.system.namespaces import send_signal, wait_exit

_GRACE = 30.0  # seconds for an interrupted apply to roll back


class Log(Progress):
    """Writes what is done, a line each, with the time."""

    def done(self, action: Action) -> None:
        say(action.describe())

    def undone(self, action: Action) -> None:
        say(f"undone: {action.describe()}")

    def warn(self, line: str) -> None:
        say(f"warning: {line}")

    def waiting(self, line: str) -> None:
        say(line)


def say(line: str) -> None:
    sys.stdout.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
    sys.stdout.flush()


class Guard:
    """Waits for the confirmation, or for the time to be up."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._control = socket.socket(fileno=order.control)
        self._listening = socket.socket(fileno=order.listening)
        self._applier = os.pidfd_open(order.applier)
        self._deadline = time.monotonic() + order.seconds
        self._applied = self._ended = False

    def watch(self) -> bool:
        """Whether the change may stay; False when the time is up."""
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(self._listening, select.POLLIN)
        self._control.send(b"ready")
        with self._listening:
            while (left := self._deadline - time.monotonic()) > 0:
                ready = {fd for fd, _ in poll.poll(left * 1000)}
                if self._control.fileno() in ready:
                    if self._hear() == b"cancel":
                        return True
                    if self._ended:
                        poll.unregister(self._control)
                if self._listening.fileno() in ready and self._answer():
                    return True
        return False

    def stop_the_apply(self) -> None:
        """Interrupt it, and wait for its end: it rolls back, and has the lab's lock."""
        if self._ended:
            return
        send_signal(self._applier, signal.SIGTERM)  # SIGINT may be ignored, in a script's `&`
        self._control.settimeout(_GRACE)
        try:
            while not self._ended:
                self._hear()
        except TimeoutError:
            say("the apply does not listen, and is killed")
            send_signal(self._applier, signal.SIGKILL)
            wait_exit(self._applier)
        self._control.close()  # for which it waits, with the lab's lock

    def _hear(self) -> bytes:
        """A word of the apply; nothing when it has ended, or was killed.

        After "cancel" it only waits for our end.
        """
        word = self._control.recv(16)
        self._ended = word in (b"", b"cancel")
        self._applied = True
        if word == b"applied":
            self._deadline = time.monotonic() + self._order.seconds
        return word

    def _answer(self) -> bool:
        """Answer one caller; whether that was the end of it."""
        peer, _ = self._listening.accept()
        with peer:
            peer.settimeout(1.0)
            try:
                word = peer.recv(16) if confirmation.is_friend(peer) else b""
                if word == b"status":
                    peer.send(f"{max(0.0, self._deadline - time.monotonic()):.1f}".encode())
                elif word == b"confirm" and not self._applied:
                    peer.send(b"applying")
                elif word in (b"confirm", b"cancel"):
                    say("confirmed" if word == b"confirm" else "called off by a teardown")
                    confirmation.forget(Path(self._order.run))  # before anybody looks again
                    peer.send(b"confirmed")
                    return True
            except OSError as error:
                say(f"a caller was lost: {error}")
        return False


def put_back(order: Order) -> None:
    """Go back to the previous topology, or to nothing."""
    try:
        if order.previous is not None:
            topology = rundir.topology_of(order.previous)
            labs.apply(topology, order.previous.source, order.choice, Log(), restart=True)
        else:
            for left in labs.teardown(labs.find(order.lab), Log()):
                say(f"left behind: {left}")
    except UsageError as gone:  # the apply rolled back, and there was nothing before it
        say(f"nothing to put back: {gone.message}")
    except ApplyError as error:
        say(f"failed to put it back: {error.message}")
        for line in error.left:
            say(f"left behind: {line}")
    except NetorchError as error:
        say(f"{error.message}")


def main() -> None:
    with open(int(sys.argv[1]), "rb") as orders:
        order = msgspec.json.decode(orders.read(), type=Order)
    run = Path(order.run)
    guard = Guard(order)
    if guard.watch():
        confirmation.forget(run)
        return
    say(f"not confirmed within {order.seconds:g} s: putting lab {order.lab} back")
    confirmation.note_undoing(run)
    guard.stop_the_apply()
    put_back(order)
    say("done")
    confirmation.forget(run)


if __name__ == "__main__":
    main()
