"""Private places for real: made, entered, found, destroyed, and killed half-way."""

import errno
import json
import os
import select
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from netorch.errors import ConflictError, MissingError, NetorchError
from netorch.system import namespaces, place_birth, places, uplinks
from netorch.system.places import Place, Uplink
from netorch.system.scope import current_place
from netorch.system.starting import program

from .machine import FAR, FAR_ADDRESS, PREFIX, on_a_machine, run, run_forked

SUBNET = "10.0.2.0/24"
RUN = Path("/run/netorch")
LAB = f"{PREFIX}lab"
ONE, TWO = f"{PREFIX}one", f"{PREFIX}two"
PROGRAMS: tuple[Uplink, ...] = ("pasta", "slirp4netns")


def make(lab: str = LAB, uplink: Uplink = "none") -> Place:
    return places.create_private(lab, RUN / lab, uplink, SUBNET)


def inside(place: Place, body: Callable[[], None]) -> None:
    """Run `body` in a child that has entered the place."""

    def entered() -> None:
        places.enter(place)
        body()

    assert run_forked(entered) == ""


def left_over(lab: str = LAB) -> list[str]:
    """The processes of a place: by their marks, or by the run directory in their arguments."""
    marked = [f"{pid} {m}" for pid, m in places.marked_processes() if m["NETORCH_LAB"] == lab]
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                arguments = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if f"{RUN}/{lab}/".encode() in arguments or is_slirp4netns(entry):
                marked.append(f"{entry.name} {arguments!r}")
    return marked


def is_slirp4netns(process: Path) -> bool:
    """One of a place inside of this test's user namespace, which owns it."""
    try:
        return (process / "comm").read_text() == "slirp4netns\n" and os.stat(
            process / "ns/net"
        ).st_ino == current_place()
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, left_over()
        time.sleep(0.005)


def ask(address: str, server: socket.socket) -> None:
    """Ask for the name `a` at an address, and answer as the server."""
    query = bytes.fromhex("12340100000100000000000001610000010001")
    server.settimeout(60)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(60)
        sock.connect((address, 53))
        sock.send(query)
        heard, client = server.recvfrom(512)
        assert heard == query
        server.sendto(b"\x12\x34\x81\x80" + query[4:], client)
        assert sock.recv(512)[:4] == b"\x12\x34\x81\x80"


def needs(program_name: str) -> None:
    if program(program_name) is None:
        pytest.skip(f"{program_name} is not installed")
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        pytest.skip("/dev/net/tun is not writable")


@on_a_machine
def test_a_place_is_made_found_entered_and_destroyed() -> None:
    place = make()
    assert places.find(LAB) == [msgspec.structs.replace(place, reason="")]
    assert places.private_places()[LAB] in places.find(LAB)
    with pytest.raises(ConflictError):
        make()

    def look() -> None:
        assert places.has_net_admin()
        assert current_place() == place.inode
        assert namespaces.loopback_is_up()
        assert (RUN / LAB / "netns").is_mount()
        assert places.find(LAB)[0].init == place.init, "/proc is the outer one"
        assert run("ip", "-br", "link", "show", "type", "veth") == ""

    inside(place, look)
    places.destroy(place)
    assert places.find(LAB) == []
    assert left_over() == []
    places.destroy(place)
    with pytest.raises(NetorchError, match="it is gone"):
        places.enter(place)


@on_a_machine
def test_home_stays_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place this is root, whose home of that machine's is not this user's."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: "/home/somebody")
    place = make()

    def look() -> None:
        assert os.environ["HOME"] == "/home/somebody"

    inside(place, look)
    places.destroy(place)


@on_a_machine
def test_two_places_with_one_subnet_are_independent() -> None:
    needs("pasta")
    one, two = make(ONE, "pasta"), make(TWO, "pasta")

    def addresses() -> None:
        (link,) = json.loads(run("ip", "-j", "-4", "addr", "show", "dev", "uplink0"))
        assert link["addr_info"][0]["local"] == "10.0.2.15"

    inside(one, addresses)
    inside(two, addresses)
    places.destroy(one)
    assert ONE not in places.private_places()
    assert TWO in places.private_places()
    assert left_over(ONE) == []
    inside(two, addresses)
    places.destroy(two)
    assert left_over(TWO) == []


