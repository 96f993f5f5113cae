"""Hosts for real: network namespaces made, entered and deleted, here and in a private place."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from netorch.errors import KernelError, MissingError, UsageError
from netorch.planner import Update
from netorch.resources import Namespace, Resource
from netorch.system import namespaces, places
from netorch.system.hosts import Hosts, exec_in_host, popen_in_host
from netorch.system.scope import Scope, current_place

from .machine import PREFIX, on_a_machine, run, run_forked

LAB = f"{PREFIX}lab"
NETNS = Path("/run/netns")
A, B = Namespace(host="a"), Namespace(host="b.example")


def in_either_place(test: Callable[[Scope], None]) -> Callable[[bool], None]:
    """Run a test with the scope of a lab in the current place, and of one in a private place."""

    @pytest.mark.parametrize("private", [False, True], ids=["current", "private"])
    @on_a_machine
    def here_or_there(private: bool) -> None:
        directory = Path("/run/lab")
        directory.mkdir()
        if private:
            places.enter(places.create_private(LAB, directory, "none", "10.0.2.0/24"))
        test(Scope(lab=LAB, place=current_place(), private=private, run=directory, disks=directory))

    here_or_there.__name__ = test.__name__
    here_or_there.__doc__ = test.__doc__
    return here_or_there  # type: ignore[no-any-return]  # pytest's decorator is untyped


def create(scope: Scope, *wanted: Namespace) -> list[Resource]:
    done: list[Resource] = []
    Hosts(scope).create(wanted, done.append)
    return done


def delete(scope: Scope, *unwanted: Namespace) -> list[Resource]:
    done: list[Resource] = []
    Hosts(scope).delete(unwanted, done.append)
    return done


@in_either_place
def test_hosts_come_and_go_without_a_trace(scope: Scope) -> None:
    home = current_place()
    hosts = Hosts(scope)
    assert hosts.observe() == []
    assert hosts.check([A, B]) == []
    assert create(scope, A, B) == [A, B]
    assert hosts.observe() == [A, B]
    inode = scope.namespace("a").stat().st_ino
    assert create(scope, A) == [A], "twice is allowed"
    assert scope.namespace("a").stat().st_ino == inode
    assert current_place() == home
    if not scope.private:
        assert "lo" in run("ip", "netns", "exec", scope.namespace("a").name, "ip", "-br", "link")
    assert delete(scope, A, B) == [A, B]
    assert hosts.observe() == []
    assert delete(scope, A) == [A]
    assert NETNS.exists() is False
    assert os.listdir(scope.run) == (["netns"] if scope.private else [])


@in_either_place
def test_half_made_hosts_converge_and_can_be_deleted(scope: Scope) -> None:
    create(scope, A)
    scope.namespace("b.example").touch()
    with namespaces.in_namespace(scope.namespace("a")):
        run("ip", "link", "set", "lo", "down")
    half = [Namespace(host="a", up=False), Namespace(host="b.example", up=False)]
    assert Hosts(scope).observe() == half
    done: list[Resource] = []
    Hosts(scope).update([Update(half[0], A), Update(half[1], B)], done.append)
    assert done == [A, B]
    assert Hosts(scope).observe() == [A, B]
    delete(scope, A, B)
    scope.namespaces.mkdir(exist_ok=True)
    scope.namespace("a").touch()
    delete(scope, half[0])
    assert not scope.namespace("a").exists()


@on_a_machine
def test_the_directory_stays_for_others() -> None:
    scope = Scope(lab=LAB, place=current_place(), run=Path("/run"), disks=Path("/run"))
    create(scope, A)
    run("ip", "netns", "add", "stranger")
    delete(scope, A)
    assert os.listdir(NETNS) == ["stranger"]
    run("ip", "netns", "del", "stranger")

    other = Scope(lab=f"{LAB}2", place=current_place(), run=Path("/run"), disks=Path("/run"))
    create(other, A)
    create(scope, A)
    delete(scope, A)
    assert Hosts(other).observe() == [A]
    delete(other, A)
    assert not NETNS.exists()

    NETNS.mkdir()  # somebody else's
    create(scope, A)
    delete(scope, A)
    assert NETNS.exists()


@in_either_place
def test_a_command_runs_in_the_host_with_its_name_servers(scope: Scope) -> None:
    create(scope, A)
    before = Path("/etc/resolv.conf").read_text()
    script = 'readlink /proc/self/ns/net; echo "$NETORCH_LAB"; cat /etc/resolv.conf'
    argv = ["sh", "-c", script]
    process = popen_in_host(
        scope, "a", argv, ["10.9.0.1", "10.9.0.2"], "lan", stdout=subprocess.PIPE
    )
    output = process.communicate()[0].decode()
    assert output.splitlines() == [
        f"net:[{scope.namespace('a').stat().st_ino}]",
        LAB,
        "search lan",
        "nameserver 10.9.0.1",
        "nameserver 10.9.0.2",
    ]
    assert process.returncode == 0
    assert Path("/etc/resolv.conf").read_text() == before
    assert not list(scope.run.glob("resolv.conf*"))
    delete(scope, A)


@in_either_place
def test_exec_replaces_the_process(scope: Scope) -> None:
    create(scope, A)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, 1)
        exec_in_host(scope, "a", ["readlink", "/proc/self/ns/net"], ["10.9.0.1"])
    os.close(writer)
    assert os.waitpid(child, 0)[1] == 0
    assert os.read(reader, 100).decode() == f"net:[{scope.namespace('a').stat().st_ino}]\n"
    delete(scope, A)


@in_either_place
def test_what_cannot_run_is_told(scope: Scope) -> None:
    with pytest.raises(UsageError, match=r"host a of lab .* is not running"):
        popen_in_host(scope, "a", ["true"])
    create(scope, A)
    for nameservers in ([], ["10.9.0.1"]):
        with pytest.raises(MissingError, match="failed to run nonesuch in host a: No such file"):
            popen_in_host(scope, "a", ["nonesuch"], nameservers)
        with pytest.raises(KernelError, match="failed to run /etc/passwd in host a: Permission"):
            popen_in_host(scope, "a", ["/etc/passwd"], nameservers)

    def body() -> None:
        with pytest.raises(MissingError, match="failed to run nonesuch in host a: No such file"):
            exec_in_host(scope, "a", ["nonesuch"])

    assert run_forked(body) == ""
    delete(scope, A)


@in_either_place
def test_deleting_a_host_ends_the_commands_in_it_and_no_others(scope: Scope) -> None:
    create(scope, A, B)
    polite = popen_in_host(scope, "a", ["sleep", "100"])
    deaf_argv = ["sh", "-c", "trap '' TERM; echo deaf; sleep 100"]
    deaf = popen_in_host(scope, "a", deaf_argv, stdout=subprocess.PIPE)
    assert deaf.stdout is not None
    assert deaf.stdout.readline() == b"deaf\n"
    neighbour = popen_in_host(scope, "b.example", ["sleep", "100"])
    pidfds = [os.pidfd_open(process.pid) for process in (polite, deaf)]
    delete(scope, A)
    assert all(namespaces.wait_exit(pidfd, 0) for pidfd in pidfds)
    assert neighbour.poll() is None
    delete(scope, B)
    assert neighbour.poll() is not None


@on_a_machine
def test_net_admin_alone_is_not_enough_and_is_told() -> None:
    """A mount namespace of another user namespace: as in a container without SYS_ADMIN."""
    scope = Scope(lab=LAB, place=current_place(), run=Path("/run"), disks=Path("/run"))

    def body() -> None:
        namespaces.unshare(namespaces.NEWUSER | namespaces.NEWNET)
        assert places.has_net_admin()
        (reason,) = Hosts(scope).check([A])
        assert "CAP_SYS_ADMIN" in reason
        assert "--private" in reason
        assert Hosts(scope).check([]) == []

    assert run_forked(body) == ""


@on_a_machine
def test_sigkill_between_any_two_hosts_leaves_what_delete_finds() -> None:
    scope = Scope(lab=LAB, place=current_place(), run=Path("/run"), disks=Path("/run"))
    wanted = [Namespace(host=f"h{number}") for number in range(20)]
    for delay in range(1, 12):
        creator = os.fork()
        if creator == 0:
            create(scope, *wanted)
            os._exit(0)
        time.sleep(delay / 1000)
        os.kill(creator, signal.SIGKILL)
        os.waitpid(creator, 0)
        delete(scope, *Hosts(scope).observe())
        assert not NETNS.exists()
