"""Every hop between guests, broken in turn: `explain` names that hop first.

One lab with two guests, in a private place, for all tests: each goes in there in a child, and mends
what it has broken.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from netorch import labs
from netorch.engine import Progress
from netorch.errors import NetorchError
from netorch.nic_devices import netdev_id
from netorch.resources import Guest, Resource
from netorch.state import State
from netorch.system import echo
from netorch.system.explain import Hop, explain
from netorch.system.firewall import Firewall
from netorch.system.forwarding import _set_forwarding, interfaces
from netorch.system.guests import Guests
from netorch.system.processes import end, leaders, marked
from netorch.system.qmp import Qmp, agent_exec
from netorch.system.scope import Scope
from netorch.system.services import Dnsmasqs
from netorch.system.tiny import tiny_image
from netorch.topology import parse
from netorch.verify import verify
from tests.isolation import inside, ip, require_tun
from tests.kernel.machine import run_forked
from tests.qemu.labs.lab import wait_for

pytestmark = [
    pytest.mark.skipif(not shutil.which(program), reason=f"{program} is not installed")
    for program in ("qemu-system-x86_64", "dnsmasq", "nft")
]

LAB = f"why{os.getpid()}"
TOPOLOGY = f"""
[lab]
name   = "{LAB}"
uplink = "none"

[networks.default]
bridge  = "virbr0"
address = "192.168.122.1/24"

[networks.lan]
mode    = "bridge"
bridge  = "br0"
address = "10.0.0.1/24"
dhcp    = true

[guests.vm1]
memory = "128M"
nics   = [{{ network = "default", address = "192.168.122.6" }}]

[guests.vm2]
memory = "128M"
nics   = [{{ network = "lan", address = "10.0.0.120" }}]

[hosts.server]
nics = [{{ network = "lan", address = "10.0.0.80/24" }}]

[[expect]]
from    = "vm1"
to      = "server"
seen_as = "10.0.0.1"
within  = 3

[[expect]]
from   = "vm1"
by     = "dhcp"
within = 3
"""
FOREIGN = "table ip foreign {\nchain forward {\ntype filter hook forward priority 0; policy drop\n"
FOREIGN += "iifname lo accept\n}\n}\n"

Change = Callable[[Scope, State], object]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    require_tun()
    tiny_image(print)
    directory = tmp_path_factory.mktemp("why")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NETORCH_RUN_DIR", str(directory / "run"))
        patch.setenv("NETORCH_DISK_DIR", str(directory / "disks"))

        def boot() -> None:
            topology = parse(TOPOLOGY, f"{LAB}.toml", directory)
            try:
                labs.apply(topology, f"{LAB}.toml", "private", Progress())
            except NetorchError as error:
                if "namespace" in error.message:
                    pytest.skip(error.message)
                raise

        outcome(run_forked(boot))
        try:
            yield
        finally:
            assert labs.teardown(labs.find(LAB), Progress()) == []


def outcome(failure: str) -> None:
    if failure.startswith("skip:"):
        pytest.skip(failure.removeprefix("skip:"))
    if failure:
        pytest.fail(failure, pytrace=False)


def in_the_lab(body: Callable[[Scope, State], None]) -> None:
    def child() -> None:
        there = labs.find(LAB)
        desired = labs.status(there).desired
        assert desired is not None
        body(there.scope, desired)

    outcome(run_forked(child))


def broken(hops: list[Hop]) -> str:
    return next((hop.name for hop in hops if not hop.ok), "")


def nothing(resource: Resource) -> None:
    pass


def link(*arguments: str) -> Change:
    return lambda scope, desired: ip("link", "set", *arguments)


def guest(name: str, *commands: str) -> Change:
    def run(scope: Scope, desired: State) -> None:
        for command in commands:
            done = agent_exec(scope, name, command.split())
            assert done.code == 0, done

    return run


def qmp(vm: str, command: str, **arguments: object) -> Change:
    def ask(scope: Scope, desired: State) -> None:
        with Qmp(scope.run / "guests" / vm / "qmp.sock", vm) as session:
            session.ready()
            if command == "set_link":
                (running,) = (guest for guest in desired.of(Guest) if guest.name == vm)
                arguments["name"] = netdev_id(running.nics[0].mac)
            session.ask(command, arguments)

    return ask


def server(*arguments: str) -> Change:
    def run(scope: Scope, desired: State) -> None:
        with inside(scope, "server"):
            ip("link", "set", *arguments)

    return run


def nft(script: str) -> Change:
    def run(scope: Scope, desired: State) -> None:
        text = script.replace("LAB", scope.table)
        subprocess.run(["nft", "-f", "-"], input=text, text=True, check=True)

    return run


def forwarding(name: str, on: bool) -> Change:
    return lambda scope, desired: _set_forwarding(interfaces()[name], on)


def kill(key: str) -> Change:
    return lambda scope, desired: end(scope, leaders(marked(scope))[key])


def wanted(desired: State, key: str) -> list[Resource]:
    resource = desired.get(key)
    assert resource is not None
    return [resource]


def back_on_its_bridge(scope: Scope, desired: State) -> None:
    """This machine has answered on br0 for 192.168.122.1, with br0's MAC: vm1 must forget that."""
    link("vm1-0", "master", "virbr0")(scope, desired)
    guest("vm1", "ip neigh flush dev eth0")(scope, desired)


