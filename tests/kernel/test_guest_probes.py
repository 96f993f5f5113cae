"""The probes of guests, with the programs of guests, in hosts that play them.

The same lines of shell as in a guest, run with busybox alone (as in the image `tiny`), with what
this machine has (bash, iputils' ping, python3), and with nothing.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from netorch.labs import Lab
from netorch.system.capture import Capture, Mark
from netorch.system.guest_commands import Inside
from netorch.system.guest_probes import GuestVantage
from netorch.system.listeners import End, Listeners
from netorch.system.patience import Patience
from netorch.system.qmp import Completed
from tests.isolation import inside
from tests.kernel.running import running

MARK = Mark(200, b"netorch-0123456789ab")
SERVER = "203.0.113.80"
SOON = 30.0  # something comes back by then even on a busy machine
# Where nothing comes back, or nothing that the probe sees: it has to begin and to send, which takes
# a busy machine a while.
SHORTLY = 6.0


class Played(Inside):
    """A guest that is a host: its programs are those on `path`."""

    def __init__(self, lab: Lab, host: str, patience: Patience, path: str) -> None:
        super().__init__(lab.scope, host, patience)
        self.lab = lab
        self.path = path

    def run(self, argv: Sequence[str], seconds: float) -> Completed | None:
        try:
            with inside(self.lab.scope, self.guest):
                done = subprocess.run(
                    argv,
                    env={"PATH": self.path},
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    timeout=seconds,
                    check=False,
                )
        except subprocess.TimeoutExpired:
            return None
        return Completed(done.returncode, done.stdout, done.stderr)

    def end(self, pid: int) -> None:
        os.kill(pid, 15)


def programs(kind: str, tmp_path: Path) -> str:
    """A PATH with busybox's programs, with this machine's, or without any."""
    if kind == "full":
        return os.environ["PATH"] + ":/usr/sbin:/sbin"
    directory = tmp_path / kind
    directory.mkdir()
    if kind == "busybox":
        busybox = shutil.which("busybox")
        if busybox is None:
            pytest.skip("busybox is not installed")
        names = ("ping", "nc", "tftp", "nslookup", "timeout", "grep", "echo", "true", "cat")
        for name in names:
            (directory / name).symlink_to(busybox)
    return str(directory)


@pytest.mark.parametrize("kind", ["busybox", "full"])
def test_every_probe(kind: str, tmp_path: Path) -> None:
    path = programs(kind, tmp_path)
    with running(tmp_path, "") as lab, Patience() as patience, Listeners(patience) as far:
        namespace = lab.scope.namespace("server")
        client = GuestVantage(Played(lab, "client", patience, path), None)
        back = GuestVantage(Played(lab, "server", patience, path), None)
        for protocol in ("tcp", "udp"):
            assert far.open(End(protocol, SERVER, 80, namespace))
            assert not far.open(End(protocol, SERVER, 80, namespace))
        far.echo()
        with Capture(namespace) as capture:
            for probe in (client.ping, partial(client.tcp, port=80), partial(client.udp, port=80)):
                answer = probe(SERVER, mark=MARK, seconds=SOON)
                assert answer.kind == "reached", answer
                assert capture.seen(MARK) == ("203.0.113.1", SERVER)
        assert client.tcp(SERVER, 81, MARK, SOON).kind == "refused"
        answer, found = client.dns("client", ["192.168.150.1"], SOON)
        if kind == "full" and not shutil.which("nslookup"):
            assert answer.text == "guest client has no nslookup to probe with"
        else:
            assert (answer.kind, len(found)) == ("reached", 1)
            assert client.dns("nobody", ["192.168.150.1"], SOON)[0].kind == "refused"
            assert back.dns("nobody", ["192.0.2.1"], SHORTLY)[0].kind in ("silent", "rejected")
        with inside(lab.scope, "server"):
            subprocess.run(["ip", "route", "flush", "default"], check=True)
            subprocess.run(["ip", "route", "del", "default"], check=False, capture_output=True)
        assert back.tcp("198.51.100.1", 80, MARK, SOON).kind == "unreachable"
        assert back.ping("198.51.100.1", MARK, SOON).kind == "unreachable"


@pytest.mark.parametrize("kind", ["busybox", "full"])
def test_a_rejection_is_seen_at_the_guests_cable(kind: str, tmp_path: Path) -> None:
    """Neither bash nor nc can tell it from a refusal, and busybox's ping does not see it."""
    path = programs(kind, tmp_path)
    with running(tmp_path, "") as lab, Patience() as patience, Capture(links=["server-0"]) as near:
        server = GuestVantage(Played(lab, "server", patience, path), near)
        for answer in (
            server.ping("192.168.150.9", MARK, SHORTLY),
            server.tcp("192.168.150.9", 80, MARK, SHORTLY),
            server.udp("192.168.150.9", 80, MARK, SHORTLY),
        ):
            assert answer.text == "rejected by 203.0.113.1 (ICMP port unreachable)"
            assert answer.by == "203.0.113.1"


@pytest.mark.parametrize("kind", ["busybox", "full"])
def test_a_guest_listens(kind: str, tmp_path: Path) -> None:
    path = programs(kind, tmp_path)
    with running(tmp_path, "") as lab, Patience() as patience:
        server = Played(lab, "server", patience, path)
        end = End("tcp", SERVER, 80)
        client = GuestVantage(Played(lab, "client", patience, path), None)
        with Listeners(patience) as far:
            assert far.open_in_guest(end, server, 300)
            while client.tcp(SERVER, 80, MARK, SOON).kind == "refused":
                pass  # it takes a moment to start
            assert client.tcp(SERVER, 80, MARK, SOON).kind == "reached"
            assert not far.open_in_guest(end, server, 300)
        while client.tcp(SERVER, 80, MARK, SOON).kind == "reached":
            pass  # and to end
        assert client.tcp(SERVER, 80, MARK, SOON).kind == "refused"


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    path = programs("none", tmp_path)
    with running(tmp_path, "") as lab, Patience() as patience:
        client = GuestVantage(Played(lab, "client", patience, path), None)
        for answer, missing in (
            (client.ping(SERVER, MARK, SOON), "no ping"),
            (client.tcp(SERVER, 80, MARK, SOON), "neither bash nor busybox's nc"),
            (client.udp(SERVER, 80, MARK, SOON), "neither bash nor busybox's tftp"),
            (client.dns("client", [], SOON)[0], "no nslookup"),
        ):
            assert answer == ("broken", f"guest client has {missing} to probe with", "")
