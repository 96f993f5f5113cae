"""Where a lab lives: the network namespace that netorch is run in, or a private place of the lab's
own.

A private place is a user, network, mount and PID namespace with a small PID 1 (keeper.py). It
needs no privilege: one id is mapped, and that id owns everything in there. Killing PID 1 is the
whole teardown, since the kernel then kills every process of the PID namespace, and links and mounts
go with the last of them.

The marks of a place are those of PID 1: its environment (NETORCH_LAB, NETORCH_PLACE,
NETORCH_PRIVATE) and its name, `netorch:<uplink>`, which it takes once the place is complete. No
file is needed to find it.

A netorch process enters the place by setns on a pidfd of PID 1 and then works as in the current
place; what it starts is born in the PID namespace. /proc stays the outer one, so all pids that are
read are outer pids.

Limits: setns on a pidfd needs Linux 5.8, and a single-threaded caller.
"""

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec

from netorch.errors import ConflictError, KernelError, NetorchError
from netorch.system import namespaces
from netorch.system.environ import environment_of
from netorch.system.namespaces import NEWNET, NEWNS, NEWPID, NEWUSER

Uplink = Literal["auto", "pasta", "slirp4netns", "none"]
UPLINKS = ("pasta", "slirp4netns", "none")


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """A place. `init` is the pid of PID 1 as this process sees it, 0 for the current place and for
    a private one that is gone.

    `run` is the lab's run directory, "" for the current place. `reason` says why there is no
    uplink, where creating the place found that out. `keeper`: PID 1 notes how its orphans end.
    """

    lab: str
    private: bool
    inode: int
    init: int = 0
    uplink: str = ""
    run: str = ""
    reason: str = ""
    keeper: bool = False


def has_net_admin() -> bool:
    """Whether labs can live in the current network namespace: CAP_NET_ADMIN, found by trying."""
    return namespaces.may_change_links()


def find(lab: str) -> list[Place]:
    """The private places of this lab by their processes' marks; at most one but for accidents."""
    return [place for _pid, place in _places() if place.lab == lab]


def private_places() -> dict[str, Place]:
    """All private places of this user, by the name of their lab."""
    return {place.lab: place for _pid, place in _places()}


def create_private(lab: str, run: Path, uplink: Uplink, subnet: str) -> Place:
    """Make a private place whose egress interface has an address of `subnet` (`10.0.2.0/24`).

    Raises MissingError where the machine doesn't allow it or an uplink asked for by name can't be
    had, and ConflictError if the lab has a private place already.
    """
    from netorch.system import place_birth

    if there := find(lab):
        raise ConflictError(
            f"failed to create a private place for {lab}: it has one, PID 1 is {there[0].init}"
        )
    return place_birth.create(lab, run, uplink, subnet)


def enter(place: Place) -> None:
    """Move this single-threaded process, and the children that it will have, into the place."""
    here = _working_directory()
    pidfd = _open_init(place)
    if pidfd is None:
        raise NetorchError(f"failed to enter the private place of {place.lab}: it is gone")
    namespaces.keep_home()
    try:
        namespaces.setns(pidfd, NEWUSER | NEWNET | NEWNS | NEWPID)
    except ProcessLookupError as error:
        raise NetorchError(
            f"failed to enter the private place of {place.lab}: it has just died"
        ) from error
    except OSError as error:
        raise KernelError(
            f"failed to enter the private place of {place.lab}: {error.strerror}", error.errno or 0
        ) from error
    finally:
        os.close(pidfd)
    # The new mount namespace comes with "/" as working directory; relative paths must keep their
    # meaning.
    if here is not None:
        os.chdir(here)


def destroy(place: Place) -> None:
    """Kill the place and wait until its processes are gone. Nothing happens if they are already."""
    pidfd = _open_init(place)
    if pidfd is None:
        return
    try:
        members = _members(namespaces.pid_in_proc(pidfd))
        ours = [pid for pid, parent in members.items() if parent == os.getpid()]
        others = {pid: parent for pid, parent in members.items() if pid not in ours}
        _allow_descriptors(len(others))
        pidfds = [fd for pid in others if (fd := _pidfd(pid)) is not None]
        namespaces.send_signal(pidfd, signal.SIGKILL)
        for pid in ours:
            with suppress(ChildProcessError):  # whoever started it has waited for it
                os.waitpid(pid, 0)
        for fd in pidfds:
            namespaces.wait_exit(fd)
            os.close(fd)
        # PID 1 lets go of everything, kills the others, and then stays until each of them has been
        # reaped (kernel/pid_namespace.c, zap_pid_ns_processes). A process that an earlier netorch
        # started inside is a child of the machine's init, which in a container may reap late or
        # never: no use to wait.
        if all(others.values()):
            namespaces.wait_exit(pidfd)
    finally:
        os.close(pidfd)