def new_rules(scope: Scope, desired: State) -> None:
    Firewall(scope).create(wanted(desired, "ruleset"), nothing)


def new_dnsmasq(scope: Scope, desired: State) -> None:
    Dnsmasqs(scope).create(wanted(desired, "dnsmasq:default"), nothing)


def new_vm2(scope: Scope, desired: State) -> None:
    Guests(scope, print).create(wanted(desired, "guest:vm2"), nothing)


def hide_leases(scope: Scope, desired: State) -> None:
    leases(scope).rename(leases(scope).with_suffix(".hidden"))


def show_leases(scope: Scope, desired: State) -> None:
    leases(scope).with_suffix(".hidden").rename(leases(scope))


def leases(scope: Scope) -> Path:
    return scope.run / "dnsmasq-default.leases"


def link_off(scope: Scope, desired: State) -> None:
    """The guest's kernel hears of it a moment after QEMU."""
    qmp("vm1", "set_link", up=False)(scope, desired)
    until = "until [ $(cat /sys/class/net/eth0/carrier) = 0 ]; do usleep 10000; done"
    assert agent_exec(scope, "vm1", ["sh", "-c", until], seconds=60).code == 0


def link_on_again(scope: Scope, desired: State) -> None:
    """vm1 then asks for its address and route anew, which the next test must not meet."""
    console = scope.run / "guests" / "vm1" / "serial.log"
    told = console.read_text(errors="replace").count(TOLD)
    qmp("vm1", "set_link", up=True)(scope, desired)
    wait_for(console, lambda text: text.count(TOLD) > told)


TOLD = "netorch-tiny: eth0 192.168.122.6/24"
# The route as its DHCP client makes it, so that there is never a second one.
DEFAULT = "ip route replace default via 192.168.122.1 dev eth0 metric 102"
READDRESS = ("ip addr replace 192.168.122.6/24 dev eth0", DEFAULT)

