"""Making a private place, so that a SIGKILL at any moment leaves nothing.

    netorch ──fork──▶ founder: unshare, id maps, mounts, lo up ──fork──▶ PID 1 (keeper.py)
       └─────fork──▶ starter of the uplink (uplinks.py), meanwhile

PID 1 reads a leash, a pipe whose writing end only netorch has. Until it has read the uplink's name
from it, end of file (netorch died) makes it exit, which takes down whatever was in the namespaces.
The founder reports in JSON, PID 1 answers with "complete" or says what went wrong, each through a
pipe of its own. Each step of the founder has a name, since what failed tells what is missing on the
machine.
"""

import errno
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import msgspec

from netorch.errors import MissingError, NetorchError
from netorch.system import namespaces, uplinks
from netorch.system.capabilities import SETFCAP, missing
from netorch.system.namespaces import MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_REC, MS_SLAVE
from netorch.system.places import Place, Uplink
from netorch.system.scope import current_place

_INIT = Path(__file__).with_name("keeper.py")
_APPARMOR = Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")


class _Founded(msgspec.Struct):
    """The founder's report: PID 1 and its network namespace, or the step that failed."""

    init: int = 0
    inode: int = 0
    step: str = ""
    errno: int = 0


def create(lab: str, run: Path, uplink: Uplink, subnet: str) -> Place:
    """As places.create_private."""
    (run / "netns").mkdir(mode=0o700, parents=True, exist_ok=True)
    leash_read, leash = os.pipe()
    report, report_write = os.pipe()
    answer, answer_write = os.pipe()
    pidfd = -1
    try:
        founder = os.fork()
        if founder == 0:
            os.close(leash)
            _found(lab, run, leash_read, report_write, answer_write)
        for end in (leash_read, report_write, answer_write):
            os.close(end)
        text = os.read(report, 4096)
        os.waitpid(founder, 0)
        founded = _founded(lab, text)
        pidfd = _open(lab, founded.init, answer)
        inside = uplinks.Inside(pidfd, run, subnet, marks_of(lab, founded.inode))
        chosen, reason = uplinks.start(inside, uplink, leash)
        _complete(lab, chosen, leash, answer)
    except BaseException:
        os.close(leash)  # the end of whatever has been made
        if pidfd >= 0:
            namespaces.send_signal(pidfd, signal.SIGKILL)
            namespaces.wait_exit(pidfd)
        raise
    else:
        os.close(leash)
    finally:
        os.close(report)
        os.close(answer)
        if pidfd >= 0:
            os.close(pidfd)
    return Place(
        lab=lab,
        private=True,
        inode=founded.inode,
        init=founded.init,
        uplink=chosen,
        run=str(run),
        reason=reason,
        keeper=True,
    )


def _found(lab: str, run: Path, leash_read: int, report: int, answer: int) -> NoReturn:
    """The founder: makes the namespaces, then forks PID 1 and leaves."""
    founded = _Founded()
    try:
        os.setsid()
        _settle(run, founded)
        founded.step = "PID 1"
        founded.init = os.fork()
        if founded.init == 0:
            _become_init(lab, run, founded.inode, leash_read, answer)
    except OSError as error:
        founded.errno = error.errno or errno.EIO
    finally:
        # Also on KeyboardInterrupt: the parent's frames above are not this process's to unwind.
        os.write(report, msgspec.json.encode(founded))
        os._exit(0)


def settle(lab: str, run: Path) -> int:
    """Move this process into the namespaces of a new place; the inode of its network namespace.

    PID 1 of the place is the next child. Raises MissingError.
    """
    (run / "netns").mkdir(mode=0o700, parents=True, exist_ok=True)
    founded = _Founded()
    try:
        _settle(run, founded)
    except OSError as error:
        founded.errno = error.errno or errno.EIO
        raise _refused(lab, founded) from error
    return founded.inode


def _settle(run: Path, founded: _Founded) -> None:
    uid, gid = os.geteuid(), os.getegid()
    founded.step = "user namespace"
    namespaces.keep_home()
    namespaces.unshare(namespaces.NEWUSER)
    founded.step = "id map"
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"0 {uid} 1")
    _write("/proc/self/gid_map", f"0 {gid} 1")
    founded.step = "namespaces"
    namespaces.unshare(namespaces.NEWNET | namespaces.NEWNS | namespaces.NEWPID)
    founded.step = "mounts"
    namespaces.mount(None, "/", flags=MS_REC | MS_SLAVE)
    namespaces.mount(
        "netorch", run / "netns", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=0700"
    )
    founded.step = "links"
    namespaces.loopback_up()
    founded.inode = current_place()