def _places() -> Iterator[tuple[int, Place]]:
    """The private places right below this process's PID namespace, with PID 1's pid in /proc.

    Where $NETORCH_RUN_DIR is set, those only whose run directories are there.
    """
    base = os.environ.get("NETORCH_RUN_DIR")
    depth = len(_nspid("self"))
    for pid, environ in marked_processes():
        if environ.get("NETORCH_PRIVATE") != "1":
            continue
        run = environ.get("NETORCH_RUN", "")
        if base and os.path.dirname(run) != os.path.abspath(base):
            continue
        with suppress(OSError):  # it may end while we read
            pids = _nspid(pid)
            # PID 1 of a namespace right below ours; whatever else inherited the environment is
            # neither.
            if len(pids) != depth + 1 or pids[-1] != 1:
                continue
            uplink = _uplink(Path(f"/proc/{pid}/comm").read_text().rstrip("\n"))
            if uplink is not None:
                place = Place(
                    lab=environ["NETORCH_LAB"],
                    private=True,
                    inode=int(environ["NETORCH_PLACE"]),
                    init=pids[-2],
                    uplink=uplink,
                    run=run,
                    keeper=environ.get("NETORCH_KEEPER") == "1",
                )
                yield pid, place


def marked_processes() -> Iterator[tuple[int, dict[str, str]]]:
    """This user's processes with a lab's marks: pid in /proc, and the NETORCH_ variables."""
    uid = os.geteuid()
    for entry in os.scandir("/proc"):
        if not entry.name.isdecimal():
            continue
        try:
            if entry.stat().st_uid != uid:
                continue
            block = environment_of(int(entry.name))
        except OSError:
            continue  # ended meanwhile, or not dumpable and so not ours to read
        if b"NETORCH_LAB=" not in block or b"NETORCH_PLACE=" not in block:
            continue
        ours = (text for text in block.split(b"\0") if text.startswith(b"NETORCH_"))
        variables = (os.fsdecode(text).partition("=") for text in ours)
        yield int(entry.name), {name: value for name, _, value in variables}


def _open_init(place: Place) -> int | None:
    """A pidfd of PID 1; None if it is gone. Marks are read after opening: no reused pid passes."""
    pidfd = _pidfd(place.init) if place.init else None
    if pidfd is None:
        return None
    number = namespaces.pid_in_proc(pidfd)
    if any(pid == number and other.inode == place.inode for pid, other in _places()):
        return pidfd
    os.close(pidfd)
    return None


def _uplink(comm: str) -> str | None:
    """The uplink in the name of a complete place's PID 1, which the kernel cuts at 15 bytes."""
    return next((uplink for uplink in UPLINKS if comm == f"netorch:{uplink}"[:15]), None)


def _members(init: int) -> dict[int, int]:
    """The processes of a place but for PID 1 (`init` in /proc): pid -> parent, 0 for an outsider.

    `init` is a pid of /proc; the others are pids as this process sees them.
    """
    own = _nspid("self")
    here = {own[0]: own[-1]}  # pid in /proc -> pid as this process sees it
    parents: dict[int, int] = {}
    homes: dict[int, int] = {}
    for name in os.listdir("/proc"):
        with suppress(OSError):  # it may end while we read
            if not name.isdecimal() or len(pids := _nspid(name)) <= len(own):
                continue
            parent, home = _status(name, "PPid")[0], _pid_namespace(name)
            here[pids[0]], parents[pids[0]], homes[pids[0]] = pids[len(own) - 1], parent, home
    found = {pid for pid in parents if homes[pid] == homes.get(init)}
    # A child of a member is one too: pasta can't be asked, and is in a PID namespace of its own.
    while more := {pid for pid in parents if parents[pid] in found} - found:
        found |= more
    return {here[pid]: here.get(parents[pid], 0) for pid in found if pid != init}


def _pid_namespace(pid: str) -> int:
    """The inode of its PID namespace; its own pid, negative, if it can't be asked."""
    try:
        return os.stat(f"/proc/{pid}/ns/pid").st_ino
    except PermissionError:
        return -int(pid)


def _pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def _nspid(pid: int | str) -> list[int]:
    """The pids of a process, from the PID namespace of /proc down to its own."""
    return _status(pid, "NSpid")


def _status(pid: int | str, field: str) -> list[int]:
    with open(f"/proc/{pid}/status") as status:
        for line in status:
            if line.startswith(f"{field}:"):
                return [int(word) for word in line.split()[1:]]
    return []


def _allow_descriptors(number: int) -> None:
    """Make room for so many more open descriptors; the usual limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < number + 256:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _working_directory() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None  # it was deleted
