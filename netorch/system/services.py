"""The services of networks and hosts: dnsmasq, and busybox's DHCP client.

dnsmasq's files stand in the run directory: dnsmasq-<network>.conf, .hosts (reservations), .names,
.leases and .log. Its parent process ends with status 0 once its ports are bound, so nothing has to
be waited for after that. Reservations and names are read again on SIGHUP; an update is

    write .pending, put the new files in place, SIGHUP, remove .pending

so an interrupted one is seen as a difference. The environment of the process carries the resource
without those two (a string there is limited to 128 KiB); what they are is read from the files.

Leases stay when a dnsmasq is deleted, since it may be to make it again with another configuration;
they go with the run directory.
"""

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from netorch.errors import KernelError, MissingError, NetorchError
from netorch.planner import Action, Create, Delete, Update
from netorch.resources import DhcpClient, Dnsmasq, Resource
from netorch.system.capabilities import NET_ADMIN, NET_BIND_SERVICE, NET_RAW, missing
from netorch.system.look import Look
from netorch.system.namespaces import send_signal
from netorch.system.processes import (
    Marked,
    end,
    end_all,
    leaders,
    marked,
    processes_of,
    tell_to_end,
)
from netorch.system.scope import Scope
from netorch.system.starting import Child, program, start

# dnsmasq 2.90 needs these three even as root (src/dnsmasq.c), and no other if it stays root; udhcpc
# as well.
_CAPABILITIES = (NET_ADMIN, NET_BIND_SERVICE, NET_RAW)
_DNS = 53  # the lowest port of dnsmasq's
_INSTALL_DNSMASQ = "install dnsmasq-base (Fedora, Arch, Alpine: dnsmasq)"
_INSTALL_BUSYBOX = "install busybox (with its applet udhcpc)"
_UDHCPC_SCRIPT = Path(__file__).with_name("udhcpc.sh")
_INTERRUPTED = (
    "# an update was interrupted\n"  # in place of the files' content: equal to nothing wanted
)
_PARTS = ("conf", "hosts", "names")