@on_a_machine
def test_a_place_is_found_and_destroyed_without_its_run_directory() -> None:
    place = make()
    shutil.rmtree(RUN / LAB)
    (found,) = places.find(LAB)
    assert (found.init, found.inode, found.uplink) == (place.init, place.inode, "none")
    inside(found, lambda: None)
    places.destroy(found)
    assert left_over() == []


@on_a_machine
def test_who_inherits_the_environment_is_no_place() -> None:
    place = make()
    environment = {"NETORCH_LAB": LAB, "NETORCH_PLACE": str(place.inode), "NETORCH_PRIVATE": "1"}

    def pretend() -> None:
        outside = os.posix_spawn("/bin/sleep", ["sleep", "100"], environment)
        places.enter(place)
        child = os.posix_spawn("/bin/sleep", ["sleep", "100"], environment)
        try:
            assert [found.init for found in places.find(LAB)] == [place.init]
        finally:
            for pid in (outside, child):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)

    assert run_forked(pretend) == ""
    places.destroy(place)
    assert left_over() == []


@on_a_machine
def test_a_process_that_entered_destroys_the_place_and_its_own_children() -> None:
    place = make()

    def body() -> None:
        places.enter(place)
        marks = {"NETORCH_LAB": LAB, "NETORCH_PLACE": str(place.inode)}
        children = [os.posix_spawn("/bin/sleep", ["sleep", "100"], marks) for _ in range(5)]
        places.destroy(place)
        for child in children:
            with pytest.raises(ChildProcessError):
                os.waitpid(child, 0)

    assert run_forked(body) == ""
    assert left_over() == []


@on_a_machine
def test_a_process_that_ends_while_destroy_looks_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    place = make()

    def body() -> None:
        places.enter(place)
        child = os.posix_spawn("/bin/sleep", ["sleep", "100"], {})
        look = places._pid_namespace

        def ended(pid: str) -> int:
            if pid == str(child):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            return look(pid)

        monkeypatch.setattr(places, "_pid_namespace", ended)
        places.destroy(place)
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)

    assert run_forked(body) == ""
    assert left_over() == []


@on_a_machine
def test_orphans_and_sigterm_are_handled_by_pid_1() -> None:
    place = make()

    def body() -> None:
        places.enter(place)
        marks = {"NETORCH_LAB": LAB, "NETORCH_PLACE": str(place.inode), "PATH": os.defpath}
        script = "sleep 0.01 & sleep 100 & exit 0"
        child = os.posix_spawn("/bin/sh", ["sh", "-c", script], marks)
        os.waitpid(child, 0)
        wait_until(lambda: len(left_over()) == 2)  # PID 1 and the longer sleep: the other is reaped
        pidfd = os.pidfd_open(place.init)
        namespaces.send_signal(pidfd, signal.SIGTERM)
        assert namespaces.wait_exit(pidfd, 60)

    assert run_forked(body) == ""
    assert left_over() == []


