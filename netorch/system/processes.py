"""Processes: the one function that starts them, and the two that find and end them by their marks.

Theory of operation
-------------------
A process of a lab carries the lab's marks in its environment (`Scope.environment`), with the
resource that it was started for. The kernel keeps them readable in /proc/PID/environ for as long as
the process lives, so no pid file can go stale: `marked` is one pass over /proc. Zombies have an
empty environment and other people's processes are not looked at (anybody can put our marks into his
own environment).

A pid alone is no identity. `end` opens a pidfd first, looks at the marks and the start time after
that, and signals through the pidfd: a pid that was given to somebody else in between is never hit.

`start` forks and executes by itself. subprocess.Popen costs 14 ms to import, complains about a
child that outlives it (all of ours do), and can tell only that "preexec_fn failed", not why. The
child
- is in a session of its own, with /dev/null as input, a log as output, and no descriptor but those
  passed;
- is in another network namespace if asked to (a host's DHCP client);
- keeps the capabilities that it was granted and can never have more: bounding, inheritable, ambient
  and permitted sets are cut down to them, and no_new_privs is set.

What goes wrong before the exec comes back as an errno through a pipe that the exec closes. A daemon
is forked twice: orphans go to the init of their parent's PID namespace (kernel/exit.c,
find_new_reaper), and ours, outside of a private place, may be one that never reaps.
"""

import errno
import os
import select
import signal
import struct
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from netorch.errors import KernelError
from netorch.resources import AnyResource, Resource, decode
from netorch.system.capabilities import confine
from netorch.system.namespaces import NEWNET, send_signal, setns, wait_exit
from netorch.system.scope import Scope

# Where daemons are on distributions whose ordinary users have no sbin in their PATH (Debian).
_SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")

# How many processes are ended at once: each takes a descriptor, and 1024 is the usual limit.
_AT_ONCE = 256
_KILL_SECONDS = 10.0


class Marked(NamedTuple):
    """A process of the lab. `start_time` is in clock ticks since boot."""

    pid: int
    start_time: int
    parent: int
    resource: AnyResource | None


class Child(NamedTuple):
    """A process that this one started. The pidfd belongs to whoever holds the Child.

    The exit status of a daemon is not for us to know: see `start`.
    """

    pid: int
    pidfd: int
    log: Path
    log_start: int  # the size of the log when it was started

    def exit_status(self, timeout: float | None = None) -> int | None:
        """Its exit status, or minus the signal that ended it; None after `timeout` seconds."""
        if not wait_exit(self.pidfd, timeout):
            return None
        ended = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
        assert ended is not None, "without WNOHANG"
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    def has_ended(self, timeout: float) -> bool:
        """Whether it has ended, or does so within `timeout` seconds."""
        return wait_exit(self.pidfd, timeout)

    def output(self) -> str:
        """What it has written to its log so far."""
        with self.log.open("rb") as log:
            log.seek(self.log_start)
            return log.read().decode(errors="replace").strip()

    def close(self) -> None:
        os.close(self.pidfd)


def program(name: str) -> str | None:
    """The path of a program, also looked for where daemons are; None if it is not installed."""
    for directory in (*os.get_exec_path(), *_SBIN):
        path = os.path.join(directory, name)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    return None


