"""The pytest fixture of a two-host lab, against the bare kernel work of the same objects.

Both in one pytest session: tests with the fixture (its set-up and tear-down as pytest measures
them), and the floor: a forked child makes the same namespaces, mounts, bridge and veths with the
same addresses, by the system calls and ready-made netlink messages alone, and ends.

The kernel takes namespaces apart in the background after their last process has gone, and that
holds the lock that making links needs. So there are two figures: apart, in turns, with a pause
after each; and back to back, each in a row of its own as a test suite has it, so that each waits
for what it has left itself.

    python bench/bench_fixture.py [TURNS]
"""

import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from netorch.system import messages, namespaces
from netorch.system.messages import up
from netorch.system.netlink import Netlink

LAB = """
[networks.lan]
mode = "bridge"
[hosts.a]
nics = [{ network = "lan", address = "10.0.0.1/24" }]
[hosts.b]
nics = [{ network = "lan", address = "10.0.0.2/24" }]
"""
TESTS = f'''
import pytest
from bench.bench_fixture import floor
LAB = """{LAB}"""

@pytest.mark.parametrize("turn", range(TURNS))
def test_fixture(lab, turn):
    pass

@pytest.mark.parametrize("turn", range(TURNS))
def test_floor(turn):
    floor()
'''
PAUSE = 0.15
HOSTS = ("a", "b")
floors: list["Cost"] = []


class Cost(NamedTuple):
    """In milliseconds."""

    setup: float
    teardown: float

    @property
    def whole(self) -> float:
        return self.setup + self.teardown


class Durations:
    """A pytest plugin: the fixture's costs, beside the floor's."""

    def __init__(self, pause: float) -> None:
        self.pause = pause
        self.fixture: list[Cost] = []
        self._setup = 0.0

    def pytest_collection_modifyitems(self, items: list[pytest.Function]) -> None:
        if self.pause:
            items.sort(key=lambda item: item.callspec.params["turn"])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed:
            sys.exit(str(report.longrepr))
        if "test_fixture" in report.nodeid and report.when == "setup":
            self._setup = report.duration * 1000
        elif "test_fixture" in report.nodeid and report.when == "teardown":
            self.fixture.append(Cost(self._setup, report.duration * 1000))

    def pytest_runtest_logfinish(self) -> None:
        time.sleep(self.pause)


def floor() -> None:
    """One turn of the floor, in a child."""
    directory = tempfile.mkdtemp()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            init, seconds = _make(Path(directory))
            os.write(writer, str(seconds).encode())
            os.kill(init, signal.SIGKILL)
            os.waitpid(init, 0)
        finally:
            os._exit(0)
    os.close(writer)
    setup = float(os.read(reader, 100))
    os.close(reader)
    began = time.perf_counter()
    os.waitpid(child, 0)
    floors.append(Cost(setup * 1000, (time.perf_counter() - began) * 1000))
    os.rmdir(directory)


def _make(directory: Path) -> tuple[int, float]:
    uid, gid = os.geteuid(), os.getegid()
    group, bridge = 7, 1000
    first = _bridge(bridge, group)
    began = time.perf_counter()
    namespaces.unshare(namespaces.NEWUSER)
    for file, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{file}", "w") as opened:
            opened.write(text)
    namespaces.unshare(namespaces.NEWNET | namespaces.NEWNS | namespaces.NEWPID)
    namespaces.mount(None, "/", flags=namespaces.MS_REC | namespaces.MS_SLAVE)
    namespaces.mount("bench", directory, "tmpfs")
    namespaces.loopback_up()
    init = os.fork()
    if init == 0:
        signal.pause()
    home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    there = [_host(directory / host, home) for host in HOSTS]
    spent = time.perf_counter() - began
    # Encoding is not the kernel's: the messages name descriptors, so they are made here.
    veths = [_veth(n, bridge, group, fd) for n, fd in enumerate(there)]
    far = [_far(n) for n in range(len(HOSTS))]
    began = time.perf_counter()
    with Netlink() as netlink:
        _check(netlink.send([first]))
        _check(netlink.send(veths))
    for fd, group_of_messages in zip(there, far, strict=True):
        with Netlink(fd) as netlink:
            _check(netlink.send([group_of_messages]))
    return init, spent + time.perf_counter() - began