class Dnsmasqs:
    """The adapter for dnsmasq, one for each network."""

    kinds: tuple[type[Resource], ...] = (Dnsmasq,)

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        # Until somebody has waited for them:
        self._started: dict[str, Child] = {}
        self._told: list[Marked] = []  # to end

    def observe(self, look: Look | None = None) -> Iterable[Dnsmasq]:
        for processes in (look or Look(self._scope)).processes.values():
            running = processes[0].resource
            if not isinstance(running, Dnsmasq):
                continue
            hosts, names = self._read(running, "hosts"), self._read(running, "names")
            if self._path(running, "pending").exists():
                hosts = names = _INTERRUPTED
            # More than one for a network, or one whose files were deleted, so that nobody would see
            # its leases: no wanted configuration is empty, so all are replaced by one.
            whole = len(processes) == 1 and self._path(running, "conf").exists()
            config = running.config if whole else ""
            yield msgspec.structs.replace(running, config=config, hosts=hosts, names=names)

    def check(self, wanted: Sequence[Resource]) -> list[str]:
        if wanted and program("dnsmasq") is None:
            return [f"dnsmasq is not installed: {_INSTALL_DNSMASQ}"]
        directories = [one.tftp for one in wanted if isinstance(one, Dnsmasq) and one.tftp]
        refused = [f"failed to serve {d} by TFTP: {why}" for d in directories if (why := _why(d))]
        return refused + (
            _not_given("dnsmasq", missing(NET_BIND_SERVICE, port=_DNS)) if wanted else []
        )

    def begin(self, step: Sequence[Action]) -> None:
        """See `netorch.system.InHalves`."""
        for action in step:
            if isinstance(action, Create):
                self._started[action.key] = self._start(action.new)
        if doomed := {action.key for action in step if isinstance(action, Delete)}:
            self._told = processes_of(self._scope, doomed)
            tell_to_end(self._scope, self._told)

    def finish(self) -> None:
        """See `netorch.system.InHalves`."""
        while self._started:
            _key, child = self._started.popitem()
            child.exit_status()
            child.close()
        end(self._scope, self._told)
        self._told = []

    def create(self, wanted: Sequence[Resource], done: Callable[[Resource], None]) -> None:
        for resource in wanted:
            if resource.key not in self._started:
                self._started[resource.key] = self._start(resource)
        errors: list[NetorchError] = []
        for resource in wanted:
            assert isinstance(resource, Dnsmasq)
            child = self._started[resource.key]
            status = child.exit_status()
            del self._started[resource.key]
            if status == 0:
                self._path(resource, "pending").unlink(missing_ok=True)
            else:
                errors.append(_refusal(resource, child))
            child.close()
            if status == 0:
                done(resource)
        if errors:
            raise errors[0]

    def _start(self, resource: Resource) -> Child:
        assert isinstance(resource, Dnsmasq)
        dnsmasq = program("dnsmasq")
        if dnsmasq is None:
            raise MissingError("dnsmasq is not installed", _INSTALL_DNSMASQ)
        for part, text in zip(
            _PARTS, (resource.config, resource.hosts, resource.names), strict=True
        ):
            self._write(resource, part, text)
        return start(
            self._scope,
            msgspec.structs.replace(resource, hosts="", names=""),
            [dnsmasq, f"--conf-file={self._path(resource, 'conf')}"],
            log=self._path(resource, "log"),
            capabilities=_CAPABILITIES,
        )

    def update(self, wanted: Sequence[Update], done: Callable[[Resource], None]) -> None:
        running = leaders(marked(self._scope))
        for change in wanted:
            new = change.new
            assert isinstance(new, Dnsmasq)
            self._write(new, "pending", "")
            self._write(new, "hosts", new.hosts)
            self._write(new, "names", new.names)
            for process in running.get(new.key, ()):
                pidfd = os.pidfd_open(process.pid)
                try:
                    send_signal(pidfd, signal.SIGHUP)
                finally:
                    os.close(pidfd)
            self._path(new, "pending").unlink()
            done(new)

    def delete(self, unwanted: Sequence[Resource], done: Callable[[Resource], None]) -> None:
        keys = {old.key for old in unwanted}
        # All, again and again: one that a killed netorch was just starting may be forking.
        end_all(self._scope, lambda one: one.resource is not None and one.resource.key in keys)
        self._told = []
        for old in unwanted:
            assert isinstance(old, Dnsmasq)
            for part in (*_PARTS, "pending", "log"):
                self._path(old, part).unlink(missing_ok=True)
            done(old)

    def _path(self, resource: Dnsmasq, part: str) -> Path:
        return self._scope.run / f"dnsmasq-{resource.network}.{part}"

    def _read(self, resource: Dnsmasq, part: str) -> str:
        try:
            return self._path(resource, part).read_text()
        except FileNotFoundError:
            return _INTERRUPTED

    def _write(self, resource: Dnsmasq, part: str, text: str) -> None:
        path = self._path(resource, part)
        new = path.with_name(f"{path.name}.new")
        new.write_text(text)
        new.rename(path)


