"""Rates on the kernel: measured, changed under a connection, put right, gone without a trace."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from netorch.engine import Progress
from netorch.system import namespaces, rates
from netorch.system.netlink import Netlink
from netorch.system.snapshot import Snapshot
from tests.isolation import ip
from tests.kernel.cables import sh
from tests.whole_labs import FailingAt, LabMachine, Refused, in_child, links

Make = Callable[..., LabMachine]
LAB = """
[networks.lan]
mode = "isolated"
address = "10.0.0.1/24"
dhcp = false
dns = false
[hosts.client]
nics = [{ network = "lan", address = "10.0.0.81/24"RATE }]
[hosts.server]
nics = [{ network = "lan", address = "10.0.0.80/24"OTHER }]
"""
SIZE = 1_000_000  # bytes: one second at 8mbit, less the 66 KiB that pass at once


def write(machine: LabMachine, rate: str = "", other: str = "") -> None:
    lab = LAB
    for name, text in (("RATE", rate), ("OTHER", other)):
        lab = lab.replace(name, f", rate = {text}" if text else "")
    machine.write(lab)


@contextmanager
def connected(machine: LabMachine) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection from the client to the server: its two ends."""
    with ExitStack() as stack:
        with namespaces.in_namespace(machine.scope.namespace("server")):
            listening = stack.enter_context(socket.create_server(("10.0.0.80", 5001)))
        with namespaces.in_namespace(machine.scope.namespace("client")):
            client = socket.create_connection(("10.0.0.80", 5001), timeout=30)
        stack.enter_context(client)
        server = stack.enter_context(listening.accept()[0])
        server.settimeout(30)
        yield client, server


def seconds(source: socket.socket, target: socket.socket) -> float:
    """How long it takes from end to end."""
    begin = time.monotonic()
    sending = threading.Thread(target=source.sendall, args=(bytes(SIZE),))
    sending.start()
    left = SIZE
    while left:
        got = len(target.recv(65536))
        assert got, "the connection was closed"
        left -= got
    sending.join()
    return time.monotonic() - begin


def check(limited: bool, source: socket.socket, target: socket.socket) -> None:
    """Whether the way is limited to 8mbit. Either may be slower on a busy machine, for as often as
    that is busy; but nothing that comes through as quickly even once has a lower limit.
    """
    for _attempt in range(20):
        took = seconds(source, target)
        assert not limited or took > 0.7
        if took < (3 if limited else 0.7):
            return
    raise AssertionError(f"{took:.2f} s, and no quicker before")


def test_rates_are_kept_by_direction_and_change_under_a_connection(lab_machine: Make) -> None:
    machine = lab_machine()
    write(machine)
    machine.up()
    with connected(machine) as (client, server):
        for rate, in_limited, out_limited in (
            ("", False, False),
            ('"8mbit"', True, True),
            ('{ in = "8mbit" }', True, False),
            ('{ in = "2gbit", out = "8mbit" }', False, True),
            ("", False, False),
        ):
            write(machine, rate)
            machine.up()
            assert machine.differences() == [], rate
            check(out_limited, client, server)
            check(in_limited, server, client)
    assert "client-0-rate" not in links()
    assert "tbf" not in sh("tc qdisc show")
    assert "ingress" not in sh("tc qdisc show")
    machine.down()


@pytest.mark.parametrize("place", ["current", "private"])
def test_a_lab_with_rates_comes_and_goes(lab_machine: Make, place: str) -> None:
    machine = lab_machine(place)
    write(machine, '"8mbit"', '{ in = "100kbit" }')
    machine.up()
    assert machine.differences() == []
    assert machine.up() == []
    machine.down()


def test_what_somebody_did_to_a_rate_shows_and_is_put_right(lab_machine: Make) -> None:
    machine = lab_machine()
    write(machine, '"8mbit"')
    machine.up()
    ip("link", "set", "client-0-rate", "mtu", "1400")  # as good as before
    sh("tc qdisc add dev server-0 root handle 7: tbf rate 1gbit burst 64k latency 50ms")
    assert machine.differences() == [], "where no rate is wanted, a queue is its owner's"
    for command, differs in (
        ("tc qdisc del dev client-0 root", "changed"),
        (
            "tc qdisc replace dev client-0 root handle 7: tbf rate 8mbit burst 64k lat 9ms",
            "changed",
        ),
        ("tc qdisc del dev client-0 ingress", "changed"),
        ("tc filter del dev client-0 parent ffff:", "changed"),
        ("tc qdisc del dev client-0-rate root", "changed"),
        ("ip link set client-0-rate down", "changed"),
        ("ip link del client-0-rate", "missing"),
        ("ip link del client-0", "changed"),
    ):
        sh(command)
        assert f"{differs} rate:veth:client:0" in machine.differences(), command
        machine.up()
        assert machine.differences() == [], command
    assert "7:" in sh("tc qdisc show dev server-0")
    sh("ip link del client-0")
    machine.down()


def test_a_failed_apply_takes_rates_off_again(lab_machine: Make) -> None:
    machine = lab_machine()
    write(machine)
    machine.up()
    before = sh("tc qdisc show"), links()
    write(machine, '"8mbit"', '"8mbit"')
    refused = in_child(lambda: machine.apply_here(Progress(), lambda s: FailingAt(s, 3)))
    assert isinstance(refused, Refused)
    assert refused.undone[0] == "delete rate of client:0, 8mbit"
    assert (sh("tc qdisc show"), links()) == before
    ip("link", "add", "server-0-rate", "type", "bridge")
    taken = machine.apply()
    assert taken.status == 1
    assert "the name server-0-rate is taken" in taken.err
    ip("link", "del", "server-0-rate")
    assert (sh("tc qdisc show"), links()) == before
    machine.down()


def test_what_the_kernel_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with Netlink() as netlink:
        snapshot = Snapshot(netlink)
    before = links()
    assert rates.missing(snapshot) == []
    monkeypatch.setattr(rates, "_redirect", lambda ifb: redirect(ifb).replace(b"mirred", b"absent"))
    (reason,) = rates.missing(snapshot)
    assert reason.startswith("rates of NICs need the kernel's act_mirred: No such file")
    assert links() == before


redirect = rates._redirect
