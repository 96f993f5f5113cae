"""Starting processes of a lab.

`start` and `start_all` fork and execute by themselves. subprocess.Popen costs 14 ms to import,
complains about a child that outlives it (all of ours do), and can tell only that "preexec_fn
failed", not why. The child
- is in a session of its own, with /dev/null as input, a log as output, and no descriptor but those
  passed;
- is in another network namespace if asked to: a host's, or an empty one (`apart`);
- keeps the capabilities that it was granted and can never have more: bounding, inheritable, ambient
  and permitted sets are cut down to them, and no_new_privs is set.

What goes wrong before the exec comes back as an errno through a pipe that the exec closes.

Daemons are forked by a process in between, which then leaves them to the init of their PID
namespace (kernel/exit.c, find_new_reaper). That of a private place is a keeper (keeper.py): it
notes how those end that have a `kept` directory. Elsewhere init may be one that never reaps, so a
process in between that has something to keep stays and becomes a keeper itself. Either waits until
this process has a pidfd of each, since one that ends at once is reaped at once, too.
"""

import errno
import os
import signal
import struct
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

from netorch.errors import KernelError
from netorch.resources import Resource
from netorch.system.capabilities import confine
from netorch.system.environ import environment_of
from netorch.system.namespaces import NEWNET, setns, unshare, wait_exit
from netorch.system.scope import Scope

# Where daemons are on distributions whose ordinary users have no sbin in their PATH (Debian).
_SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")
_KEEPER = Path(__file__).with_name("keeper.py")

# What comes through the pipe of those started: the number of the start, what it is about, and a pid
# or an errno. Through that of the process in between comes an errno alone.
_MESSAGE = struct.Struct("iii")
_PID, _ERRNO = 0, 1
_FAILURE = struct.Struct("i")


class Start(NamedTuple):
    """A process to be started. `argv[0]` is a path; `log` gets its output.

    An `environment` of its own has other marks, or none. `capabilities` are all that it may ever
    have (None: those of this process), `namespace` is a network namespace to run it in, `cwd`
    defaults to the run directory. `apart`: in an empty network namespace, where this process may
    make one. `kept`: the directory in which its keeper notes how it ended; only for a daemon.
    """

    resource: Resource | None
    argv: Sequence[str]
    log: Path
    cwd: Path | None = None
    pass_fds: Sequence[int] = ()
    capabilities: Sequence[int] | None = None
    namespace: Path | None = None
    environment: dict[str, str] | None = None
    apart: bool = False
    kept: Path | None = None


