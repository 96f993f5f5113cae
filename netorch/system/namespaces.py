"""The kernel's calls about namespaces, mounts and pidfds that Python 3.11 doesn't have.

Everything here raises OSError with the kernel's errno; the callers know what they were doing and
say so. Kinds of namespaces are the CLONE_ constants of <linux/sched.h>, mount flags the MS_ and
MNT_ of <sys/mount.h>.
"""

import ctypes
import errno
import fcntl
import os
import select
import signal
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NEWNS = 0x00020000
NEWUSER = 0x10000000
NEWPID = 0x20000000
NEWNET = 0x40000000

MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_BIND = 0x1000
MS_REC = 0x4000
MS_SLAVE = 0x80000
MS_SHARED = 0x100000
MNT_DETACH = 0x2
UMOUNT_NOFOLLOW = 0x8

_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 0x1
_PIDFD_GETFD = 438
_NS_GET_USERNS = 0xB701
_RTM_SETLINK = 19
_NLM_F_REQUEST_ACK = 0x5
_NLMSG_ERROR = 2
_IFLA_AF_SPEC = 26
_IFLA_INET_CONF = 1
_IPV4_DEVCONF_FORWARDING = 1

_libc = ctypes.CDLL(None, use_errno=True)


def setns(fd: int, kinds: int) -> None:
    """Move this thread into `fd`: a namespace, or those `kinds` of the process of a pidfd."""
    _check(_libc.setns(fd, kinds))


def keep_home() -> None:
    """Have HOME, also where it was not set: as root of a user namespace this process would be told
    that of the machine's root.
    """
    home = os.path.expanduser("~")
    if os.path.isabs(home):
        os.environ.setdefault("HOME", home)


def unshare(kinds: int) -> None:
    """Give this thread namespaces of its own; NEWPID takes effect for its children."""
    _check(_libc.unshare(kinds))


def mount(
    source: str | Path | None,
    target: str | Path,
    fstype: str | None = None,
    flags: int = 0,
    data: str | None = None,
) -> None:
    arguments = (_bytes(source), os.fsencode(target), _bytes(fstype))
    _check(_libc.mount(*arguments, ctypes.c_ulong(flags), _bytes(data)), target)


def unmount(target: str | Path, flags: int = 0) -> None:
    _check(_libc.umount2(os.fsencode(target), flags), target)


@contextmanager
def in_namespace(namespace: str | Path | int) -> Iterator[None]:
    """Run a block in another network namespace, by path or descriptor; in this thread only."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if isinstance(namespace, int):
            setns(namespace, NEWNET)
        else:
            there = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
            try:
                setns(there, NEWNET)
            finally:
                os.close(there)
        try:
            yield
        finally:
            setns(home, NEWNET)
    finally:
        os.close(home)


def send_signal(pidfd: int, number: signal.Signals) -> bool:
    """Signal the process behind `pidfd`; False if it is gone."""
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return False
    return True


def wait_exit(pidfd: int, timeout: float | None = None) -> bool:
    """Wait for the end of the process behind `pidfd`; False if `timeout` (seconds) passed."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(None if timeout is None else timeout * 1000))


def pid_in_proc(pidfd: int) -> int:
    """The pid of the process behind `pidfd` as /proc numbers it; -1 if it is gone or not in there.

    To a process born in a private place the two differ: its /proc is the outer one.
    """
    with open(f"/proc/self/fdinfo/{pidfd}") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("Pid:"))


def get_fd(pidfd: int, fd: int) -> int:
    """A copy of a descriptor of another process, which this one may trace (Linux 5.6)."""
    got = _libc.syscall(_PIDFD_GETFD, pidfd, fd, 0)
    if got < 0:
        _check(got)
    return int(got)


def owner_of(namespace: int) -> int:
    """A descriptor of the user namespace that owns a namespace; refused for one outside of ours."""
    return fcntl.ioctl(namespace, _NS_GET_USERNS)


def loopback_up() -> None:
    """Set lo of the current network namespace up. Needs CAP_NET_ADMIN over it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        flags = _flags(sock, "lo")
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | _IFF_UP))


def loopback_is_up() -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        return bool(_flags(sock, "lo") & _IFF_UP)


def may_change_links() -> bool:
    """Whether this process has CAP_NET_ADMIN over the network namespace that it is in.

    Asks the kernel to set nothing at all on an interface index that no interface has: rtnetlink
    looks at the capability before anything else (EPERM), then misses the interface (ENODEV).
    """
    return _set_link(0x7FFFFFFF, b"") != errno.EPERM


def forwarding_on(name: str) -> None:
    """Switch IPv4 forwarding on for one interface of the current network namespace.

    The attribute is IFLA_AF_SPEC > AF_INET > IFLA_INET_CONF > IPV4_DEVCONF_FORWARDING
    (net/ipv4/devinet.c, inet_set_link_af). Needs no writable /proc/sys.
    """
    attribute = struct.pack("=HHI", 8, _IPV4_DEVCONF_FORWARDING, 1)
    for kind in (_IFLA_INET_CONF, socket.AF_INET, _IFLA_AF_SPEC):
        attribute = struct.pack("=HH", 4 + len(attribute), kind) + attribute
    number = _set_link(socket.if_nametoindex(name), attribute)
    if number != 0:
        raise OSError(number, os.strerror(number), name)


def may_mount() -> bool:
    """Whether this process has CAP_SYS_ADMIN over the mount namespace that it is in.

    Asks the kernel to unmount what is not a mount point: refused with EPERM without the capability,
    with EINVAL with it (fs/namespace.c, can_umount).
    """
    try:
        unmount("/proc/self/ns", UMOUNT_NOFOLLOW)
    except OSError as error:
        return error.errno == errno.EINVAL
    return True


def _set_link(index: int, attributes: bytes) -> int:
    """Send RTM_SETLINK for one interface; the errno that the kernel answers with, 0 for success."""
    header = struct.pack("=IHHII", 32 + len(attributes), _RTM_SETLINK, _NLM_F_REQUEST_ACK, 1, 0)
    message = struct.pack("=BxHiII", 0, 0, index, 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as sock:
        sock.send(header + message + attributes)
        answer = sock.recv(65536)
    kind, result = struct.unpack_from("=4xH10xi", answer)
    if kind != _NLMSG_ERROR:
        raise OSError(errno.EPROTO, os.strerror(errno.EPROTO))
    return -int(result)


def _flags(sock: socket.socket, name: str) -> int:
    answer = fcntl.ioctl(sock, _SIOCGIFFLAGS, struct.pack("16s16x", name.encode()))
    flags: int = struct.unpack_from("16xH", answer)[0]
    return flags


def _bytes(text: str | Path | None) -> bytes | None:
    return None if text is None else os.fsencode(text)


def _check(result: int, path: str | Path | None = None) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), None if path is None else str(path))
