"""Leases, and waiting until every guest and host has its own.

A node is ready when dnsmasq has written its lease; for one that this apply started, or a NIC that
it plugged or gave its link back, the lease has to be newer than that. That is read from dnsmasq's
log, where `services.note_start` leaves a line when a node or NIC starts: what the log says of the
MAC after that line is how far it has come

    nothing -> DHCPDISCOVER -> DHCPOFFER -> DHCPREQUEST -> DHCPACK (and the lease)

Nothing is polled: dnsmasq's log and leases are files that inotify tells of, and the end of a
process shows on its pidfd. A process that ends fails the wait at once. When the deadline passes,
the reason for each late node is the first step without evidence.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from netorch.errors import ReadyError
from netorch.planner import Plan, Update
from netorch.resources import DhcpClient, Guest, Tap, Veth
from netorch.state import State
from netorch.system.processes import leaders, marked
from netorch.system.scope import Scope
from netorch.system.services import nic_key

if TYPE_CHECKING:
    from netorch.system.watch import Watch

# dnsmasq 2.90, src/rfc2131.c, log_packet(): TYPE(interface) [address] mac ...
_PACKET = re.compile(r"(DHCP[A-Z]+)\([^)]*\) (?:[\d.]+ )?([0-9a-f]{2}(?::[0-9a-f]{2}){5})")
_CONSOLE_SECONDS = 10.0
_TAIL = 1 << 16  # bytes of a console's log
_STARTED = re.compile(r"netorch: (\S+) starts(?: at (\d+))?")


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """A DHCP lease. `expires` is in seconds since 1970, 0 for never; `name` may be ""."""

    network: str
    expires: int
    mac: str
    address: str
    name: str
    client_id: str


class _Wanted(NamedTuple):
    """A lease that is waited for. `key` is that of the process which asks for it."""

    node: str
    key: str
    network: str
    mac: str
    links: tuple[str, ...]  # the lab's end of the node's cable, and the bridge that it is in
    one_is_enough: bool = False  # of the node's leases
    settled: Path | None = None  # what a host's udhcpc.sh writes once the address is in place
    console: Path | None = None  # where tiny says so


def parse(text: str, network: str) -> list[Lease]:
    """The IPv4 leases in dnsmasq's lease file; a line that is not finished yet is left out."""
    found = []
    for line in text.splitlines(keepends=True):
        # dnsmasq 2.90, src/lease.c, lease_update_file(): expiry, MAC, address, name or *, client id
        # or *
        fields = line.split()
        if len(fields) == 5 and line.endswith("\n") and fields[1].count(":") == 5:
            expires, mac, address, name, client_id = (word.removeprefix("*") for word in fields)
            found.append(
                Lease(
                    network=network,
                    expires=int(expires),
                    mac=mac,
                    address=address,
                    name=name,
                    client_id=client_id,
                )
            )
    return found


def read(scope: Scope) -> list[Lease]:
    """All leases of the lab, by network and address."""
    return read_in(scope.run)


def read_in(run: Path) -> list[Lease]:
    """All leases of the lab with this run directory, by network and address."""
    found = []
    for path in run.glob("dnsmasq-*.leases"):
        if not path.with_suffix(".conf").exists():
            continue  # of a network that the lab no longer has
        network = path.name.removeprefix("dnsmasq-").removesuffix(".leases")
        found += parse(path.read_text(), network)
    return sorted(
        found, key=lambda lease: (lease.network, tuple(map(int, lease.address.split("."))))
    )


def wait_ready(
    scope: Scope, desired: State, started: set[str], seconds: float, progress: Callable[[str], None]
) -> list[Lease]:
    """Wait until all guests and hosts of `desired` that ask for addresses have them; the leases.

    `started` has the keys of the processes that were just started, and those of `asking_anew`: a
    lease from before counts only for the others.
    Raises ReadyError, which names for each late node the step that is late.
    """
    wanted = list(_wanted(scope, desired))
    if not wanted:
        return []
    started = {key for key in started if key in desired or key.startswith(nic_key(""))}
    from netorch.system.watch import Watch

    with Watch() as watch:
        return _Wait(scope, wanted, started, progress).until(time.monotonic() + seconds, watch)