class Child(NamedTuple):
    """A process that this one started. The pidfd belongs to whoever holds the Child.

    The exit status of a daemon is not for us to know: see `start_all`.
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


class _Opened(NamedTuple):
    """A Start with what was opened for it."""

    start: Start
    output: int
    network: int | None
    environment: dict[str, str]
    log_start: int


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
    """Start a process with the lab's marks; when this returns, it is executed. See `Start`.

    A `daemon` becomes a child of the init of the lab's PID namespace. Raises KernelError.
    """
    one = Start(resource, argv, log, cwd, pass_fds, capabilities, namespace, environment)
    (result,) = _start(scope, [one], daemon)
    if isinstance(result, KernelError):
        raise result
    return result


def start_all(scope: Scope, starts: Sequence[Start]) -> list[Child | KernelError]:
    """Start daemons side by side; for each the Child, or why it could not be started."""
    return _start(scope, starts, daemon=True)


class _Between(NamedTuple):
    """The descriptors of the process in between."""

    said: int  # the pipe of those that it forks
    failed: int  # its own pipe
    go_on: tuple[int, int]  # both ends of a pipe; closed where there are pidfds of all


def _start(scope: Scope, starts: Sequence[Start], daemon: bool) -> list[Child | KernelError]:
    keeper = daemon and not scope.keeper and any(one.kept for one in starts)
    opened: set[int] = set()
    children: dict[int, Child] = {}

    def pipe() -> tuple[int, int]:
        ends = os.pipe2(os.O_CLOEXEC)
        opened.update(ends)
        return ends

    def close(fd: int) -> None:
        opened.remove(fd)
        os.close(fd)

    try:
        ready = [_open(scope, one, opened) for one in starts]
        (report, said), (failing, failed), go_on = pipe(), pipe(), pipe()
        pid = os.fork()
        if pid == 0:
            if daemon:
                _be_in_between(scope, ready, _Between(said, failed, go_on), keeper)
            _become(ready[0], 0, said, None)
        close(said)
        close(failed)
        told = list(_MESSAGE.iter_unpack(_all_of(report)))
        errors = {number: value for number, what, value in told if what == _ERRNO}
        pids = {number: value for number, what, value in told if what == _PID}
        for number in pids.keys() - errors.keys():
            children[number] = _child(ready[number], pids[number])
        close(go_on[1])
        if daemon or errors:
            os.waitpid(pid, 0)
        if failure := _all_of(failing):
            for child in children.values():
                child.close()
            return [_failure(one, *_FAILURE.unpack(failure)) for one in starts]
        return [
            children.get(number) or _failure(one, errors.get(number, errno.ESRCH))
            for number, one in enumerate(starts)
        ]
    except OSError as error:
        for child in children.values():
            child.close()
        raise KernelError(
            f"failed to start {starts[0].argv[0]}: {error.strerror}", error.errno or 0
        ) from error
    finally:
        for fd in opened:
            os.close(fd)


def _all_of(pipe: int) -> bytes:
    with open(pipe, "rb", closefd=False) as file:
        return file.read()


def _open(scope: Scope, one: Start, opened: set[int]) -> _Opened:
    if "logging" in sys.modules:  # else nobody listens
        import logging
        import shlex

        logging.getLogger(__name__).info("start: %s", shlex.join(one.argv))
    output = os.open(one.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    opened.add(output)
    network = None
    if one.namespace is not None:
        network = os.open(one.namespace, os.O_RDONLY | os.O_CLOEXEC)
        opened.add(network)
    environment = one.environment
    if environment is None:
        environment = scope.environment(one.resource)
    # The children know no scope: what is relative to it is said in full.
    return _Opened(
        one._replace(cwd=one.cwd or scope.run),
        output,
        network,
        environment,
        os.fstat(output).st_size,
    )


def _failure(one: Start, number: int) -> KernelError:
    return KernelError(f"failed to start {one.argv[0]}: {os.strerror(number)}", number)


def _child(one: _Opened, pid: int) -> Child:
    child = Child(pid, os.pidfd_open(pid), one.start.log, one.log_start)
    # The report pipe is closed some microseconds before the marks can be read: wait for them.
    with suppress(FileNotFoundError, PermissionError, ProcessLookupError):
        environment_of(pid)  # else gone, or it has changed its user: then it has been executed
    return child


def _be_in_between(
    scope: Scope, ready: Sequence[_Opened], pipes: _Between, keeper: bool
) -> NoReturn:
    """The part of the process that forks the daemons."""
    number = 0
    try:
        if keeper and os.fork() > 0:
            os._exit(0)
        waiting, going = pipes.go_on
        os.close(going)
        ordered = sorted(enumerate(ready), key=lambda item: item[1].start.apart)
        empty = False
        for index, one in ordered:
            if one.start.apart and not empty:
                # Not everybody who may run a lab may make a namespace (CAP_SYS_ADMIN).
                with suppress(PermissionError):
                    unshare(NEWNET)
                empty = True
            if os.fork() == 0:
                _become(one, index, pipes.said, one.start.kept)
        os.close(pipes.said)
        os.read(waiting, 1)  # until the end of the file: also if the other side was killed
        if keeper:
            os.setsid()
            null = os.open("/dev/null", os.O_RDWR)
            for standard in (0, 1, 2):
                os.dup2(null, standard)
            _close_inherited_but({0, 1, 2, pipes.failed})
            os.chdir("/")
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            words = [sys.executable, "-I", "-S", "-E", str(_KEEPER), "keep", str(scope.run)]
            os.execve(sys.executable, words, scope.environment())
    except OSError as error:
        number = error.errno or errno.EIO
    finally:
        # Also on KeyboardInterrupt: the parent's frames above are not this process's to unwind.
        if number:
            os.write(pipes.failed, _FAILURE.pack(number))
        os._exit(0)


def _become(one: _Opened, index: int, said: int, kept: Path | None) -> NoReturn:
    """The child's part, between fork and exec."""
    number = errno.EINVAL
    try:
        # As /proc has it, which is the outer one in a private place.
        os.write(said, _MESSAGE.pack(index, _PID, int(os.readlink("/proc/self"))))
        if kept is not None:
            _be_kept(kept)
        start = one.start
        assert start.cwd is not None, "_open fills it in"
        os.setsid()
        os.chdir(start.cwd)
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        os.dup2(one.output, 1)
        os.dup2(one.output, 2)
        # Python ignores these two; ignoring is inherited, and no daemon expects it.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        if one.network is not None:
            setns(one.network, NEWNET)
        _close_inherited_but({0, 1, 2, said, *start.pass_fds})
        for fd in (0, 1, 2, *start.pass_fds):
            os.set_inheritable(fd, True)
        if start.capabilities is not None:
            confine(start.capabilities)
        os.execve(start.argv[0], list(start.argv), one.environment)
    except OSError as error:
        number = error.errno or errno.EINVAL
    finally:
        try:
            os.write(said, _MESSAGE.pack(index, _ERRNO, number))
        finally:
            os._exit(127)


def _be_kept(directory: Path) -> None:
    """Say to the keeper which process this directory is about: by the pid that it knows."""
    with suppress(FileNotFoundError):
        (directory / "ended").unlink()
    new = directory / "process.new"
    new.write_text(str(os.getpid()))
    new.rename(directory / "process")


def _close_inherited_but(kept: set[int]) -> None:
    """Close what this process has from whoever started netorch. Its own descriptors are closed by
    the exec, the lab's lock among them: so nobody can have that and not see this process's marks.
    """
    for fd in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # that of the listing itself
            if fd not in kept and os.get_inheritable(fd):
                os.close(fd)