class DhcpClients:
    """The adapter for DHCP clients, one for each interface of a host that asks for its address."""

    kinds: tuple[type[Resource], ...] = (DhcpClient,)

    def __init__(self, scope: Scope) -> None:
        self._scope = scope

    def observe(self, look: Look | None = None) -> Iterable[DhcpClient]:
        for processes in (look or Look(self._scope)).processes.values():
            running = processes[0].resource
            if isinstance(running, DhcpClient):
                logged = self._log(running).exists()
                yield msgspec.structs.replace(running, logged=logged)

    def check(self, wanted: Sequence[Resource]) -> list[str]:
        if wanted and program("busybox") is None:
            return [f"busybox is not installed, a host's DHCP client: {_INSTALL_BUSYBOX}"]
        return _not_given("a host's DHCP client", missing(NET_RAW)) if wanted else []

    def create(self, wanted: Sequence[Resource], done: Callable[[Resource], None]) -> None:
        busybox = program("busybox")
        if busybox is None:
            raise MissingError("busybox is not installed", _INSTALL_BUSYBOX)
        note_start(self._scope, {resource.key: None for resource in wanted})
        for resource in wanted:
            assert isinstance(resource, DhcpClient)
            directory = self._scope.run / "hosts" / resource.host
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            # A lost first DISCOVER costs one second and not udhcpc's usual three.
            times = ["-t", "20", "-T", "1", "-A", "1"]
            asked = ["-O", "mtu", "-x", f"hostname:{resource.host}", "-s", str(_UDHCPC_SCRIPT)]
            start(
                self._scope,
                resource,
                [busybox, "udhcpc", "-f", "-i", resource.device, *times, *asked],
                log=self._log(resource),
                cwd=directory,
                capabilities=_CAPABILITIES,
                namespace=self._scope.namespace(resource.host),
                daemon=True,
            ).close()
            done(resource)

    def update(self, wanted: Sequence[Update], done: Callable[[Resource], None]) -> None:
        """Never called: a DHCP client has no live field."""
        raise NotImplementedError

    def delete(self, unwanted: Sequence[Resource], done: Callable[[Resource], None]) -> None:
        end(self._scope, processes_of(self._scope, [old.key for old in unwanted]))
        for old in unwanted:
            assert isinstance(old, DhcpClient)
            directory = self._scope.run / "hosts" / old.host
            self._log(old).unlink(missing_ok=True)
            for part in ("resolv", "servers"):
                (directory / f"{part}.{old.device}").unlink(missing_ok=True)
            done(old)

    def _log(self, client: DhcpClient) -> Path:
        return self._scope.run / "hosts" / client.host / f"udhcpc-{client.device}.log"


def nic_key(mac: str) -> str:
    """What `note_start` calls a NIC of a guest that runs."""
    return f"nic:{mac}"


def note_start(scope: Scope, consoles: Mapping[str, Path | None]) -> None:
    """Write into dnsmasq's logs that these guests, hosts or NICs start, and how much their guests
    have written to their consoles by now: `leases` reads on from there.
    """
    text = "".join(f"netorch: {key} starts{_at(log)}\n" for key, log in consoles.items()).encode()
    for path in scope.run.glob("dnsmasq-*.log"):
        # One write at the end of the file: dnsmasq's own lines, which it appends too, stay whole.
        with path.open("ab", buffering=0) as log:
            log.write(text)


def _at(console: Path | None) -> str:
    return f" at {console.stat().st_size}" if console is not None and console.exists() else ""


def _why(directory: str) -> str:
    """Why it can't be served, "" if it can."""
    try:
        os.scandir(directory).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _not_given(program: str, capabilities: Sequence[str]) -> list[str]:
    return [
        f"{program} can't run here: that needs CAP_{name} "
        f"(in a container, start it with `--cap-add {name}`; or use --private)"
        for name in capabilities
    ]


def _refusal(resource: Dnsmasq, child: Child) -> NetorchError:
    """Why dnsmasq did not start, from its own words."""
    words = child.output().removeprefix("dnsmasq: ").strip() or "it says nothing"
    message = f"failed to create dnsmasq for {resource.network}: {words}"
    if "already in use" not in words.lower():
        return NetorchError(message)
    ports = (67,) if "dhcp" in words.lower() else (53,)
    holders = ", ".join(dict.fromkeys(holder for port in ports for holder in port_holders(port)))
    hint = f"port {ports[0]} is held by {holders}" if holders else "another process has the port"
    return KernelError(message, 98, f"{hint}; stop it, or let it leave the lab's bridges alone")


def port_holders(port: int) -> Iterator[str]:
    """The processes that have a port of this network namespace: `dnsmasq (process 4711)`."""
    inodes = set()
    for table in ("udp", "tcp", "udp6", "tcp6"):
        try:
            lines = Path(f"/proc/thread-self/net/{table}").read_text().splitlines()[1:]
        except FileNotFoundError:
            continue  # a kernel without IPv6
        # proc_net_tcp.txt: local address and port in hexadecimal is the 2nd field, the inode the
        # 10th.
        fields = (line.split() for line in lines)
        inodes |= {f[9] for f in fields if int(f[1].rpartition(":")[2], 16) == port}
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            if any(os.readlink(fd.path) in wanted for fd in os.scandir(f"/proc/{name}/fd")):
                yield f"{Path(f'/proc/{name}/comm').read_text().strip()} (process {name})"
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue  # gone, or not ours to look at
