"""The jobs, each with its contenders: netorch, floors, the best script, and peers."""

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from bench import labs, peers, traffic
from bench.turns import SECONDS, Clock, Turn
from netorch.system.watch import Watch


class Tools(NamedTuple):
    """`netorch` and `python` are an installed wheel's; `floor` is the C program."""

    netorch: str
    python: str
    floor: str


class Job(NamedTuple):
    """Of slow contenders, `few` says how many turns they have."""

    letter: str
    title: str
    turns: int
    contenders: dict[str, Turn]
    few: dict[str, int] = {}  # noqa: RUF012 (never changed)


# What there is of a command before it does anything: the interpreter, and all that `apply` imports.
_START_UP = """
import gc
gc.set_threshold(100_000)
import netorch.cli, netorch.command_line, netorch.labs, netorch.report
import netorch.system.adapters, netorch.system.conflicts, netorch.system.facts
import netorch.system.hosts, netorch.system.services, nftables
gc.freeze()
"""


def all_jobs(tools: Tools) -> list[Job]:
    return [
        _start_up(tools),
        _nat(tools),
        _switches(tools, "B", "100 taps on one bridge", 1, 100),
        _switches(tools, "C", "10 networks of 100 taps", 10, 100),
        *(_guests(tools, count) for count in (1, 2, 8)),
        _many_guests(tools, 32),
        _fixture(),
        _networks(tools),
        _traffic(tools),
    ]


def _netorch(tools: Tools, text: str, extra: Callable[[Clock, Path], None] | None = None) -> Turn:
    """Start-up, up, the same again, status, and down."""

    def turn(directory: Path, clock: Clock) -> None:
        file = _file(directory, text)
        clock.run("start-up", [tools.python, "-c", _START_UP])
        clock.run("up", [tools.netorch, "apply", str(file)])
        clock.run("again", [tools.netorch, "apply", str(file)])
        clock.run("status", [tools.netorch, "status"])
        clock.run("taps", [tools.netorch, "taps"])
        if extra is not None:
            extra(clock, file)
        clock.run("down", [tools.netorch, "teardown"])

    return turn


def _file(directory: Path, text: str) -> Path:
    os.environ["NETORCH_RUN_DIR"] = str(directory / "run")
    os.environ["NETORCH_DISK_DIR"] = str(directory / "disks")
    file = directory / "lab.toml"
    file.write_text(text)
    return file


def _script(write: Callable[[Path], tuple[list[str], list[str]]]) -> Turn:
    def turn(directory: Path, clock: Clock) -> None:
        up, down = write(directory)
        clock.run("up", up)
        clock.run("down", down)

    return turn


def _start_up(tools: Tools) -> Job:
    def netorch(directory: Path, clock: Clock) -> None:
        file = _file(directory, labs.NAT)
        clock.run("--version", [tools.netorch, "--version"])
        clock.run("check", [tools.netorch, "check", str(file)])

    def bare(_directory: Path, clock: Clock) -> None:
        clock.run("--version", [tools.python, "-c", "pass"])
        clock.run("check", [tools.python, "-c", "pass"])

    return Job("H", "start-up", 20, {"netorch": netorch, "bare interpreter": bare})


def _nat(tools: Tools) -> Job:
    contenders: dict[str, Turn] = {
        "netorch": _netorch(tools, labs.NAT),
        "netorch (two hosts)": _netorch(tools, labs.hosts(2)),
        "script": _script(labs.write_nat_script),
        **peers.nat(),
    }
    return Job("A", "a NAT network with DHCP and two taps", 15, contenders)


