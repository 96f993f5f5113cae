"""The machine of a test of whole labs: apply, kill, compare.

A test's body runs in fresh namespaces (tests/isolation.py); `LabMachine` gives it directories of
its own, a way out (`wan`, for NAT), and remembers what was there before, so that "nothing is left"
is a comparison. Commands run either as the real command line, or by `labs.apply` in a forked child
that can be killed at a chosen moment.
"""

import itertools
import json
import os
import pickle
import random
import re
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO

import pytest

from netorch import cli, labs, report
from netorch.engine import Progress
from netorch.errors import ApplyError, KernelError
from netorch.labs import PlaceChoice
from netorch.planner import Action, Plan
from netorch.resources import decode
from netorch.system import (  # the lazily imported ones here: a hundred children then need not
    System,
    facts,
    firewall,
    guests,
    hosts,
    leases,
    marks,
    namespaces,
    place_birth,
    services,
)
from netorch.system import (
    links as system_links,
)
from netorch.system.places import marked_processes
from netorch.system.scope import Scope, current_place
from netorch.topology import load
from tests import isolation, untouched

IMPORTED = (facts, firewall, guests, hosts, leases, system_links, marks, place_birth, services)
PLACES: tuple[PlaceChoice, ...] = ("current", "private")
WAN = "wan0"
_DYING = 30.0  # seconds that a process which was killed is given to go, on a busy machine