def start(
    scope: Scope,
    resource: Resource | None,
    argv: Sequence[str],
    *,
    log: Path,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
    capabilities: Sequence[int] | None = None,
    namespace: Path | None = None,
    environment: dict[str, str] | None = None,
    daemon: bool = False,
) -> Child:
    """Start a process with the lab's marks; when this returns, it is executed.

    `argv[0]` is a path. An `environment` of its own has other marks, or none. `capabilities` are
    all that it may ever have (None: those of this process), `namespace` is a network namespace to
    run it in, `cwd` defaults to the run directory. A `daemon` becomes a child of the init of the
    lab's PID namespace. Raises KernelError.
    """
    _log(argv)
    opened: list[int] = []
    try:
        output = _open(opened, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        network = None if namespace is None else _open(opened, namespace, os.O_RDONLY)
        log_start = os.fstat(output).st_size
        report, said = os.pipe2(os.O_CLOEXEC)
        opened += [report, said]
        if environment is None:
            environment = scope.environment(resource)
        pid = os.fork()
        if pid == 0:
            _become(
                argv,
                environment,
                cwd or scope.run,
                output,
                pass_fds,
                network,
                capabilities,
                said,
                daemon,
            )
        opened.remove(said)
        os.close(said)
        with open(report, "rb", closefd=False) as pipe:
            told, *failed = struct.iter_unpack("i", pipe.read())
        if daemon or failed:
            os.waitpid(pid, 0)
        for (number,) in failed:
            raise KernelError(f"failed to start {argv[0]}: {os.strerror(number)}", number)
        child = Child(told[0], os.pidfd_open(told[0]), log, log_start)
        _await_marks(child)
        return child
    except OSError as error:
        raise KernelError(
            f"failed to start {argv[0]}: {error.strerror}", error.errno or 0
        ) from error
    finally:
        for fd in opened:
            os.close(fd)


def _await_marks(child: Child) -> None:
    """Wait until the marks can be read: the kernel closes the report pipe some microseconds before
    it says where the new environment is (fs/exec.c, begin_new_exec; fs/binfmt_elf.c). No event
    tells of that, so this gives the processor away until it is there.
    """
    while not child.has_ended(0):
        try:
            with open(f"/proc/{child.pid}/environ", "rb", buffering=0) as environ:
                if environ.read(1):
                    return
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            return  # gone, or it has changed its user: then it has been executed
        os.sched_yield()


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


def _log(argv: Sequence[str]) -> None:
    """Log the command line, where somebody listens: who does has imported `logging` before."""
    if "logging" in sys.modules:
        import logging
        import shlex

        logging.getLogger(__name__).info("start: %s", shlex.join(argv))


def _open(opened: list[int], path: Path, flags: int) -> int:
    opened.append(os.open(path, flags | os.O_CLOEXEC, 0o600))
    return opened[-1]


def _become(
    argv: Sequence[str],
    environment: dict[str, str],
    cwd: Path,
    output: int,
    pass_fds: Sequence[int],
    network: int | None,
    capabilities: Sequence[int] | None,
    said: int,
    daemon: bool,
) -> None:
    """The child's part, between fork and exec. Never returns."""
    number = errno.EINVAL
    try:
        if daemon and os.fork() > 0:
            os._exit(0)
        # As /proc has it, which is the outer one in a private place.
        os.write(said, struct.pack("i", int(os.readlink("/proc/self"))))
        os.setsid()
        os.chdir(cwd)
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        # Python ignores these two; ignoring is inherited, and no daemon expects it.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        if network is not None:
            setns(network, NEWNET)
        _close_all_but({0, 1, 2, said, *pass_fds})
        for fd in (0, 1, 2, *pass_fds):
            os.set_inheritable(fd, True)
        if capabilities is not None:
            confine(capabilities)
        os.execve(argv[0], list(argv), environment)
    except OSError as error:
        number = error.errno or errno.EINVAL
    finally:
        try:
            os.write(said, struct.pack("i", number))
        finally:
            os._exit(127)


def _close_all_but(kept: set[int]) -> None:
    low = 0
    for fd in sorted(kept):
        if low < fd:  # os.closerange(0, 0) closes everything (Python 3.11)
            os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, os.sysconf("SC_OPEN_MAX"))


def _look(scope: Scope, pid: int) -> Marked | None:
    """The process, if it is one of the lab's."""
    lab = f"NETORCH_LAB={scope.lab}".encode()
    try:
        with open(f"/proc/{pid}/environ", "rb", buffering=0) as environ:
            if lab not in (text := environ.read()):
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
