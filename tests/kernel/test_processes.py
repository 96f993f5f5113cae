"""Starting, finding and ending real processes."""

import logging
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from netorch.errors import KernelError
from netorch.resources import DhcpClient
from netorch.system.capabilities import NET_ADMIN, NET_RAW
from netorch.system.environ import environment_of
from netorch.system.places import marked_processes
from netorch.system.processes import Marked, end, end_all, leaders, marked
from netorch.system.scope import Scope
from netorch.system.starting import Child, start
from tests.isolation import make_host

CLIENT = DhcpClient(host="server", device="eth0")


def shell(scope: Scope, script: str, **options: object) -> Child:
    argv = ["/bin/sh", "-c", script]
    return start(scope, CLIENT, argv, log=scope.run / "log", **options)  # type: ignore[arg-type]


def run(scope: Scope, script: str, **options: object) -> str:
    child = shell(scope, script, **options)
    assert child.exit_status(timeout=60) == 0, child.output()
    child.close()
    return child.output()


def sleeping(scope: Scope, count: int = 1) -> list[Marked]:
    """The lab's processes, once so many of them sleep."""
    while True:
        found = marked(scope)
        named = [Path(f"/proc/{one.pid}/comm").read_text() for one in found]
        if named.count("sleep\n") == count:
            return found
        os.sched_yield()


def test_a_process_is_found_by_its_marks_and_ended(scope: Callable[..., Scope]) -> None:
    ours, other = scope("t"), scope("other")
    child = shell(ours, "exec sleep 100")
    stranger = shell(other, "exec sleep 100")
    elsewhere = shell(msgspec.structs.replace(ours, place=1), "exec sleep 100")
    (found,) = sleeping(ours)
    assert (found.pid, found.resource) == (child.pid, CLIENT)
    end(ours, [found])
    assert marked(ours) == []
    with pytest.raises(ChildProcessError):  # reaped
        os.waitpid(child.pid, 0)
    assert not stranger.exit_status(timeout=0)
    for left in (stranger, elsewhere):
        os.kill(left.pid, signal.SIGKILL)
        assert left.exit_status() == -signal.SIGKILL


def test_a_process_is_found_in_the_middle_of_an_exec(scope: Callable[..., Scope]) -> None:
    lab = scope()
    script = lab.run / "again"
    script.write_text('#!/bin/sh\nexec "$0"\n')
    script.chmod(0o700)
    child = shell(lab, f"exec {script}")
    for _ in range(500):
        assert [process.pid for process in marked(lab)] == [child.pid]
        assert [pid for pid, _marks in marked_processes() if pid == child.pid]


def test_a_process_without_environment_is_nobodys(scope: Callable[..., Scope]) -> None:
    lab = scope()
    with subprocess.Popen(["sleep", "100"], env={}) as child:
        assert environment_of(child.pid) == b""
        assert marked(lab) == []
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert marked(lab) == []  # a zombie


def test_what_ignores_sigterm_is_killed(scope: Callable[..., Scope]) -> None:
    lab = scope()
    for _ in range(3):
        shell(lab, "trap '' TERM; exec sleep 100")
    shell(lab, "exec sleep 100")
    end(lab, sleeping(lab, 4), grace=0.1)
    assert marked(lab) == []


def test_a_recycled_pid_is_left_alone(scope: Callable[..., Scope]) -> None:
    lab = scope()
    child = shell(lab, "exec sleep 100")
    (found,) = sleeping(lab)
    end(lab, [found._replace(start_time=found.start_time - 1)])
    end(msgspec.structs.replace(lab, lab="other"), [found])
    assert child.exit_status(timeout=0) is None
    end(lab, [found])


def test_ending_what_is_gone_succeeds(scope: Callable[..., Scope]) -> None:
    lab = scope()
    shell(lab, "exec sleep 100")
    found = sleeping(lab)
    end(lab, found)
    end(lab, found)


def test_a_child_with_the_same_marks_is_no_second_process(scope: Callable[..., Scope]) -> None:
    lab = scope()
    child = shell(lab, "sleep 100 & wait")
    found = sleeping(lab)
    assert len(found) == 2
    assert [process.pid for process in leaders(found)[CLIENT.key]] == [child.pid]
    end(lab, found)


def test_what_a_process_starts_while_it_is_ended_ends_too(scope: Callable[..., Scope]) -> None:
    lab = scope()
    os.mkfifo(lab.run / "fifo")  # nobody writes to it; and who opens it is no other program
    shell(lab, "trap 'read line <fifo & exit' TERM; sleep 100")
    sleeping(lab)
    end_all(lab)
    assert marked(lab) == []


def test_only_the_granted_capabilities_are_left(scope: Callable[..., Scope]) -> None:
    status = run(scope(), "grep -E 'Cap|NoNewPrivs' /proc/self/status", capabilities=(NET_ADMIN,))
    values = dict(line.split(":\t") for line in status.splitlines())
    for name in ("CapPrm", "CapEff", "CapBnd"):
        assert int(values[name], 16) == 1 << NET_ADMIN, status
    assert values["NoNewPrivs"] == "1"
    status = run(scope("none"), "grep -E 'Cap' /proc/self/status", capabilities=())
    assert {int(line.split()[1], 16) for line in status.splitlines()} == {0}, status
    status = run(scope("all"), "grep CapEff /proc/self/status")
    assert int(status.split()[1], 16) & (1 << NET_RAW | 1 << NET_ADMIN)


def test_a_process_inherits_nothing_but_what_it_is_passed(scope: Callable[..., Scope]) -> None:
    lab = scope()
    passed, leaked = (os.open("/dev/zero", os.O_RDONLY) for _ in range(2))
    os.set_inheritable(leaked, True)
    listed = run(lab, "echo /proc/$$/fd/*; readlink /proc/$$/fd/0; pwd", pass_fds=[passed])
    names, stdin, directory = listed.splitlines()
    numbers = {int(name.rpartition("/")[2]) for name in names.split()}
    assert passed in numbers
    assert leaked not in numbers
    assert stdin == "/dev/null"
    assert directory == str(lab.run)
    os.close(passed)
    os.close(leaked)


def test_a_process_starts_in_another_network_namespace(scope: Callable[..., Scope]) -> None:
    lab = scope(private=True)
    there = make_host(lab, "server")
    inode = run(lab, "stat -L -c %i /proc/self/ns/net", namespace=there)
    assert int(inode) == there.stat().st_ino != lab.place


def test_what_can_not_be_executed_says_why(
    scope: Callable[..., Scope], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lab = scope()
    missing = tmp_path / "no such program"
    with caplog.at_level(logging.INFO), pytest.raises(KernelError) as caught:
        start(lab, CLIENT, [str(missing), "a b"], log=lab.run / "log")
    assert caught.value.message == f"failed to start {missing}: No such file or directory"
    assert f"'{missing}' 'a b'" in caplog.text
