"""netorch verify on labs of hosts: every probe, both answers, and what it leaves behind."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as xml

import pytest

from netorch import labs
from netorch.engine import Progress
from netorch.expectations import Verdict
from netorch.labs import Lab
from netorch.planner import Update
from netorch.resources import Record
from netorch.system.leases import read
from netorch.system.probes import Answer
from netorch.topology import parse
from netorch.verify import _Run, verify
from tests.isolation import inside
from tests.kernel.running import LAB, expect, running

ROOT = Path(__file__).parents[2]


def verdicts(tmp_path: Path, *expected: str) -> list[Verdict]:
    with running(tmp_path, "\n".join(expected)) as lab:
        return verify(lab)


def said(found: list[Verdict]) -> list[tuple[bool, str]]:
    return [(verdict.ok, verdict.observed) for verdict in found]


def nft(lab: Lab, host: str, rule: str) -> None:
    """A filter of the host's own."""
    chain = "chain inet t in { type filter hook input priority 0; }"
    with inside(lab.scope, host):
        command = f"add table inet t; add {chain}; add rule inet t in {rule}"
        subprocess.run(["nft", command], check=True)


def listeners(lab: Lab, host: str) -> list[tuple[str, str]]:
    """Protocol and local address of every socket in the host that listens."""
    with inside(lab.scope, host):
        shown = subprocess.run(["ss", "-Hlntu"], capture_output=True, text=True, check=True)
    return sorted((line.split()[0], line.split()[4]) for line in shown.stdout.splitlines())


def test_every_way_of_reaching(tmp_path: Path) -> None:
    nat = {"seen_as": "203.0.113.1"}
    found = verdicts(
        tmp_path,
        expect("client", "server", **nat),
        expect("client", "server", "tcp:22", **nat),
        expect("client", "server", "udp:5000", **nat),
        expect("server", "other", "tcp:22", seen_as="203.0.113.80"),
        expect("client", "203.0.113.80", "udp:22"),
        expect("client", "gateway"),
        expect("client", "gateway", "tcp:9", seen_as="192.168.150.248"),
        expect("client", "gateway", "tcp:53"),
        expect("client", "gateway", "udp:53"),
        expect("client", by="dns:client"),
        expect("server", "gateway", by="dns:server"),
        expect("client", by="dhcp"),
        expect("network:lan", "client", "tcp:1", reach=False),
    )
    assert all(verdict.ok for verdict in found), said(found)
    assert [verdict.question.source for verdict in found[-2:]] == ["server", "other"]
    assert found[0].observed.endswith(" ms, seen as 203.0.113.1")
    assert found[1].observed.startswith("connected in ")
    assert found[2].observed.startswith("echo in ")
    assert found[8].observed == "it arrives, and nobody answers"
    assert found[11].observed.endswith(" on eth0")