def _become_init(lab: str, run: Path, inode: int, leash_read: int, answer: int) -> NoReturn:
    try:
        os.dup2(leash_read, 0)
        os.dup2(answer, 1)
        os.dup2(answer, 2)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        os.chdir("/")
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        marks = {**init_marks(lab, run, inode), "NETORCH_KEEPER": "1"}
        os.execve(sys.executable, [sys.executable, "-I", "-S", "-E", str(_INIT), lab], marks)
    except OSError as error:
        os.write(1, f"can't run {sys.executable}: {error.strerror}".encode())
    finally:
        os._exit(1)


def _complete(lab: str, uplink: str, leash: int, answer: int) -> None:
    """Let PID 1 off the leash; it takes the uplink's name and stays."""
    with suppress(BrokenPipeError):  # it has died, and said why
        os.write(leash, uplink.encode())
    said = os.read(answer, 65536)
    if said != b"complete":
        raise _ended(lab, said)


def _open(lab: str, init: int, answer: int) -> int:
    try:
        return os.pidfd_open(init)
    except ProcessLookupError as error:
        raise _ended(lab, os.read(answer, 65536)) from error


def _ended(lab: str, said: bytes) -> NetorchError:
    cause = said.decode(errors="replace").strip().rpartition("\n")[2] or "it was killed"
    return NetorchError(f"failed to create a private place for {lab}: PID 1 ended: {cause}")


def init_marks(lab: str, run: Path, inode: int) -> dict[str, str]:
    """The marks of a place's PID 1, by which the place is found, with its run directory."""
    return {**marks_of(lab, inode), "NETORCH_PRIVATE": "1", "NETORCH_RUN": str(run)}


def marks_of(lab: str, inode: int) -> dict[str, str]:
    return {"NETORCH_LAB": lab, "NETORCH_PLACE": str(inode)}


def _founded(lab: str, text: bytes) -> _Founded:
    if not text:
        raise NetorchError(f"failed to create a private place for {lab}: its founder was killed")
    founded = msgspec.json.decode(text, type=_Founded)
    if founded.errno:
        raise _refused(lab, founded)
    return founded


def _refused(lab: str, founded: _Founded) -> MissingError:
    cause = f"{founded.step}: {os.strerror(founded.errno)}"
    return MissingError(
        f"failed to create a private place for {lab}: {cause}", _hint(founded.step, founded.errno)
    )


def _hint(step: str, number: int) -> str:
    """What to do about a step that this machine refuses."""
    refused = number in (errno.EPERM, errno.EACCES)
    if step == "user namespace" and number in (errno.ENOSPC, errno.EUSERS):
        return "no more user namespaces are allowed: raise `sysctl user.max_user_namespaces`"
    if step == "namespaces" and number in (errno.ENOSPC, errno.EUSERS):
        return "raise `sysctl user.max_net_namespaces`, max_mnt_namespaces or max_pid_namespaces"
    without = number == errno.EINVAL or not os.path.exists("/proc/self/ns/user")
    if step == "user namespace" and without:
        return "this kernel has no user namespaces (CONFIG_USER_NS): run netorch as root"
    # Podman's profile says ENOSYS where Docker's says EPERM.
    if step == "user namespace" and (refused or number == errno.ENOSYS):
        return (
            "user namespaces are forbidden here: in a container by its seccomp profile (start it "
            "with `--cap-add NET_ADMIN` or `--security-opt seccomp=unconfined`), on a host by "
            "`sysctl kernel.unprivileged_userns_clone=0`"
        )
    if step == "id map" and refused and os.geteuid() == 0 and missing(SETFCAP):
        return (
            "root needs CAP_SETFCAP to map its id (since Linux 5.12): start the container with "
            "`--cap-add SETFCAP`, or run netorch as another user"
        )
    if refused and _APPARMOR.exists() and _APPARMOR.read_text().strip() != "0":
        return (
            "AppArmor takes the capabilities out of new user namespaces: "
            "`sysctl kernel.apparmor_restrict_unprivileged_userns=0`, "
            "or an AppArmor profile for netorch"
        )
    if refused:
        return (
            "a security module or a container's seccomp profile forbids it: on a host, run netorch "
            "as root; start a container with `--cap-add NET_ADMIN`, or with `--security-opt "
            "seccomp=unconfined --security-opt apparmor=unconfined`"
        )
    return ""


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