class Done(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Refused(NamedTuple):
    """What a child's ApplyError said."""

    message: str
    hint: str
    undone: tuple[str, ...]
    left: tuple[str, ...]


class Forked:
    """A command line in a forked child. `output` is what it says on both its streams."""

    def __init__(self, pid: int, output: TextIO) -> None:
        self.pid = pid
        self.output = output
        self.status: int | None = None


class LabMachine:
    """`name` is unique to this test, since private labs of one user see each other."""

    def __init__(self, name: str, tmp_path: Path, place: PlaceChoice) -> None:
        self.name = name
        self.place = place
        self.run_base = tmp_path / "run"
        self.disks_base = tmp_path / "disks"
        self.file = tmp_path / "lab.toml"
        os.environ["NETORCH_RUN_DIR"] = str(self.run_base)
        os.environ["NETORCH_DISK_DIR"] = str(self.disks_base)
        # Those of tests before this one may go meanwhile.
        self._older = {_pid(line) for line in untouched.machine()["processes"]}
        for line in (
            f"link add {WAN} type veth peer name far0",
            f"link set {WAN} addrgenmode none",
            "link set far0 addrgenmode none",
            "link set far0 up",
            f"addr add 10.99.0.2/24 dev {WAN}",
            f"link set {WAN} up",
            "route add default via 10.99.0.1",
        ):
            isolation.ip(*line.split())
        self.before = self.look()

    @property
    def run(self) -> Path:
        return self.run_base / self.name

    @property
    def scope(self) -> Scope:
        """Of the lab in the current place."""
        return Scope(
            lab=self.name,
            place=current_place(),
            run=self.run,
            disks=self.disks_base / self.name,
        )

    def write(self, text: str, lab: str = "timeout = 60") -> None:
        """Write the topology file, with this lab's name and `lab` in its table [lab]."""
        self.file.write_text(f'[lab]\nname = "{self.name}"\n{lab}\n{text}')

    def look(self) -> dict[str, set[str]]:
        """All that a lab could leave.

        Without what the kernel does by itself, up to a second after a carrier came or went: it
        tells of it, passes that on from ports to bridges, and then routes IPv6's multicast there.
        """
        files = {str(p) for base in (self.run_base, self.disks_base) for p in [base, *_below(base)]}
        machine = untouched.machine()
        return {
            **machine,
            "links": {_without_carrier(line) for line in machine["links"]},
            "routes": {r for r in machine["routes"] if not r.startswith("type=multicast dst=ff00")},
            "processes": {
                line
                for line in machine["processes"]
                if _pid(line) not in self._older and not line.endswith(f" of lab {self.name}")
            },
            "files": {path for path in files if os.path.lexists(path)},
            "marked processes": {f"{pid} {resource}" for pid, resource in self._marked()},
        }

    def leftovers(self) -> list[str]:
        """What differs from before the lab. Who is dying (PID 1 of a place whose maker was killed)
        may do so first.
        """
        pids = {pid for pid, marks in marked_processes() if marks["NETORCH_LAB"] == self.name}
        left = self.look()["processes"] - self.before["processes"]
        for pid in {*pids, *map(_pid, left)}:
            with suppress(ProcessLookupError):
                pidfd = os.pidfd_open(pid)
                namespaces.wait_exit(pidfd, _DYING)
                os.close(pidfd)
        return untouched.differences(self.before, self.look())

    def netorch(self, *arguments: str, env: dict[str, str] | None = None) -> Done:
        """Run the command line."""
        ended = subprocess.run(
            [sys.executable, "-m", "netorch", *arguments],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **(env or {})},
            timeout=120,
        )
        return Done(ended.returncode, ended.stdout, ended.stderr)

    def popen(self, *arguments: str) -> subprocess.Popen[str]:
        """Start the command line in a process group of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "netorch", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def apply_arguments(self) -> list[str]:
        return ["apply", *(["--private"] if self.place == "private" else []), str(self.file)]

    def apply(self, env: dict[str, str] | None = None) -> Done:
        return self.netorch(*self.apply_arguments(), env=env)

    @contextmanager
    def apply_in_fork(self, printer: type[report.Printer]) -> Iterator["Forked"]:
        """Apply by the command line in a forked child, in a process group of its own, which tells
        its progress to such a Printer. The block has to read all that it says.
        """
        receiving, sending = os.pipe()
        child = os.fork()
        if child == 0:
            _run_command_line(self.apply_arguments(), printer, sending)
        os.close(sending)
        with os.fdopen(receiving) as output:
            command = Forked(child, output)
            yield command
        command.status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def up(
        self, progress: Progress | None = None, system: Callable[[System], Any] = lambda s: s
    ) -> list[str]:
        """`labs.apply` in a child; what it did, in words. Raises what it raised."""
        result = in_child(lambda: self.apply_here(progress or Progress(), system))
        assert isinstance(result, list), result
        return result

    def apply_here(
        self, progress: Progress, system: Callable[[System], Any] = lambda s: s
    ) -> list[str]:
        """`labs.apply` in this process, which moves into a private place. `system` may wrap."""
        make = labs.machine
        labs.machine = lambda *a, **k: system(make(*a, **k))
        outcome = labs.apply(load(self.file), str(self.file), self.place, progress)
        return outcome.plan.describe()

    def differences(self) -> list[str]:
        """`status` in a child: what is not in sync, as `missing KEY`."""

        def look() -> list[str]:
            standing = labs.status(labs.find(self.name))
            rows = [f"{s} {key}" for s, key, _ in standing.rows() if s != "ok"]
            return rows if standing.in_sync else [*rows, "not in sync"]

        result = in_child(look)
        assert isinstance(result, list), result
        return result

    def down(self) -> None:
        """Teardown in a child; then nothing may be left. A lab that never was needs none."""

        def take_away() -> list[str]:
            there = [lab for lab in labs.labs() if lab.name == self.name]
            return [line for lab in there for line in labs.teardown(lab, Progress())]

        errors = in_child(take_away)
        assert errors == [], errors
        left = self.leftovers()
        assert not left, "\n".join(left)

    def processes(self) -> dict[str, int]:
        """The lab's processes: pid by the key of the resource."""
        return {decode(resource).key: pid for pid, resource in self._marked() if resource}

    def _marked(self) -> Iterator[tuple[int, str]]:
        """The lab's processes with the resources that they were started for, but for those that
        such a process starts with its own marks: a DHCP client's script is gone in a moment.
        """
        found = {
            pid: marks.get("NETORCH_RESOURCE", "")
            for pid, marks in marked_processes()
            if marks["NETORCH_LAB"] == self.name
        }
        for pid, resource in found.items():
            with suppress(FileNotFoundError, ProcessLookupError):  # gone meanwhile
                # proc(5): the name in parentheses may hold anything; then state and parent
                parent = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1]
                if not resource or found.get(int(parent)) != resource:
                    yield pid, resource


@pytest.fixture
def lab_machine(tmp_path: Path) -> Iterator[Callable[..., LabMachine]]:
    """Makes the LabMachine; to be called in the test's body, which is where the namespaces are."""
    name = f"t{os.getpid()}-{next(_numbers)}"

    def make(place: PlaceChoice = "current") -> LabMachine:
        isolation.require_tun()
        return LabMachine(name, tmp_path, place)

    yield make
    # What a test that failed has left
    for pid, variables in marked_processes():
        if variables["NETORCH_LAB"] == name:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


_numbers = itertools.count()


def links() -> dict[str, int]:
    """The links of this namespace: index by name."""
    return {link["ifname"]: link["ifindex"] for link in isolation.ip_json("link")}


def without_numbers(look: dict[str, set[str]]) -> dict[str, set[str]]:
    """A look without what changes when an object is made again (indexes, pids, the MAC addresses
    that the kernel chooses), what a host's DHCP client then does by itself, and leases, which stay.
    """
    return {
        **look,
        "links": {re.sub("(ifindex|address)=[^ ]+ ", "", line) for line in look["links"]},
        "files": {
            path for path in look["files"] if "/hosts/" not in path and not path.endswith(".leases")
        },
        "processes": set(),
        "marked processes": {line.partition(" ")[2] for line in look["marked processes"]},
    }