@pytest.mark.parametrize(("to", "by"), [("server", "udp:5000"), ("", "dns:client")])
def test_no_verdict_without_a_probe(
    to: str, by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deadline passes while the process stands still, right before the attempt."""
    clock, attempt = time.monotonic, _Run._attempt
    stood_still = itertools.count(1)

    def late(self: _Run, *arguments: Any) -> Answer:
        passed = 100 * next(stood_still)
        monkeypatch.setattr(time, "monotonic", lambda: clock() + passed)
        return attempt(self, *arguments)

    monkeypatch.setattr(_Run, "_attempt", late)
    # One at a time: the time of an attempt that runs must not pass, too.
    (verdict,) = verdicts(tmp_path, expect("client", to, by))
    assert verdict.ok, verdict.observed


def test_what_is_seen_is_compared(tmp_path: Path) -> None:
    wrong = {"seen_as": "192.168.150.2"}
    ways = ("ping", "tcp:22", "udp:22")
    found = verdicts(tmp_path, *(expect("client", "server", by, **wrong) for by in ways))
    for verdict in found:
        assert not verdict.ok
        assert "seen as 203.0.113.1, not as 192.168.150.2" in verdict.observed


def test_a_no_says_who_refuses_and_who_gets_there(tmp_path: Path) -> None:
    ways = ("ping", "tcp:22", "udp:22")
    wanted = "\n".join(
        [
            *(expect("server", "client", by, reach=False) for by in ways),
            *(expect("other", "server", by, reach=False, within=1) for by in ("ping", "udp:22")),
            expect("other", "server", "tcp:22", reach=False, within=1),
            expect("other", "server", "tcp:23", reach=False, within=1),
            expect("client", by="dns:nobody", reach=False),
        ]
    )
    with running(tmp_path, wanted) as lab:
        nft(lab, "server", "ip saddr 203.0.113.81 tcp dport 23 reject with tcp reset")
        nft(lab, "server", "ip saddr 203.0.113.81 udp dport 22 reject")
        nft(lab, "server", "ip saddr 203.0.113.81 drop")
        found = verify(lab)
    assert all(verdict.ok for verdict in found), said(found)
    for verdict in found[:3]:
        assert verdict.observed.startswith("rejected by 203.0.113.1 (ICMP port unreachable); ")
    for verdict in found[:7]:
        assert "; this machine gets there: " in verdict.observed
    assert found[3].observed.startswith("no answer in 1 s; ")
    assert found[4].observed.startswith("rejected by 203.0.113.80 (ICMP port unreachable); ")
    assert found[5].observed.startswith("no answer in 1 s; ")
    assert found[6].observed.startswith("refused by 203.0.113.80 (TCP RST); ")
    assert "NXDOMAIN" in found[7].observed


def test_what_gets_there_must_not(tmp_path: Path) -> None:
    found = verdicts(
        tmp_path,
        expect("client", "server", reach=False),
        expect("client", "server", "tcp:22", reach=False),
        expect("client", "server", "udp:22", reach=False),
        expect("client", by="dns:client", reach=False),
    )
    assert not any(verdict.ok for verdict in found)
    assert all(verdict.observed.startswith("it gets there: ") for verdict in found)


def test_a_datagram_that_only_arrives(tmp_path: Path) -> None:
    """It is too much where nothing may arrive, and too little where an answer has to come."""
    wanted = expect("other", "server", "udp:22", reach=False, within=1)
    wanted += expect("other", "server", "udp:23", within=1)
    with running(tmp_path, wanted) as lab:
        nft(lab, "other", "udp sport { 22, 23 } drop")
        no, yes = verify(lab)
    assert (no.ok, no.observed) == (False, "it gets there: it arrives, and nobody answers")
    assert (yes.ok, yes.observed) == (False, "no answer in 1 s")


def test_a_dead_far_end_proves_nothing(tmp_path: Path) -> None:
    ways = ("ping", "tcp:22", "udp:22")
    wanted = [expect("server", "client", by, reach=False) for by in ways]
    wanted += [expect("client", "server", by, within=1) for by in ways]
    wanted.append(expect("server", "203.0.113.99", reach=False))
    with running(tmp_path, "\n".join(wanted)) as lab:
        for host in ("client", "server"):
            with inside(lab.scope, host):
                down = ["ip", "link", "set", "eth0", "down"]
                subprocess.run(down, check=True)
        found = verify(lab)
    assert not any(verdict.ok for verdict in found), said(found)
    for verdict in (*found[:3], found[6]):
        assert verdict.observed.startswith("could not be proved: "), verdict
        assert "this machine does not get there either" in verdict.observed


def test_a_host_that_is_gone(tmp_path: Path) -> None:
    wanted = expect("client", "server", "tcp:1", within=1) + expect("server", "client")
    with running(tmp_path, wanted) as lab:
        path = lab.scope.namespace("server")
        subprocess.run(["umount", str(path)], check=True)
        far, near = verify(lab)
    assert not far.ok
    assert "failed to listen" in far.observed
    assert said([near]) == [(False, "host server is not up")]


def test_a_lease_that_is_gone(tmp_path: Path) -> None:
    with running(tmp_path, expect("client", by="dhcp", within=1)) as lab:
        (lease,) = read(lab.scope)
        with inside(lab.scope, "client"):
            subprocess.run(["ip", "address", "flush", "dev", "eth0"], check=True)
        assert said(verify(lab)) == [
            (False, f"no address on eth0, though {lease.address} is leased")
        ]


def test_a_service_that_is_there_is_used_and_left_alone(tmp_path: Path) -> None:
    wanted = [
        expect("client", "server", "tcp:80", seen_as="203.0.113.1"),
        expect("client", "server", "udp:80", seen_as="203.0.113.1"),
    ]
    with running(tmp_path, "\n".join(wanted)) as lab:
        with inside(lab.scope, "server"):
            stream = socket.create_server(("0.0.0.0", 80))
            datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        datagrams.bind(("0.0.0.0", 80))
        with stream, datagrams:
            before = listeners(lab, "server")
            found = verify(lab)
            assert listeners(lab, "server") == before
            assert stream.accept()[1][0] == "203.0.113.1"
            assert datagrams.recv(100).startswith(b"netorch-")
    assert all(verdict.ok for verdict in found), said(found)
    assert found[1].observed == "it arrives, and nobody answers, seen as 203.0.113.1"


def test_many_side_by_side(tmp_path: Path) -> None:
    """Fifty that each wait a second, next to fifty that don't, take no fifty seconds. On a busy
    machine each takes longer, and so they are held against their sum.
    """
    wanted = [expect("other", "server", f"tcp:{p}", reach=False, within=1) for p in range(1, 51)]
    wanted += [expect("client", "server", f"tcp:{port}") for port in range(1001, 1051)]
    with running(tmp_path, "\n".join(wanted)) as lab:
        nft(lab, "server", "ip saddr 203.0.113.81 drop")
        began = time.monotonic()
        found = verify(lab)
        took = time.monotonic() - began
        assert listeners(lab, "server") == []
    assert all(verdict.ok for verdict in found), said(found)
    assert sum(verdict.seconds for verdict in found) > 50
    assert took < sum(verdict.seconds for verdict in found) / 4


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:

    def listens(lab: Lab) -> bool:
        return any(address.endswith(":22") for _, address in listeners(lab, "client"))

    wanted = expect("server", "client", "tcp:22", within=60)
    with running(tmp_path, wanted) as lab:
        command = [sys.executable, "-m", "netorch", "verify", lab.name]
        for number in (signal.SIGINT, signal.SIGTERM):
            with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) as process:
                while not listens(lab):
                    assert process.poll() is None
                process.send_signal(number)
                assert process.stderr is not None
                assert process.stderr.read().strip() == b"interrupted"
                assert process.wait() == 1
            assert not listens(lab)


def test_a_change_of_expectations_updates_the_record_alone(tmp_path: Path) -> None:
    with running(tmp_path, "") as lab:
        assert verify(lab) == []
        written = f'[lab]\nname = "{lab.name}"\n{LAB}\n{expect("client", "gateway")}'
        topology = parse(written, "lab.toml", tmp_path)
        outcome = labs.apply(topology, "lab.toml", "current", Progress())
        (change,) = outcome.plan
        assert isinstance(change, Update)
        assert isinstance(change.new, Record)
        assert [verdict.ok for verdict in verify(lab)] == [True]


def netorch(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "netorch", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_line(tmp_path: Path) -> None:
    wanted = expect("client", "server") + expect("client", "server", reach=False)
    with running(tmp_path, wanted) as lab:
        report = tmp_path / "report.xml"
        shown = netorch("verify", lab.name, "--junit", str(report))
        assert shown.returncode == 4, shown.stderr
        good, bad, summary = shown.stdout.splitlines()
        assert good.startswith("ok   client -> server ping: ")
        assert bad.startswith("FAIL client -> server ping (must not): it gets there: ")
        assert summary == f"lab {lab.name}: 1 of 2 expectations are not met"
        (suite,) = xml.parse(report).getroot()
        assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
        rows = json.loads(netorch("verify", lab.name, "--json").stdout)
        assert [row["ok"] for row in rows] == [True, False]


def test_apply_and_verify_at_once(tmp_path: Path) -> None:
    os.environ["NETORCH_RUN_DIR"] = str(tmp_path / "run")
    file = tmp_path / "lab.toml"
    name = f"p{os.getpid()}"
    file.write_text(f'[lab]\nname = "{name}"\nuplink = "none"\n{LAB}{expect("client", "server")}')
    try:
        shown = netorch("apply", "--private", "--verify", str(file))
        assert shown.returncode == 0, shown.stderr
        assert shown.stdout.splitlines()[-1].startswith("ok   client -> server ping: ")
        file.write_text(file.read_text() + "reach = false\n")
        shown = netorch("apply", "--private", "--verify", "--json", str(file))
        assert shown.returncode == 4, shown.stderr
        made = json.loads(shown.stdout)
        assert [action["key"] for action in made["actions"]] == ["record"]
        assert [row["ok"] for row in made["expectations"]] == [False]
    finally:
        assert netorch("teardown", name).returncode == 0