# What is broken, how it is mended, from where to where it is felt, and the hop to be named.
BREAKINGS: dict[str, tuple[Change, Change, str, str, str]] = {
    "tap down": (link("vm1-0", "down"), link("vm1-0", "up"), "vm1", "server", "tap vm1-0"),
    "wrong bridge": (
        link("vm1-0", "master", "br0"),
        back_on_its_bridge,
        *("vm1", "server", "bridge port vm1-0"),
    ),
    "QEMU's link off": (
        link_off,
        link_on_again,
        *("vm1", "server", "NIC eth0 of vm1"),
    ),
    "guest's NIC down": (
        guest("vm1", "ip link set eth0 down"),
        guest("vm1", "ip link set eth0 up", DEFAULT),
        *("vm1", "server", "NIC eth0 of vm1"),
    ),
    "address flushed": (
        guest("vm1", "ip addr flush dev eth0"),
        guest("vm1", *READDRESS),
        *("vm1", "server", "lease of vm1"),
    ),
    "lease gone": (hide_leases, show_leases, "vm1", "server", "lease of vm1"),
    "dnsmasq dead": (
        kill("dnsmasq:default"),
        new_dnsmasq,
        *("vm1", "server", "dnsmasq for default"),
    ),
    "no default route": (
        guest("vm1", "ip route del default"),
        guest("vm1", DEFAULT),
        *("vm1", "server", "route in vm1"),
    ),
    "forwarding off": (
        forwarding("virbr0", False),
        forwarding("virbr0", True),
        *("vm1", "server", "forwarding on virbr0"),
    ),
    "our table flushed": (
        nft("flush table inet LAB"),
        new_rules,
        *("vm1", "server", f"nft table netorch_{LAB}"),
    ),
    "foreign drop": (
        nft(FOREIGN),
        nft("delete table ip foreign"),
        *("vm1", "server", "nft chain forward of table ip foreign"),
    ),
    "host's device down": (
        server("eth0", "down"),
        server("eth0", "up"),
        *("vm2", "server", "NIC eth0 of server"),
    ),
    "target's tap down": (
        link("vm2-0", "down"),
        link("vm2-0", "up"),
        *("vm1", "vm2", "tap vm2-0"),
    ),
    "QEMU stopped": (qmp("vm1", "stop"), qmp("vm1", "cont"), "vm1", "server", "guest vm1"),
    "target's QEMU stopped": (
        qmp("vm2", "stop"),
        qmp("vm2", "cont"),
        *("server", "vm2", "guest vm2"),
    ),
    "QEMU killed": (kill("guest:vm2"), new_vm2, "server", "vm2", "guest vm2"),  # boots: so last
}


@pytest.mark.usefixtures("lab")
def test_all_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(echo, "SECONDS", 60)  # all answer, if late

    def body(scope: Scope, desired: State) -> None:
        for source, target in (
            ("vm1", "server"),
            ("vm1", "vm2"),
            ("vm2", "server"),
            ("server", "vm2"),
            ("vm1", "gateway"),
            ("vm2", "10.0.0.1"),
        ):
            hops = explain(scope, desired, source, target)
            assert broken(hops) == "", (source, target, hops)
            assert "answers a ping" in hops[-1].detail

    in_the_lab(body)


@pytest.mark.usefixtures("lab")
@pytest.mark.parametrize("name", BREAKINGS)
def test_the_broken_hop_is_named(name: str) -> None:
    breaking, mending, source, target, expected = BREAKINGS[name]

    def body(scope: Scope, desired: State) -> None:
        breaking(scope, desired)
        try:
            hops = explain(scope, desired, source, target)
        finally:
            mending(scope, desired)
        assert broken(hops) == expected, hops

    in_the_lab(body)


VERIFIED = (
    *("tap down", "wrong bridge", "lease gone", "our table flushed", "foreign drop"),
    *("forwarding off", "no default route"),
)


@pytest.mark.usefixtures("lab")
@pytest.mark.parametrize("name", VERIFIED)
def test_verify_names_the_broken_hop(name: str) -> None:
    breaking, mending, _source, _target, expected = BREAKINGS[name]

    def body(scope: Scope, desired: State) -> None:
        breaking(scope, desired)
        try:
            verdicts = verify(labs.find(LAB))
        finally:
            mending(scope, desired)
        failed = [verdict for verdict in verdicts if not verdict.ok]
        assert failed, verdicts
        assert failed[0].because.startswith(f"{expected} is broken: "), failed

    in_the_lab(body)