def _host(path: Path, home: int) -> int:
    path.touch()
    namespaces.unshare(namespaces.NEWNET)
    namespaces.mount("/proc/thread-self/ns/net", path, flags=namespaces.MS_BIND)
    namespaces.loopback_up()
    namespaces.setns(home, namespaces.NEWNET)
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _bridge(index: int, group: int) -> list[bytearray]:
    kind = (("IFLA_LINKINFO", (("IFLA_INFO_KIND", "bridge"),)), ("IFLA_GROUP", group))
    make = messages.link(
        index,
        name="br-lan",
        alias="bench:br-lan",
        mac="52:54:00:00:00:01",
        flags=messages.CREATE | messages.EXCLUSIVE,
        attributes=kind,
    )
    return [make, messages.link(index, attributes=(up(True),))]


def _veth(number: int, bridge: int, group: int, namespace: int) -> list[bytearray]:
    index = 2000 + number
    make = messages.veth(
        index=index,
        name=f"{HOSTS[number]}-0",
        peer=3000 + number,
        device="eth0",
        mac=f"52:54:00:00:01:0{number}",
        namespace=namespace,
        attributes=(("IFLA_MTU", 1500), ("IFLA_GROUP", group)),
    )
    join = (("IFLA_MASTER", bridge), up(True))
    return [make, messages.link(index, alias=f"bench:{number}", attributes=join)]


def _far(number: int) -> list[bytearray]:
    index = 3000 + number
    return [
        messages.address(messages.NEWADDR, index, f"10.0.0.{number + 1}/24"),
        messages.link(index, alias=f"bench:{number}", attributes=(up(True),)),
    ]


def _check(outcomes: list[object]) -> None:
    for error in outcomes:
        if error is not None:
            raise RuntimeError(error)


def measure(turns: int, pause: float) -> tuple[list[Cost], list[Cost]]:
    """The costs of the fixture and of the floor; the first two turns of each are left out."""
    from bench import bench_fixture

    bench_fixture.floors.clear()
    durations = Durations(pause)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "test_bench.py")
        path.write_text(TESTS.replace("TURNS", str(turns + 2)))
        Path(directory, "pytest.ini").write_text("[pytest]\n")
        arguments = ["-p", "no:cacheprovider", "-p", "no:terminal", str(path)]
        if not any(p.name == "netorch" for p in _entry_points()):
            arguments = ["-p", "netorch.pytest_plugin", *arguments]
        pytest.main(arguments, plugins=[durations])
        sys.modules.pop("test_bench", None)
    return durations.fixture[2:], bench_fixture.floors[2:]


def _entry_points() -> list[object]:
    from importlib import metadata

    return list(metadata.entry_points(group="pytest11"))


def main() -> None:
    turns = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    sys.path.insert(0, str(Path(__file__).parents[1]))
    print(f"medians of {turns} turns, ms (quartiles)")
    for name, pause in (("with a pause", PAUSE), ("back to back", 0.0)):
        fixture, bare = measure(turns, pause)
        print(f"{name}:")
        for what, costs in (("fixture", fixture), ("kernel", bare)):
            parts = (f"{part} {_median(costs, part)}" for part in ("setup", "teardown", "whole"))
            print(f"  {what:8}", "  ".join(parts))
        ratio = statistics.median(c.whole for c in fixture) / statistics.median(
            c.whole for c in bare
        )
        print(f"  ratio    {ratio:.2f}")


def _median(costs: list[Cost], part: str) -> str:
    values = [getattr(cost, part) for cost in costs]
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.1f} ({low:.1f}..{high:.1f})"


if __name__ == "__main__":
    main()