def _wanted(scope: Scope, desired: State) -> Iterator[_Wanted]:
    for guest in desired.of(Guest):
        for nic in guest.nics:
            if nic.link == "down":
                continue
            tap = desired.get(guest.tap_key(nic))
            if isinstance(tap, Tap) and tap.network in guest.networks:
                # Many an image asks on its first NIC only; tiny is known to ask on all, and
                # cloud-init is told to.
                one = guest.image != "tiny" and not guest.boot.seed
                links = (tap.name, tap.bridge)
                console = None if one else scope.run / "guests" / guest.name / "serial.log"
                yield _Wanted(
                    guest.name, guest.key, tap.network, nic.mac, links, one, console=console
                )
    for client in desired.of(DhcpClient):
        veth = desired.get(client.needs[0])
        if isinstance(veth, Veth) and f"dnsmasq:{veth.network}" in desired:
            links = (veth.name, veth.bridge)
            settled = scope.run / "hosts" / client.host / f"resolv.{client.device}"
            yield _Wanted(client.host, client.key, veth.network, veth.mac, links, settled=settled)


def asking_anew(plan: Plan) -> Iterator[str]:
    """The keys (`services.nic_key`) of NICs that running guests were given, or that changed their
    network or link.
    """
    for action in plan:
        if isinstance(action, Update) and isinstance(action.old, Guest):
            assert isinstance(action.new, Guest)
            before = {nic.mac: nic for nic in action.old.nics}
            for nic in action.new.nics:
                old = before.get(nic.mac)
                if old is None or any(
                    getattr(nic, field) != getattr(old, field)
                    for field in ("hardware", "network", "link")
                ):
                    yield nic_key(nic.mac)


class _Log:
    """dnsmasq's log of one network, followed; `steps` is the last DHCP message by MAC, `consoles`
    how long the log of its guest's console was when it started.
    """

    def __init__(self, path: Path, macs: dict[str, list[str]]) -> None:
        self.path = path
        self.steps: dict[str, str] = {}
        self.consoles: dict[str, int] = {}
        self._macs = macs
        self._position = 0

    def follow(self) -> None:
        try:
            with self.path.open("rb") as log:
                log.seek(self._position)
                whole, newline, _unfinished = log.read().rpartition(b"\n")
        except FileNotFoundError:
            return
        self._position += len(whole) + len(newline)
        for line in whole.decode(errors="replace").splitlines():
            if packet := _PACKET.search(line):
                self.steps[packet[2]] = packet[1]
            elif start := _STARTED.search(line):
                for mac in self._macs.get(start[1], ()):
                    self.steps.pop(mac, None)
                    self.consoles[mac] = int(start[2] or 0)