@pytest.mark.parametrize("uplink", PROGRAMS)
@on_a_machine
def test_egress(uplink: Uplink, tmp_path: Path) -> None:
    needs(uplink)
    resolv_conf = tmp_path / "resolv.conf"
    resolv_conf.write_text(f"nameserver {FAR_ADDRESS}\n")
    namespaces.mount(resolv_conf, "/etc/resolv.conf", flags=namespaces.MS_BIND)
    with namespaces.in_namespace(FAR):
        far = socket.create_server((FAR_ADDRESS, 8000))
        dns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        dns.bind((FAR_ADDRESS, 53))
    loopback = socket.create_server(("127.0.0.1", 9000))
    place = make(uplink=uplink)
    assert place.uplink == uplink
    assert places.find(LAB) == [place]

    def reach_out() -> None:
        with socket.create_connection((FAR_ADDRESS, 8000), 60) as connection:
            connection.sendall(b"hello")
            peer, (address, _) = far.accept()
            assert (peer.recv(5), address) == (b"hello", "10.99.0.2")
        assert Path("/etc/resolv.conf").read_text() == "nameserver 10.0.2.3\n"
        ask("10.0.2.3", dns)
        for address in ("10.0.2.2", "127.0.0.1"):
            with pytest.raises(OSError), socket.create_connection((address, 9000), 1):
                pass
        sysctls = Path("/proc/sys/net/ipv4")
        assert (sysctls / "conf/uplink0/forwarding").read_text() == "1\n"
        assert (sysctls / "ip_forward").read_text() == "0\n"

    inside(place, reach_out)
    assert resolv_conf.read_text() == Path("/etc/resolv.conf").read_text()
    assert not select.select([loopback], [], [], 0)[0]
    places.destroy(place)
    assert left_over() == []


@pytest.mark.parametrize("uplink", PROGRAMS)
@on_a_machine
def test_names_are_asked_of_a_stub_on_the_machines_loopback(uplink: Uplink, tmp_path: Path) -> None:
    """As systemd-resolved has it."""
    needs(uplink)
    resolv_conf = tmp_path / "resolv.conf"
    resolv_conf.write_text("nameserver 127.0.0.53\n")
    namespaces.mount(resolv_conf, "/etc/resolv.conf", flags=namespaces.MS_BIND)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stub:
        stub.bind(("127.0.0.53", 53))
        place = make(uplink=uplink)
        inside(place, lambda: ask("10.0.2.3", stub))
    places.destroy(place)


@on_a_machine
def test_without_a_program_there_is_no_uplink_and_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uplinks, "program", lambda _name: None)
    assert uplinks.choose("auto") == "none"
    place = make(uplink="auto")
    assert (place.uplink, place.reason) == (
        "none",
        "pasta is not installed; slirp4netns is not installed",
    )
    places.destroy(place)
    with pytest.raises(MissingError, match="pasta is not installed"):
        make(uplink="pasta")
    assert left_over() == []


@on_a_machine
def test_without_any_route_there_is_no_uplink_and_a_reason() -> None:
    run("ip", "link", "set", "wan", "down")
    assert uplinks.choose("auto") == "none"
    place = make(uplink="auto")
    reason = "the network namespace that netorch runs in has no routes itself"
    assert (place.uplink, place.reason) == ("none", reason)
    places.destroy(place)
    assert left_over() == []


@on_a_machine
def test_without_a_tun_device_there_is_no_uplink_and_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(uplinks, "_TUN", "/dev/net/none")
    with pytest.raises(MissingError, match="/dev/net/none can't be opened: No such file"):
        make(uplink="pasta")
    assert left_over() == []


@on_a_machine
def test_pasta_without_a_route_is_a_reason() -> None:
    needs("pasta")
    run("ip", "route", "del", "default")
    with pytest.raises(MissingError, match="failed to start the uplink: pasta: "):
        make(uplink="pasta")
    assert left_over() == []


