"""The agents of netorch.Lab: processes that live in the labs, so that no caller has to.

Entering a private place can't be undone, and needs a process with a single thread. A test process
must not enter, and often has threads. So it starts, once, a starter: this module in a process of
its own, single-threaded, with everything imported that a lab may need.

    caller ──▶ starter ──fork──▶ agent of lab 1   (in the lab's place)
       │                └─fork──▶ agent of lab 2
       └──────── a socket pair to each agent ─────▶

An agent costs a fork. It makes its lab, then serves its caller's requests (wire.py) one at a time,
and meanwhile waits for the commands that it started, each of which has a pipe that its exit status
goes to. When its socket closes, or its starter asks (SIGTERM), it takes the lab down and ends.

The starter does nothing but wait: for requests, for the end of its agents and for that of the
caller, on a pidfd, since others may hold copies of the caller's sockets. When the caller is gone it
ends all agents. What an agent that was killed has left, it takes down by the marks. So of these
processes any can be killed, the caller included, and the labs end.
"""

import os
import select
import signal
import socket
import sys

from netorch import labs, wire
from netorch.agent import live, request_decoder
from netorch.engine import Progress

_GRACE = 20.0  # seconds that agents have to take their labs down once the caller is gone


class _Starter:
    def __init__(self, channel: socket.socket, caller: int) -> None:
        self._channel = channel
        self._caller = caller
        self._agents: dict[int, tuple[int, str]] = {}  # by pidfd: the pid, the lab to look after
        self._poll = select.poll()
        self._poll.register(channel, select.POLLIN)
        self._poll.register(caller, select.POLLIN)

    def serve(self) -> None:
        while True:
            for fd, _event in self._poll.poll():
                if fd in self._agents:
                    self._ended(fd)
                elif fd == self._caller or not self._request():
                    return

    def end(self) -> None:
        """Have all agents take their labs down."""
        import time

        for pid, _lab in self._agents.values():
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + _GRACE
        while self._agents and (left := deadline - time.monotonic()) > 0:
            for fd, _event in self._poll.poll(left * 1000):
                if fd in self._agents:
                    self._ended(fd)
                else:
                    self._poll.unregister(fd)
        for fd, (pid, _lab) in list(self._agents.items()):
            os.kill(pid, signal.SIGKILL)
            self._ended(fd)

    def _request(self) -> bool:
        text, fds = wire.receive(self._channel)
        if not text:
            return False
        start = request_decoder.decode(text)
        assert isinstance(start, wire.Start)
        (end,) = fds
        pid = os.fork()
        if pid == 0:
            for fd in (self._channel.fileno(), self._caller, *self._agents):
                os.close(fd)
            live(start, socket.socket(fileno=end))
        os.close(end)
        pidfd = os.pidfd_open(pid)
        # Only a name that we made up is surely no other lab's.
        self._agents[pidfd] = pid, "" if start.keep or start.named else start.lab
        self._poll.register(pidfd, select.POLLIN)
        return True

    def _ended(self, pidfd: int) -> None:
        pid, lab = self._agents.pop(pidfd)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        if status != 0 and lab:
            _take_down(lab)


def _take_down(name: str) -> None:
    """What a killed agent left, by the marks."""
    child = os.fork()
    if child == 0:
        try:
            for lab in labs.labs():
                if lab.name == name:
                    labs.teardown(lab, Progress())
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def main(channel: int, caller: int) -> None:
    """The starter: `channel` is its socket, `caller` the pid of the process that uses it."""
    import gc

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _import_all()
    pidfd = os.pidfd_open(caller)
    if os.getppid() != caller:
        sys.exit(1)
    gc.collect()
    gc.freeze()  # or the agents' garbage collectors would copy every page
    starter = _Starter(socket.socket(fileno=channel), pidfd)
    try:
        starter.serve()
    finally:
        starter.end()


_NEEDED = (
    *("adapters", "conflicts", "disks", "facts", "firewall", "guests", "hosts", "leases", "links"),
    *("nft", "packets", "removal", "services", "taps"),
)


def _import_all() -> None:
    """What agents will need: so that it is imported once, and no agent imports anything."""
    from importlib import import_module

    from netorch.system import messages, owned_place

    for name in ("nftables", "shlex", "subprocess"):
        import_module(name)
    for name in _NEEDED:
        import_module(f"netorch.system.{name}")
    messages.warm()
    owned_place.warm()
