"""Labs that are driven by the real command line, each test in namespaces of its own.

`Machine` is what a test has: the command line as a subprocess with run and disk directories of the
test's own. The body of the test is the machine that netorch runs on, so it opens sockets itself
where the gateway is to speak. conftest.py runs each body inside `with machine`, which in the end
tears down what is still up and then fails the test if anything is left.

Names of labs carry the pid: private places are found by user, not by directory, so labs of other
sessions would be in the way.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from netorch.system.watch import Watch
from tests.isolation import ip_json
from tests.qemu.labs.server import PORT

ROOT = Path(__file__).parents[3]
TOPOLOGIES = ROOT / "topologies"
SERVER = str(Path(__file__).with_name("server.py"))
SECONDS = 90.0  # for anything at all, under TCG on a busy machine
_TAG = "NETORCHTEST_MACHINE"


Completed = subprocess.CompletedProcess[str]


class Machine:
    """A machine with the command line `netorch` on it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.run_base = directory / "run"
        self.disks_base = directory / "disks"
        self._tag = f"{directory}"
        self._environment = {
            **os.environ,
            "NETORCH_RUN_DIR": str(self.run_base),
            "NETORCH_DISK_DIR": str(self.disks_base),
            "PYTHONPATH": str(ROOT),
            _TAG: self._tag,
        }
        self._closing = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.close()
        left = self.left()
        if error is None:
            assert left == [], "netorch has left something here"

    def netorch(
        self, *arguments: str, input: str = "", status: int | None = 0, seconds: float = SECONDS
    ) -> Completed:
        """Run the command line; fails unless it exits with `status` (None: with any)."""
        done = subprocess.run(
            self._argv(arguments),
            env=self._environment,
            input=input,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        said = f"netorch {' '.join(arguments)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert status is None or done.returncode == status, said
        return done

    def start(self, *arguments: str, **files: int) -> subprocess.Popen[str]:
        """Start the command line, with pipes unless told otherwise; it ends with the test."""
        pipes = {name: files.get(name, subprocess.PIPE) for name in ("stdin", "stdout", "stderr")}
        return self.started(self._argv(arguments), **pipes)

    def started(self, argv: Sequence[str], **files: int) -> subprocess.Popen[str]:
        """Start another program, which ends with the test."""
        child = subprocess.Popen(argv, env=self._environment, text=True, **files)  # type: ignore[call-overload]
        self._closing.callback(_end, child)
        assert isinstance(child, subprocess.Popen)
        return child

    def up(self, name: str, text: str, *options: str, seconds: float = SECONDS) -> "Lab":
        """Apply a topology under the name `name-PID`; it is torn down at the end of the test."""
        file = self.file(name, text)
        lab = self.running(file)
        lab.said = self.netorch("apply", *options, str(file), seconds=seconds).stderr
        return lab

    def running(self, file: Path) -> "Lab":
        """The lab of a file that the test applies by itself; torn down at the end of the test."""
        lab = Lab(self, file.stem, file)
        self._closing.callback(lab.end)
        return lab

    def shipped(self, name: str, *options: str) -> "Lab":
        """Apply one of topologies/."""
        return self.up(name, (TOPOLOGIES / f"{name}.toml").read_text(), *options)

    def file(self, name: str, text: str) -> Path:
        """Write a topology file; its name, and so the lab's, is `name-PID`."""
        assert "[lab]" not in text
        file = self.directory / f"{name}-{os.getpid()}.toml"
        file.write_text(text)
        return file

    def left(self) -> list[str]:
        """Whatever netorch has left here, or has there now: links, tables, processes, files."""
        links = [link["ifname"] for link in ip_json("link")]
        left = [f"link {name}" for name in links if name != "lo" and not name.startswith("ifb")]
        command = ["nft", "list", "tables"]
        tables = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        left += tables.splitlines()
        left += [f"process {pid}" for pid in self._processes()]
        mounts = Path("/proc/self/mountinfo").read_text()
        left += [f"mount {at}" for at in re.findall(r" (\S*netorch:\S*) ", mounts)]
        for base in (self.run_base, self.disks_base):
            left += [f"file {path}" for path in (base, *base.rglob("*")) if path.exists()]
        return left

    def _argv(self, arguments: Sequence[str]) -> list[str]:
        return [sys.executable, "-m", "netorch", *arguments]

    def _processes(self) -> Iterator[str]:
        mark = f"{_TAG}={self._tag}".encode()
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in path.read_bytes().split(b"\0"):
                    command = (path.parent / "cmdline").read_bytes().replace(b"\0", b" ")
                    yield f"{path.parent.name} {command.decode()}"
            except OSError:  # another user's, or gone meanwhile
                continue


class Lab:
    """A running lab. `said` is what `apply` wrote to stderr."""

    said = ""

    def __init__(self, machine: Machine, name: str, file: Path) -> None:
        self.machine = machine
        self.name = name
        self.file = file
        self.run = machine.run_base / name

    def exec(self, node: str, *argv: str, input: str = "", status: int | None = 0) -> Completed:
        command = ("exec", "--lab", self.name, node, "--", *argv)
        return self.machine.netorch(*command, input=input, status=status)

    def sh(self, node: str, script: str, status: int | None = 0) -> str:
        """What a shell script writes in a node, without the newline at its end."""
        return self.exec(node, "sh", "-c", script, status=status).stdout.strip()

    def status(self) -> dict[str, Any]:
        """`status --json` of a lab that is in sync."""
        found: dict[str, Any] = json.loads(
            self.machine.netorch("status", "--json", self.name).stdout
        )
        assert found["in_sync"]
        return found

    def leases(self) -> dict[str, str]:
        """`leases --json`: name to address."""
        found = json.loads(self.machine.netorch("leases", "--json", self.name).stdout)
        return {lease["name"]: lease["address"] for lease in found}

    def unchanged(self) -> None:
        """Hold that the lab is as its file says, and that another apply does nothing."""
        assert {row["state"] for row in self.status()["resources"]} == {"ok"}
        assert "nothing to do" in self.machine.netorch("apply", str(self.file)).stdout

    def serve(self, *hosts: str) -> list[subprocess.Popen[str]]:
        """Run server.py in hosts, ready when this returns."""
        command = ("exec", "--lab", self.name)
        children = [
            self.machine.start(*command, host, "--", sys.executable, SERVER) for host in hosts
        ]
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        return children

    def ask(self, host: str, address: str, port: int = PORT) -> str:
        """Connect from a host: the first line of the answer, or what refused (see server.py)."""
        return self.exec(host, sys.executable, SERVER, address, str(port)).stdout.strip()

    def teardown(self) -> None:
        self.machine.netorch("teardown", self.name)

    def end(self) -> None:
        """Tear down unless that was done."""
        done = self.machine.netorch("teardown", self.name, status=None)
        assert done.returncode == 0 or "no lab" in done.stderr, done.stderr


def wait_for(path: Path, satisfied: Callable[[str], bool]) -> str:
    """The text of a file once it satisfies; its directory exists."""
    deadline = time.monotonic() + SECONDS
    with Watch() as watch:
        watch.directory(path.parent)
        while True:
            text = path.read_text(errors="replace") if path.exists() else ""
            if satisfied(text):
                return text
            assert time.monotonic() < deadline, f"{path} has only:\n{text}"
            watch.wait(deadline - time.monotonic())


@contextmanager
def closed_at_end(*descriptors: int) -> Iterator[None]:
    try:
        yield
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _end(child: subprocess.Popen[str]) -> None:
    child.terminate()
    child.communicate(timeout=SECONDS)