@on_a_machine
def test_a_limit_of_user_namespaces_is_said() -> None:
    def body() -> None:
        namespaces.unshare(namespaces.NEWUSER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text("0 0 1")
        Path("/proc/sys/user/max_user_namespaces").write_text("0")
        with pytest.raises(MissingError, match="No space left on device") as raised:
            make()
        assert "max_user_namespaces" in raised.value.hint

    assert run_forked(body) == ""


CALLS = ("fork", "read", "write", "close", "waitpid", "pidfd_open", "pipe")


@pytest.mark.parametrize("uplink", ["none", *PROGRAMS])
@on_a_machine
def test_sigkill_before_any_of_its_calls_leaves_nothing(uplink: Uplink) -> None:
    """The creator is killed before its first, second, ... call, until it gets through."""
    if uplink != "none":
        needs(uplink)
    killed = 0
    while create_and_die(uplink, killed):
        # Either nothing is left, or the place was complete already.
        wait_until(lambda: not left_over() or bool(places.find(LAB)))
        for place in places.find(LAB):
            places.destroy(place)
        wait_until(lambda: not left_over())
        killed += 1
    assert killed > 15
    (place,) = places.find(LAB)
    places.destroy(place)
    wait_until(lambda: not left_over())


def create_and_die(uplink: Uplink, calls: int) -> bool:
    """Create a place in a child that dies before call `calls`; whether it did."""
    alive, held = os.pipe()
    creator = os.fork()
    if creator == 0:
        me = os.getpid()
        left = calls

        def deadly(call: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*args: object) -> object:
                nonlocal left
                if os.getpid() == me:
                    if left == 0:
                        os.kill(me, signal.SIGKILL)
                    left -= 1
                return call(*args)

            return counted

        try:
            for name in CALLS:
                setattr(os, name, deadly(getattr(os, name)))
            make(uplink=uplink)
        finally:
            os._exit(0)
    os.close(held)
    status = os.waitpid(creator, 0)[1]
    # What was forked and not executed holds the pipe: its end says that all of them are gone.
    assert select.select([alive], [], [], 60)[0]
    os.close(alive)
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("uplink", PROGRAMS)
@on_a_machine
def test_a_place_within_a_place(uplink: Uplink) -> None:
    """There pids are not those of /proc, which is the outermost one."""
    needs(uplink)
    outer = make()

    def body() -> None:
        places.enter(outer)
        assert run_forked(nested) == ""  # in a process of the PID namespace itself

    def nested() -> None:
        run("ip", "link", "add", "uplink0", "type", "bridge")
        run("ip", "addr", "add", "10.98.0.1/24", "dev", "uplink0")
        run("ip", "link", "set", "uplink0", "up")
        run("ip", "route", "add", "default", "via", "10.98.0.2")
        assert os.getpid() != int(Path("/proc/self").readlink().name)
        place = make(ONE, uplink)
        assert places.find(ONE) == [place]
        assert places.find(LAB) == []
        inside(place, lambda: None)
        places.destroy(place)
        assert left_over(ONE) == []

    assert run_forked(body) == ""
    places.destroy(outer)
    assert left_over() == []


@on_a_machine
def test_two_threads_cannot_enter_and_are_told() -> None:
    import threading

    place = make()
    go = threading.Event()
    thread = threading.Thread(target=go.wait)
    thread.start()
    with pytest.raises(NetorchError, match="failed to enter the private place of"):
        places.enter(place)
    go.set()
    thread.join()
    places.destroy(place)


@pytest.mark.parametrize(
    ("step", "number", "hint"),
    [
        ("user namespace", errno.ENOSPC, "max_user_namespaces"),
        ("user namespace", errno.EPERM, "seccomp"),
        ("user namespace", errno.ENOSYS, "seccomp"),
        ("user namespace", errno.EINVAL, "CONFIG_USER_NS"),
        ("namespaces", errno.ENOSPC, "max_net_namespaces"),
        ("id map", errno.EPERM, "apparmor_restrict_unprivileged_userns"),
        ("mounts", errno.EACCES, "apparmor_restrict_unprivileged_userns"),
        ("links", errno.EPERM, "apparmor_restrict_unprivileged_userns"),
    ],
)
def test_hints_follow_from_what_failed(
    step: str, number: int, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sysctl = tmp_path / "apparmor"
    sysctl.write_text("1\n")
    monkeypatch.setattr(place_birth, "_APPARMOR", sysctl)
    assert hint in place_birth._hint(step, number)


def test_root_without_setfcap_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(place_birth, "missing", lambda number: ["SETFCAP"])
    assert "--cap-add SETFCAP" in place_birth._hint("id map", errno.EPERM)


@on_a_machine
def test_a_pid_1_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    cause = "PID 1 ended: can't run /nonexistent/python: No such file or directory"
    with pytest.raises(NetorchError, match=cause):
        make()
    assert left_over() == []
