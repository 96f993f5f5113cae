"""The keeper: how its children end, and logs that don't grow for ever."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from netorch.errors import KernelError
from netorch.resources import DhcpClient
from netorch.system import starting
from netorch.system.endings import endings
from netorch.system.processes import leaders, marked
from netorch.system.scope import Scope, current_place
from netorch.system.starting import Child, Start, start_all
from netorch.system.watch import Watch

SECONDS = 60
LIMIT = 2 << 20


def begin(scope: Scope, name: str, script: str, apart: bool = False) -> Start:
    """A daemon that plays the guest `name`."""
    directory = scope.run / "guests" / name
    directory.mkdir(parents=True, exist_ok=True)
    return Start(
        DhcpClient(host=name, device="eth0"),
        ["/bin/sh", "-c", script],
        log=directory / "qemu.log",
        cwd=directory,
        kept=directory,
        apart=apart,
    )


def wait_for(directory: Path, satisfied: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    with Watch() as watch:
        watch.directory(directory)
        while not satisfied():
            assert time.monotonic() < deadline
            watch.wait(deadline - time.monotonic())


def test_how_each_child_ended_is_noted(scope: Callable[..., Scope]) -> None:
    lab = scope()
    scripts = {"good": "exit 0", "bad": "echo no disk >&2; exit 3", "ugly": "kill -SEGV $$"}
    children = start_all(lab, [begin(lab, name, text) for name, text in scripts.items()])
    for name, child in zip(scripts, children, strict=True):
        assert isinstance(child, Child)
        wait_for(lab.run / "guests" / name, lambda name=name: name in endings(lab))  # type: ignore[misc]
        child.close()
    found = endings(lab)
    assert {name: (e.killed, e.status, e.failed) for name, e in found.items()} == {
        "good": (False, 0, False),
        "bad": (False, 3, True),
        "ugly": (True, signal.SIGSEGV, True),
    }
    assert found["bad"].qemu == ("no disk",)
    assert "exited with status 3" in found["bad"].describe()
    again = begin(lab, "bad", "exec sleep 100")
    start_all(lab, [again])
    assert set(endings(lab)) == {"good", "ugly"}


def test_one_that_cannot_start_does_not_stop_the_others(scope: Callable[..., Scope]) -> None:
    lab = scope()
    absent = begin(lab, "absent", "")._replace(argv=["/nonexistent"])
    refused, child = start_all(lab, [absent, begin(lab, "vm1", "exec sleep 100")])
    assert isinstance(refused, KernelError)
    assert "failed to start /nonexistent: No such file" in str(refused)
    assert isinstance(child, Child)
    assert not child.has_ended(0)


@pytest.mark.parametrize("kept", [True, False])
def test_one_that_ends_at_once_is_there_until_it_is_known(
    scope: Callable[..., Scope], kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab, known = scope(), starting._child

    def late(one: starting._Opened, pid: int) -> Child:
        at = time.monotonic()
        while time.monotonic() < at + 0.5:  # long enough for whoever reaps it
            assert Path(f"/proc/{pid}").exists()
        return known(one, pid)

    monkeypatch.setattr(starting, "_child", late)
    start = begin(lab, "vm1", "exit 3")
    (child,) = start_all(lab, [start if kept else start._replace(kept=None)])
    assert isinstance(child, Child)
    assert child.has_ended(SECONDS)
    child.close()


def test_an_empty_namespace_is_shared_by_those_that_want_one(scope: Callable[..., Scope]) -> None:
    lab = scope()
    starts = [begin(lab, f"vm{i}", "exec sleep 100", apart=i != 1) for i in range(3)]
    children = [child for child in start_all(lab, starts) if isinstance(child, Child)]
    places = [os.stat(f"/proc/{child.pid}/ns/net").st_ino for child in children]
    assert places[1] == current_place() != places[0]
    assert places[0] == places[2]
    assert Path(f"/proc/{children[0].pid}/net/dev").read_text().count(":") == len(
        ["lo", *(name for name in ("ifb0", "ifb1") if _has(children[0].pid, name))]
    )
    found = leaders(marked(lab))
    parents = {process.parent for group in found.values() for process in group}
    assert len(found) == 3
    assert len(parents) == 1  # one keeper for all


def _has(pid: int, name: str) -> bool:
    return f"{name}:" in Path(f"/proc/{pid}/net/dev").read_text()


def test_a_log_is_cut_while_it_is_written(scope: Callable[..., Scope]) -> None:
    lab = scope()
    log = lab.run / "guests" / "vm1" / "serial.log"
    chatter = (
        "yes 'a line of the console' | head -c 9000000 >> serial.log; : > said; exec sleep 100"
    )
    start_all(lab, [begin(lab, "vm1", chatter)])
    written = log.parent / "qemu.log"
    wait_for(log.parent, (log.parent / "said").exists)
    wait_for(log.parent, lambda: log.stat().st_size <= LIMIT)
    assert log.read_bytes().startswith(b"[netorch cut this log")
    lines = log.read_text().splitlines()
    # What is written while it is cut may break a line, no more.
    assert len(lines) - lines.count("a line of the console") <= 4
    assert len(lines) > LIMIT / 2 / 23 * 0.9
    assert written.stat().st_size == 0
