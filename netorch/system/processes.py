"""The processes of a lab, found and ended by their marks; netorch.system.starting starts them.

Theory of operation
-------------------
A process of a lab carries the lab's marks in its environment (`Scope.environment`), with the
resource that it was started for. The kernel keeps them readable in /proc/PID/environ for as long as
the process lives (environ.py tells of the one gap), so no pid file can go stale: `marked` is one
pass over /proc. Zombies have no environment and other people's processes are not looked at (anybody
can put our marks into his own environment).

A pid alone is no identity. `end` opens a pidfd first, looks at the marks and the start time after
that, and signals through the pidfd: a pid that was given to somebody else in between is never hit.
"""

import os
import select
import signal
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import msgspec

from netorch.errors import KernelError
from netorch.resources import AnyResource, decode
from netorch.system.environ import environment_of
from netorch.system.namespaces import send_signal
from netorch.system.scope import Scope

# How many processes are ended at once: each takes a descriptor, and 1024 is the usual limit.
_AT_ONCE = 256
_KILL_SECONDS = 10.0


class Marked(NamedTuple):
    """A process of the lab. `start_time` is in clock ticks since boot."""

    pid: int
    start_time: int
    parent: int
    resource: AnyResource | None


def marked(scope: Scope) -> list[Marked]:
    """The processes of the lab in its place, in the order of their pids."""
    pids = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
    return [found for pid in pids if (found := _look(scope, pid)) is not None]


def leaders(processes: Iterable[Marked]) -> dict[str, list[Marked]]:
    """Processes by the key of their resource, without children (dnsmasq forks for TCP queries)."""
    having = {process.pid: process for process in processes if process.resource is not None}
    found: dict[str, list[Marked]] = {}
    for process in having.values():
        parent = having.get(process.parent)
        if parent is None or parent.resource != process.resource:
            assert process.resource is not None
            found.setdefault(process.resource.key, []).append(process)
    return found


def processes_of(scope: Scope, keys: Iterable[str]) -> list[Marked]:
    """The processes of these resources, without children."""
    found = leaders(marked(scope))
    return [process for key in keys for process in found.get(key, ())]


def end(scope: Scope, processes: Sequence[Marked], grace: float = 5.0) -> None:
    """End processes of the lab: SIGTERM to all, SIGKILL to those still there after `grace` seconds.

    Returns when all are gone. What is gone already, or is another process by now, is left alone.
    Raises KernelError for one that outlives SIGKILL.
    """
    for start_at in range(0, len(processes), _AT_ONCE):
        pidfds: dict[int, int] = {}
        try:
            for process in processes[start_at : start_at + _AT_ONCE]:
                _open_process(scope, process, pidfds)
            left = _signal_and_wait(set(pidfds), signal.SIGTERM, grace)
            left = _signal_and_wait(left, signal.SIGKILL, _KILL_SECONDS)
            if left:
                pids = ", ".join(str(pidfds[fd]) for fd in left)
                raise KernelError(f"failed to end process {pids}: it outlives SIGKILL", 0)
        finally:
            for fd in pidfds:
                os.close(fd)


def tell_to_end(scope: Scope, processes: Sequence[Marked]) -> None:
    """SIGTERM to processes of the lab, without waiting: `end` does, later."""
    for process in processes:
        pidfds: dict[int, int] = {}
        _open_process(scope, process, pidfds)
        for pidfd in pidfds:
            send_signal(pidfd, signal.SIGTERM)
            os.close(pidfd)


def end_all(
    scope: Scope, belongs: Callable[[Marked], bool] = lambda _: True, grace: float = 5.0
) -> None:
    """End all processes of the lab that belong, and those that they start meanwhile: a child that
    is forked after the look at /proc has nobody else who ends it.
    """
    while found := [process for process in marked(scope) if belongs(process)]:
        end(scope, found, grace)


def _look(scope: Scope, pid: int) -> Marked | None:
    """The process, if it is one of the lab's."""
    lab = f"NETORCH_LAB={scope.lab}".encode()
    try:
        if lab not in (text := environment_of(pid)):
            return None
        entries = text.split(b"\0")
        if lab not in entries or f"NETORCH_PLACE={scope.place}".encode() not in entries:
            return None
        if os.stat(f"/proc/{pid}").st_uid != os.geteuid():
            return None
        with open(f"/proc/{pid}/stat", "rb") as stat:
            # proc(5): the name in parentheses may hold anything; then state, ppid, ..., starttime
            # (22nd).
            fields = stat.read().rpartition(b")")[2].split()
    except (FileNotFoundError, PermissionError, ProcessLookupError):
        return None  # gone, or not ours
    encoded = [e for e in entries if e.startswith(b"NETORCH_RESOURCE=")]
    resource = _decoded(encoded[0].partition(b"=")[2]) if encoded else None
    return Marked(pid, int(fields[19]), int(fields[1]), resource)


def _decoded(text: bytes) -> AnyResource | None:
    try:
        return decode(text)
    except msgspec.DecodeError as error:
        import logging

        logging.getLogger(__name__).warning("a process of another version of netorch: %s", error)
        return None


def _open_process(scope: Scope, process: Marked, pidfds: dict[int, int]) -> None:
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    pidfds[pidfd] = process.pid
    found = _look(scope, process.pid)
    if found is None or found.start_time != process.start_time:
        del pidfds[pidfd]
        os.close(pidfd)


def _signal_and_wait(pidfds: set[int], number: signal.Signals, seconds: float) -> set[int]:
    """Signal them all and wait for all; those that are still there after `seconds`."""
    import time

    left = {pidfd for pidfd in pidfds if send_signal(pidfd, number)}
    for pidfd in left:
        send_signal(pidfd, signal.SIGCONT)  # a stopped process gets no SIGTERM
    for pidfd in pidfds - left:
        _reap(pidfd)
    poll = select.poll()
    for pidfd in left:
        poll.register(pidfd, select.POLLIN)
    deadline = time.monotonic() + seconds
    while left and (rest := deadline - time.monotonic()) > 0:
        for pidfd, _event in poll.poll(rest * 1000):
            poll.unregister(pidfd)
            left.discard(pidfd)
            _reap(pidfd)
    return left


def _reap(pidfd: int) -> None:
    try:
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return  # started by another run of netorch: its new parent reaps it
