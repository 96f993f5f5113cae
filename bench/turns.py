"""Measuring commands: each turn in fresh namespaces, contenders in turns, medians and spread.

A turn is a forked child in network, mount and PID namespaces of its own, with empty directories in
place of /run/netns and /run/netorch. It runs a contender's commands one after the other and
reports, for each, the wall-clock milliseconds from spawn to exit, and the peak resident memory.
Contenders take turns, so that what else the machine does meets all of them alike.

Nothing outlives a turn, however it ends: the first process of its PID namespace does nothing but
reap orphans and wait for the turn, the kernel ends the rest with it, and it is killed when the
bench is. Links, mounts and the names in /run/netns go with the namespaces.
"""

import ctypes
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

from netorch.system import namespaces

SECONDS = 300  # for one turn
HIDDEN = ("/run/netns", "/run/netorch")  # where a netorch of root leaves names

_PR_SET_PDEATHSIG = 1


@contextmanager
def mount_points() -> Iterator[None]:
    """The directories that turns hide, on a machine that has none as well."""
    missing = [Path(path) for path in HIDDEN if not Path(path).exists()]
    for path in missing:
        path.mkdir(parents=True)
    try:
        yield
    finally:
        for path in missing:
            with suppress(OSError):  # somebody else has used it, or has removed it
                path.rmdir()


class Cost(NamedTuple):
    """Of one command: milliseconds, and the peak resident memory of a process of it in MiB."""

    ms: float
    mib: float


class Figure(NamedTuple):
    """Of one command over all turns."""

    ms: float  # median
    low: float
    high: float
    mib: float
    turns: int


# What a contender does in a turn: it is handed a directory of its own and a clock.
Turn = Callable[[Path, "Clock"], None]


class Clock:
    """Runs commands and notes what they cost, by label; a label may be noted more than once."""

    def __init__(self) -> None:
        self.costs: dict[str, list[Cost]] = {}

    def run(self, label: str, argv: Sequence[str], status: int = 0) -> str:
        """Run a command to its end; its output. Exits with what it said if it fails."""
        began = time.perf_counter()
        process = subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
        assert process.stdout is not None
        said = process.stdout.read()
        _pid, ended, usage = os.wait4(process.pid, 0)
        took = (time.perf_counter() - began) * 1000
        process.returncode = os.waitstatus_to_exitcode(ended)
        if process.returncode != status:
            sys.exit(f"{' '.join(argv)}: {process.returncode}\n{said.decode()}")
        self.note(label, took, usage.ru_maxrss / 1024)
        return said.decode()

    def hold(self, argv: Sequence[str]) -> None:
        """Run a program that says "up" when it is, and goes down at the end of its input.

        What it takes from spawn to its "up" is noted as up, from then on to its exit as down.
        """
        began = time.perf_counter()
        process = subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.PIPE
        )
        assert process.stdout is not None
        assert process.stdin is not None
        said = []
        for line in process.stdout:
            said.append(line.decode())
            if line == b"up\n":
                break
        risen = time.perf_counter()
        process.stdin.close()
        said.append(process.stdout.read().decode())
        _pid, ended, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(ended)
        if process.returncode != 0 or "up\n" not in said:
            sys.exit(f"{' '.join(argv)}: {process.returncode}\n{''.join(said)}")
        mib = usage.ru_maxrss / 1024
        self.note("up", (risen - began) * 1000, mib)
        self.note("down", (time.perf_counter() - risen) * 1000, mib)

    def note(self, label: str, ms: float, mib: float = 0.0) -> None:
        self.costs.setdefault(label, []).append(Cost(ms, mib))


# What the commands of one turn cost, by label.
Costs = Mapping[str, Sequence[Cost]]


def measure(
    contenders: Mapping[str, Turn],
    turns: int,
    few: Mapping[str, int],
    scratch: Path,
    say: Callable[[str], None],
) -> dict[str, dict[str, Figure]]:
    """The figures of each contender by label.

    The first turn of each is not counted, except of the slow ones in `few`, which have so many, and
    if there is no other.
    """
    costs: dict[str, list[Costs]] = {name: [] for name in contenders}
    for turn in range(turns + 1):
        for number, (name, contender) in enumerate(contenders.items()):
            if turn >= few.get(name, turns + 1):
                continue
            found = _in_namespaces(name, contender, scratch / f"{number}-{turn}")
            if turn > 0 or name in few or turns == 0:
                costs[name].append(found)
            say(f"{turn}/{turns} {name}: " + _words(found))
    return {name: _figures(found) for name, found in costs.items()}


def _figures(turns: Sequence[Costs]) -> dict[str, Figure]:
    labels = dict.fromkeys(label for turn in turns for label in turn)
    figures = {}
    for label in labels:
        found = [cost for turn in turns for cost in turn.get(label, ())]
        ms = [cost.ms for cost in found]
        mib = statistics.median(cost.mib for cost in found)
        figures[label] = Figure(statistics.median(ms), min(ms), max(ms), mib, len(ms))
    return figures


def _in_namespaces(name: str, turn: Turn, directory: Path) -> Costs:
    """What `turn` noted. Exits, naming the contender, if it fails."""
    directory.mkdir(parents=True)
    reader, writer = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _child(lambda: _place(turn, directory, writer))
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _pid, status = os.waitpid(pid, 0)
    if status != 0:
        raise SystemExit(f"{name}: its turn in {directory} failed")
    return {label: [Cost(*cost) for cost in costs] for label, costs in json.loads(text).items()}


def _place(turn: Turn, directory: Path, writer: int) -> int:
    """Make the namespaces and the process that ends them all; its status."""
    namespaces.unshare(namespaces.NEWNET | namespaces.NEWNS | namespaces.NEWPID)
    namespaces.mount(None, "/", flags=namespaces.MS_REC | namespaces.MS_SLAVE)
    for path in HIDDEN:
        namespaces.mount("bench", path, "tmpfs")
    namespaces.loopback_up()
    init = os.fork()
    if init == 0:
        _child(lambda: _init(turn, directory, writer))
    os.close(writer)
    _pid, status = os.waitpid(init, 0)
    return os.waitstatus_to_exitcode(status)


def _init(turn: Turn, directory: Path, writer: int) -> int:
    """Reap whatever ends until the turn has."""
    namespaces.mount("proc", "/proc", "proc")
    worker = os.fork()
    if worker == 0:
        _child(lambda: _work(turn, directory, writer))
    os.close(writer)
    while True:
        pid, status = os.wait()
        if pid == worker:
            return os.waitstatus_to_exitcode(status)


def _work(turn: Turn, directory: Path, writer: int) -> int:
    signal.alarm(SECONDS)
    clock = Clock()
    turn(directory, clock)
    os.write(writer, json.dumps(clock.costs).encode())
    return 0


def _child(work: Callable[[], int]) -> NoReturn:
    """End this forked child with the status of `work`; die with the parent."""
    status = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        status = work()
    except SystemExit as error:
        sys.stderr.write(f"{error}\n")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(0 if status == 0 else 1)


def _words(costs: Costs) -> str:
    return ", ".join(
        f"{label} {statistics.median(cost.ms for cost in of):.1f} ms" for label, of in costs.items()
    )


def exponent(points: Iterable[tuple[float, float]]) -> float:
    """The slope of a straight line through the logarithms: 1 is linear."""
    import math

    logs = [(math.log(x), math.log(y)) for x, y in points]
    return statistics.linear_regression([x for x, _ in logs], [y for _, y in logs]).slope
