"""Measuring commands: each turn in fresh namespaces, contenders in turns, medians and spread.

A turn is a forked child in a network and a mount namespace of its own. It runs a contender's
commands one after the other and reports, for each, the wall-clock milliseconds from spawn to exit,
and the peak resident memory. Contenders take turns, so that what else the machine does meets all of
them alike.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from netorch.system import namespaces

SECONDS = 600  # for one turn


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
    """Runs commands and notes what they cost, by label."""

    def __init__(self) -> None:
        self.costs: dict[str, Cost] = {}

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

    def note(self, label: str, ms: float, mib: float = 0.0) -> None:
        self.costs[label] = Cost(ms, mib)


def measure(
    contenders: Mapping[str, Turn], turns: int, scratch: Path, say: Callable[[str], None]
) -> dict[str, dict[str, Figure]]:
    """The figures of each contender by label. The first turn of each is not counted."""
    costs: dict[str, list[dict[str, Cost]]] = {name: [] for name in contenders}
    for turn in range(turns + 1):
        for name, contender in contenders.items():
            costs[name].append(_in_namespaces(contender, scratch / f"{name}-{turn}"))
            say(f"{turn}/{turns} {name}: " + _words(costs[name][-1]))
    return {name: _figures(found[1:]) for name, found in costs.items()}


def _figures(turns: Sequence[Mapping[str, Cost]]) -> dict[str, Figure]:
    labels = dict.fromkeys(label for turn in turns for label in turn)
    figures = {}
    for label in labels:
        found = [turn[label] for turn in turns if label in turn]
        ms = [cost.ms for cost in found]
        mib = statistics.median(cost.mib for cost in found)
        figures[label] = Figure(statistics.median(ms), min(ms), max(ms), mib, len(ms))
    return figures


def _in_namespaces(turn: Turn, directory: Path) -> dict[str, Cost]:
    directory.mkdir(parents=True)
    reader, writer = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        status = 1
        try:
            signal.alarm(SECONDS)
            namespaces.unshare(namespaces.NEWNET | namespaces.NEWNS)
            namespaces.mount(None, "/", flags=0x4000 | 0x40000)  # MS_REC | MS_PRIVATE
            namespaces.loopback_up()
            clock = Clock()
            turn(directory, clock)
            os.write(writer, json.dumps(clock.costs).encode())
            status = 0
        except SystemExit as error:
            sys.stderr.write(f"{error}\n")
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _pid, status = os.waitpid(pid, 0)
    if status != 0:
        raise SystemExit(f"a turn in {directory} failed")
    return {label: Cost(*cost) for label, cost in json.loads(text).items()}


def _words(costs: Mapping[str, Cost]) -> str:
    return ", ".join(f"{label} {cost.ms:.1f} ms" for label, cost in costs.items())


def exponent(points: Iterable[tuple[float, float]]) -> float:
    """The slope of a straight line through the logarithms: 1 is linear."""
    import math

    logs = [(math.log(x), math.log(y)) for x, y in points]
    return statistics.linear_regression([x for x, _ in logs], [y for _, y in logs]).slope
