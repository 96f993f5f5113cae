"""Every hop of a way through a lab of hosts, broken in turn: `explain` names that hop first."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from netorch import labs
from netorch.engine import Progress
from netorch.errors import UsageError
from netorch.state import State
from netorch.system import namespaces
from netorch.system.explain import Echo, Hop, Packets, Probe, explain, first_broken
from netorch.system.forwarding import _set_forwarding, interfaces
from netorch.system.processes import end, leaders, marked
from netorch.system.scope import Scope
from netorch.system.tracing import PINGS, Trace
from netorch.topology import parse
from netorch.verify import verify
from tests.isolation import inside, ip

pytestmark = [
    pytest.mark.skipif(not shutil.which(program), reason=f"{program} is not installed")
    for program in ("dnsmasq", "busybox", "nft", "bridge")
]

TOPOLOGY = """
[lab]
name = "{name}"

[networks.inside]
mode    = "nat"
address = "192.168.150.1/24"

[networks.lan]
mode    = "bridge"
address = "203.0.113.1/24"

[hosts.client]
nics = [{{ network = "inside" }}]

[hosts.second]
nics = [{{ network = "inside" }}]

[hosts.server]
nics = [{{ network = "lan", address = "203.0.113.80/24" }}]

[hosts.other]
nics = [{{ network = "lan", address = "203.0.113.81/24", gateway = false }}]

[[expect]]
from    = "client"
to      = "server"
seen_as = "203.0.113.1"
within  = 2

[[expect]]
from   = "client"
by     = "dhcp"
within = 2
"""

ROOT = Path(__file__).parents[2]
Lab = tuple[Scope, State]


@contextmanager
def running(directory: Path) -> Iterator[Lab]:
    """The lab in the current network namespace, which is the test's own."""
    os.environ["NETORCH_RUN_DIR"] = str(directory / "run")
    os.environ["NETORCH_DISK_DIR"] = str(directory / "disks")
    name = f"why{os.getpid()}"
    topology = parse(TOPOLOGY.format(name=name), f"{name}.toml", directory)
    outcome = labs.apply(topology, f"{name}.toml", "current", Progress())
    assert outcome.place is not None
    lab = labs.Lab(name, outcome.place, directory / "run" / name, directory / "disks" / name)
    try:
        desired = labs.status(lab).desired
        assert desired is not None
        yield lab.scope, desired
    finally:
        assert labs.teardown(lab, Progress()) == []


def broken(hops: list[Hop]) -> str:
    """The name of the first broken hop, "" if all are fine."""
    return next((hop.name for hop in hops if not hop.ok), "")


