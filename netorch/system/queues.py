"""Open tap queues: who has which, in one pass over /proc.

Theory of operation
-------------------
/proc/PID/fdinfo/FD of a descriptor of /dev/net/tun has a line `iff:\\t<name>` for the tap whose
queue it is (drivers/net/tun.c, tun_chr_show_fdinfo), also for a queue that the guest does not use
at the moment. So the pass reads the links in /proc/PID/fd of every process, and only of one that
has /dev/net/tun open anything more: fdinfo, name, command line, environment. Links are read, never
followed: stat() of somebody's file on a dead network file system would hang.

The name alone doesn't say which tap it is: another network namespace may have one of the same
name, and a tap's need not be that of the process that has it open, nor that in which it was made
(taps can be moved). The kernel tells: TUNGETDEVNETNS on the descriptor gives the namespace that its
tap is in (Linux 5.7), and pidfd_getfd a copy of the descriptor. That takes the right to trace the
process, and CAP_NET_ADMIN over the tap's namespace: root has both for all, whoever made a user
namespace for what belongs to it, so for his private places. Where it is refused, the queue has
no namespace here; what else may be known of it is for the caller to say.

The same pass notes one descriptor for every network namespace that some process is in, and who is
in it. `refused` counts the processes that may not be looked into.
"""

import contextlib
import fcntl
import os
import resource
import stat
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple, Self

from netorch.system import namespaces
from netorch.system.environ import environment_of

_TUNGETDEVNETNS = 0x54E3
_NAMED = "/run/netns"


class Queue(NamedTuple):
    """A descriptor of a tap; `namespace` is the inode of the tap's, None if the kernel didn't
    say.
    """

    fd: int
    tap: str
    namespace: int | None


class Holder(NamedTuple):
    """A process with open queues. `marks` are the NETORCH_ variables of its environment, `home` its
    own network namespace.
    """

    pid: int
    uid: int
    name: str
    argv: tuple[str, ...]
    marks: dict[str, str]
    home: int | None
    queues: tuple[Queue, ...]


class Queues:
    """What the pass has found. `spaces` are descriptors of network namespaces by inode, open until
    `close`; `members` the pids in each, `names` those that `ip netns` knows it by.
    """

    def __init__(self) -> None:
        self.holders: list[Holder] = []
        self.spaces: dict[int, int] = {}
        self.members: dict[int, list[int]] = {}
        self.names: dict[int, str] = {}
        self.refused = 0

    def __enter__(self) -> Self:
        _allow_descriptors()
        self._keep(os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC))
        self._look_at_names()
        # Whoever hides processes (the mount option hidepid) hides that of pid 1 as well.
        self.refused = int(not os.path.exists("/proc/1"))
        for name in os.listdir("/proc"):
            if name.isdecimal():
                self._look(name)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for fd in self.spaces.values():
            os.close(fd)

    def _look(self, pid: str) -> None:
        """One process. A process or descriptor that is gone meanwhile has no queue."""
        try:
            fds = [fd for fd in os.listdir(f"/proc/{pid}/fd") if _is_tun(pid, fd)]
            home = self._home(pid)
            if fds and (queues := self._queues(int(pid), fds)):
                self.holders.append(_holder(pid, home, queues))
        except (FileNotFoundError, ProcessLookupError):
            return
        except PermissionError:
            self.refused += 1

    def _home(self, pid: str) -> int:
        path = f"/proc/{pid}/ns/net"
        inode = os.stat(path).st_ino
        if inode not in self.spaces:
            self._keep(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        self.members.setdefault(inode, []).append(int(pid))
        return inode

    def _queues(self, pid: int, fds: list[str]) -> tuple[Queue, ...]:
        pidfd = os.pidfd_open(pid)
        try:
            found = []
            for fd in sorted(map(int, fds)):
                with contextlib.suppress(FileNotFoundError):
                    if tap := _tap(pid, fd):
                        found.append(Queue(fd, tap, self._ask(pidfd, fd)))
            return tuple(found)
        finally:
            os.close(pidfd)

    def _ask(self, pidfd: int, fd: int) -> int | None:
        """The network namespace of the tap, of the kernel; None if it is refused."""
        try:
            copy = namespaces.get_fd(pidfd, fd)
        except OSError:
            return None  # not to be traced, gone, or seccomp has it
        try:
            # By now the number may be another file's, of whose driver nothing is to be asked.
            if not stat.S_ISCHR(os.fstat(copy).st_mode):
                return None
            return self._keep(fcntl.ioctl(copy, _TUNGETDEVNETNS))
        except OSError:
            return None
        finally:
            os.close(copy)

    def _keep(self, fd: int) -> int:
        """Keep a namespace's descriptor unless there is one; the inode."""
        inode = os.fstat(fd).st_ino
        if self.spaces.setdefault(inode, fd) != fd:
            os.close(fd)
        return inode

    def _look_at_names(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(_NAMED):
                with contextlib.suppress(OSError):  # not mounted (any more)
                    fd = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC)
                    try:
                        namespaces.owner_of(fd)  # of a file that is no namespace: ENOTTY
                    except PermissionError:
                        pass  # it is one, of somebody else's
                    except OSError:
                        os.close(fd)
                        continue
                    self.names.setdefault(self._keep(fd), entry.name)


def marks_of(pid: int) -> dict[str, str]:
    """The NETORCH_ variables of a process; {} where they can't be read."""
    try:
        block = environment_of(pid)
    except OSError:
        return {}
    if b"NETORCH_" not in block:
        return {}
    variables = (text.partition("=") for text in os.fsdecode(block).split("\0"))
    return {name: value for name, _, value in variables if name.startswith("NETORCH_")}


def _is_tun(pid: str, fd: str) -> bool:
    """By name: a container may have the device elsewhere than in /dev/net. fdinfo then decides."""
    try:
        return os.readlink(f"/proc/{pid}/fd/{fd}").endswith("/tun")
    except FileNotFoundError:
        return False


def _tap(pid: int, fd: int) -> str:
    """The tap of a descriptor; "" for one that is not attached to any, or no tap's at all."""
    for line in _read(f"/proc/{pid}/fdinfo/{fd}").splitlines():
        if line.startswith(b"iff:\t"):
            return os.fsdecode(line[5:])
    return ""


def _holder(pid: str, home: int, queues: tuple[Queue, ...]) -> Holder:
    words = os.fsdecode(_read(f"/proc/{pid}/cmdline")).split("\0")[:-1]
    return Holder(
        pid=int(pid),
        uid=os.stat(f"/proc/{pid}").st_uid,
        name=os.fsdecode(_read(f"/proc/{pid}/comm")).rstrip("\n"),
        argv=tuple(words),
        marks=marks_of(int(pid)),
        home=home,
        queues=queues,
    )


def _read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()


def _allow_descriptors() -> None:
    """Make room for one descriptor a namespace; the usual limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def each_tap(holder: Holder) -> Iterator[tuple[str, int | None, tuple[int, ...]]]:
    """The taps of a process: name, namespace, descriptors."""
    found: dict[tuple[str, int | None], list[int]] = {}
    for fd, tap, namespace in holder.queues:
        found.setdefault((tap, namespace), []).append(fd)
    for (tap, namespace), fds in found.items():
        yield tap, namespace, tuple(fds)