def _switches(tools: Tools, letter: str, title: str, bridges: int, taps: int) -> Job:
    text = labs.switches(bridges, taps)
    more = text.replace(f"count = {taps}", f"count = {taps + 1}", 1)

    def add(clock: Clock, file: Path) -> None:
        file.write_text(more)
        clock.run("add one", [tools.netorch, "apply", str(file)])

    def floor(_directory: Path, clock: Clock) -> None:
        clock.run("up", [tools.floor, "up", str(bridges), str(taps)])
        clock.run("down", [tools.floor, "down"])

    contenders: dict[str, Turn] = {
        "netorch": _netorch(tools, text, add),
        "C floor": floor,
        "script": _script(lambda d: labs.write_switches_script(d, bridges, taps)),
        "naive script": _script(lambda d: labs.write_naive_script(d, bridges, taps)),
    }
    if bridges == 1:
        hosts = f"netorch ({taps} hosts)"
        contenders |= {hosts: _netorch(tools, labs.hosts(taps)), **peers.one_bridge(taps)}
        return Job(letter, title, 7, contenders, _few(contenders, naive=3, mininet=3, munet=1))
    contenders |= peers.many_bridges(bridges, taps)
    return Job(letter, title, 5, contenders, _few(contenders, naive=1, mininet=1))


def _few(contenders: dict[str, Turn], **turns: int) -> dict[str, int]:
    """The numbers of turns by contenders, from those by the first words of their names."""
    first = {name.split()[0]: name for name in contenders}
    return {first[word]: count for word, count in turns.items() if word in first}


def _guests(tools: Tools, count: int) -> Job:
    contenders: dict[str, Turn] = {
        "netorch cold": _netorch_guests(tools, count, "cold"),
        "script": lambda directory, clock: _script_guests(directory, clock, count),
        "netorch warm": _netorch_guests(tools, count, "warm"),
    }
    if count == 1:
        contenders |= peers.one_guest()
    title = f"{count} guest{'s' if count > 1 else ''} from nothing to leases"
    few = {name: 3 for name in contenders if name.startswith("libvirt")}
    return Job(f"D{count}", title, 7 if count < 8 else 5, contenders, few)


def _many_guests(tools: Tools, count: int) -> Job:
    contenders = {"netorch warm": _netorch_guests(tools, count, "warm")}
    return Job(f"D{count}", f"{count} guests, warm", 1, contenders, {"netorch warm": 1})


def _netorch_guests(tools: Tools, count: int, start: str) -> Turn:
    """Up is the whole command; leases is until dnsmasq has given the last one, which is what the
    script waits for. The command waits until the guests have their addresses.
    """
    text = labs.guests(count, start)

    def turn(directory: Path, clock: Clock) -> None:
        file = _file(directory, text)
        with _leases(directory / "run", count) as came:
            began = time.perf_counter()
            clock.run("up", [tools.netorch, "apply", str(file)])
        clock.note("leases", (came.result() - began) * 1000)
        clock.note("memory", 0.0, _proportional())
        clock.run("down", [tools.netorch, "teardown"])

    return turn


@contextmanager
def _leases(run: Path, count: int) -> Iterator[Future[float]]:
    """The moment (perf_counter) in which dnsmasq of the lab `lab` has given `count` leases."""
    file = run / "lab" / "dnsmasq-default.leases"
    run.mkdir()

    def wait() -> float:
        with Watch() as watch:
            watch.directory(run)
            while True:
                if file.parent.exists():
                    watch.directory(file.parent)
                if file.exists() and len(file.read_text().splitlines()) >= count:
                    return time.perf_counter()
                watch.wait(SECONDS)

    with ThreadPoolExecutor() as pool:
        yield pool.submit(wait)