class At(Progress):
    """Does something after the n-th action that is carried out; 0: when the plan is known."""

    def __init__(self, number: int, act: Callable[[], None]) -> None:
        self._left = number
        self._act = act

    def planned(self, plan: Plan) -> None:
        if self._left == 0 and plan:
            self._act()

    def done(self, action: Action) -> None:
        self._left -= 1
        if self._left == 0:
            self._act()


class Made(Progress):
    """Does something when the resource with this key is there."""

    def __init__(self, key: str, act: Callable[[], None]) -> None:
        self._key = key
        self._act = act

    def done(self, action: Action) -> None:
        if action.key == self._key:
            self._act()


class Waiting(Progress):
    """Does something at the first line about the guest vm1, which is coming to life."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act

    def waiting(self, line: str) -> None:
        if line.startswith("vm1 "):
            self._act()


def stops_dnsmasq(machine: LabMachine) -> type[report.Printer]:
    """A Printer that stops dnsmasq as soon as it is there, before any client asks it."""

    class Stopping(report.Printer):
        def done(self, action: Action) -> None:
            if action.key == "dnsmasq:default":
                os.kill(machine.processes()[action.key], signal.SIGSTOP)
            super().done(action)

    return Stopping


def _run_command_line(
    arguments: Sequence[str], printer: type[report.Printer], output: int
) -> NoReturn:
    status = 99
    try:
        os.setsid()
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        report.Printer = printer  # type: ignore[misc]
        sys.argv = ["netorch", *arguments]
        cli.main()
    except SystemExit as end:
        status = int(str(end.code))
    finally:  # also if the session has died: this child must not go on with its tests
        os._exit(status)


def end_now(pid: int) -> None:
    """SIGKILL a process, and wait until it is dead."""
    pidfd = os.pidfd_open(pid)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    namespaces.wait_exit(pidfd)
    os.close(pidfd)


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class FailingAt:
    """The machine, but its n-th action fails. Steps are carried out one action at a time."""

    def __init__(self, system: System, number: int) -> None:
        self._system = system
        self._left = number
        self.observe, self.check = system.observe, system.check

    def execute(self, step: Sequence[Action], done: Callable[[Action], None]) -> None:
        for action in step:
            self._left -= 1
            if self._left == 0:
                raise KernelError(f"failed to {action.describe()}: no luck", 5)
            self._system.execute([action], done)


def kill_at_call(number: int) -> None:
    """End this process with SIGKILL at its n-th call into the kernel from here on.

    What counts are calls of Python's modules posix and fcntl, and methods of sockets.
    """
    me = os.getpid()
    left = number

    def count(frame: object, event: str, function: Any) -> None:
        nonlocal left
        if event != "c_call":
            return
        owner = type(getattr(function, "__self__", None)).__module__
        if getattr(function, "__module__", "") in ("posix", "fcntl") or owner == "_socket":
            left -= 1
            if left == 0 and os.getpid() == me:
                kill_self()

    sys.setprofile(count)


def calls_into_the_kernel(body: Callable[[], object]) -> int:
    """How many of these calls `body` makes, in a child."""

    def counted() -> int:
        total = 0

        def count(frame: object, event: str, function: Any) -> None:
            nonlocal total
            owner = type(getattr(function, "__self__", None)).__module__
            known = getattr(function, "__module__", "") in ("posix", "fcntl")
            total += event == "c_call" and (known or owner == "_socket")

        sys.setprofile(count)
        body()
        sys.setprofile(None)
        return total

    result = in_child(counted)
    assert isinstance(result, int), result
    return result


def chosen_seed() -> int:
    """Another one each time; in CI always the same, so that what fails there can be looked into."""
    return int(os.environ.get("SEED", 27753 if "CI" in os.environ else random.randrange(1 << 16)))


def said(line: str) -> None:
    """Into the report of the test, should it fail."""
    sys.stdout.write(f"{line}\n")


KILLED = "killed"


def in_child(body: Callable[[], object]) -> object:
    """What `body` returns in a forked child; KILLED if SIGKILL ended it, a Refused for an
    ApplyError. Raises AssertionError with the traceback of any other exception.
    """
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        _run_and_exit(body, sending)
    os.close(sending)
    with os.fdopen(receiving, "rb") as pipe:
        sent = pipe.read()
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return KILLED
    verb, value = pickle.loads(sent) if sent else ("raised", f"ended with wait status {status}")
    if verb == "raised":
        raise AssertionError(value)
    return value


def _run_and_exit(body: Callable[[], object], sending: int) -> NoReturn:
    try:
        answer = _answered(body)
        sys.setprofile(None)
        with os.fdopen(sending, "wb") as pipe:
            pickle.dump(answer, pipe)
    finally:  # also if the session has died: this child must not go on with its tests
        os._exit(0)


def _answered(body: Callable[[], object]) -> tuple[str, object]:
    try:
        return "returned", body()
    except ApplyError as error:
        refused = Refused(error.message, error.hint, tuple(error.undone), tuple(error.left))
        return "returned", refused
    except BaseException:
        return "raised", traceback.format_exc()


def settle_carriers() -> None:
    """Have the kernel tell now of each change of a carrier that it would tell of up to a second
    later (its linkwatch): a tap that nobody has opened, a bridge whose ports came and went.

    Asking for one link by its name does that since Linux 6.8, for a list of links not. An older
    kernel is waited for, as far as it shows: a link that is up has either a carrier or the flag
    NO-CARRIER by then. Twice, since a bridge's own change may follow from that of a port.
    """
    monitor = subprocess.Popen(["ip", "monitor", "link"], stdout=subprocess.PIPE)
    assert monitor.stdout is not None
    deadline = time.monotonic() + 60
    before: list[object] = []
    try:
        while time.monotonic() < deadline:
            names = [link["ifname"] for link in isolation.ip_json("link")]
            links = [link for name in names for link in isolation.ip_json("link", "show", name)]
            flags = [(link["ifname"], link["operstate"], link["flags"]) for link in links]
            up = [{"NO-CARRIER", "LOWER_UP"} & {*words} for *_, words in flags if "UP" in words]
            told = all(len(carrier) == 1 for carrier in up)
            if told and flags == before:
                return
            before = [*flags]
            # It may have been told before the monitor listened: look again after a while anyway.
            if not told and select.select([monitor.stdout], [], [], 0.5)[0]:
                os.read(monitor.stdout.fileno(), 1 << 16)
        raise AssertionError(f"the kernel does not tell of a carrier: {before}")
    finally:
        monitor.kill()
        monitor.communicate()


class Monitor:
    """`ip monitor` and `nft monitor`, from the moment when both are known to listen.

    Both are told to say something by a change of the test's own, a marker, until they do; what they
    say before the last marker and is not about markers is what others changed.
    """

    _MARKER = "marker"

    def __init__(self) -> None:
        settle_carriers()
        self._number = 0
        self._ip = self._start("ip", "-oneline", "monitor", "link", "address", "route")
        self._nft = self._start("nft", "monitor")
        for monitor, mark in ((self._ip, self._mark_links), (self._nft, self._mark_rules)):
            assert monitor.stdout is not None
            late = time.monotonic() + 60
            while True:
                mark()
                if _readable(monitor, 0.1):
                    break
                assert time.monotonic() < late, "the monitor says nothing"

    def changes(self) -> list[str]:
        """What was said; ends the monitors."""
        said: list[str] = []
        for monitor, mark in ((self._ip, self._mark_links), (self._nft, self._mark_rules)):
            last = mark()
            assert monitor.stdout is not None
            for line in monitor.stdout:
                if last in line:
                    break
                if self._MARKER not in line and not line.startswith("# new generation"):
                    said.append(line.rstrip())
            monitor.kill()
            monitor.communicate()
        return said

    @staticmethod
    def _start(*argv: str) -> subprocess.Popen[str]:
        return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, bufsize=1)

    def _mark_links(self) -> str:
        self._number += 1
        name = f"{self._MARKER}{self._number}x"
        isolation.ip("link", "add", name, "type", "bridge")
        isolation.ip("link", "del", name)
        return name

    def _mark_rules(self) -> str:
        self._number += 1
        name = f"{self._MARKER}{self._number}x"
        subprocess.run(["nft", f"add table ip {name}; delete table ip {name}"], check=True)
        return name


def _readable(process: subprocess.Popen[str], seconds: float) -> bool:
    import select

    assert process.stdout is not None
    return bool(select.select([process.stdout.fileno()], [], [], seconds)[0])


@contextmanager
def foreign_link(name: str, *words: str) -> Iterator[None]:
    """A link that is nobody's we know."""
    isolation.ip("link", "add", name, *words)
    yield
    isolation.ip("link", "del", name)


def _pid(line: str) -> int:
    """Of a line about a process (tests/untouched.py)."""
    return int(line.partition(" ")[0])


def _without_carrier(link: str) -> str:
    return re.sub("'(NO-CARRIER|LOWER_UP)', |, '(NO-CARRIER|LOWER_UP)'", "", link)


def _below(base: Path) -> list[Path]:
    return list(base.rglob("*")) if base.is_dir() else []
