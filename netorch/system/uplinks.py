"""The way out of a private place: pasta, else slirp4netns, as interface `uplink0`.

Either program runs inside the place's PID namespace, so that it dies with PID 1, and outside its
network namespace, where its sockets have the machine's routes. A starter process puts it there:

    netorch ──fork──▶ starter: setns(user, pid[, mount]) ──fork──▶ pasta | slirp4netns
                      waits until it is ready; then setns(mount, net):
                      IPv4 forwarding on uplink0, resolv.conf

pasta is ready when the process that was started exits with 0 (it goes on in a child of its own),
slirp4netns when it writes to --ready-fd. pasta runs in the place's mount namespace, where the
network namespace is mounted on a file: it drops the capability without which /proc/PID/ns/net of
PID 1 is closed to it (2023-03, isolation.c), and later versions close inherited descriptors.
slirp4netns stays outside of it: it reads resolv.conf again and again, and would find its own
address there.

Neither forwards ports, and neither reaches the machine's loopback. Addresses in the subnet: .2 is
the gateway, .3 the name server, .15 (pasta) or .100 (slirp4netns' own choice) the place.
"""

import os
import signal
import socket
from pathlib import Path
from typing import NamedTuple, NoReturn

from netorch.errors import MissingError, NetorchError
from netorch.system import namespaces
from netorch.system.namespaces import MS_BIND, NEWNET, NEWNS, NEWPID, NEWUSER
from netorch.system.starting import program

INTERFACE = "uplink0"
_PROGRAMS = ("pasta", "slirp4netns")
_MTU = "1500"
_TUN = "/dev/net/tun"
_RESOLV_CONF = Path("/etc/resolv.conf")
_REFUSED = 3  # the starter's exit status: the program did not start; any other failure is ours


class Inside(NamedTuple):
    """The place that gets an uplink: PID 1, the run directory, the subnet, the lab's marks."""

    pidfd: int
    run: Path
    subnet: str
    marks: dict[str, str]

    def address(self, number: int) -> str:
        first = int.from_bytes(socket.inet_aton(self.subnet.partition("/")[0]), "big")
        return socket.inet_ntoa((first + number).to_bytes(4, "big"))

    @property
    def network(self) -> str:
        return f"/proc/{namespaces.pid_in_proc(self.pidfd)}/ns/net"

    @property
    def log(self) -> Path:
        return self.run / "uplink.log"

    @property
    def netns(self) -> Path:
        """Where pasta finds the network namespace; on the place's own tmpfs."""
        return self.run / "netns" / "place"


def choose(uplink: str) -> str:
    """What `start` would take, judged by what is installed."""
    candidates = _PROGRAMS if uplink == "auto" else (uplink,)
    return next((name for name in candidates if program(name) and not _obstacle()), "none")


def start(place: Inside, uplink: str, leash: int) -> tuple[str, str]:
    """Start `uplink` ("auto": the first that works): its name, and for "none" the reason.

    Raises MissingError if an uplink that was asked for by name can't be had. `leash` is the
    descriptor that holds the place's life, which no child may keep open.
    """
    if uplink == "none":
        return "none", "none was asked for"
    if obstacle := _obstacle():
        return _none(uplink, [obstacle])
    reasons = []
    for name in _PROGRAMS if uplink == "auto" else (uplink,):
        path = program(name)
        reason = f"{name} is not installed" if path is None else _try(place, name, path, leash)
        if not reason:
            return name, ""
        reasons.append(reason)
    return _none(uplink, reasons)


def _none(uplink: str, reasons: list[str]) -> tuple[str, str]:
    if uplink == "auto":
        return "none", "; ".join(reasons)
    raise MissingError(
        f"failed to start the uplink: {reasons[0]}", "set `uplink` in [lab] to another, or none"
    )