def _proportional() -> float:
    """MiB of all processes of the lab in this network namespace, shared pages in parts."""
    mark = f"NETORCH_PLACE={os.stat('/proc/self/ns/net').st_ino}"
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() not in (process / "environ").read_bytes():
                continue
            lines = (process / "smaps_rollup").read_text().splitlines()
        except OSError:
            continue  # gone, or not ours
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def _script_guests(directory: Path, clock: Clock, count: int) -> None:
    """What a person would write: bridge, taps, dnsmasq that tells of leases by a fifo, QEMU."""
    image = json.loads(os.environ["BENCH_TINY"])
    leases = directory / "told"
    os.mkfifo(leases)
    told = directory / "tell.sh"
    told.write_text(f'#!/bin/sh\n[ "$1" = add ] && echo "$3" > {leases}\nexit 0\n')
    told.chmod(0o755)
    up, down = labs.write_nat_script(directory)
    config = directory / "dnsmasq.conf"
    config.write_text(config.read_text() + f"dhcp-script={told}\n")
    lines = (directory / "up.ip").read_text()
    for guest in range(count):
        lines += f"tuntap add g{guest} mode tap vnet_hdr\n"
        lines += f"link set g{guest} master virbr0 group 7 up\n"
    (directory / "up.ip").write_text(lines)
    script = [f"sh {up[1]}"]
    for guest in range(count):
        script.append(
            "qemu-system-x86_64 -nodefaults -no-user-config -display none "
            "-machine q35,sata=off,smbus=off,vmport=off,usb=off -accel tcg -m 256 "
            f"-kernel {image['kernel']} -initrd {image['initrd']} -append '{image['cmdline']}' "
            f"-netdev tap,id=n,ifname=g{guest},script=no,downscript=no "
            f"-device virtio-net-pci,netdev=n,romfile=,mac=52:54:00:00:01:{guest:02x} "
            f"-serial file:{directory}/serial{guest} -daemonize -pidfile {directory}/q{guest}.pid"
        )
    script.append(f"head -n {count} < {leases} > {directory}/leased")
    start = ["set -e", f"exec 3<>{leases}", *script]
    (directory / "guests.sh").write_text("\n".join(start))
    (directory / "stop.sh").write_text(f"kill $(cat {directory}/q*.pid)\nsh {down[1]}\n")
    clock.run("up", ["sh", str(directory / "guests.sh")])
    clock.run("down", ["sh", str(directory / "stop.sh")])


def _fixture() -> Job:
    """The pytest fixture of a two-host lab, and the bare kernel work of the same objects."""

    def of(which: int) -> Turn:
        def turn(_directory: Path, clock: Clock) -> None:
            from bench import bench_fixture  # imports pytest

            for label, pause in (("apart", bench_fixture.PAUSE), ("back to back", 0.0)):
                for cost in bench_fixture.measure(15, pause)[which]:
                    clock.note(f"set-up, {label}", cost.setup)
                    clock.note(f"tear-down, {label}", cost.teardown)
                    clock.note(f"both, {label}", cost.whole)

        return turn

    contenders = {"netorch": of(0), "kernel": of(1)}
    few = dict.fromkeys(contenders, 2)  # it leaves out its own first turns
    return Job("I", "the pytest fixture of a two-host lab", 2, contenders, few)


def _networks(tools: Tools) -> Job:
    def of(count: int) -> Turn:
        def turn(directory: Path, clock: Clock) -> None:
            file = _file(directory, labs.networks(count))
            clock.run("start-up", [tools.python, "-c", _START_UP])
            clock.run("check", [tools.netorch, "check", str(file)])
            clock.run("plan", [tools.netorch, "plan", str(file)], status=3)
            clock.run("up", [tools.netorch, "apply", str(file)])
            clock.run("again", [tools.netorch, "apply", str(file)])
            clock.run("down", [tools.netorch, "teardown"])

        return turn

    contenders = {str(n): of(n) for n in (10, 100, 1000)}
    contenders["script, 1000"] = _script(lambda d: labs.write_switches_script(d, 1000, 1))
    return Job("J", "networks in one lab", 3, contenders, {"1000": 2, "script, 1000": 2})


def _traffic(tools: Tools) -> Job:
    def of(model: str) -> Turn:
        def turn(directory: Path, clock: Clock) -> None:
            _file(directory, "")
            traffic.turn(tools.netorch, tools.python, model, directory, clock)

        return turn

    contenders = {model: of(model) for model in traffic.MODELS}
    return Job("L", "throughput and latency", 1, contenders)