class _Wait:
    def __init__(
        self,
        scope: Scope,
        wanted: Sequence[_Wanted],
        started: set[str],
        progress: Callable[[str], None],
    ) -> None:
        self._scope = scope
        self._late = list(wanted)
        self._started = started
        self._progress = progress
        macs: dict[str, list[str]] = {}
        for one in wanted:
            macs.setdefault(one.key, []).append(one.mac)
            macs[nic_key(one.mac)] = [one.mac]
        networks = dict.fromkeys(one.network for one in wanted)
        self._logs = {n: _Log(scope.run / f"dnsmasq-{n}.log", macs) for n in networks}
        self._asking: set[_Wanted] = set()
        self._found: dict[_Wanted, Lease] = {}
        self._patience: dict[_Wanted, float] = {}  # until when a console is given time

    def until(self, deadline: float, watch: "Watch") -> list[Lease]:
        settled = {p.parent for one in self._late for p in (one.settled, one.console) if p}
        for directory in (self._scope.run, *settled):
            if directory.is_dir():
                watch.directory(directory)
        for key in sorted(self._started):
            if key.startswith("guest:"):
                self._progress(f"{key.removeprefix('guest:')} starts")
        self._look()
        if self._late:
            self._watch_late(watch)
        while self._late:
            left = deadline - time.monotonic()
            pause = min(left, _CONSOLE_SECONDS) if self._patience else left
            changed, ended = watch.wait(pause) if left > 0 else (set(), set())
            if gone := self._watch_again(ended, watch):
                raise self._ended(gone)
            if left <= 0:
                self._look()
            if left <= 0 and self._late:
                raise self._too_late()
            if changed or self._patience:
                self._look()
        return list(self._found.values())

    def _watch_late(self, watch: "Watch") -> None:
        running = leaders(marked(self._scope))
        needed = {one.key for one in self._late} | {f"dnsmasq:{n}" for n in self._logs}
        if gone := {key for key in needed if key not in running}:
            raise self._ended(gone)
        for key in needed:
            for process in running[key]:
                watch.process(process, key)

    def _watch_again(self, ended: set[str], watch: "Watch") -> set[str]:
        """Those that have ended for good. A daemon becomes one by forks: who was seen may have been
        the parent of the process that stays.
        """
        running = leaders(marked(self._scope)) if ended else {}
        for key in ended & running.keys():
            for process in running[key]:
                watch.process(process, key)
        return ended - running.keys()

    def _look(self) -> None:
        """See who has come further: by dnsmasq's logs and leases."""
        for log in self._logs.values():
            log.follow()
        leases = {(lease.network, lease.mac): lease for lease in read(self._scope)}
        for one in list(self._late):
            if one not in self._late:
                continue  # another lease of the same node was enough
            step = self._logs[one.network].steps.get(one.mac, "")
            lease = leases.get((one.network, one.mac))
            started = not self._started.isdisjoint((one.key, nic_key(one.mac)))
            if step and started and one not in self._asking:
                self._asking.add(one)
                self._progress(f"{one.node} asks for an address on {one.network}")
            fresh = step == "DHCPACK" or not started
            if lease and fresh and self._has_settled(one, lease, started):
                self._late.remove(one)
                self._patience.pop(one, None)
                self._found[one] = lease
                if one.one_is_enough:
                    self._late = [other for other in self._late if other.key != one.key]
                if started:
                    self._progress(f"{one.node} has {lease.address}")

    def _has_settled(self, one: _Wanted, lease: Lease, started: bool) -> bool:
        """Whether the node has its address in place. dnsmasq's lease is a moment older; a tiny
        whose console says nothing for a while is taken at the lease's word.
        """
        if one.settled is not None:
            return one.settled.exists()
        if one.console is None or not started:
            return True
        began = self._logs[one.network].consoles.get(one.mac, 0)
        if f" {lease.address}/" in _tail(one.console, began):
            return True
        until = self._patience.setdefault(one, time.monotonic() + _CONSOLE_SECONDS)
        return time.monotonic() >= until

    def _ended(self, keys: Iterable[str]) -> ReadyError:
        from netorch.system.late import log_end

        lines = []
        for key in sorted(keys):
            kind, name, device = (*key.split(":"), "")[:3]
            run = self._scope.run
            guest = run / "guests" / name
            what, logs = {
                "dnsmasq": (f"dnsmasq for {name}", [run / f"dnsmasq-{name}.log"]),
                "guest": (f"QEMU of {name}", [guest / "qemu.log", guest / "serial.log"]),
                "dhcp": (
                    f"the DHCP client of {name}",
                    [run / "hosts" / name / f"udhcpc-{device}.log"],
                ),
            }[kind]
            lines.append(f"{what} has ended{''.join(log_end(log) for log in logs)}")
        return ReadyError("\n".join(lines), "the lab's other parts are up: see `netorch status`")

    def _too_late(self) -> ReadyError:
        from netorch.system.late import guest_reason, host_reason

        lines = []
        for one in self._late:
            step = self._logs[one.network].steps.get(one.mac, "")
            if one.key.startswith("guest:"):
                reason = guest_reason(self._scope, one.node, one.links, step)
            else:
                reason = host_reason(one.links, step)
            lines.append(f"{one.node} has no lease of network {one.network} yet: {reason}")
        return ReadyError("\n".join(lines), "the lab is up: `netorch status` shows the leases")


def _tail(log: Path, began: int) -> str:
    """The end of what was written to a log since it was `began` bytes long."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(began if began <= size else 0, size - _TAIL))  # the keeper may cut it
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