def _obstacle() -> str:
    """Why no program can work in this network namespace; empty if one may."""
    try:
        os.close(os.open(_TUN, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"{_TUN} can't be opened: {error.strerror} (in a container: `--device {_TUN}`)"
    with open("/proc/self/net/route") as routes:  # IPv4, the first line a heading
        if sum(1 for _line in routes) < 2:
            return "the network namespace that netorch runs in has no routes itself"
    return ""


def _try(place: Inside, name: str, path: str, leash: int) -> str:
    """Why the program doesn't work here; empty if it does."""
    starter = os.fork()
    if starter == 0:
        os.close(leash)
        _run_starter(place, name, path)
    _, status = os.waitpid(starter, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return ""
    if code != _REFUSED:
        raise NetorchError(f"failed to set up {INTERFACE} by {name}: {_cause(place.log)}")
    return f"{name}: {_cause(place.log)}"


def _cause(log: Path) -> str:
    """The last line that the program wrote about itself."""
    lines = log.read_text(errors="replace").splitlines()
    # pasta 2023-03 complains about each line that it can't send to a syslog; slirp4netns 1.2 warns
    # about its own seccomp filter.
    noise = ("Failed to send ", "WARNING: Support for seccomp")
    said = [line for line in lines if line.strip() and not line.startswith(noise)]
    return said[-1].strip() if said else "it ended without a word"


def _run_starter(place: Inside, name: str, path: str) -> NoReturn:
    code = 1
    log = -1
    try:
        os.setsid()
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        log = os.open(place.log, flags, 0o600)
        start_program = _start_pasta if name == "pasta" else _start_slirp4netns
        if start_program(place, path, log):
            namespaces.setns(place.pidfd, NEWNS | NEWNET)
            namespaces.forwarding_on(INTERFACE)
            _bind_resolv_conf(place)
            code = 0
        else:
            code = _REFUSED
    except OSError as error:
        os.write(log, f"\n{error}\n".encode())
    finally:
        os._exit(code)


def _start_pasta(place: Inside, path: str, log: int) -> bool:
    namespaces.setns(place.pidfd, NEWUSER | NEWPID | NEWNS)
    place.netns.touch()
    namespaces.mount(place.network, place.netns, flags=MS_BIND)
    pid = _spawn(place, _pasta(place, path), log)
    _, status = os.waitpid(pid, 0)
    return status == 0


def _start_slirp4netns(place: Inside, path: str, log: int) -> bool:
    namespaces.setns(place.pidfd, NEWUSER | NEWPID)
    ready, said = os.pipe()
    os.set_inheritable(said, True)
    # By a process in between that ends: so it becomes a child of the place's PID 1, not of the
    # machine's.
    between = os.fork()
    if between == 0:
        _spawn(place, _slirp4netns(place, path, said), log, said)
        os._exit(0)
    os.close(said)
    os.waitpid(between, 0)
    return os.read(ready, 1) == b"1"


def _pasta(place: Inside, path: str) -> list[str]:
    return [
        path, "--config-net", "--ipv4-only", "--quiet",
        "--ns-ifname", INTERFACE, "--mtu", _MTU,
        "--address", place.address(15), "--netmask", place.subnet.partition("/")[2],
        "--gateway", place.address(2), "--dns-forward", place.address(3),
        "--no-map-gw", "-t", "none", "-u", "none", "-T", "none", "-U", "none",
        "--no-dhcp", "--no-dhcpv6", "--no-ndp", "--no-ra",
        "--netns-only", "--netns", str(place.netns),
    ]  # fmt: skip


def _slirp4netns(place: Inside, path: str, ready: int) -> list[str]:
    return [
        path, "--configure", "--disable-host-loopback", "--enable-sandbox", "--enable-seccomp",
        "--mtu", _MTU, "--cidr", place.subnet, "--ready-fd", str(ready),
        "--netns-type=path", place.network, INTERFACE,
    ]  # fmt: skip


def _spawn(place: Inside, argv: list[str], log: int, ready: int = -1) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.closerange(3, max(ready, 3))
        os.closerange(max(ready, 2) + 1, os.sysconf("SC_OPEN_MAX"))
        os.chdir("/")
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.execve(argv[0], argv, {"PATH": os.defpath, **place.marks})
    except OSError as error:
        os.write(2, f"{argv[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(127)


def _bind_resolv_conf(place: Inside) -> None:
    """Put the uplink's name server into the place's own view of /etc/resolv.conf."""
    if not _RESOLV_CONF.exists():
        return
    own = place.run / "netns" / "resolv.conf"
    own.write_text(f"nameserver {place.address(3)}\n")
    namespaces.mount(own, _RESOLV_CONF, flags=MS_BIND)
