"""The adapters for dnsmasq and the DHCP client, on a bridge and a host of the test's own."""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import msgspec
import pytest

from netorch.errors import NetorchError, ReadyError
from netorch.networks import Reservation, Segment, dhcp_hosts, dnsmasq_config
from netorch.planner import Create, Delete, Update
from netorch.resources import DhcpClient, Dnsmasq, Resource, Tap, Veth
from netorch.state import State
from netorch.system import Adapter, System
from netorch.system.capabilities import NET_ADMIN, NET_BIND_SERVICE, NET_RAW
from netorch.system.leases import parse, read, wait_ready
from netorch.system.processes import end, marked
from netorch.system.scope import Scope
from netorch.system.services import DhcpClients, Dnsmasqs
from netorch.system.starting import program
from tests.isolation import inside, ip, make_host

pytestmark = [
    pytest.mark.skipif(not shutil.which(program), reason=f"{program} is not installed")
    for program in ("dnsmasq", "busybox")
]

MAC = "52:54:00:00:00:01"
SEGMENT = Segment(
    network="default",
    mode="nat",
    bridge="virbr0",
    subnet="192.168.122.0/24",
    gateway="192.168.122.1",
    dhcp_first="192.168.122.2",
    dhcp_last="192.168.122.254",
    reservations=(Reservation(mac=MAC, address="192.168.122.66", name="server"),),
)
CLIENT = DhcpClient(host="server", device="eth0")
VETH = Veth(
    id="server:0",
    name="server-0",
    network="default",
    bridge="virbr0",
    host="server",
    device="eth0",
    mac=MAC,
)


def dnsmasq(scope: Scope, segment: Segment = SEGMENT) -> Dnsmasq:
    stem = scope.run / f"dnsmasq-{segment.network}"
    config = dnsmasq_config(
        segment,
        leases=f"{stem}.leases",
        hosts=f"{stem}.hosts",
        names=f"{stem}.names",
        log=f"{stem}.log",
    )
    return Dnsmasq(network=segment.network, config=config, hosts=dhcp_hosts(segment))


def make_links(scope: Scope) -> None:
    ip("link", "add", "virbr0", "type", "bridge")
    ip("addr", "add", "192.168.122.1/24", "dev", "virbr0")
    make_host(scope, "server")
    ip("link", "add", "server-0", "type", "veth", "peer", "name", "eth0", "address", MAC)
    ip("link", "set", "server-0", "master", "virbr0", "up")
    ip("link", "set", "virbr0", "up")
    ip("link", "set", "eth0", "netns", str(scope.namespace("server")))


def nothing(resource: Resource) -> None:
    pass


def silent(line: str) -> None:
    pass


def test_dnsmasq_runs_with_three_capabilities_and_is_observed(
    scope: Callable[..., Scope],
) -> None:
    lab = scope(private=True)
    make_links(lab)
    adapter, wanted = Dnsmasqs(lab), dnsmasq(lab)
    done: list[Resource] = []
    adapter.create([wanted], done.append)
    assert done == [wanted] == list(adapter.observe())
    status = Path(f"/proc/{marked(lab)[0].pid}/status").read_text().splitlines()
    granted = 1 << NET_ADMIN | 1 << NET_BIND_SERVICE | 1 << NET_RAW
    bounding = next(line for line in status if line.startswith("CapBnd"))
    assert int(bounding.split()[1], 16) == granted
    adapter.delete([wanted], nothing)
    assert list(adapter.observe()) == []
    assert marked(lab) == []
    adapter.delete([wanted], nothing)
    left = {path.name for path in lab.run.iterdir()}
    assert left == {"dnsmasq-default.leases", "netns"}


def test_new_reservations_go_to_the_same_process(scope: Callable[..., Scope]) -> None:
    lab = scope(private=True)
    make_links(lab)
    adapter, wanted = Dnsmasqs(lab), dnsmasq(lab)
    adapter.create([wanted], nothing)
    (before,) = marked(lab)
    changed = msgspec.structs.replace(wanted, hosts=f"{MAC},192.168.122.77,server\n")
    adapter.update([Update(wanted, changed)], nothing)
    assert list(adapter.observe()) == [changed]
    assert [process.pid for process in marked(lab)] == [before.pid]
    DhcpClients(lab).create([CLIENT], nothing)
    (lease,) = wait_ready(lab, State([VETH, changed, CLIENT]), set(), 60, silent)
    assert lease.address == "192.168.122.77"
    (lab.run / "dnsmasq-default.pending").touch()  # an update that was killed half way
    assert list(adapter.observe()) != [changed]
    end(lab, marked(lab))


def test_a_second_process_for_a_network_is_seen_and_goes(scope: Callable[..., Scope]) -> None:
    lab = scope(private=True)
    make_links(lab)
    adapter, wanted = Dnsmasqs(lab), dnsmasq(lab)
    adapter.create([wanted], nothing)
    with inside(lab, "server"):
        ip("link", "add", "virbr0", "type", "bridge")
        adapter.create([wanted], nothing)
    (seen,) = adapter.observe()
    assert seen != wanted
    adapter.delete([seen], nothing)
    assert marked(lab) == []


class Failing:
    """An adapter with which every step fails, in the middle of what dnsmasq has begun."""

    kinds = (Tap,)

    def create(self, wanted: Sequence[Resource], done: Callable[[Resource], None]) -> None:
        raise NetorchError("failed to create it")

    def delete(self, unwanted: Sequence[Resource], done: Callable[[Resource], None]) -> None:
        raise NetorchError("failed to delete it")