def nft(script: str) -> str:
    done = subprocess.run(["nft", "-f", "-"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kill(scope: Scope, key: str) -> None:
    end(scope, leaders(marked(scope))[key])


def in_host(host: str, *arguments: str) -> Callable[[Scope], None]:
    def run(scope: Scope) -> None:
        with inside(scope, host):
            ip(*arguments)

    return run


def here(*arguments: str) -> Callable[[Scope], None]:
    return lambda scope: void(ip(*arguments))


def rules(script: str) -> Callable[[Scope], None]:
    return lambda scope: void(nft(script.replace("LAB", scope.table)))


def void(_value: object) -> None:
    pass


def other_bridge(scope: Scope) -> None:
    ip("link", "add", "br9", "type", "bridge")
    ip("link", "set", "br9", "up")
    ip("link", "set", "client-0", "master", "br9")


def listening_port(scope: Scope) -> None:
    """Spanning tree holds a port back for 60 s after it came up."""
    ip("link", "set", "br-inside", "type", "bridge", "forward_delay", "3000", "stp_state", "1")
    ip("link", "set", "client-0", "down")
    ip("link", "set", "client-0", "up")


def stolen_mac(scope: Scope) -> None:
    with inside(scope, "client"):
        text = ip("-o", "link", "show", "eth0").partition("link/ether ")[2].split()[0]
    command = ["bridge", "fdb", "replace", text, "dev", "second-0", "master", "static", "sticky"]
    subprocess.run(command, check=True)


def no_forwarding(name: str) -> Callable[[Scope], None]:
    return lambda scope: _set_forwarding(interfaces()[name], False)


def lost_lease(scope: Scope) -> None:
    (scope.run / "dnsmasq-inside.leases").write_text("")


def gone_host(scope: Scope) -> None:
    namespaces.unmount(scope.namespace("server"), namespaces.MNT_DETACH)


def drop_in_server(scope: Scope) -> None:
    with inside(scope, "server"):
        nft(base("ip", "input", "drop"))


def base(family: str, hook: str, policy: str, *rules: str, kind: str = "filter") -> str:
    """A table of somebody else's with one base chain."""
    body = "\n".join((f"type {kind} hook {hook} priority 0; policy {policy}", *rules))
    return f"table {family} foreign {{\nchain {hook} {{\n{body}\n}}\n}}\n"


FOREIGN = "nft chain {0} of table {1} foreign"
BREAKINGS: dict[str, tuple[Callable[[Scope], None], str]] = {
    "source device down": (in_host("client", "link", "set", "eth0", "down"), "NIC eth0 of client"),
    "device renamed": (
        in_host("client", "link", "set", "eth0", "down", "name", "gone"),
        "NIC 52:54:00",
    ),
    "veth down": (here("link", "set", "client-0", "down"), "veth client-0"),
    "veth gone": (here("link", "del", "client-0"), "NIC 52:54:00"),
    "wrong bridge": (other_bridge, "bridge port client-0"),
    "port held back": (listening_port, "bridge port client-0"),
    "bridge down": (here("link", "set", "br-inside", "down"), "bridge br-inside"),
    "bridge address": (here("addr", "flush", "dev", "br-inside"), "bridge br-inside"),
    "stolen MAC": (stolen_mac, "forwarding table of br-inside"),
    "dnsmasq dead": (lambda scope: kill(scope, "dnsmasq:inside"), "dnsmasq for inside"),
    "DHCP client dead": (lambda scope: kill(scope, "dhcp:client:eth0"), "DHCP client of client"),
    "lease gone": (lost_lease, "lease of client"),
    "address flushed": (in_host("client", "addr", "flush", "dev", "eth0"), "lease of client"),
    "no default route": (in_host("client", "route", "del", "default"), "route in client"),
    "another route": (
        here("route", "add", "203.0.113.80/32", "dev", "br-inside"),
        "route in this machine",
    ),
    "forwarding in": (no_forwarding("br-inside"), "forwarding on br-inside"),
    "forwarding out": (no_forwarding("br-lan"), "forwarding on br-lan"),
    "our table deleted": (rules("delete table inet LAB"), "nft table netorch_"),
    "our table flushed": (rules("flush table inet LAB"), "nft table netorch_"),
    "our table changed": (rules("add rule inet LAB forward drop"), "nft table netorch_"),
    "foreign policy": (rules(base("ip", "forward", "drop")), FOREIGN.format("forward", "ip")),
    "foreign rule": (
        rules(base("inet", "forward", "accept", "ip protocol icmp counter drop")),
        FOREIGN.format("forward", "inet"),
    ),
    "foreign reject": (
        rules(base("ip", "forward", "accept", "iifname br-inside reject")),
        FOREIGN.format("forward", "ip"),
    ),
    "foreign prerouting": (
        rules(base("ip", "prerouting", "accept", "ip daddr 203.0.113.80 drop")),
        FOREIGN.format("prerouting", "ip"),
    ),
    "foreign postrouting": (
        rules(base("ip", "postrouting", "drop")),
        FOREIGN.format("postrouting", "ip"),
    ),
    "answer dropped": (
        rules(base("ip", "forward", "accept", "icmp type echo-reply drop")),
        FOREIGN.format("forward", "ip"),
    ),
    "target bridge down": (here("link", "set", "br-lan", "down"), "route in this machine"),
    "target veth down": (here("link", "set", "server-0", "down"), "veth server-0"),
    "target off its bridge": (here("link", "set", "server-0", "nomaster"), "bridge port server-0"),
    "target device down": (in_host("server", "link", "set", "eth0", "down"), "NIC eth0 of server"),
    "target gone": (gone_host, "host server"),
    "target address": (in_host("server", "addr", "flush", "dev", "eth0"), "address of server"),
    "no way back": (in_host("server", "route", "flush", "table", "main"), "route in server"),
    "no ARP": (
        in_host("server", "link", "set", "eth0", "arp", "off"),
        "neighbour 203.0.113.80 of this machine",
    ),
    "target's own firewall": (drop_in_server, "answer of server"),
}


@pytest.mark.parametrize("name", BREAKINGS)
def test_the_broken_hop_is_named(name: str, tmp_path: Path) -> None:
    breaking, expected = BREAKINGS[name]
    with running(tmp_path) as (scope, desired):
        breaking(scope)
        hops = explain(scope, desired, "client", "server")
        assert broken(hops).startswith(expected), hops
        assert first_broken(hops).startswith(expected)
        assert "netorchtrace" not in nft_tables()


def nft_tables() -> str:
    return subprocess.run(["nft", "list", "tables"], capture_output=True, text=True).stdout


def test_all_is_well(tmp_path: Path) -> None:
    with running(tmp_path) as (scope, desired):
        for source, target in (
            ("client", "server"),
            ("client", "second"),
            ("client", "gateway"),
            ("client", "203.0.113.1"),
            ("client", "203.0.113.80"),
            ("server", "other"),
            ("other", "203.0.113.1"),
        ):
            hops = explain(scope, desired, source, target)
            assert broken(hops) == "", (source, target, hops)
            assert first_broken(hops) == "every hop is as it should be"
            assert "answers a ping" in hops[-1].detail
        with pytest.raises(UsageError, match="'nobody' is no guest or host"):
            explain(scope, desired, "client", "nobody")
        with pytest.raises(UsageError, match="there is no guest or host 'nobody'"):
            explain(scope, desired, "nobody", "client")


def test_the_labs_own_rule_is_named_as_such(tmp_path: Path) -> None:
    with running(tmp_path) as (scope, desired):
        hop = next(h for h in explain(scope, desired, "server", "client") if not h.ok)
        assert hop.name == f"nft chain arriving of table inet {scope.table}"
        assert "the lab's own rule" in hop.detail


def test_what_stands_before_this_machine_itself(tmp_path: Path) -> None:
    with running(tmp_path) as (scope, desired):
        nft(base("ip", "input", "accept", "iifname br-inside icmp type echo-request drop"))
        hops = explain(scope, desired, "client", "gateway")
        assert broken(hops) == "nft chain input of table ip foreign"
        nft("delete table ip foreign\n" + base("ip", "output", "drop"))
        hops = explain(scope, desired, "client", "gateway")
        assert broken(hops) == "nft chain output of table ip foreign"


def test_an_address_outside_needs_a_way_there(tmp_path: Path) -> None:
    with running(tmp_path) as (scope, desired):
        hops = explain(scope, desired, "client", "198.51.100.1")
        assert broken(hops) == "route in this machine"


def test_bridged_frames_are_dropped_in_family_bridge(tmp_path: Path) -> None:
    with running(tmp_path) as (scope, desired):
        script = base("bridge", "forward", "accept", "ip protocol icmp drop")
        if subprocess.run(["nft", "-f", "-"], input=script, text=True).returncode:
            pytest.skip("this kernel has no nftables of family bridge")
        hops = explain(scope, desired, "server", "other")
        assert broken(hops) == "nft chain forward of table bridge foreign"


def test_bridged_frames_are_dropped_by_way_of_br_netfilter(tmp_path: Path) -> None:
    switch = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
    if not switch.exists() or switch.read_text().strip() != "1":
        pytest.skip("br_netfilter is off")
    with running(tmp_path) as (scope, desired):
        nft(base("ip", "forward", "drop"))
        hop = next(h for h in explain(scope, desired, "server", "other") if not h.ok)
        assert hop.name == "nft chain forward of table ip foreign"
        assert "br_netfilter" in hop.detail


def test_without_a_trace_the_refusing_chains_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from netorch.errors import KernelError

    def refuse(*_: object) -> None:
        raise KernelError("failed to trace", 0)

    monkeypatch.setattr("netorch.system.explain.Trace", refuse)
    with running(tmp_path) as (scope, desired):
        assert broken(explain(scope, desired, "client", "server")) == ""
        nft(base("ip", "forward", "drop"))
        hops = explain(scope, desired, "client", "server")
        assert broken(hops) == "nft chain forward of table ip foreign"


def test_another_probe_than_a_ping_is_traced_as_well(tmp_path: Path) -> None:
    with running(tmp_path) as (scope, desired):
        nft(base("ip", "forward", "accept", "tcp dport 8000 drop"))

        def connect(port: int) -> Echo:
            with inside(scope, "client"):
                client = socket.socket()
            client.settimeout(1 if port == 8000 else 30)  # what is dropped never answers
            with client:
                try:
                    client.connect(("203.0.113.80", port))
                except OSError as error:
                    return Echo(True, isinstance(error, ConnectionRefusedError), str(error))
            return Echo(True, True, "connected")

        for port, expected in ((8000, "nft chain forward of table ip foreign"), (8001, "")):
            packets = Packets(f"tcp dport {port}", f"tcp sport {port}")
            probe = Probe(packets, lambda port=port: connect(port))  # type: ignore[misc]
            assert broken(explain(scope, desired, "client", "server", probe)) == expected
        assert broken(explain(scope, desired, "client", "server")) == ""


def test_the_command_prints_the_hops(tmp_path: Path) -> None:
    def why(*arguments: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "netorch", "why", *arguments]
        return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)

    with running(tmp_path) as (scope, _desired):
        fine = why("client", "server", "--lab", scope.lab)
        assert fine.returncode == 0, fine.stderr
        assert fine.stdout.splitlines()[-1] == "every hop is as it should be"
        ip("link", "set", "client-0", "down")
        wrong = why("client", "server", "--lab", scope.lab)
        assert wrong.returncode == 1
        assert "veth client-0 is broken: it is down" in wrong.stdout.splitlines()[-1]
        as_json = why("client", "server", "--lab", scope.lab, "--json")
        assert as_json.returncode == 1
        first = next(hop for hop in json.loads(as_json.stdout) if not hop["ok"])
        assert first["name"] == "veth client-0"


def test_sigkill_in_the_middle_of_a_trace_leaves_no_table() -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with Trace("t", "10.0.0.1", "10.0.0.2", PINGS):
            os.write(writing, b"there")
            signal.pause()
    os.close(writing)
    try:
        assert os.read(reading, 5) == b"there"
        assert "netorchtrace_t_" in nft_tables()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert nft_tables() == ""


VERIFIED = (
    *("veth down", "wrong bridge", "lease gone", "our table flushed", "foreign policy"),
    *("foreign rule", "forwarding in", "forwarding out", "no default route"),
)


@pytest.mark.parametrize("name", VERIFIED)
def test_verify_names_the_broken_hop(name: str, tmp_path: Path) -> None:
    breaking, expected = BREAKINGS[name]
    with running(tmp_path) as (scope, _desired):
        breaking(scope)
        verdicts = verify(labs.find(scope.lab))
    failed = [verdict for verdict in verdicts if not verdict.ok]
    assert failed, verdicts
    assert failed[0].because.startswith(expected), failed
    assert " is broken: " in failed[0].because