def test_a_step_that_fails_leaves_no_dnsmasq_half_started_or_half_ended(
    scope: Callable[..., Scope], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = scope()
    make_links(lab)
    slow = lab.run / "bin" / "dnsmasq"
    slow.parent.mkdir()
    slow.write_text(f'#!/bin/sh\nsleep 0.5\nexec {program("dnsmasq")} "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{slow.parent}:{os.environ['PATH']}")
    system = System(lab, [cast(Adapter, Failing()), Dnsmasqs(lab)])
    tap = Tap(id="lab:0", name="lab0", network="default", bridge="virbr0", mac=MAC)

    with pytest.raises(NetorchError, match="failed to create it"):
        system.execute([Create(tap), Create(dnsmasq(lab))], lambda action: None)
    with pytest.raises(ChildProcessError):  # what had begun has come to its end
        os.waitpid(-1, os.WNOHANG)
    assert list(Dnsmasqs(lab).observe()) == [dnsmasq(lab)]

    with pytest.raises(NetorchError, match="failed to delete it"):
        system.execute([Delete(tap), Delete(dnsmasq(lab))], lambda action: None)
    assert marked(lab) == []


def test_who_holds_the_port_is_named(scope: Callable[..., Scope]) -> None:
    lab, other = scope(private=True), scope("other")
    make_links(lab)
    Dnsmasqs(other).create([dnsmasq(other, msgspec.structs.replace(SEGMENT))], nothing)
    with pytest.raises(NetorchError) as caught:
        Dnsmasqs(lab).create([dnsmasq(lab)], nothing)
    holder = marked(other)[0].pid
    assert "failed to create dnsmasq for default" in caught.value.message
    assert "Address already in use" in caught.value.message
    assert f"dnsmasq (process {holder})" in caught.value.hint
    end(other, marked(other))


def test_a_wrong_configuration_is_reported_in_dnsmasqs_words(
    scope: Callable[..., Scope],
) -> None:
    lab = scope()
    wrong = Dnsmasq(network="default", config="no-such-option\n")
    with pytest.raises(NetorchError, match="bad option at line 1"):
        Dnsmasqs(lab).create([wrong], nothing)
    assert marked(lab) == []


def test_a_host_gets_address_route_and_name_server(scope: Callable[..., Scope]) -> None:
    lab = scope(private=True)
    make_links(lab)
    server, clients = Dnsmasqs(lab), DhcpClients(lab)
    wanted = dnsmasq(lab)
    server.create([wanted], nothing)
    clients.create([CLIENT], nothing)
    assert list(clients.observe()) == [CLIENT]
    said: list[str] = []
    started = {CLIENT.key}
    desired = State([VETH, wanted, CLIENT])
    (lease,) = wait_ready(lab, desired, started, 60, said.append)
    assert (lease.address, lease.name, lease.mac) == ("192.168.122.66", "server", MAC)
    assert said[-1] == "server has 192.168.122.66"
    assert read(lab) == [lease]
    with inside(lab, "server"):
        assert "192.168.122.66/24 brd 192.168.122.255" in ip("addr", "show", "dev", "eth0")
        assert "dynamic" in ip("addr", "show", "dev", "eth0")
        assert ip("route", "show", "default").startswith(
            "default via 192.168.122.1 dev eth0 proto dhcp"
        )
    resolv = lab.run / "hosts" / "server" / "resolv.conf"
    assert resolv.read_text() == "nameserver 192.168.122.1\n"
    clients.delete([CLIENT], nothing)
    server.delete([wanted], nothing)
    assert marked(lab) == []


def test_a_lease_from_before_does_not_count_for_who_was_started_again(
    scope: Callable[..., Scope],
) -> None:
    lab = scope(private=True)
    make_links(lab)
    server, clients = Dnsmasqs(lab), DhcpClients(lab)
    wanted = dnsmasq(lab)
    desired, started = State([VETH, wanted, CLIENT]), {CLIENT.key}
    server.create([wanted], nothing)
    clients.create([CLIENT], nothing)
    leases = wait_ready(lab, desired, started, 60, silent)
    assert wait_ready(lab, desired, set(), 0, silent) == leases
    clients.delete([CLIENT], nothing)
    ip("link", "set", "virbr0", "down")
    clients.create([CLIENT], nothing)
    with pytest.raises(
        ReadyError, match="server has no lease of network default yet: its link virbr0 is down"
    ):
        wait_ready(lab, desired, started, 0.1, silent)
    end(lab, marked(lab))
    with pytest.raises(ReadyError, match="the DHCP client of server has ended"):
        wait_ready(lab, desired, started, 60, silent)


def test_lease_file_with_an_unfinished_line() -> None:
    text = (
        "duid 00:01:00:01:2f\n"
        f"1795382947 {MAC} 192.168.122.66 server 01:{MAC}\n"
        f"0 52:54:00:00:00:02 192.168.122.67 * *\n"
        f"1795382947 52:54:00:00:00:03 192.168.122.68 vm3 01:52"
    )
    first, second = parse(text, "default")
    assert (first.network, first.expires, first.name) == ("default", 1795382947, "server")
    assert (second.expires, second.name, second.client_id) == (0, "", "")
